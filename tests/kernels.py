"""The core's C on other processors and by other compilers: one checksum, no fused operation, no warning, and how long the loops are.

    python tests/kernels.py          what is there; what is not is told, with what to install

The row kernels run without Python. Other processors are emulated by QEMU, which shows bits, and neither speed nor the order of
memory between threads. MSVC's place takes clang in its mode: it compiles what MSVC would, and nothing of that runs.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy
from disassembly import functions, listing, table

from rau import _core

ROOT = Path(__file__).resolve().parents[1]
KERNELS, HEADERS = str(ROOT / "tests" / "kernels.c"), str(ROOT / "rau" / "csrc")
FLAGS = [flag for flag in _core.build()["flags"].split() if flag != "-fopenmp"]
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic"]
ALONE = ["-Wno-unused-function", "-Werror"]  # the core's own functions are not called
CLANG = ["-Wno-overriding-t-option"]  # of two flags that each compiler wants one of
# A name, the compiler, its options, and what runs its programs elsewhere than on such a processor.
WAYS = [
    ("gcc", "gcc", [], ""),
    ("gcc, no vectors", "gcc", ["-DRAU_PLAIN_C"], ""),
    ("clang", "clang", CLANG, ""),
    ("aarch64", "aarch64-linux-gnu-gcc", ["-static"], "qemu-aarch64-static"),
    ("s390x (big-endian)", "s390x-linux-gnu-gcc", ["-static"], "qemu-s390x-static"),
    ("armhf (32 bits)", "arm-linux-gnueabihf-gcc", ["-static"], "qemu-arm-static"),
]
FUSED = re.compile(r"\s(v?fn?m(?:add|sub)\w*|fml[as]|vfm[as]\S*|m[as][de]br?)\s.*")  # x86 and aarch64, armhf, s390x
PAGE, COUNTED = ROOT / "docs" / "benchmarks.md", ["12", "12"]  # it has the loops that gcc 12 makes for x86-64 and aarch64
PACKAGES = (
    "apt-get install clang qemu-user-static gcc-aarch64-linux-gnu libc6-dev-arm64-cross gcc-s390x-linux-gnu "
    "libc6-dev-s390x-cross gcc-arm-linux-gnueabihf libc6-dev-armhf-cross"
)

WARNING = re.compile(r"^(.+?):(\d+):\d+: warning: (.*?)(?: \[-W.*)?$", re.MULTILINE)
# Warnings of the C that Cython writes, and the lines that they are excused in.
EXCUSED = {
    # CPython wants what makes a module, and a type's methods, in tables of pointers to data.
    "ISO C forbids conversion of function pointer to object pointer type": re.compile(r" *\{Py_\w+, \(void ?\*\)__[Pp]yx_\w+\},"),
}
# What the kernels use of headers that no compiler brings by itself.
FOR_MSVC = {
    "fenv.h": "typedef int fenv_t;\n#define FE_DFL_ENV ((const fenv_t *)0)\n#define FE_UPWARD 1\n"
    "int fegetenv(fenv_t *), fesetenv(const fenv_t *), fegetround(void), fesetround(int);\n",
    "inttypes.h": '#include <stdint.h>\n#define PRIx64 "llx"\n',
    "math.h": "#define INFINITY ((float)(1e308 * 10))\n#define NAN (INFINITY * 0.0f)\n",
    "stdio.h": "int printf(const char *, ...);\n",
    "stdlib.h": "#include <stddef.h>\nvoid *calloc(size_t, size_t);\nvoid free(void *), exit(int);\n",
    "string.h": "#include <stddef.h>\nvoid *memcpy(void *, const void *, size_t), *memset(void *, int, size_t);\n",
}


def said(*command: str | Path) -> str:
    return subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True).stdout


def refuse_fused(name: str, code: str) -> None:
    if fused := FUSED.search(code):
        raise SystemExit(f"FAILED: {name}: a fused multiply-add, {fused[0].strip()}: its product is not rounded")


def checksums(way: tuple[str, str, list[str], str], folder: Path) -> tuple[list[str], str]:
    """Compile the kernels and run them: a line for each instruction-set version, the checksum first; and their machine code."""
    name, compiler, options, emulator = way
    program = folder / name.replace(" ", "-")
    kernels = program.with_suffix(".o")
    said(compiler, *FLAGS, *WARNINGS, *ALONE, *options, f"-I{HEADERS}", "-c", KERNELS, "-o", kernels)
    said(compiler, *options, kernels, "-o", program, "-lm")
    code = listing(compiler.replace("gcc", "objdump").replace("clang", "objdump"), kernels)
    refuse_fused(name, code)
    return said(*filter(None, [emulator]), program).splitlines(), code


def as_msvc(processor: str, folder: Path) -> str:
    """Compile the kernels as MSVC would, and see that its own pragma is reached."""
    name = f"clang as MSVC, {processor}"
    flags = ast.literal_eval(re.findall("^MSVC_FLAGS = (.*)$", (ROOT / "setup.py").read_text(), re.MULTILINE)[0])
    headers, assembly = folder / f"headers-{processor}", folder / f"{processor}.s"
    headers.mkdir()
    for header, text in FOR_MSVC.items():
        (headers / header).write_text(text)
    command = ["clang", "--driver-mode=cl", f"--target={processor}-pc-windows-msvc", *flags, f"/I{headers}", f"/I{HEADERS}"]
    command += ["/clang:-ffreestanding", "/W4", "-Wpedantic", ALONE[0], "/WX"]
    said(*command, "/c", "/clang:-S", f"/clang:-o{assembly}", "--", KERNELS)
    refuse_fused(name, assembly.read_text())
    if "#pragma fp_contract(off)" not in said(*command, "-U__clang__", "/E", "--", KERNELS):
        raise SystemExit(f"FAILED: {name}: MSVC is not told #pragma fp_contract(off)")
    return f"{name}: no warning, no fused operation, and MSVC is told #pragma fp_contract(off); nothing has run"


def core_warnings(compiler: str, options: list[str], core: Path) -> str:
    """Read the core's C, as Cython has written it: a warning that is not excused by name is a failure."""
    # Of a system, so that NumPy's own warnings are not the core's.
    include = [f"-I{sysconfig.get_path('include')}", f"-I{HEADERS}", "-isystem", numpy.get_include()]
    command = [compiler, *FLAGS, *WARNINGS, *options, *include, "-fopenmp", "-fsyntax-only", str(core)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    lines, excused = core.read_text().splitlines(), 0
    for file, line, message in WARNING.findall(done.stderr):
        if Path(file) != core or message not in EXCUSED or not EXCUSED[message].match(lines[int(line) - 1]):
            raise SystemExit(f"FAILED: {compiler}: {file}:{line}: {message}")
        excused += 1
    if done.returncode:
        raise SystemExit(f"FAILED: {compiler}: {done.stderr}")
    return f"{compiler}, Cython's C: no warning beside {excused} that are excused by name"


def loops(x86: str, aarch64: str) -> str:
    """Compare the page's table of the hot loops with this machine code."""
    versions = [said(compiler, "-dumpversion").strip() for compiler in ("gcc", "aarch64-linux-gnu-gcc")]
    if versions != COUNTED:
        return f"NOT RUN: the table in {PAGE.name}: it is of gcc {COUNTED[0]}, and these are {' and '.join(versions)}"
    if (made := table(functions(x86), functions(aarch64))) not in PAGE.read_text():
        raise SystemExit(f"FAILED: {PAGE.name} has another table than\n{made}")
    return f"the loops are as long as {PAGE.name} says"


def main() -> int:
    here = [way for way in WAYS if shutil.which(way[1]) and (not way[3] or shutil.which(way[3]))]
    names = [way[0] for way in here]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        found = dict(zip(names, pool.map(lambda way: checksums(way, folder), here)))
        for way, (lines, _) in found.items():
            for line in lines:
                print(f"{way + ':':20} {line}", flush=True)
        for way in WAYS:
            if way not in here:
                print(f"NOT RUN: {way[0]}: no {way[1]} or {way[3] or 'processor'}; {PACKAGES}")
        if "clang" in names:
            print(*pool.map(lambda processor: as_msvc(processor, folder), ("x86_64", "aarch64")), sep="\n")
        if find_spec("Cython"):
            core = folder / "_core.c"
            said(sys.executable, "-m", "cython", ROOT / "rau" / "_core.pyx", "-o", core)
            for way in here:
                if way[0] in ("gcc", "clang"):
                    print(core_warnings(way[1], way[2], core))
        else:
            print("NOT RUN: warnings of Cython's C: no Cython; python -m pip install Cython")
        if {"gcc", "aarch64"} <= set(names):
            print(loops(found["gcc"][1], found["aarch64"][1]))
    different = {line.split()[0] for lines, _ in found.values() for line in lines}
    print("one checksum" if len(different) == 1 else f"FAILED: {len(different)} checksums")
    return 0 if len(different) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
