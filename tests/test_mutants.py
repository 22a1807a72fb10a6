"""The kit catches backends that are wrong, each by name, finds the smallest case, replays it, and names the mistake."""

import time
from fnmatch import fnmatchcase

import pytest
from mutants import LSE_TWINS, MUTANTS, OF_MISTAKES, WITHIN_THEIR_TOLERANCE, Plain, PlainLSE, Wrapped

import rau
from rau import registry
from rau.testing.cases import named
from rau.testing.conformance import check_backend
from rau.testing.diagnosis import diagnose
from rau.testing.differential import record, run_differential, run_recorded

# The checks that are there for each mistake. Most catch it many times over; these must, whatever else changes.
CAUGHT_BY = {
    "packed-read-as-token-major": "tnd/packed-uneven*",
    "token-major-read-as-packed": "tnd/token-major-uneven*",
    "base-2-instead-of-e": "layout/SBH*",
    "base-e-converted-twice": "layout/SBH*",
    "log-sum-exp-instead-of-max-and-sum": "layout/SBH*",
    "sums-left-out": "layout/SBH*",
    "sums-left-out-of-the-output": "layout/SBH*",
    "not-normalised": "layout/SBH*",
    "sides-swapped": "layout/SBH*",
    "statistics-in-float16": "layout/SBH*",
    "statistics-in-bfloat16": "layout/SBH*",
    "weights-in-float16": "layout/SBH*",
    "weights-in-bfloat16": "layout/SBH*",
    "weights-do-not-sum-to-1": "layout/SBH*",
    "rounded-at-every-hop": "states/8-bfloat16",
    "elements-in-16-bits": "dtype/*float16",
    "truncated": "dtype/*float16",
    "lane-by-element": "lanes/unequal-*",
    "last-lane": "lanes/unequal-*",
    "mean-of-lanes": "lanes/unequal-*",
    "no-max-subtraction": "statistics/huge-gaps-*",
    "stale-max": "statistics/huge-gaps-*",
    "prev-not-rescaled": "layout/SBH*",
    "last-token-dropped": "tnd/packed-zero-length*",
    "last-token-zero": "tnd/packed-zero-length*",
    "empty-sides-not-guarded": "statistics/empty-float32",
    "sigmoid-form": "statistics/empty-float32",
    "prev-returned": "layout/SBH*",
    "cur-returned": "layout/SBH*",
    "in-place-reads-what-it-overwrote": "in-place/contiguous-*",
    "wrapped-offset": "large/*",
    "offsets-in-32-bits": "far/*",
    "depends-on-threads": "layout/SBH*",
    "input-changed": "layout/SBH*",
    "lane-3-differs": "layout/SBH*",
    "out-ignored": "out/contiguous-*",
    "out-not-written": "out/contiguous-*",
    "dtype-of-the-output": "dtype/bfloat16*",
    "writes-beside-a-strided-output": "out/*",
    "input-returned": "tnd/*-attention",
    "rows-in-float32-undeclared": "layout/SBH*",
    "fused-undeclared": "algebra/commutativity-*",
    "five-bits-at-tolerance-40": "dtype/bfloat16",
    "truncated-at-tolerance-40": "dtype/bfloat16",
}
OF_LSE = {
    "base-e-instead-of-2": "layout/SBH*",
    "logarithm-to-the-other-base": "layout/SBH*",
    "log-sum-exp-transposed": "layout/SBH*",
    "log-sum-exp-returned-transposed": "layout/SBH*",
    "log-sum-exp-padded": "tnd/packed-uneven*",
    "log-sum-exp-clamped": "statistics/empty-float32",
    "empty-side-not-rescaled": "statistics/empty-float32",
}
CAUGHT_BY |= {name: (CAUGHT_BY | OF_LSE)[name.removeprefix("lse-")] for name in LSE_TWINS}
NAMED = named()


@pytest.fixture(autouse=True)
def two_threads():
    before = rau.get_num_threads()
    rau.set_num_threads(2)
    yield
    rau.set_num_threads(before)


def test_the_table_names_every_mutant():
    assert CAUGHT_BY.keys() == MUTANTS.keys()


@pytest.mark.parametrize("plain", [Plain, PlainLSE], ids=lambda plain: plain.name)
def test_what_the_mutants_are_made_of_is_right(plain):
    """So each is wrong by its own mistake alone."""
    report = check_backend(plain, cases=NAMED)
    assert report.passed, str(report)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_kit_catches(name):
    started = time.monotonic()
    report = check_backend(MUTANTS[name], select=CAUGHT_BY[name])
    print(f"{name}: {len(report.failures)} failures in {time.monotonic() - started:.2f} s")
    assert report.backend == name
    assert report.failures, str(report)
    assert not report.passed


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["five-bits-at-tolerance-40", "truncated-at-tolerance-40"])
def test_a_tolerance_does_not_cover_a_bad_rounding_to_16_bits(name, dtype):
    report = check_backend(MUTANTS[name], select=f"dtype/{dtype}")
    assert [failure.id for failure in report.failures] == [f"dtype/{dtype}"], str(report)


@pytest.mark.parametrize("mutant", WITHIN_THEIR_TOLERANCE, ids=lambda mutant: mutant.name)
def test_what_is_within_its_declared_tolerance_passes(mutant):
    report = check_backend(mutant, cases=NAMED)
    assert report.passed, str(report)
    reasons = {failure.message for failure in report.excluded}
    assert any("only float64 rows decide" in reason for reason in reasons)


@pytest.mark.parametrize("mutant", WITHIN_THEIR_TOLERANCE, ids=lambda mutant: mutant.name)
def test_a_declared_tolerance_makes_no_difference_of_bits_a_finding(mutant):
    report = run_differential(["cython", mutant], [case for case in NAMED if fnmatchcase(case.id, "dtype/*")])
    assert report.passed, str(report)
    assert report.pairs["cython", mutant.name].different


@pytest.mark.parametrize("name", MUTANTS)
def test_the_harness_finds_the_smallest_case_that_replays_and_is_diagnosed(name, tmp_path, monkeypatch):
    if name == "fused-undeclared":  # nothing but other bits: any case shows that
        cases = [case for case in NAMED if fnmatchcase(case.id, "layout/*")]
    else:
        cases = [case for case in NAMED if fnmatchcase(case.id, CAUGHT_BY[name])]
    monkeypatch.setattr(Wrapped, "elements", 2**12)  # megabytes are for the kit: each of many smaller cases is run here
    started = time.monotonic()
    report = run_differential(["cython", MUTANTS[name]], cases, folder=tmp_path)
    print(f"{name}: {time.monotonic() - started:.2f} s")
    assert not report.passed
    finding = next(finding for finding in report.findings if name in finding.backend.split(", "))
    print(finding.case, finding.message)
    assert all(who in (name, f"cython, {name}") for who in report.wrong)
    assert f"python -m rau difftest --replay {tmp_path}" in finding.replay

    recorded = record.read_record(finding.file)
    mutant = MUTANTS[name]()
    again = run_recorded(recorded, [registry.get("cython"), mutant])
    assert any(name in who.split(", ") for who in again.wrong)
    if name in {**OF_MISTAKES, **LSE_TWINS}:
        assert not again.pairs[record.Recorded.name, name].different  # the recorded bits
        name = name.removeprefix("lse-")
        recognised = [candidate.mistake.name for candidate in diagnose(recorded).recognised]
        print(recognised)
        assert name in recognised
