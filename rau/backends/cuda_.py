"""The cuda backend: torch tensors on a GPU, through one Triton kernel; the same bits as the others."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from rau.arrays.numpy_ import ITEMSIZE
from rau.backends import AttentionState, Capabilities, Problem
from rau.backends.torch_ import TorchBackend
from rau.errors import BackendUnavailableError, UnsupportedError
from rau.install import command
from rau.layouts import LAYOUTS, packed_row_stride

if TYPE_CHECKING:
    from torch import Tensor

MAX_STATES = 8  # of more, the kernel would not have registers enough for the weights and addresses
FEWEST_ROWS = 4  # of a program: fewer were no faster, and each number is compiled anew
AT_ONCE = 16  # programs that a multiprocessor runs at once, since 64 Ki registers are 16 times 32 threads' 128
# Triton's own switch: its interpreter runs the kernel on the CPU, slowly, and cannot read a GPU's memory.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# A program is one warp. Without the last, ptxas waits for the rows of one state after the other's, with registers to spare.
COMPILE = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False, "maxnreg": 128}

Axis = tuple[int, tuple[int, ...]]  # its length, and the stride of every array along it, in elements


class Plan(NamedTuple):
    """All of a launch that the addresses of the arrays do not decide."""

    grid: tuple[int, int, int]
    steps: list[tuple[int, ...]]  # of each array, along the outer, middle and inner axis: words
    wide: list[int]  # the arrays that are read or written 16 bytes at a time where they are aligned
    aligned: bool  # whether their strides are
    numbers: tuple[int, ...]  # the kernel's last arguments
    constants: tuple[dict[str, Any], dict[str, Any]]  # for addresses that are not aligned, and such that are
    keys: tuple[tuple[Any, ...], tuple[Any, ...]]  # what is compiled, and for which device, likewise


class CudaBackend(TorchBackend):
    """One streaming pass over the states; what the kernel does not do is left to ATen, with the same bits."""

    name = "cuda"
    capabilities = Capabilities(
        array_types=("torch:Tensor",), devices=("cpu",) if INTERPRETED else ("cuda",), halves=True, without_statistics=True
    )

    def __init__(self) -> None:
        try:
            super().__init__()
        except BackendUnavailableError as error:
            raise BackendUnavailableError(f"torch is missing: {command('cuda')}") from error
        try:
            import triton

            from rau.backends import cuda_kernel
        except ImportError as error:
            raise BackendUnavailableError(
                f"triton is missing ({error}); torch's CUDA and ROCm builds include it: {command('cuda')}"
            ) from error
        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
            raise BackendUnavailableError(
                f"triton {triton.__version__} does not compile the kernel; expected 3.4 or newer, which torch's builds "
                "include since 2.8"
            )
        torch = self._torch
        if not INTERPRETED:
            with warnings.catch_warnings(record=True) as said:  # of a driver that is too old
                warnings.simplefilter("always")
                found = torch.cuda.is_available()
            if not found:
                advice = str(said[0].message) if said else "check the driver and CUDA_VISIBLE_DEVICES"
                if not (torch.version.cuda or torch.version.hip):
                    advice = "it was built for CPUs only; https://pytorch.org/get-started/locally has CUDA builds"
                raise BackendUnavailableError(f"torch {torch.__version__} finds no CUDA device: {advice}")
            try:
                triton.runtime.driver.active  # noqa: B018 - the first time, Triton compiles its own part here
            except Exception as error:
                raise BackendUnavailableError(f"Triton cannot drive the device: {error}") from error
        self._kernel = cuda_kernel
        self._alone = _interpreting if INTERPRETED else nullcontext
        self._on = torch.cuda.device_of if torch.cuda.device_count() > 1 else nullcontext
        self._rows = 64 if torch.version.hip else 32  # as many as a warp has threads; a program is one warp
        # Programs; few for the interpreter, whose tests then meet every number of rows.
        self._at_once = 2 if INTERPRETED else AT_ONCE * min(
            torch.cuda.get_device_properties(index).multi_processor_count for index in range(torch.cuda.device_count())
        )
        # Triton's interpreter cuts off, and devices before sm_80 cannot; elsewhere than on NVIDIA's nobody has looked.
        self._by_integers = INTERPRETED or bool(torch.version.hip) or any(
            torch.cuda.get_device_capability(index) < (8, 0) for index in range(torch.cuda.device_count())
        )
        self._compile = {name: value for name, value in COMPILE.items() if name != "maxnreg" or not torch.version.hip}
        self._plans: WeakKeyDictionary[Problem, Plan] = WeakKeyDictionary()
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def merge(self, problem: Problem, states: Sequence[AttentionState], out: AttentionState | None) -> AttentionState:
        if problem.K > MAX_STATES:
            return super().merge(problem, states, out)
        torch, first = self._torch, states[0]
        if out is None:
            out = AttentionState(
                torch.empty(problem.shape, dtype=first.attn_out.dtype, device=first.attn_out.device),
                *(torch.empty(problem.stats_shape, dtype=part.dtype, device=part.device) if problem.statistics else None
                  for part in first[1:]),
            )  # fmt: skip
        if problem.T * problem.N:
            with self._on(first.attn_out), self._alone():
                lengths = self._lengths(problem) if problem.packed or problem.half else None
                written = out if problem.statistics else (out[0], *first[1:])  # in places that are not written to
                arrays = [array for state in (*states, written) for array in state]
                plan, aligned, arguments = self.launch(problem, arrays, lengths)
                kernel = self._compiled.get(plan.keys[aligned])
                constants = plan.constants[aligned]
                if kernel is None:  # as always under the interpreter
                    kernel = self._kernel.merge[plan.grid](*arguments, **constants, **self._compile)
                    self._compiled[plan.keys[aligned]] = kernel
                else:  # on the current stream, as there, but without finding out anew what is compiled for what
                    kernel[plan.grid](*arguments, *constants.values())
        return out

    def launch(
        self, problem: Problem, arrays: Sequence[Tensor], lengths: Tensor | None
    ) -> tuple[Plan, bool, tuple[Any, ...]]:
        """Describe a call of the kernel on the arrays of inputs and result: plan, whether addresses are aligned, arguments.

        The plan's constants alone decide what is compiled: dtypes, states, lanes, whether all rows are aligned to 16 bytes,
        whether statistics are packed, which half is meant, the head dimension's next power of 2, and rows of a program: 4,
        8, 16 or 32. No length or stride does otherwise. `lengths` is None unless rows are found by it.
        """
        plan = self._plans.get(problem)
        if plan is None:
            plan = self._plans[problem] = self._plan(problem)
        word, addresses = self._kernel.word, [array.data_ptr() for array in arrays]
        aligned = plan.aligned and not any([addresses[index] % 16 for index in plan.wide])
        described = [(word(address), *steps) for address, steps in zip(addresses, plan.steps, strict=True)]
        states = tuple([tuple(described[k : k + 3]) for k in range(0, len(described), 3)])
        sequences = 0 if lengths is None else len(lengths) - 1
        return plan, aligned, (states, lengths, sequences, (sequences + 1).bit_length(), *plan.numbers)

    def _plan(self, problem: Problem) -> Plan:
        """Say all of a launch that the addresses of the arrays do not decide."""
        # A program merges rows in turn, so of few each takes fewer, as long as all programs run at once.
        rows = self._rows
        while rows > FEWEST_ROWS and problem.T * problem.N <= self._at_once * rows // 2:
            rows //= 2
        axes = row_axes(problem, rows)
        (outers, _), (middles, _), (inners, _) = axes
        tiles = -(-inners // rows)
        steps = [tuple([strides[index] for _, strides in axes]) for index in range(3 * (problem.K + 1))]
        lanes = problem.lanes if problem.statistics else 0
        wide = [index for index in range(len(steps)) if index % 3 == 0 or (index >= 3 * problem.K and lanes > 1)]
        outputs = problem.dtype, *[problem.cur_dtype] * (problem.K - 1), problem.dtype
        sizes = [ITEMSIZE[name] for output in outputs for name in (output, problem.stats_dtype, problem.stats_dtype)]
        dtypes = self._kernel.DTYPES
        constants = {
            "K": problem.K, "FIRST": dtypes[problem.dtype], "LATER": dtypes[problem.cur_dtype],
            "STATS": dtypes[problem.stats_dtype], "LANES": lanes, "ALIGNED": None, "PACKED": problem.packed,
            "HALF": problem.half or "", "ROWS": rows, "GROUP": None, "BLOCK_D": None, "BY_INTEGERS": self._by_integers,
        }  # fmt: skip

        def compiled(aligned: bool) -> dict[str, Any]:
            # Whole rows, if they have at most 512 bytes, and of few states several at a time, as registers allow; each
            # element takes an address of its own where 16 bytes cannot be had at once.
            bytes_ = (2048 if problem.K <= 2 else 512) >> (0 if aligned else 2)
            block = min(1 << (problem.D - 1).bit_length(), min(512, bytes_) // sizes[0])
            group = min(rows, bytes_ // (block * sizes[0]))
            return constants | {"ALIGNED": aligned, "GROUP": group, "BLOCK_D": block}

        both = compiled(False), compiled(True)
        key = (problem.device, problem.dtype, problem.cur_dtype, problem.stats_dtype, problem.K, lanes,
               problem.packed, problem.half, both[True]["BLOCK_D"], rows)  # fmt: skip
        return Plan(
            grid=(outers * middles * tiles, 1, 1),
            steps=[tuple(map(self._kernel.word, its)) for its in steps],
            wide=wide,
            aligned=problem.D % 8 == 0 and not any(step * sizes[index] % 16 for index in wide for step in steps[index]),
            numbers=(middles, inners, tiles, problem.D),
            constants=both,
            keys=(key, (*key, "aligned")),
        )

    def _lengths(self, problem: Problem) -> Tensor:
        """Have the cumulative lengths on the device, without waiting for it."""
        torch, lengths = self._torch, problem.actual_seq_qlen
        if not isinstance(lengths, np.ndarray):
            return lengths.to(torch.int64).contiguous()
        if INTERPRETED:
            return torch.tensor(lengths)
        if torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                "actual_seq_qlen is on the host, from where a CUDA graph would not copy it again at each replay; pass it "
                f"as a tensor of int64 on {problem.device}"
            )
        return torch.tensor(lengths).pin_memory().to(problem.device, non_blocking=True)

    def asarray(self, array: np.ndarray) -> Tensor:
        host = super().asarray(array)
        if INTERPRETED:
            return host
        # With its strides: what lies between its elements comes along.
        reach = sum((length - 1) * step for length, step in zip(host.shape, host.stride(), strict=True))
        flat = host.as_strided((reach + 1 if host.numel() else 0,), (1,))
        return flat.cuda().as_strided(host.shape, host.stride())


def row_axes(problem: Problem, rows: int) -> list[Axis]:
    """See the rows of all arrays along three axes: outer, middle, and inner, of which a program takes `rows`.

    Strides are in the order of ``problem.strides``. Packed statistics have one along the inner axis alone: the kernel finds
    the place of each row.
    """
    layout = LAYOUTS[problem.layout]
    table = []  # batch, head and token stride of every array
    for index, stride in enumerate(problem.strides):
        if index % 3 == 0:
            batch, token = layout.attn_batch, stride[layout.attn_token]
            head = problem.D if layout.attn_head is None else stride[layout.attn_head]
        elif problem.packed:
            batch, head, token = None, 0, packed_row_stride(problem.stats_shape, stride) or 0
        else:
            batch, head, token = layout.stats_batch, stride[layout.stats_head], stride[layout.stats_token]
        table.append((0 if batch is None else stride[batch], head, token))
    by_batch, by_head, by_token = zip(*table, strict=True)
    if problem.packed or problem.half:
        return [(1, by_batch), (problem.N, by_head), (problem.T, by_token)]
    if problem.S is None or problem.layout == "TND":
        axes = [(problem.T, by_token), (problem.N, by_head)]
    else:
        axes = [(problem.B, by_batch), (problem.N, by_head), (problem.S, by_token)]

    merged: list[Axis] = []
    for length, strides in axes:
        if length == 1:
            continue
        if merged and merged[-1][1] == tuple(length * step for step in strides):  # two axes walked like one
            merged[-1] = merged[-1][0] * length, strides
        else:
            merged.append((length, strides))
    if merged and merged[-1][0] < rows:
        merged.sort(key=lambda axis: axis[0])  # a program's rows lie along the longest one
    return [(1, (0,) * len(table))] * (3 - len(merged)) + merged


_lock = threading.Lock()


@contextmanager
def _interpreting() -> Iterator[None]:
    """Triton's interpreter is not made for threads, and computes by NumPy."""
    with _lock, np.errstate(all="ignore"):
        yield
