"""Machine code as objdump lists it, x86's in Intel's syntax and aarch64's: functions, loops, and the hot loops of the row kernels."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

Code = list[tuple[int, str, str]]  # address, name, operands

UNIT = 16  # elements: those of two vectors of AVX2, of four of NEON
KERNELS = {
    "rows_f32": "float32", "rows_f16": "float16", "rows_bf16": "bfloat16",
    "rows_f32_f16": "float16 into float32", "rows_f32_bf16": "bfloat16 into float32", "rows_f64": "float64",
}  # fmt: skip

INSTRUCTION = re.compile(r"^ +([0-9a-f]+):\t(\S+)[ \t]*((?:(?! # |<|//).)*)", re.MULTILINE)
JUMP = re.compile(r"j\w+|b(\.\w+)?|[ct]bn?z")  # within a function
ARITHMETIC = re.compile(r"(?:v?(mul|add)p|f(mul|add))[sd]?")
VECTOR = re.compile(r"([xyz])mm\d|v\d+\.(?:4s|2d)")
STORED = re.compile(r"(?:v?mov\w+ ([XYZ])MMWORD PTR|st(?:p|r|ur) q)")
BYTES = {"X": 16, "Y": 32, "Z": 64}


def listing(objdump: str, file: str | Path) -> str:
    """Disassemble a file by the objdump of its processor."""
    syntax = ["-M", "intel"] if objdump == "objdump" else []
    return subprocess.run([objdump, "-d", *syntax, "--no-show-raw-insn", file], check=True, capture_output=True, text=True).stdout


def functions(text: str) -> dict[str, Code]:
    """Instructions by function."""
    parts = re.split(r"^[0-9a-f]+ <(.+)>:$", text, flags=re.MULTILINE)
    return {
        name: [(int(address, 16), which, operands.rstrip()) for address, which, operands in INSTRUCTION.findall(body)]
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def jumps(code: Code) -> list[tuple[int, int]]:
    """Where each jump stands and goes."""
    places = ((address, operands.split(", ")[-1]) for address, name, operands in code if JUMP.fullmatch(name))
    return [(address, int(to, 16)) for address, to in places if re.fullmatch("[0-9a-f]+", to)]


def innermost(code: Code) -> Iterator[Code]:
    """Go through the loops that have no loop within."""
    backward = [(to, address) for address, to in jumps(code) if to <= address]
    for first, last in backward:
        if not any(first <= to and address <= last and (to, address) != (first, last) for to, address in backward):
            yield [its for its in code if first <= its[0] <= last]


def hot_loops(code: Code) -> tuple[dict[int, float], float]:
    """Find the loops in which a row kernel spends its time, by what they have to do.

    That over the elements of two states multiplies twice and adds once for each vector of sums, and stores; that over more than
    two states multiplies and adds once, and stores nothing. No other innermost loop of a kernel does either.

    Returns
    -------
    of_two : dict
        Instructions a unit of the result: of stores as usual (0), and around the cache by so many bytes.
    of_many : float
        Instructions a unit and state; of copies of the loop, that with most.

    Raises
    ------
    LookupError
        Where a loop is not there, or there twice.
    """
    of_two: dict[int, float] = {}
    of_many: list[tuple[int, float]] = []
    for loop in innermost(code):
        done = {"mul": 0, "add": 0}
        lanes, stores = 0, set()
        for _, name, operands in loop:
            if (which := ARITHMETIC.fullmatch(name)) and (vector := VECTOR.match(operands)):
                done[which[1] or which[2]] += 1
                lanes = BYTES[(vector[1] or "x").upper()] // (8 if name.endswith("pd") or ".2d" in operands else 4)
            if stored := STORED.match(f"{name} {operands}"):
                stores.add(BYTES[stored[1]] if "nt" in name else 0)
        if len(stores) == 1 and done["mul"] == 2 * done["add"] > 0:
            if (way := stores.pop()) in of_two:
                raise LookupError("two loops over two states that store in the same way")
            of_two[way] = len(loop) * UNIT / (done["add"] * lanes)
        elif not stores and done["mul"] == done["add"] > 0:
            of_many.append((done["add"], len(loop) * UNIT / (done["add"] * lanes)))
    if 0 not in of_two or not of_many:
        raise LookupError("no loop over two states, or none over more")
    return of_two, max(of_many)[1]


def table(avx2: dict[str, Code], neon: dict[str, Code]) -> str:
    """Lay out the instructions of the hot loops as docs/benchmarks.md has them."""
    head = ["", "two states: AVX2", "NEON", "around the cache: AVX2", "each of more: AVX2", "NEON"]
    rows = [head, ["---"] * len(head)]
    for kernel, title in KERNELS.items():
        (two, many), (neon_two, neon_many) = hot_loops(avx2[f"{kernel}_avx2"]), hot_loops(neon[f"{kernel}_baseline"])
        rows.append([title, *(f"{count:.4g}" for count in (two[0], neon_two[0], two[32], many, neon_many))])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows).replace("|  |", "| |")
