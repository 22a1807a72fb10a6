"""The package on aarch64: built there by a cross compiler, it gives the published bits under an emulator, and its backends agree.

    python tests/aarch64.py          some minutes; what it needs and does not find is told, with what to install

Debian's Python and NumPy's wheel run under QEMU, which shows bits, and neither speed nor the order of memory between threads.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RELEASE, VERSION = "bookworm", "3.11"  # of Debian, and of the Python there
PACKAGES = "apt-get install mmdebstrap arch-test qemu-user-static gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
PLATFORMS = [f"--platform=manylinux{which}_aarch64" for which in ("_2_28", "_2_27", "_2_17", "2014")] + ["--platform=linux_aarch64"]


def run(*command: str | Path, **environment: str) -> None:
    subprocess.run([str(word) for word in command], check=True, env=os.environ | environment)


def missing() -> str:
    """Say what is not here, and how to have it; nothing where all is."""
    tools = ("mmdebstrap", "arch-test", "qemu-aarch64-static", "aarch64-linux-gnu-gcc")
    if absent := [tool for tool in tools if not shutil.which(tool)]:
        return f"no {', '.join(absent)}; {PACKAGES}"
    if f"{sys.version_info[0]}.{sys.version_info[1]}" != VERSION:
        return f"Debian's Python for aarch64 is {VERSION}, and this is another; python{VERSION} {Path(__file__).name}"
    return "" if find_spec("build") else "no build; python -m pip install build"


def sdist(folder: Path) -> Path:
    """Make the distribution that everything else is built from."""
    subprocess.run([sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT], check=True, stdout=subprocess.DEVNULL)
    (made,) = folder.glob("*.tar.gz")
    return made


def wheel(
    python: str | Path, source: Path, folder: Path, processor: str, compiler: str, suffix: str = "", **environment: str
) -> Path:
    """Build a wheel for the version of a Python that runs here, and for another processor than it may run on.

    `suffix` is of the core's file; by default it names version and processor.
    """
    code = "import sys; print('.cpython-{}{}'.format(*sys.version_info))"
    version = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    run(
        python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source,
        CC=compiler, LDSHARED=f"{compiler} -shared", RAU_BUILD_REQUIRE_CORE="1",
        # How CPython's own cross builds name the platform, and setuptools what is compiled for it.
        _PYTHON_HOST_PLATFORM=f"linux-{processor}", SETUPTOOLS_EXT_SUFFIX=suffix or f"{version}-{processor}-linux-gnu.so",
        **environment,
    )  # fmt: skip
    (made,) = folder.glob("*.whl")
    return made


def checks(backends: str = "cython,numpy") -> list[list[str]]:
    """List what is asked of ``python -m rau``: each group of merges; then as many of the usual cases by two seeds, held to the oracle."""
    seeds = [["--select", f"generated/{seed}/*", "--seed", seed, "--cases", "60"] for seed in "12"]
    return [["bits", "--backends", backends], *(["difftest", "--backends", backends, *its] for its in seeds)]


class Emulated:
    """A folder with Debian's Python for aarch64 and the libraries that the package needs, of which nothing was run."""

    def __init__(self, folder: Path) -> None:
        self.root, self.libraries = folder / "root", folder / "libraries"
        wanted = "base-files,python3,python3-dev,libgomp1,libstdc++6"
        options = ["--quiet", "--arch=arm64", "--variant=extract", "--skip=check/qemu", f"--include={wanted}"]
        run("mmdebstrap", *options, RELEASE, self.root)
        self.install(self.libraries, "numpy", "ml_dtypes")

    def install(self, folder: Path, *what: str | Path) -> None:
        which = ["--only-binary=:all:", "--no-deps", "--python-version", VERSION, *PLATFORMS]
        run(sys.executable, "-m", "pip", "install", "-q", "--root-user-action=ignore", *which, "--target", folder, *what)

    def check(self, wheel: Path, folder: Path, *command: str) -> None:
        """Install a wheel beside the libraries, and run a command of ``python -m rau`` there."""
        if not folder.exists():
            self.install(folder, wheel)
        print(f"\naarch64: python -m rau {' '.join(command)}", flush=True)
        python = self.root / "usr" / "bin" / f"python{VERSION}"
        path = os.pathsep.join(map(str, (folder, self.libraries)))
        run("qemu-aarch64-static", "-L", self.root, python, "-P", "-m", "rau", *command, PYTHONPATH=path)


def main() -> int:
    if absent := missing():
        print(f"NOT RUN: the package on aarch64: {absent}")
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        emulated = Emulated(folder)
        headers = emulated.root / "usr" / "include"
        compiler = f"aarch64-linux-gnu-gcc -I{headers / f'python{VERSION}'} -idirafter {headers}"
        made = wheel(sys.executable, sdist(folder), folder / "wheel", "aarch64", compiler)
        for command in checks():
            emulated.check(made, folder / "installed", *command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
