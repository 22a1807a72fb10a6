"""What every test shares: the backends under test, and the report of them at the top of a run.

``RAU_TEST_BACKENDS=cython,numpy`` names the backends to test; one of them that cannot be loaded fails the whole run.
Without it those of the built-in ones that are there are tested (test_packaging.py fails if the compiled one is not).
"""

from __future__ import annotations

import importlib
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

import rau

BUILT_IN = ("cython", "numpy")

# What the tests are made of: --doctest-modules would import it, and some of it imports what may not be there.
collect_ignore = [file.name for file in Path(__file__).parent.glob("*.py") if not file.name.startswith("test_")]

settings.register_profile("rau", deadline=None)  # a first call may load or compile something
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "rau")

# The status speaks of every backend that is known here, and loads those that come as plugins.
STATUS = {status.name: status for status in rau.registry.status()}
ASKED_FOR = [name.strip() for name in os.environ.get("RAU_TEST_BACKENDS", "").split(",") if name.strip()]
BACKENDS = ASKED_FOR or [name for name in BUILT_IN if name in STATUS and STATUS[name].available]




def _takes_numpy(name: str) -> bool:
    capabilities = rau.registry.capabilities(name)
    return capabilities is not None and "numpy:ndarray" in capabilities.array_types


# Not per function: Hypothesis refuses that.
@pytest.fixture(scope="module", params=[name for name in BACKENDS if _takes_numpy(name)])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend under test that takes NumPy arrays, in turn."""
    return str(request.param)


@pytest.fixture(scope="module", params=BACKENDS)
def any_backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend under test in turn; own_arrays.py makes calls on its own arrays."""
    return str(request.param)


@pytest.fixture(scope="session")
def compiler() -> str:
    """A C compiler."""
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not found:
        assert os.environ.get("RAU_EXPECT_NO_CORE"), "no C compiler; set RAU_EXPECT_NO_CORE=1 where that is meant to be"
        pytest.skip("no C compiler, as RAU_EXPECT_NO_CORE says")
    return found


def pytest_configure(config: pytest.Config) -> None:
    failures = []
    for name in ASKED_FOR:
        try:
            rau.registry.get(name)
        except Exception as error:
            failures.append(f"  {name}: {type(error).__name__}: {error}")
    if failures:
        raise pytest.UsageError("RAU_TEST_BACKENDS names what cannot be loaded:\n" + "\n".join(failures))
    if os.environ.get("RAU_EXPECT_NO_CORE"):  # then the one warning about it is no news
        config.addinivalue_line("filterwarnings", "ignore:rau runs on NumPy:RuntimeWarning")


def pytest_report_header() -> list[str]:
    others = [
        f"{name} ({'available' if status.available else status.reason})"
        for name, status in STATUS.items()
        if name not in BACKENDS
    ]
    return [
        f"rau {_version()}, compiled core: {_core()}, NumPy {np.__version__}",
        f"backends tested: {', '.join(BACKENDS) or 'none'}",
        f"backends not asked for: {'; '.join(others) or 'none'}",
    ]


def _version() -> str:
    try:
        return version("ring-attention-update")
    except PackageNotFoundError:
        return "(not installed)"


def _core() -> str:
    try:
        return f"yes, SIMD version {importlib.import_module('rau._core').simd()}"
    except ImportError as error:
        return f"no ({error})"
