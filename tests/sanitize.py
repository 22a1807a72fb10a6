"""The compiled core under a sanitizer or valgrind, in each instruction-set version that the processor has.

    python tests/sanitize.py address      accesses beside arrays and to freed memory: AddressSanitizer
    python tests/sanitize.py undefined    overflow, misaligned accesses and the like: UndefinedBehaviorSanitizer
    python tests/sanitize.py thread       data races: ThreadSanitizer
    python tests/sanitize.py valgrind     as `address`, for all machine code, and what depends on memory that was never set

Builds the core in a copy of the sources, and runs there: the conformance checks, generated cases against NumPy, tests of
the core, and the fuzzer, with nothing but the tool's own guard beside its arrays. For each version, reports come in full,
and a line says what ran; with a report, or a command that fails, the exit status is 1. Minutes; with valgrind an hour.

Needs Linux, gcc with its sanitizers, what the tests need, and torch for those of tensors;
`apt-get install valgrind libomp-dev` for the last two.
- `thread`: how libgomp synchronizes threads is not seen, and every parallel loop would be reported. LLVM's OpenMP runtime
  answers to libgomp's names, and tells the sanitizer by way of Archer. Races within the interpreter and NumPy are not seen.
- `valgrind` reports on the interpreter too (it finds small ints by digits that may be unset): those from the core count.
- Leaks are not looked for: the interpreter leaves memory to the end of the process.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from glob import glob
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STARTS = {  # what a report starts with
    "address": r"==\d+==ERROR: ",
    "undefined": r".*: runtime error: ",
    "thread": "WARNING: ThreadSanitizer",
    "valgrind": r"==\d+== \w",
}
TESTS = ["tests/test_guard_pages.py", "tests/test_core.py", "tests/test_hostile.py", "tests/test_hostile_torch.py"]
CHOSEN = "test_core or (guard_pages and {}) or writes_to_the_lengths or resized or axes_of_length_1 or not_aligned"
# So that small cases take the ways of large ones: threads, and stores around the cache, which the processor refuses where
# they are not aligned. gcc's AddressSanitizer does not look into those stores: under it they stay rare.
LARGE, SMALL = "{1 << 18, 1 << 23, 1 << 18, 0}", "{1 << 18, 0, 1, 0}"  # of rau_tuned


def build(tool, folder):
    """Build the core in a copy of the sources."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "build", "*.so", "__pycache__"))
    tuning = folder / "rau" / "csrc" / "versions.h"
    text = tuning.read_text()
    assert text.count(LARGE) == 1
    tuning.write_text(text if tool == "address" else text.replace(LARGE, SMALL))
    flags = "" if tool == "valgrind" else f"-fno-omit-frame-pointer -fsanitize={tool}"
    # By CC, since CFLAGS do not reach the link by which setup.py looks for OpenMP. Between the two come the interpreter's
    # own flags, whose -fwrapv makes overflow defined: nothing would be reported.
    environment = os.environ | {"CC": f"gcc -g {flags}", "RAU_BUILD_REQUIRE_CORE": "1"}
    environment["CFLAGS"] = "-fstrict-overflow" if tool == "undefined" else ""
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder / "wheel", folder]  # by what pyproject.toml requires
    subprocess.run(wheel, env=environment, check=True)
    shutil.unpack_archive(*folder.glob("wheel/*.whl"), folder, "zip")


def prepare(tool, reports):
    """What a command starts with, and its environment."""
    if tool == "valgrind":
        start = ["valgrind", "--quiet", "--trace-children=yes", "--fullpath-after=", f"--log-file={reports}/%p"]
        return start, {"PYTHONMALLOC": "malloc"}
    log = f"log_path={reports}/report"
    if tool == "address":  # libstdc++ for torch, whose exceptions are watched
        names = ["libasan.so", "libstdc++.so.6"]
        environment = {"ASAN_OPTIONS": f"{log}:detect_leaks=0:allocator_may_return_null=1", "PYTHONMALLOC": "malloc"}
    elif tool == "undefined":
        names, environment = ["libubsan.so"], {"UBSAN_OPTIONS": f"{log}:print_stacktrace=1"}
    else:
        archer = max(glob("/usr/lib/llvm-*/lib/libarcher.so"), default="") or sys.exit("no libarcher.so: libomp-dev has it")
        names = ["libtsan.so", archer.replace("libarcher.so", "libomp.so.5")]
        environment = {"TSAN_OPTIONS": f"{log}:ignore_noninstrumented_modules=1:die_after_fork=0"}
        environment |= {"OMP_TOOL_LIBRARIES": archer, "OMP_NUM_THREADS": "4"}
    paths = [subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip() for name in names]
    # -R: gcc 12's sanitizers have no place for addresses as random as newer kernels make them.
    return ["setarch", "-R", "env", f"LD_PRELOAD={' '.join(paths)}"], environment


def commands(tool, version, cases, calls):
    """What runs, as arguments of Python."""
    yield ["-m", "rau", "check", "cython"]
    yield ["-m", "rau", "difftest", "--backends", "cython,numpy", "--select", "generated/*", "--cases", cases]
    tests = TESTS[:1] if tool == "valgrind" else TESTS  # the others give processes a minute: too little for valgrind
    chosen = CHOSEN.format(version)
    if tool == "thread":  # which keeps more beside each byte than those tests allow the core
        chosen = f"({chosen}) and not no_temporary"
    yield ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *tests]
    yield ["tests/fuzz.py", "--calls", calls, "--beside", "0", *["--threads", "4"] * (tool == "thread")]


def found(tool, reports, folder):
    """Take the reports: of valgrind's, those with the core in one of the two innermost frames."""
    for file in sorted(reports.iterdir()):
        for report in re.split(f"(?m)^(?={STARTS[tool]})", file.read_text())[1:]:
            if tool != "valgrind" or str(folder) in "".join(report.splitlines()[1:3]):
                yield report
        file.unlink()


def main():
    """Run: 0 without a report or a failure, 1 with one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("tool", choices=STARTS)
    parser.add_argument("--cases", default="300", help="generated ones (default: 300)")
    parser.add_argument("--calls", default="10000", help="of the fuzzer (default: 10000)")
    given, failed = parser.parse_args(), False
    with tempfile.TemporaryDirectory() as temporary:
        folder, reports = Path(temporary, "sources"), Path(temporary, "reports")
        reports.mkdir()
        start, environment = prepare(given.tool, reports)
        build(given.tool, folder)

        def run(arguments, **more):
            variables = os.environ | environment | {"PYTHONPATH": str(folder)} | more
            command = [*start, sys.executable, *arguments]
            return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)

        code = "from rau import _core; print(_core.__file__, _core.build()['openmp'], *_core.simd_versions())"
        file, openmp, *versions = run(["-c", code]).stdout.split()
        assert file.startswith(temporary) and openmp == "True", (file, openmp)
        for version in versions:
            ran = []
            for arguments in commands(given.tool, version, given.cases, given.calls):
                done = run(arguments, RAU_SIMD=version)
                ran += done.stdout.splitlines()[-1:]
                if done.returncode:
                    failed = True
                    print(f"status {done.returncode}: {' '.join(arguments)}", done.stdout, done.stderr, sep="\n")
            findings = list(found(given.tool, reports, folder))
            failed |= bool(findings)
            print(*findings, f"{given.tool}, {version}: {'; '.join(ran)}; {len(findings)} reports", sep="\n", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
