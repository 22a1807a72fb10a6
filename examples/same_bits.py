"""The same numbers from every backend: merge the same states, and print a digest of the result's bits.

From a checkout, with ``pip install -e '.[torch]'`` (for cuda ``'.[cuda]'``)::

    python examples/same_bits.py
    python examples/same_bits.py --backend torch
    python examples/same_bits.py --backend cuda --device cuda
    TRITON_INTERPRET=1 python examples/same_bits.py --backend cuda      # without a GPU

Nothing but ``backend=`` and the tensors' device differs between them, and they print the same lines.
"""

import argparse
import hashlib

import torch

import rau

LENGTHS = [0, 5, 5, 18, 24]  # cumulative: 5, 0, 13 and 6 tokens


def partial(seed: int, dtype: torch.dtype, tokens: int = 24, heads: int = 3, head_dim: int = 64) -> rau.AttentionState:
    """Make what an attention kernel could return over a part of the keys, in layout TND.

    Parameters
    ----------
    seed : int
    dtype : torch.dtype
    tokens, heads, head_dim : int

    Returns
    -------
    AttentionState
        attn_out (tokens, heads, head_dim), statistics (tokens, heads, 8); some rows have seen no key.
    """
    generator = torch.Generator().manual_seed(seed)
    attn_out = torch.randn(tokens, heads, head_dim, generator=generator).to(dtype)
    softmax_max = 30 * torch.randn(tokens, heads, 1, generator=generator)
    softmax_sum = 1 + 100 * torch.rand(tokens, heads, 1, generator=generator)
    empty = torch.rand(tokens, heads, generator=generator) < 0.1
    attn_out[empty] = torch.nan  # a kernel may leave anything there
    softmax_sum[empty] = 0
    return rau.AttentionState(attn_out, softmax_max.expand(-1, -1, 8), softmax_sum.expand(-1, -1, 8))


def reorder(statistics: torch.Tensor) -> torch.Tensor:
    """Bring token-major statistics into the packed order of ``npu_fusion_attention``."""
    return rau.reorder_softmax(statistics, LENGTHS, to="SBH")


def digest(state: rau.AttentionState) -> str:
    """Hash the bits of a state's three tensors."""
    sha = hashlib.sha256()
    for part in state:
        sha.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default=None, help="cython, torch, cuda, or any other (default: the best at hand)")
    parser.add_argument("--device", default="cpu", help="where the tensors are (default: cpu)")
    options = parser.parse_args()

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        states = [rau.AttentionState(*(part.to(options.device) for part in partial(k, dtype))) for k in range(4)]
        update = rau.ring_attention_update(*states[0], *states[1], LENGTHS, "TND", backend=options.backend)
        print(f"{dtype!s:15} update, token-major statistics: {digest(update)}")
        packed = [arg for state in states[:2] for arg in (state[0], *(reorder(part) for part in state[1:]))]
        update = rau.ring_attention_update(*packed, LENGTHS, "TND", softmax_layout="SBH", backend=options.backend)
        print(f"{dtype!s:15} update, packed statistics     : {digest(update)}")
        merged = rau.merge_states(states, layout="TND", backend=options.backend)
        print(f"{dtype!s:15} merge of {len(states)} states             : {digest(merged)}")


if __name__ == "__main__":
    main()
