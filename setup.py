"""Builds the compiled core, ``rau._core``. All metadata is in pyproject.toml.

The core is optional: without a C compiler the install succeeds, this file says so (pip shows it with ``-v`` only, hence
``python -m rau info`` says it too), and the "numpy" backend gives the same bits, more slowly.
``RAU_BUILD_REQUIRE_CORE=1`` makes a failed core a failed build.
"""

import os
import tempfile
from glob import glob
from importlib.metadata import distribution
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

REQUIRE_CORE = os.environ.get("RAU_BUILD_REQUIRE_CORE", "") not in ("", "0")

# Our flags come last, after the interpreter's own and after CFLAGS, so that neither can change a result. The order counts:
# the first two -fno- put back defaults that the others then change (clang's -fno-fast-math even the contraction). The
# linker gets them too: for -ffast-math and its like in CFLAGS it adds start-up code that flushes subnormals to zero in the
# whole process.
UNIX_FLAGS = [
    "-O3", "-fno-fast-math", "-fno-unsafe-math-optimizations",
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
]  # fmt: skip
MSVC_FLAGS = ["/O2", "/fp:precise"]

OPENMP_PROBE = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"

WITHOUT_CORE = """
==============================================================================
rau: installing WITHOUT the compiled core (rau._core).
  why:   {reason}
  cost:  the "numpy" backend is used instead: the same bits, several times slower.
  cure:  install a C compiler and Python's C headers, then in the source tree
             python -m pip install --force-reinstall --no-deps .
         (". " becomes "-e ." if the install is editable)
  RAU_BUILD_REQUIRE_CORE=1 turns this message into a failed build.
==============================================================================
"""


class BuildCore(build_ext):
    """build_ext that chooses the flags, probes for OpenMP, and survives a failure."""

    def initialize_options(self):
        super().initialize_options()
        self.cython_c_in_temp = True  # no generated C file beside the sources: it cannot go stale, nor be shipped
        self.failed = False

    def finalize_options(self):
        super().finalize_options()
        self.force = True  # one file: compiling it again is cheaper than a build that missed a changed flag or header

    def run(self):
        in_place = self.inplace  # super().run() hides it while it works
        super().run()
        if self.failed and in_place:  # what an earlier build left there no longer matches the sources
            Path("rau", Path(self.get_ext_filename("rau._core")).name).unlink(missing_ok=True)

    def build_extension(self, ext):
        try:
            self.choose_flags(ext)
            super().build_extension(ext)
        except Exception as error:  # no compiler, no Python.h, no Cython, a bug in the core: whatever it is
            if REQUIRE_CORE:
                raise
            self.failed = True
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            reason = f"{type(error).__name__}: {error}"
            if len(reason) > 160:  # a whole compiler command; what the compiler said stands above
                reason = f"{reason[:60]} ... {reason[-90:]}"
            print(WITHOUT_CORE.format(reason=reason), flush=True)

    def choose_flags(self, ext):
        msvc = self.compiler.compiler_type == "msvc"
        flags = list(MSVC_FLAGS if msvc else UNIX_FLAGS)
        openmp = "/openmp" if msvc else "-fopenmp"
        has_openmp = self.links_with(openmp)
        if has_openmp:
            flags.append(openmp)
        print(f"rau: OpenMP {'found' if has_openmp else 'not found, the core will use one thread'}", flush=True)
        ext.extra_compile_args = flags
        ext.extra_link_args = [] if msvc else flags
        ext.libraries = [] if msvc else ["m"]  # fegetenv and fesetenv, off x86
        # Not get_include(): of a cross build NumPy is the target's, and cannot be imported.
        ext.include_dirs.append(str(distribution("numpy").locate_file("numpy/_core/include")))
        # What `python -m rau info` prints.
        ext.define_macros = [("RAU_COMPILE_FLAGS", f'"{" ".join(flags)}"'), ("RAU_OPENMP", str(int(has_openmp)))]
        ext.define_macros.append(("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION"))

    def links_with(self, flag):
        """Whether a program that needs OpenMP compiles and links (it is not run: that would fail when cross-compiling)."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(OPENMP_PROBE)
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=[flag])
                link_args = [] if self.compiler.compiler_type == "msvc" else [flag]
                self.compiler.link_executable(objects, "probe", output_dir=folder, extra_postargs=link_args)
            except Exception:
                return False
        return True


setup(
    ext_modules=[
        # Bare, not cythonize()d: then the sdist ships the .pyx, from which alone a wheel can be built.
        Extension(
            "rau._core",
            ["rau/_core.pyx"],
            depends=sorted(glob("rau/csrc/*")),
            include_dirs=["rau/csrc"],
            optional=not REQUIRE_CORE,
        )
    ],
    cmdclass={"build_ext": BuildCore},
)
