"""What the cuda backend's kernel becomes for GPUs that need not be here, read from its machine code.

    pip install '.[cuda,cli]' && python examples/compiled_cuda.py

For each architecture, dtype (of a first float32 state and later ones, two) and number of states, with D 128, 8 lanes and
rows aligned to 16 bytes: registers of a thread; bytes of them that it spills to the stack; warps that a multiprocessor
holds at once, and KiB of rows for which these ask at once; bits of the narrowest load and store of rows, and of
statistics; how often a program waits for memory; operations in float64 a row, and those repeated in loops.

All but the first two are of the path that a program takes where its rows are all there, no side is empty and no division
is a special one: branches forward are not taken, unless nothing decides them, and loops run as often as the kernel's
constants say. What the loads on that path read must be the rows and statistics of a program; where it is not, since ptxas
has made other loops, their columns stay empty.

Waits are round trips that depend on one another. The machine's instructions say which of six scoreboards they wait for, and
a load says which one it holds until its value is there. Loads that were issued before a wait come back during one trip;
the first wait for a load that was issued after that is the next one. Nobody waits for stores.

Operations in float64 are additions, multiplications, comparisons, conversions and approximate reciprocals, of all threads
by the rows of a program. In loops are those of float64 elements alone: the statistics of a row are merged once.
"""

import argparse
import itertools
import re
import subprocess
import tempfile
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
from rich.console import Console
from rich.table import Table

from rau.arrays.numpy_ import ITEMSIZE
from rau.backends import cuda_kernel
from rau.backends.cuda_ import COMPILE, CudaBackend
from rau.constraints import Options, bind

ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200
DTYPES = (("float32", ""), ("float16", ""), ("bfloat16", ""), ("float64", ""), ("float32", "bfloat16"))  # later states'
STATES = (2, 3, 4, 8)
BLOCKS = 32  # that a multiprocessor of any of these holds; a block is a program
REGISTERS = 1 << 14  # of each of its four parts, handed out to warps by 256

INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/ +(?P<guard>@\S+ )?(?P<name>[A-Z][\w.]*) ?(?P<operands>.*?) *;"
    r" +/\* 0x[0-9a-f]{16} \*/\s+/\* 0x(?P<high>[0-9a-f]{16}) \*/"
)
FLOAT64 = re.compile(r"D(ADD|MUL|FMA|SETP)\b|F2F\.\S*F64|MUFU\.\w+64H")


class Instruction(NamedTuple):
    """One of the machine's."""

    address: int
    name: str
    operands: str
    decided: bool  # whether something decides if a branch is taken
    waits: int  # a bit for each scoreboard
    holds: int  # the scoreboard of its result; 7: none

    @property
    def branches(self):
        """Whether it is a branch."""
        return self.name.partition(".")[0] == "BRA"

    @property
    def target(self):
        """Where a branch goes."""
        return int(self.operands.split()[-1], 16)


class Figures(NamedTuple):
    """What was found in one compiled kernel."""

    registers: int
    stack: int
    warps: int
    asked: float  # KiB
    rows: tuple[int, int]  # bits of the narrowest load and store
    statistics: tuple[int, int]
    waits: int
    float64: float  # a row
    float64_in_loops: float


# ---- compiling without a device ---------------------------------------------------------------------------------------


def without_a_device(at_once=0):
    """An instance of the backend as it would be on a machine with a GPU that runs so many programs at once."""
    backend = CudaBackend.__new__(CudaBackend)
    backend._torch, backend._kernel, backend._alone = torch, cuda_kernel, nullcontext
    backend._rows, backend._at_once, backend._by_integers = 32, at_once, False
    backend._plans, backend._compiled = WeakKeyDictionary(), {}
    return backend


def call(layout="SBH", B=2, S=40, N=3, D=64, dtype="float32", cur_dtype="", K=2, lanes=8, qlen=None, make=torch.zeros):
    """Describe a call on arrays that `make` makes, of a shape and a dtype: problem, arrays, lengths."""
    shape, stats = {
        "SBH": ((S, B, N * D), (B, N, S, lanes)), "TND": ((S, N, D), (S, N, lanes)),
        "BSND": ((B, S, N, D), (B, N, S, lanes)), "BNSD": ((B, N, S, D), (B, N, S, lanes)),
    }[layout]  # fmt: skip
    wide = torch.float64 if dtype == "float64" else torch.float32
    states = []
    for k in range(K + 1):
        narrow = getattr(torch, dtype if k in (0, K) else cur_dtype or dtype)
        states.append([make(shape, dtype=narrow), *(make(stats, dtype=wide) for _ in "ml")])
    order = "SBH" if qlen else "TND"
    into = states[K] if states[K][0].device.type == "cpu" else None
    problem, _ = bind("call", states[:K], lambda k, field: "", qlen, Options(layout, order, "portable", "metadata"), into)
    lengths = torch.tensor(qlen) if qlen else None
    return problem, [array for state in states for array in state], lengths


def compiled(architecture, problem, arrays, lengths=None, at_once=0):
    """Compile as a launch would, for a device that is not there: the kernel, and its constants. 0: as of many rows."""
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: architecture,  # each has a cache of its own
        get_current_stream=lambda device: 0,
    ))  # fmt: skip
    plan, aligned, arguments = without_a_device(at_once).launch(problem, arrays, lengths)
    constants = plan.constants[aligned]
    return cuda_kernel.merge.warmup(*arguments, grid=plan.grid, **constants, **COMPILE), constants


