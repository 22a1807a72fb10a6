"""The published bits: that they are those of every backend, and that no bit changes without a digest."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from patience import LIMIT

from rau import registry
from rau.__main__ import main
from rau.backends import Backend
from rau.state import AttentionState
from rau.testing import bits

pytest.importorskip("ml_dtypes")


def test_these_are_the_published_bits(backend):
    assert bits.digests(registry.get(backend)) == bits.published()


def test_without_ml_dtypes_what_needs_it_is_not_taken_and_nothing_fails():
    """As in an environment with NumPy and nothing else."""
    code = "import sys; sys.modules['ml_dtypes'] = None; from rau.__main__ import main; sys.exit(main(['bits', '--backends', 'numpy', '--json']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(done.stdout)["backends"]["numpy"]
    assert not row["differ"] and row["same"] and {"float8_e4m3fn", "float8_e5m2"} < {*row["not_taken"]}
    assert all("float" not in group or "bfloat16" in group or "float8" in group for group in row["not_taken"])


def test_what_is_published_are_digests():
    """Of every group that there is, and of no failure."""
    published = bits.published()
    assert all(re.fullmatch("[0-9a-f]{16}", value) for value in published.values()) and len({*published.values()}) == len(published)
    assert {*bits.cases()} < {*published}


def test_the_integers_are_those_of_the_paper():
    """The first numbers of its reference implementation, from 1234567, one by one in Python's integers."""
    state, expected = 1234567, []
    for _ in range(5):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        expected.append(z ^ (z >> 31))
    assert expected[0] == 6457827717110365317  # as published with the reference implementation
    assert bits.words(1234567, 5).tolist() == expected


def test_what_is_merged_is_exact_and_nasty():
    """No rounding decides what the inputs are, and all that can be wrong with statistics is in them."""
    for name, group in bits.cases().items():
        for case in group[:1]:
            (first, *_) = states = bits.fill(case, 0)
            assert len(states) == case.states and first.attn_out.dtype.name == case.dtype, name
            wide = first.attn_out.astype(np.float64)
            assert (np.isnan(wide) | (wide.astype(first.attn_out.dtype).astype(np.float64) == wide)).all()
    states = [state for case in bits.cases()["float32, 17 states"] for state in bits.fill(case, 1)]
    maxima, sums = (np.concatenate([state[field].ravel() for state in states]) for field in (1, 2))
    for found in (np.isnan(maxima), np.isnan(sums), maxima == np.inf, maxima == -np.inf, sums == np.inf, sums == 0, sums < 0,
                  (sums > 0) & (sums < 1e-38), sums > 1e38, maxima > 1e37, maxima < -700, (maxima == 0) & np.signbit(maxima)):  # fmt: skip
        assert found.any()


class Mine(Backend):
    name = "mine"
    capabilities = replace(registry.get("numpy").capabilities, dtypes=("float32",), mixed=False)
    wrong = None

    def update(self, problem, prev, cur, out):
        return self.merge(problem, [prev, cur], out)

    def merge(self, problem, states, out):
        result = registry.get("numpy").merge(problem, states, out)
        if self.wrong is not None:
            self.wrong(problem, result)
        return result


def last_bit(problem, result):
    if problem.K == 4:
        result.attn_out.view(np.int32)[np.isfinite(result.attn_out)] ^= 1


def zero(problem, result):
    if problem.layout == "BSND":
        result.softmax_sum[np.signbit(result.softmax_sum)] *= -1


def raises(problem, result):
    if problem.layout == "SBH":
        raise ValueError("no memory")


@pytest.mark.parametrize(
    ("wrong", "groups"),
    [
        (last_bit, {"float32, 4 states"}), (zero, {"float32, BSND"}), (raises, {"float32, SBH", "float32, SBH, 1 lane"}),
    ],
)  # fmt: skip
def test_the_groups_that_differ_are_named(monkeypatch, capsys, wrong, groups):
    class Wrong(Mine):
        pass

    Wrong.wrong = staticmethod(wrong)
    monkeypatch.setattr("rau.testing.under_test.load", lambda name: Wrong())
    assert main(["bits", "--backends", "mine", "--in-process"]) == 1
    told = capsys.readouterr().out
    assert "mine: NOT the published bits in" in told and "Next: python -m rau check " in told
    found = {line.strip().partition(": ")[0] for line in told.splitlines() if line.startswith("    float32")}
    assert found >= groups and len(found) <= 3, told
    assert ("ValueError: no memory" in told) == (wrong is raises)


