"""The proofs' part that needs neither Gappa nor Sollya: that they are about our numbers, and that no bound is false.

.ci/run runs the proofs themselves, with `--mutants`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from patience import LIMIT

import rau
from rau import arithmetic
from rau.arithmetic import difference, exp_nonpositive

PROOFS = Path(__file__).parents[1] / "proofs"
NUMBERS = vars(arithmetic)


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("proofs_run", PROOFS / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its NamedTuples look for their types
    spec.loader.exec_module(module)
    return module


run = load()


# ---------------------------------------------------------------------------------------------------------- the scripts


def reached(changed: dict[str, object]) -> set[str]:
    """Which scripts differ where these numbers do."""
    pairs = zip(run.proofs(NUMBERS), run.proofs(NUMBERS | changed), strict=True)
    return {before.script for before, after in pairs if before.text != after.text}


@pytest.mark.parametrize(
    ("name", "scripts"),
    [
        ("LOG2_E", {"reduction.gappa"}),
        ("ROUND", {"reduction.gappa"}),
        ("UNDERFLOW", {"reduction.gappa"}),
        ("LN2_HIGH", {"approximation.sollya", "reduction.gappa"}),
        ("LN2_LOW", {"approximation.sollya", "reduction.gappa"}),
        ("BOUND", {"exponential.gappa"}),
        ("DIFFERENCE_BOUND", {"exponential.gappa", "share.gappa", "update.gappa", "row.gappa", "element.gappa"}),
    ],
)
def test_a_changed_number_reaches_the_scripts(name: str, scripts: set[str]) -> None:
    assert reached({name: NUMBERS[name] * (1 + 2**-20)}) == scripts


@pytest.mark.parametrize("index", range(len(arithmetic.COEFFICIENTS)))
def test_a_changed_coefficient_reaches_the_scripts(index: int) -> None:
    coefficients = list(arithmetic.COEFFICIENTS)
    coefficients[index] = np.nextafter(coefficients[index], 2)
    assert reached({"COEFFICIENTS": coefficients}) == {"approximation.sollya", "exponential.gappa"}


def test_every_state_and_addition_is_in_the_scripts() -> None:
    *_, row, element = run.proofs(NUMBERS)  # eight states in float64
    assert "s double= (((((((a1 + a2) + a3) + a4) + a5) + a6) + a7) + a8);" in row.text
    weight = run.interval(row.bounds["WEIGHT"].value, outward=False)
    assert all(f"(w{i}) -/ W{i} in [{weight}]" in row.text for i in range(1, 9))
    assert all(f"(1 + d{j})" in element.text for j in range(1, 8)) and element.text.count("\n  /\\ d") == 7
    assert not any("%" in proof.text for proof in run.proofs(NUMBERS))


def test_every_script_is_run() -> None:
    scripts = {path.name for path in PROOFS.iterdir() if path.suffix in {".gappa", ".sollya"}}
    assert {proof.script for proof in run.proofs(NUMBERS)} == scripts


def with_tools(tmp_path: Path, gappa: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the proofs with tools of our making."""
    sollya = "echo APPROXIMATION -1b-60 1b-60; echo LN2_REST -1b-90 1b-90"
    for name, script in {"gappa": gappa, "sollya": sollya}.items() if gappa is not None else ():
        (tmp_path / name).write_text(f"#!/bin/sh\nwhile read -r line; do :; done\n{script}\n")
        (tmp_path / name).chmod(0o755)
    command = [sys.executable, str(PROOFS / "run.py"), *arguments]
    return subprocess.run(command, env=os.environ | {"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=LIMIT)


def test_without_the_tools_the_line_to_type_is_said(tmp_path: Path) -> None:
    done = with_tools(tmp_path, None)
    assert done.returncode == 1 and not done.stdout
    assert "gappa and sollya" in done.stderr and "\n    apt-get install gappa sollya\n" in done.stderr


def test_everything_proven_is_success(tmp_path: Path) -> None:
    done = with_tools(tmp_path, "exit 0")
    assert (done.returncode, done.stderr) == (0, "") and "NOT" not in done.stdout


def test_what_is_not_proven_is_a_failure(tmp_path: Path) -> None:
    done = with_tools(tmp_path, "echo 'Error: some properties were not satisfied:'; exit 1")
    assert done.returncode == 1
    assert any(line.startswith("NOT PROVEN") and "1.71 v" in line for line in done.stdout.splitlines())
    assert any(line.startswith("proven") and line.endswith("approximation.sollya") for line in done.stdout.splitlines())


@pytest.mark.parametrize(("words", "status"), [("Error: syntax error", 1), ("Warning: a and b are not trivially equal.", 0)])
def test_a_script_that_a_tool_does_not_take_is_a_failure(tmp_path: Path, words: str, status: int) -> None:
    done = with_tools(tmp_path, f"echo '{words}' >&2; exit {status}")
    assert done.returncode == 1 and "does not take this script" in done.stderr and words in done.stderr


def test_a_tool_that_proves_anything_is_noticed(tmp_path: Path) -> None:
    done = with_tools(tmp_path, "exit 0", "--mutants")
    assert done.returncode == 1
    refused = [line for line in done.stdout.splitlines() if line.startswith("refused")]
    # By Sollya's numbers and by what is on paper.
    assert all("sollya" in line or "README.md" in line for line in refused)
    assert any(line.startswith("NOT REFUSED") and line.endswith("exponential.gappa") for line in done.stdout.splitlines())


def test_the_readme_says_what_is_proven() -> None:
    text = (PROOFS / "README.md").read_text(encoding="utf-8")
    e = Fraction(str(arithmetic.DIFFERENCE_BOUND))
    numbers = [Fraction(str(arithmetic.BOUND)), e, e + Fraction("1.01"), e + Fraction("3.01"), e + Fraction("5.01")]
    assert [f"{float(number):g}" in text for number in numbers] == [True] * len(numbers), numbers
    for _, bound, _ in run.conditions(NUMBERS):
        assert bound in text or bound.startswith(("exactly", "2^")), bound


# ------------------------------------------------------------------------------------------------------ what is measured


def exp(x: Fraction) -> Fraction:
    with localcontext() as context:
        context.prec = 400
        exact = Decimal(x.numerator) / Decimal(x.denominator)
        context.prec = 60
        return Fraction(exact.exp())


def off(approximate: float, exact: Fraction) -> float:
    """The relative error, in units of 2**-53."""
    return float(abs(Fraction(approximate) / exact - 1) * 2**53)


def weakened(bound: float) -> float:
    """What `run.py --mutants` shows to be refused in place of the bound."""
    return bound - min(bound / 20, 1)


def test_the_exponential_is_within_its_bound_and_beyond_the_weakened_one() -> None:
    inputs = """
        -0x1.1fd04dfc5a257p+2 -0x1.3a2b3ac8e3919p+9 -0x1.9a2d818685644p+3 -0x1.c7be7dbdf023fp+8 -0x1.5f60fcd6f7dcap-2
        -0x1.bf1475b1bf86cp+7 -0x1.62p+9 -0x1p-1074 -0x1.62e42fefa39efp-2 -0x1.62e42fefa39efp-1
    """
    x = np.array([*map(float.fromhex, inputs.split()), *np.random.default_rng(0).uniform(-708, 0, 500)])
    errors = [off(float(q), exp(Fraction(float(d)))) for d, q in zip(x, exp_nonpositive(x), strict=True)]
    assert weakened(arithmetic.BOUND) < max(errors) <= arithmetic.BOUND
    assert errors[5] < 3.72  # what it was by Taylor's polynomial of degree 12
    assert exp_nonpositive(np.array([0.0])) == 1


def test_the_exponential_of_a_difference_is_within_its_bound_and_beyond_the_weakened_one() -> None:
    inputs = """
        -0x1.1efcde0f71492p+2 0x1.617727ecdb9d2p-7
        -0x1.05a550bc96035p+7 -0x1.687d477e056e0p-3
        -0x1.1f4616a8946d7p+2 0x1.86344f1552860p-26
    """
    named = np.array([*map(float.fromhex, inputs.split())]).reshape(-1, 2)
    random = np.random.default_rng(0)
    top = random.uniform(-1, 1, 500) * 2.0 ** random.integers(-20, 10, 500)
    m, top = np.concatenate([named, np.stack([top - random.uniform(1, 690, 500), top], axis=1)]).T
    e = exp_nonpositive(*difference(m, top))
    errors = [off(float(x), exp(Fraction(float(a)) - Fraction(float(b)))) for x, a, b in zip(e, m, top, strict=True)]
    assert weakened(arithmetic.DIFFERENCE_BOUND) < max(errors) <= arithmetic.DIFFERENCE_BOUND


def exact(maxima: np.ndarray, sums: np.ndarray, outputs: np.ndarray) -> tuple[Fraction, Fraction, Fraction]:
    """A row's element, the sum of the magnitudes of its terms, and the new sum."""
    m, l, o = ([Fraction(float(x)) for x in part] for part in (maxima, sums, outputs))
    shares = [li * exp(mi - max(m)) for li, mi in zip(l, m, strict=True)]
    total = sum(shares, Fraction())
    terms = [share / total * oi for share, oi in zip(shares, o, strict=True)]
    return sum(terms, Fraction()), sum(map(abs, terms), Fraction()), total


def states(maxima: np.ndarray, sums: np.ndarray, outputs: np.ndarray) -> list[rau.AttentionState]:
    """Arrays of shape (states, rows) as states of one head and one element."""
    arrays = (part[:, :, None, None] for part in (outputs, maxima, sums))
    return [rau.AttentionState(*state) for state in zip(*arrays, strict=True)]


def far_apart(dtype: str, count: int, rows: int = 150) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maxima far apart and sums that make the weights about equal: where a rounded difference costs most."""
    random = np.random.default_rng(count)
    gap = random.uniform(0, 1, (count, rows)) * np.where(np.arange(rows) % 2, 350 if dtype == "float64" else 80, 3)
    gap[random.integers(0, count, rows), np.arange(rows)] = 0
    sums = np.exp(gap - gap.max(axis=0) / 2 + random.uniform(-1, 1, (count, rows)))
    outputs = random.standard_normal((count, rows)) * np.exp2(random.integers(-6, 6, (count, rows)))
    maxima = random.uniform(-9, 9, rows) - gap
    return maxima.astype(dtype), sums.astype(dtype), outputs.astype(dtype)


@pytest.mark.parametrize("count", run.STATES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_merge_is_within_its_bound(dtype: str, count: int) -> None:
    maxima, sums, outputs = far_apart(dtype, count)
    merged = rau.merge_states(states(maxima, sums, outputs), layout="TND", backend="numpy")
    bounds = run.of_merge(NUMBERS, count, dtype == "float32")
    tiny = Fraction(1, 2**149) if dtype == "float32" else Fraction(1, 2**500)
    worst = {"ELEMENT": 0.0, "SUM": 0.0}
    for row in range(maxima.shape[1]):
        element, size, total = exact(maxima[:, row], sums[:, row], outputs[:, row])
        error = abs(Fraction(float(merged.attn_out[row, 0, 0])) - element)
        allowed = bounds["ELEMENT"].value * size + tiny * (count + sum(abs(Fraction(float(o))) for o in outputs[:, row]))
        worst["ELEMENT"] = max(worst["ELEMENT"], float(error / allowed))
        error = abs(Fraction(float(merged.softmax_sum[row, 0, 0])) - total)
        worst["SUM"] = max(worst["SUM"], float(error / (bounds["SUM"].value * total)))
    assert all(0.1 < share <= 1 for share in worst.values()), worst


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_chain_is_within_its_bound(dtype: str) -> None:
    count = 24
    maxima, sums, outputs = far_apart(dtype, count, 60)
    ring = rau.StreamingMerge(layout="TND", backend="numpy")
    for state in states(maxima, sums, outputs):
        ring.update(*state)
    e, steps = Fraction(str(arithmetic.DIFFERENCE_BOUND)), count - 1
    if dtype == "float32":
        bound = (1 + run.U) ** (4 * count - 5) * (1 + (e + Fraction("3.01")) * steps * run.V) - 1
    else:
        bound = (e + Fraction("5.01")) * steps * run.V
    worst = 0.0
    for row in range(maxima.shape[1]):
        element, size, _ = exact(maxima[:, row], sums[:, row], outputs[:, row])
        worst = max(worst, float(abs(Fraction(float(ring.result().attn_out[row, 0, 0])) - element) / (bound * size)))
    assert 0.02 < worst <= 1


# ------------------------------------------------------------------------------------------------------------- the words


def test_the_documentation_quotes_what_is_proven() -> None:
    e = arithmetic.DIFFERENCE_BOUND
    pair, many, ring = rau.ring_attention_update.__doc__, rau.merge_states.__doc__, rau.StreamingMerge.__doc__
    assert pair is not None and many is not None and ring is not None
    assert "(3*u + 6*v) * S" in pair and f"within {e + 5.01:g} * v * S" in pair
    assert f"(1 + (K + {2 * e + 2.01:g}) * v) - 1) * S" in many and f"(2*K + {2 * e + 2.01:g}) * v * S" in many
    assert f"(1 + {e + 3.01:g} * (n - 1) * v) - 1) * S" in ring and f"{e + 5.01:g} * (n - 1) * v * S" in ring
    stated = (PROOFS / "README.md").read_text(encoding="utf-8")
    for number in (arithmetic.BOUND, e, e + 0.01, e + 5.01, 2 * e + 2.01, e + 3.01):
        assert f"{number:g}" in stated
