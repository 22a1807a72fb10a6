"""The conformance kit: backends of every kind are held to what they declare, no more and no less."""

import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from lse_kernels import Weights
from mutants import NUMPY, OneLane, Plain
from patience import LIMIT

from rau import merge_states, registry, rows
from rau.backends import AttentionState, Backend, Capabilities, Problem
from rau.errors import (
    BackendUnavailableError,
    ShapeError,
    UnknownBackendError,
    UnsupportedError,
)
from rau.testing.cases import Case, named
from rau.testing.comparison import compare
from rau.testing.conformance import check_backend, checks
from rau.testing.conformance.matrix import matrix
from rau.testing.conformance.report import Report
from rau.testing.differential import run_differential
from rau.testing.reference.oracle import oracle
from rau.testing.under_test import load

# A backend of somebody else's, in a module of its own: its arrays are nothing that NumPy or rau knows.
LOOPBACK = '''
import numpy as np

from rau.backends import AttentionState, Backend, Capabilities
from rau.testing.diagnosis.steps import Steps


class Box:
    """An array that only its backend can open."""

    __slots__ = ("_inside", "dtype", "shape")
    device = "loop:0"

    def __init__(self, inside):
        self._inside, self.shape, self.dtype = inside, inside.shape, inside.dtype.name


class Loopback(Backend):
    name = "loopback"
    capabilities = Capabilities(array_types=("loopback:Box",), devices=("loop",))

    def update(self, problem, prev, cur, out):
        return self.merge(problem, (prev, cur), out)

    def merge(self, problem, states, out):
        opened = [[part._inside for part in state] for state in states]
        with np.errstate(all="ignore"):
            result = Steps(opened, problem.actual_seq_qlen, problem.layout, problem.softmax_layout).merge()
        if out is None:
            return AttentionState(*map(Box, result))
        for box, part in zip(out, result, strict=True):
            box._inside[...] = part
        return out

    def asarray(self, array):
        return Box(np.array(array))

    def to_numpy(self, array):
        return array._inside
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the module in it; nothing is installed."""
    (tmp_path / "loopback.py").write_text(LOOPBACK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("loopback", None)


@pytest.fixture
def loopback(folder):
    instance = load("loopback:Loopback")
    registry.register(instance)
    yield instance
    registry.refresh()


def ids(items):
    return {item.id for item in items}


# Arrays of one's own


def test_arrays_of_ones_own_reach_their_backend_unasked(loopback):
    case = Case(id="mine", layout="TND", softmax_layout="SBH", tokens=5, lengths=(2, 3), heads=3, head_dim=4)
    numbers = case.fill()
    states = [AttentionState(*map(loopback.asarray, state)) for state in numbers]
    result = case.call(states, None, None)
    assert type(result.attn_out).__name__ == "Box"
    result = [loopback.to_numpy(part) for part in result]
    assert compare(result, oracle(numbers, [0, 2, 5], "TND", softmax_layout="SBH")).passed


def test_lanes_of_arrays_of_ones_own_are_as_many_everywhere(loopback):
    """Of views of such arrays nothing is known."""
    states = [Case(id="", lanes=lanes, profile="portable").fill() for lanes in (8, 1)]
    (first, _), (_, second) = ([AttentionState(*map(loopback.asarray, state)) for state in pair] for pair in states)
    with pytest.raises(ShapeError, match=r"states\[1\]\.softmax_max .* 8 lane\(s\); expected as many"):
        merge_states([first, second], backend=loopback)


class Alone(Plain):
    """Leaves statistics out, and is wrong only then, where `wrong` says so."""

    capabilities = replace(Plain.capabilities, without_statistics=True)
    wrong = staticmethod(lambda problem: False)

    def merge(self, problem, states, out):
        result = registry.get("numpy").merge(problem, states, out)
        if not problem.statistics and self.wrong(problem):
            result.attn_out[...] = 0
        return result

    def update(self, problem, prev, cur, out):
        return self.merge(problem, (prev, cur), out)


@pytest.mark.parametrize("what", [None, "K", "lanes", "packed", "statistics"])
def test_an_output_alone_that_is_wrong_is_found(what):
    wrongs = {
        None: lambda problem: False, "K": lambda problem: problem.K > 2, "lanes": lambda problem: problem.lanes == 1,
        "packed": lambda problem: problem.packed,
    }  # fmt: skip

    class Mine(Alone):
        wrong = staticmethod(wrongs.get(what, wrongs[None]))

    if what == "statistics":  # which it says that it leaves out
        Mine.merge = lambda self, problem, states, out: rau_state(Alone.merge(self, problem, states, out), states)
    report = check_backend(Mine(), select="algebra/output-alone-float32")
    assert bool(report.failures) == (what is not None), str(report)


class OfRuns(Alone):
    """Says that it takes runs of tokens, and merges all of them where it is told to forget."""

    capabilities = replace(Alone.capabilities, runs=True)
    forgets = False

    def merge(self, problem, states, out):
        if self.forgets:
            options = problem.actual_seq_qlen, problem.layout, problem.softmax_layout, problem.profile
            problem = Problem.of(states, out, *options, in_place=problem.in_place, statistics=problem.statistics)
        return Alone.merge(self, problem, states, out)


@pytest.mark.parametrize("forgets", [False, True], ids=["heeds runs", "forgets them"])
def test_runs_that_are_forgotten_are_found(forgets):
    class Mine(OfRuns):
        pass

    Mine.forgets = forgets
    report = check_backend(Mine(), select="algebra/some-tokens-float32")
    assert bool(report.failures) == forgets, str(report)


@pytest.mark.parametrize("wrong", [None, "sign", "range", "twice rounded", "head"])
def test_eight_bits_that_are_wrong_are_found(monkeypatch, wrong):
    pytest.importorskip("ml_dtypes")
    right = rows.scaled

    def scaled(attn_out, scale, largest, layout, heads):
        if wrong == "head" and np.ndim(scale):
            scale = scale[::-1]
        if wrong == "range":
            largest *= 0.9
        result = right(attn_out, scale, largest, layout, heads)
        if wrong == "twice rounded":
            result = result.astype(np.float16).astype(np.float32)
        return -result if wrong == "sign" else result

    monkeypatch.setattr(rows, "scaled", scaled)
    report = check_backend("numpy", select="algebra/eight-bits-*")
    assert len(report.failures) == (0 if wrong is None else 2), str(report)


def rau_state(result, states):
    return result if result.softmax_max is not None else result._replace(softmax_max=states[0][1], softmax_sum=states[0][2])


def test_arrays_of_ones_own_are_refused_by_others(loopback):
    case = Case(id="mine")
    states = [AttentionState(*map(loopback.asarray, state)) for state in case.fill()]
    with pytest.raises(UnsupportedError, match="loopback:Box is not one of"):
        case.call(states, None, "numpy")


def test_the_kit_takes_a_module_and_class_that_nobody_has_registered(folder):
    report = check_backend("loopback:Loopback", cases=named())
    assert report.passed, str(report)
    assert {excluded.message for excluded in report.excluded} == {
        "its arrays cannot be indexed", "it takes no torch tensors", "array types of its own: rows of NumPy arrays, torch tensors and JAX arrays are chosen",
    }  # fmt: skip
    assert "loopback" not in registry.names()


# Who is checked


@pytest.mark.parametrize("what", ["numpy", Plain, Plain()], ids=["name", "class", "instance"])
def test_a_backend_is_named_or_handed_over(what):
    assert check_backend(what, select="smallest/*").succeeded == ["smallest/one-token-one-head"]


class NoName(Backend):
    capabilities = Capabilities(array_types=NUMPY)


class NoUpdate:
    name = "no-update"
    capabilities = Capabilities(array_types=NUMPY)
    merge = asarray = to_numpy = synchronize = None


class NoDevice(Plain):
    name = "no-device"

    def __init__(self):
        raise OSError("no such device: /dev/chip0")


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("nobody", UnknownBackendError, "nobody"),
        ("no_such_module:Class", UnknownBackendError, "no module 'no_such_module'"),
        ("rau.backends.numpy_:Class", UnknownBackendError, "no class 'Class'"),
        (NoName, UnknownBackendError, "NoName has no name"),
        (NoUpdate, UnknownBackendError, "NoUpdate has no update"),
        (NoDevice, BackendUnavailableError, "NoDevice.*no such device"),
    ],
)
def test_what_is_no_backend_is_refused_in_words(what, error, words):
    with pytest.raises(error, match=words):
        check_backend(what)


# What is declared is held to, what is excluded is listed


class Narrow(Plain):
    """It takes little, and notes what it was given."""

    name = "narrow"
    capabilities = Capabilities(
        array_types=NUMPY, dtypes=("float16",), mixed=False, layouts=("TND",), softmax_layouts=("SBH",), lanes=(8,),
        in_place=False, max_heads=4, max_head_dim=128, head_dim_multiple=16,
    )  # fmt: skip

    def __init__(self):
        self.given = []

    def merge(self, problem, states, out):
        self.given.append(problem)
        return super().merge(problem, states, out)


def test_what_capabilities_exclude_is_listed_and_not_run():
    backend = Narrow()
    report = check_backend(backend, cases=named())
    assert report.passed, str(report)
    assert backend.given
    assert not [reason for problem in backend.given for reason in backend.capabilities.limits_broken(problem)]
    assert ids(report.excluded) | set(report.succeeded) == {check.id for check in checks(backend, named())}
    reasons = dict(report.excluded)
    assert reasons["dtype/float32@TND"] == "dtype float32 is not one of float16"  # in the layout that it has
    assert reasons["layout/BSND"] == "dtype float32 is not one of float16; layout BSND is not one of TND; N = 5 > 4"
    assert "layout SBH is not one of TND" in reasons["algebra/neutral-element-float16"]
    assert "calls/several-threads-at-once" in report.succeeded
    assert "excluded: " in str(report) and " more" in str(report)


def test_what_there_is_no_room_for_is_listed(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refuse)
    report = check_backend(Plain, select="far/*")
    assert {failure.message for failure in report.excluded} == {"no room here: Cannot allocate memory"}
    found = run_differential([Plain], [case for case in named() if case.id == "far/out-SBH"])
    assert found.standings["plain"].excluded == {"far/out-SBH": "Cannot allocate memory"}


def test_where_no_offset_needs_64_bits_that_is_listed(monkeypatch):
    monkeypatch.setattr("sys.maxsize", 2**31 - 1)
    (reason,) = {failure.message for failure in check_backend(Plain, select="far/*").excluded}
    assert reason == "no room here: this system does not reserve so much memory without taking it"


class AloneInPairs(Alone):
    merge = Backend.merge

    def update(self, problem, prev, cur, out):
        return Alone.merge(self, problem, (prev, cur), out)


class AloneInPairsOfFloat16(AloneInPairs):
    capabilities = replace(Alone.capabilities, dtypes=("float16",), mixed=False)


class AloneOfLSE(Weights):
    capabilities = replace(Weights.capabilities, without_statistics=True)


@pytest.mark.parametrize("backend", [AloneInPairs, AloneInPairsOfFloat16, AloneOfLSE])
def test_an_output_alone_of_one_update_after_another(backend):
    report = check_backend(backend(), select="algebra/output-alone-float*")
    assert report.passed, str(report)


class Coarse(Plain):
    """Right, and held to less than that."""

    name = "coarse"
    capabilities = Capabilities(array_types=NUMPY, tolerance=40.0)


class Forgets(Coarse):
    """What a NaN behind a weight of 0 makes of it."""

    name = "forgets"

    def merge(self, problem, states, out):
        result = super().merge(problem, states, out)
        result.attn_out[np.isnan(sum(state.attn_out for state in states))] = np.nan
        return result


class Small(Plain):
    name = "small"
    capabilities = Capabilities(array_types=NUMPY, max_head_dim=32)


def test_a_property_is_asked_for_in_the_cases_that_are_not_excluded():
    """The others say nothing against it."""
    row = matrix([Coarse(), Forgets()])
    assert all(answer.good for answer in row["coarse"].values())
    assert [row["coarse"][name].word for name in ("payload", "small-weights")] == ["yes", "yes"]
    assert [name for name, answer in row["forgets"].items() if not answer.good] == ["payload"]


def test_a_property_is_not_asked_for_where_all_its_cases_are_excluded():
    row = matrix([Small()])["small"]
    assert {row[name] for name in ("payload", "nan", "strides", "states")} == {("-", True, False, "D = 64 > 32")}
    assert all(answer.good for answer in row.values())


class NotInPlace(Plain):
    name = "not-in-place"

    def merge(self, problem, states, out):
        if problem.in_place:
            raise NotImplementedError("in place is for later")
        return super().merge(problem, states, out)


def test_a_capability_that_is_declared_and_fails_is_a_failure():
    report = check_backend(NotInPlace, select="in-place/*")
    assert not report.succeeded
    words = {failure.message.partition(" (")[0] for failure in report.failures}
    assert words == {"NotImplementedError: in place is for later"}


def test_a_backend_that_is_checked_on_nothing_does_not_pass():
    assert not check_backend(Plain, cases=[], select="nothing").passed
    assert not run_differential([Plain], []).passed


# Failures are readable


class Raises(Plain):
    name = "raises"

    def compute(self, rows):
        raise ZeroDivisionError("l is 0")


class Transposes(Plain):
    name = "transposes"

    def compute(self, rows):
        result = rows.merge()
        return result._replace(attn_out=np.ascontiguousarray(result.attn_out.swapaxes(0, 1)))


class ReturnsNothing(Plain):
    name = "returns-nothing"

    def merge(self, problem, states, out):
        super().merge(problem, states, out)


class ReturnsLists(Plain):
    name = "returns-lists"

    def compute(self, rows):
        return AttentionState(*(part.tolist() for part in rows.merge()))


class Stuck(Plain):
    name = "stuck"

    def to_numpy(self, array):
        raise RuntimeError("the queue is dead")


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        (Raises, "ZeroDivisionError: l is 0 (test_conformance.py:"),
        (Transposes, "attn_out has shape (3, 7, 80); expected (7, 3, 80)"),
        (ReturnsNothing, "returned a NoneType; expected an AttentionState"),
        (ReturnsLists, "attn_out is a list; expected the inputs' kind"),
        (Stuck, "RuntimeError: the queue is dead"),
    ],
    ids=lambda item: getattr(item, "name", ""),
)
def test_failures_say_what_happened(backend, words):
    report = check_backend(backend, select="layout/SBH")
    assert f"{backend.name}: FAILED" in str(report)
    (failure,) = report.failures
    assert failure.id == "layout/SBH"
    assert words in failure.message
    found = run_differential([backend, "numpy"], [case for case in named() if case.id == "layout/SBH"])
    assert [finding.backend for finding in found.findings] == [backend.name]
    assert words.partition(" has shape")[0].partition(" (")[0] in found.findings[0].message


# Expected failures are strict


def test_expected_failures():
    report = Report("mine")
    report.record("a/1", [])
    report.record("a/2", ["wrong"])
    report.record("b/1", ["wrong", "and more"])
    report.exclude("c/1", ["cannot"])
    assert not report.passed
    report.expect({"a/2": "known", "b/*": "known too", "c/1": "never run"})
    assert report.passed
    assert report.expected == [("a/2", "wrong (expected: known)"), ("b/1", "wrong; and more (expected: known too)")]
    assert "2 failed as expected, 1 excluded" in str(report)


@pytest.mark.parametrize(
    ("expected", "failures"),
    [
        ({"a/1": "why"}, [("a/1", "expected to fail (why), but passes: take it off the list")]),
        ({"z/*": "why"}, [("z/*", "an expected failure that matches no check")]),
    ],
)
def test_an_expected_failure_that_does_not_come_is_a_failure(expected, failures):
    report = Report("mine")
    report.record("a/1", [])
    report.expect(expected)
    assert not report.passed
    assert report.failures == failures


def test_check_backend_takes_expected_failures():
    report = check_backend(NotInPlace, {"in-place/*": "for later"}, select="in-place/c*")
    assert not report.failures
    assert len(report.expected) == 8
    assert not report.passed  # nothing at all was found right


CONFORMANCE = """
    from rau.testing import BackendConformance

    from mutants import OneLane, Plain

    class TestRight(BackendConformance):
        backend = "numpy"

    class TestKnown(BackendConformance):
        backend = OneLane
        expected_failures = {"layout/SBH*": "lane 3 is to be repaired"}

    class TestMistaken(BackendConformance):
        backend = Plain()
        expected_failures = {"layout/SBH": "was wrong once", "layuot/BSND": "lane 3 is to be repaired"}
"""


def test_the_kit_as_a_pytest_class(tmp_path):
    (tmp_path / "test_mine.py").write_text(dedent(CONFORMANCE))
    (tmp_path / "mutants.py").write_bytes((Path(__file__).parent / "mutants.py").read_bytes())
    status, text = run_pytest(tmp_path, "-rA", "-k", "TestRight and not generated or layout or match")
    assert status == 1, text
    lines = text.splitlines()

    def outcomes(cls, what):
        return [line for line in lines if line.startswith(what) and f"::{cls}::" in line]

    right = outcomes("TestRight", "PASSED") + outcomes("TestRight", "SKIPPED")
    without_torch = 0 if find_spec("torch") else 2  # which are skipped, and listed by their place in the file alone
    assert len(right) == len(checks(registry.get("numpy"), named())) + 1 - without_torch
    made = sum(map(int, re.findall(r"(\d+) (?:passed|failed|skipped|xfailed|deselected)", lines[-1])))
    assert made == sum(len(checks(backend)) + 1 for backend in (registry.get("numpy"), OneLane(), Plain()))
    assert not outcomes("TestRight", "FAILED")

    expected = outcomes("TestKnown", "XFAIL")
    assert len(expected) == 2 and all("lane 3 is to be repaired" in line for line in expected)
    assert [line for line in outcomes("TestKnown", "FAILED") if "[layout/BSND]" in line]
    assert [line for line in outcomes("TestKnown", "PASSED") if "match_something" in line]

    passing, idle = outcomes("TestMistaken", "FAILED")
    assert "[layout/SBH]" in passing and "XPASS(strict)" in text
    assert "match_something" in idle and "match no check: ['layuot/BSND']" in text


def run_pytest(folder, *arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT)
    return done.returncode, done.stdout + done.stderr


def test_a_pytest_class_without_a_backend_says_so(tmp_path):
    text = "from rau.testing import BackendConformance\n\nclass TestMine(BackendConformance):\n    pass\n"
    (tmp_path / "test_mine.py").write_text(text)
    status, text = run_pytest(tmp_path)
    assert status and "TestMine: set the class attribute `backend`" in text
