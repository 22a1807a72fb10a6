"""The conformance kit where words have 32 bits, bytes come in the other order, or vectors are NEON's: Debian's own Python and NumPy, emulated.

    python tests/emulated.py [PROCESSOR ...]       aarch64, armhf, s390x; all three by default; some ten minutes each

For each processor: the package built by a cross compiler, the published bits, generated cases by two backends, and
`python -m rau check cython`. tests/aarch64.py is the short form for one of them, with NumPy's own wheel.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import aarch64

RELEASE = "forky"  # of Debian: the first that has NumPy 2 and ml_dtypes for all of these
PROCESSORS = {  # Debian's name for each, the compiler's, the emulator's, and the backends that have our bits there
    "aarch64": ("arm64", "aarch64-linux-gnu", "qemu-aarch64-static", "cython,numpy"),
    "armhf": ("armhf", "arm-linux-gnueabihf", "qemu-arm-static", "cython"),  # NumPy's vectors there take subnormal numbers for zero
    "s390x": ("s390x", "s390x-linux-gnu", "qemu-s390x-static", "cython,numpy"),
}
PACKAGES = "apt-get install mmdebstrap arch-test qemu-user-static " + " ".join(
    f"gcc-{compiler} libc6-dev-{debian}-cross" for debian, compiler, *_ in PROCESSORS.values()
)


def system(processor: str, folder: Path) -> None:
    """Unpack Debian's Python and the libraries that the package needs; nothing of it is run."""
    debian = PROCESSORS[processor][0]
    wanted = "base-files,python3,python3-dev,python3-numpy,python3-ml-dtypes,libgomp1,libstdc++6"
    options = ["--quiet", f"--arch={debian}", "--variant=extract", "--skip=check/qemu", f"--include={wanted}"]
    aged = ['--aptopt=Acquire::Check-Valid-Until "false"', '--aptopt=Acquire::Check-Date "false"']  # as a mirror's copy may be
    aarch64.run("mmdebstrap", *options, *aged, RELEASE, folder)
    for library in ("blas/libblas", "lapack/liblapack"):  # links that a package's own scripts would have made
        for file in folder.glob(f"usr/lib/*/{library}.so.3"):
            (file.parents[1] / file.name).symlink_to(file.relative_to(file.parents[1]))


def builder(folder: Path) -> Path:
    """Make a Python that has what builds, but NumPy: its headers are the emulated system's."""
    aarch64.run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    aarch64.run(python, "-m", "pip", "install", "-q", "--upgrade", "setuptools", "Cython")
    return python


def check(processor: str, source: Path, python: Path, work: Path) -> None:
    """Build the package for a processor, and ask it for the bits and for conformance."""
    _, compiler, emulator, backends = PROCESSORS[processor]
    root, installed = work / "root", work / "installed"
    work.mkdir()
    system(processor, root)
    its = (root / "usr" / "bin" / "python3").resolve()  # python3.14, for example
    headers, libraries = root / "usr" / "include", root / "usr" / "lib" / "python3" / "dist-packages"
    made = aarch64.wheel(
        python, source, work / "wheel", processor, f"{compiler}-gcc -I{headers / its.name} -idirafter {headers}", ".so",
        PIP_NO_BUILD_ISOLATION="0", PYTHONPATH=str(libraries),
    )  # fmt: skip
    shutil.unpack_archive(made, installed, "zip")  # not by pip: its name says the version of the Python that built it
    for command in [*aarch64.checks(backends), ["check", "cython"]]:
        print(f"\n{processor}: python -m rau {' '.join(command)}", flush=True)
        aarch64.run(emulator, "-L", root, its, "-P", "-m", "rau", *command, PYTHONPATH=str(installed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("processors", nargs="*", metavar="PROCESSOR", help=", ".join(PROCESSORS))
    chosen = parser.parse_args().processors or list(PROCESSORS)
    if unknown := set(chosen) - set(PROCESSORS):
        parser.error(f"PROCESSOR is {', '.join(sorted(unknown))}; expected {', '.join(PROCESSORS)}")
    tools = ["mmdebstrap", "arch-test", *(tool for name in chosen for tool in (f"{PROCESSORS[name][1]}-gcc", PROCESSORS[name][2]))]
    if absent := [tool for tool in tools if not shutil.which(tool)]:
        parser.error(f"no {', '.join(absent)}; {PACKAGES}")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source, python = aarch64.sdist(work), builder(work / "builder")
        for processor in chosen:
            check(processor, source, python, work / processor)
    return 0


if __name__ == "__main__":
    sys.exit(main())
