"""The row kernels on other processors and by other compilers, without Python there: one checksum, and no fused operation.

    python tests/kernels.py          what is there; what is not is told, with what to install

Emulated by QEMU, which shows bits, and neither speed nor the order of memory between threads.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rau import _core

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [flag for flag in _core.build()["flags"].split() if flag != "-fopenmp"]
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wno-unused-function", "-Werror"]  # the core's own functions are not called
# A name, the compiler, its options, and what runs its programs elsewhere than on such a processor.
WAYS = [
    ("gcc", "gcc", [], ""),
    ("gcc, no vectors", "gcc", ["-DRAU_PLAIN_C"], ""),
    ("clang", "clang", ["-Wno-overriding-t-option"], ""),  # of two flags that each compiler wants one of
    ("aarch64", "aarch64-linux-gnu-gcc", ["-static"], "qemu-aarch64-static"),
    ("s390x (big-endian)", "s390x-linux-gnu-gcc", ["-static"], "qemu-s390x-static"),
    ("armhf (32 bits)", "arm-linux-gnueabihf-gcc", ["-static"], "qemu-arm-static"),
]
FUSED = re.compile(r"\s(v?fn?m(?:add|sub)\w*|fml[as]|vfm[as]\S*|m[as][de]br?)\s.*")  # x86 and aarch64, armhf, s390x
PACKAGES = (
    "apt-get install clang qemu-user-static gcc-aarch64-linux-gnu libc6-dev-arm64-cross gcc-s390x-linux-gnu "
    "libc6-dev-s390x-cross gcc-arm-linux-gnueabihf libc6-dev-armhf-cross"
)


def checksums(way: tuple[str, str, list[str], str], folder: Path) -> list[str]:
    """Compile the kernels and run them: a line for each instruction-set version, the checksum first."""
    name, compiler, options, emulator = way
    program = folder / name.replace(" ", "-")
    kernels = program.with_suffix(".o")
    source = [f"-I{ROOT / 'rau' / 'csrc'}", "-c", str(ROOT / "tests" / "kernels.c"), "-o", str(kernels)]
    subprocess.run([compiler, *FLAGS, *WARNINGS, *options, *source], check=True)
    subprocess.run([compiler, *options, str(kernels), "-o", str(program), "-lm"], check=True)
    disassembler = compiler.replace("gcc", "objdump").replace("clang", "objdump")
    code = subprocess.run([disassembler, "-d", str(kernels)], check=True, capture_output=True, text=True).stdout
    if fused := FUSED.search(code):
        raise SystemExit(f"FAILED: {name}: a fused multiply-add, {fused[0].strip()}: its product is not rounded")
    done = subprocess.run([*filter(None, [emulator]), str(program)], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def main() -> int:
    here = [way for way in WAYS if shutil.which(way[1]) and (not way[3] or shutil.which(way[3]))]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(zip(here, pool.map(lambda way: checksums(way, Path(folder)), here)))
    for way, lines in found:
        for line in lines:
            print(f"{way[0] + ':':20} {line}")
    for way in WAYS:
        if way not in here:
            print(f"NOT RUN: {way[0]}: no {way[1]} or {way[3] or 'processor'}; {PACKAGES}")
    different = {line.split()[0] for _, lines in found for line in lines}
    print("one checksum" if len(different) == 1 else f"FAILED: {len(different)} checksums")
    return 0 if len(different) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