def test_what_is_not_taken_or_not_promised_is_said(monkeypatch, capsys):
    class Fast(Mine):
        capabilities = replace(Mine.capabilities, tolerance=4.0)
        wrong = staticmethod(last_bit)

    monkeypatch.setattr("rau.testing.under_test.load", lambda name: Mine())
    assert main(["bits", "--backends", "mine", "--in-process", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["backends"]["mine"]
    assert {name.split(",")[0] for name in row["same"]} >= {"float32", "ring of float32"} and row["differ"] == []
    assert len(row["same"]) + len(row["not_taken"]) == len(bits.published())
    monkeypatch.setattr("rau.testing.under_test.load", lambda name: Fast())
    assert main(["bits", "--backends", "mine", "--in-process"]) == 0
    assert "Its capabilities do not promise them." in capsys.readouterr().out


def published_but(wrong):
    """The published bits, made by a backend whose update is the only thing of its own."""

    class Folds(Backend):
        name = "folds"
        capabilities = replace(registry.get("numpy").capabilities, dtypes=("float32",), mixed=False)

        def update(self, problem, prev, cur, out):
            result = registry.get("numpy").merge(problem, [prev, cur], out)
            if wrong is not None:
                wrong(problem, result)
            return result

    return Folds()


def in_a_batch(problem, result):
    if problem.layout == "BSND":
        result.attn_out.view(np.int32)[np.isfinite(result.attn_out)] ^= 1


def in_the_ring(problem, result):
    if problem.T == 24:
        result.attn_out.view(np.int32)[np.isfinite(result.attn_out)] ^= 1


@pytest.mark.parametrize(
    ("wrong", "groups"),
    [(None, set()), (in_a_batch, {"float32, BSND", "float32, BSND, 1 lane"}), (in_the_ring, {"ring of float32"})],
)
def test_a_merge_of_one_update_after_another_promises_the_bits_of_updates(monkeypatch, capsys, wrong, groups):
    """A ring's, too, which is nothing else; those of a merge that rounds once are not its."""
    monkeypatch.setattr("rau.testing.under_test.load", lambda name: published_but(wrong))
    assert main(["bits", "--backends", "folds", "--in-process", "--json"]) == bool(groups)
    row = json.loads(capsys.readouterr().out)["backends"]["folds"]
    assert {*row["differ"]} == groups and "float32, SBH" in row["same"]
    assert {*row["not_promised"]} >= {"float32, 3 states", "float32, 17 states", "output alone"}
    assert not any("ring" in group or "SBH" in group for group in row["not_promised"])
    assert main(["bits", "--backends", "folds", "--in-process"]) == bool(groups)
    told = f"Its capabilities do not promise {str(len(row['not_promised'])) + ' of them' if groups else 'them'}."
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("kind", [{"deterministic": False}, {"unpromised": ("payload",)}, {"statistics": "lse"}], ids=str)
def test_what_differs_and_promises_no_bits_does_not_fail(monkeypatch, capsys, kind):
    class Loose(Mine):
        capabilities = replace(Mine.capabilities, **kind)
        wrong = staticmethod(last_bit)

    monkeypatch.setattr("rau.testing.under_test.load", lambda name: Loose())
    assert main(["bits", "--backends", "mine", "--in-process", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["backends"]["mine"]
    assert row["differ"] == [] and "float32, 4 states" in row["not_promised"]


def test_what_is_not_promised_is_compared_only_where_it_is_named(monkeypatch, capsys):
    class Fast(Mine):
        name = "fast"
        capabilities = replace(Mine.capabilities, tolerance=4.0)
        wrong = staticmethod(lambda problem, result: pytest.fail("it was asked"))

    monkeypatch.setattr("rau.cli.session.choose", lambda names: ([Mine(), Fast()], {}))
    assert main(["bits", "--in-process"]) == 0
    told = capsys.readouterr().out
    assert "mine: these are the published bits" in told and "fast: " not in told
    assert "not run: fast (it promises no bits; --backends fast compares them)\n" in told


def test_what_needs_ml_dtypes_is_not_taken_without(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert main(["bits", "--backends", "numpy", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["backends"]["numpy"]
    assert {"float8_e5m2", "float8_e4m3fn", "bfloat16, SBH"} < {*row["not_taken"]} and "float16, SBH" in row["same"]
    assert main(["bits", "--backends", "numpy"]) == 0
    told = "not run: bfloat16 and eight bits (bfloat16 NumPy arrays need ml_dtypes: pip install ml_dtypes)\n"
    assert told in capsys.readouterr().out


def test_a_maximum_of_zero_has_no_sign_and_all_nan_are_one():
    def state(maximum, nan):
        stats = np.full((1, 1, 1), maximum, np.float32)
        return AttentionState(np.array([nan], np.uint32).view(np.float32).reshape(1, 1, 1), stats, np.ones_like(stats))

    same = {bits.digest([], [state(zero, nan)]) for zero in (0.0, -0.0) for nan in (0x7FC00000, 0xFFC00001)}
    assert len(same) == 1
    assert bits.digest([], [state(0.0, 0x3F800000)]) != bits.digest([], [state(0.0, 0x3F800001)])