# ---- reading machine code ---------------------------------------------------------------------------------------------


def shown(kernel, *options):
    """What NVIDIA's tool says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(kernel):
    """Registers of a thread, and bytes of its stack, where spilled ones go."""
    found = shown(kernel, "-res-usage")
    return tuple(int(re.search(rf"{name}:(\d+)", found)[1]) for name in ("REG", "STACK"))


def instructions(kernel):
    """Read the machine code, in order of its addresses."""
    found = []
    for its in INSTRUCTION.finditer(shown(kernel, "-sass")):
        control = int(its["high"], 16) >> 41  # stall:4, yield:1, holds:3, held while reading:3, waits:6, reuse:4
        decided = bool(its["guard"]) or "," in its["operands"]
        found.append(Instruction(int(its["address"], 16), its["name"], its["operands"], decided, control >> 11 & 63,
                                 control >> 5 & 7))  # fmt: skip
    return found


def loops(code):
    """First and last address of each loop that loads, inner ones first."""
    loads = [its.address for its in code if its.name.startswith("LDG")]
    found = [(its.target, its.address) for its in code if its.branches and its.target <= its.address]
    return sorted((its for its in found if any(its[0] <= load <= its[1] for load in loads)), key=lambda its: its[1] - its[0])


def path(code, times):
    """The instructions that a program takes, in turn; each loop, by the address of its last, as often as `times` says."""
    places = {its.address: place for place, its in enumerate(code)}
    left, place = dict(times), 0
    while max(left.values()):  # nothing of interest follows the outermost loop
        its = code[place]
        yield its
        place += 1
        if its.branches and its.target > its.address and not its.decided:
            place = places[its.target]
        elif its.address in left:
            left[its.address] -= 1
            if left[its.address]:
                left.update({inner: count for inner, count in times.items() if its.target <= inner < its.address})
                place = places[its.target]


def waits(taken):
    """Count round trips to memory that depend on one another."""
    trips, pending = 0, defaultdict(list)  # of each scoreboard's loads: the trips before each was issued
    for its in taken:
        waited = [(board, 0) for board in range(6) if its.waits >> board & 1]
        if its.name.startswith("DEPBAR"):  # until no more than some are left
            board, most = re.match(r"SB(\d), (0x\w+)", its.operands).groups()
            waited.append((int(board), int(most, 16)))
        for board, most in waited:
            over = len(pending[board]) - most
            trips = max([trips, *(before + 1 for before in pending[board][: max(over, 0)])])
            pending[board] = pending[board][max(over, 0) :]
        if its.name.startswith("LDG"):
            pending[its.holds].append(trips)
    return trips


def bits(code, name):
    """What each load or store moves for a thread."""
    widths = [re.search(r"\.[US]?(8|16|64|128|256)\b", its.name) for its in code if its.name.startswith(name)]
    return [int(width[1]) if width else 32 for width in widths]


def figures(problem, kernel, constants):
    """Read all figures of a kernel that was compiled for a call without lengths."""
    code, threads = instructions(kernel), 32 * kernel.metadata.num_warps
    rows, pieces = constants["ROWS"], -(-problem.D // constants["BLOCK_D"])
    found = loops(code)
    counts = [pieces, rows // constants["GROUP"]]
    taken = list(path(code, dict(zip([last for _, last in found], counts, strict=True))))
    begin, end = found[-1]
    inside, outside = ([its for its in taken if (begin <= its.address <= end) is where] for where in (True, False))

    size = ITEMSIZE[problem.dtype] + (problem.K - 1) * ITEMSIZE[problem.cur_dtype]
    block = constants["BLOCK_D"] * size  # bytes of a row, of all states
    expected = rows * (pieces * block + 2 * problem.K * ITEMSIZE[problem.stats_dtype])
    read = sum(bits(taken, "LDG")) // 8 * threads
    if read != expected:
        raise LookupError(f"the loads on the path that was found read {read} bytes, but a program reads {expected}")
    registers, stack = resources(kernel)
    warps = min(REGISTERS // (-(-registers // 8) * 256) * 4, BLOCKS * threads // 32)
    once, again = (sum(bool(FLOAT64.match(its.name)) for its in part) * threads / rows for part in (outside, inside))
    return Figures(
        registers, stack, warps, warps * 32 / threads * constants["GROUP"] * block / 1024,
        *((min(bits(part, "LDG")), min(bits(part, "STG"))) for part in (inside, outside)), waits(taken), once, again,
    )  # fmt: skip


def main(arguments=None):
    """Compile for each architecture and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*", type=int, default=ARCHITECTURES, help="such as 90; default: all")
    table = Table("sm", "dtype", "K", "registers", "stack", "warps", "KiB", "rows", "statistics", "waits", "float64", "again")
    for architecture in parser.parse_args(arguments).architectures:
        for (dtype, cur_dtype), K in itertools.product(DTYPES, STATES):
            problem, arrays, _ = call(D=128, dtype=dtype, cur_dtype=cur_dtype, K=K)
            kernel, constants = compiled(architecture, problem, arrays)
            try:
                cells = figures(problem, kernel, constants)
            except LookupError:  # of float64, ptxas takes four pieces of a row at a time, and fewer otherwise
                cells = resources(kernel)
            cells = ["{} {}".format(*its) if isinstance(its, tuple) else f"{its:.0f}" for its in cells]
            table.add_row(str(architecture), f"{dtype} {cur_dtype}".strip(), str(K), *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
