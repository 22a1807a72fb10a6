from typing import Any

import numpy as np

def simd_versions() -> list[str]: ...
def use_simd(name: str) -> None: ...
def simd() -> str: ...
def forked() -> bool: ...
def build() -> dict[str, Any]: ...
def merge(
    table: np.ndarray,
    arrays: tuple[np.ndarray, ...],
    dtype: str,
    cur_dtype: str,
    heads: int,
    head_dim: int,
    lanes: int,
    in_place: bool,
    threads: int,
) -> None: ...
