"""Kernels that return (out, lse): adapted in a few lines, judged by a bound of their own and by what they promise."""

import inspect

import numpy as np
import pytest
from lse_kernels import KERNELS, NUMPY, Guarded

from rau.backends import PROPERTIES, Capabilities
from rau.backends.lse import LSEBackend
from rau.testing.conformance import check_backend
from rau.testing.reference.oracle import ALLOWANCES


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_what_is_right_in_its_own_way_passes(kernel):
    report = check_backend(kernel)
    assert report.passed, str(report)


def test_every_property_has_its_allowance():
    assert PROPERTIES.keys() == ALLOWANCES.keys()
