"""Our own backends, held to the kit that we hand to others."""

from importlib.util import find_spec

import rau
from rau.testing import check_backend, run_differential
from rau.testing.cases import generated, named
from rau.testing.conformance import GENERATED


def test_the_conformance_kit(any_backend):
    report = check_backend(any_backend)
    assert report.passed, str(report)
    assert len(report.succeeded) > 600, "the kit has shrunk"
    if rau.registry.get(any_backend).capabilities.tolerance == 1:
        takes = rau.registry.get(any_backend).capabilities
        torch_tensors = find_spec("torch") and "jax:Array" not in takes.array_types
        in_place = [case.id for case in (*named(), *generated(0, GENERATED)) if case.out in ("prev", "cur") and not takes.in_place]
        of_tensors = [] if torch_tensors else ["autograd/learns-of-writes", "autograd/rows-and-sinks"]
        assert [excluded.id for excluded in report.excluded] == in_place + of_tensors, str(report)


def test_the_same_bits_from_all_of_them():
    available = [status.name for status in rau.registry.status() if status.available]
    names = [name for name in available if rau.registry.capabilities(name).tolerance == 1]  # the others promise no bits
    report = run_differential(names, generated(5, 300))
    assert report.passed, str(report)
