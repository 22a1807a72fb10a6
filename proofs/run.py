"""Prove the bounds of rau's arithmetic: fill in the scripts beside this file and have Sollya and Gappa prove them.

    python proofs/run.py                     every bound that the documentation quotes
    python proofs/run.py --mutants           and that the proofs fail where one number is wrong
    python proofs/run.py --scripts FOLDER    the scripts as they are run, to read or to run by hand

The numbers are those of rau/arithmetic.py, which the kernels use. README.md has what is proven on paper.
Needs an environment that has rau, of which that file is a part, and `gappa` and `sollya`, which are packages of Debian.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cache
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ARITHMETIC = HERE.parent / "rau" / "arithmetic.py"
U, V = Fraction(1, 2**24), Fraction(1, 2**53)  # unit roundoffs of float32 and float64
STATES = (2, 3, 4, 8)  # of which Gappa is asked; README.md has the proof for any number

# What is wrong, and the constants that make it so.
MUTANTS: dict[str, dict[str, Any]] = {
    "LOG2_E has 24 bits": {"LOG2_E": float.fromhex("0x1.715476p+0")},
    "ROUND lacks its 2^51": {"ROUND": 2.0**52},
    "k * LN2_HIGH is rounded": {"LN2_HIGH": math.log(2), "LN2_LOW": float.fromhex("0x1.abc9e3b39803fp-56")},
    "LN2_LOW is left out": {"LN2_LOW": 0.0},
    "the coefficients are Taylor's": {"COEFFICIENTS": tuple(1 / math.factorial(n) for n in range(11, -1, -1))},
    "UNDERFLOW is where exp itself underflows": {"UNDERFLOW": -745.0},
    "UNDERFLOW cuts off too much": {"UNDERFLOW": -700.0},
}


class Bound(NamedTuple):
    """What is bounded, and by how much: as it is written, and exactly."""

    what: str
    text: str
    value: Fraction


class Proof(NamedTuple):
    """A script with its numbers, and what it proves, by the names in it."""

    script: str
    text: str
    bounds: dict[str, Bound]


class Script(Template):
    """A script with %NAMES. A line with %i stands for K lines, one a state; with %j for K - 1 lines, one an addition."""

    delimiter = "%"

    def fill(self, values: Mapping[str, str]) -> str:
        lines = []
        for line in self.template.splitlines():
            index, count = ("%i", int(values["K"])) if "%i" in line else ("%j", int(values["K"]) - 1)
            lines += [line.replace(index, str(i + 1)) for i in range(count)] if index in line else [line]
        return Script("\n".join(lines) + "\n").substitute(values)


def interval(size: Fraction, *, outward: bool = True) -> str:
    """From minus to plus a number, as Gappa writes numbers."""
    scaled = math.ceil(size * 2**200) if outward else math.floor(size * 2**200)
    return f"-{scaled}b-200, {scaled}b-200"


def decimal(number: float) -> Fraction:
    """A number as it is written."""
    return Fraction(str(number))


def in_v(what: str, count: Fraction) -> Bound:
    """A number of unit roundoffs of float64."""
    return Bound(what, f"{float(count):g} v", count * V)


def of_merge(numbers: Mapping[str, Any], states: int, single: bool) -> dict[str, Bound]:
    """The bounds of a row of some states, and of an element of it, in float32 or float64."""
    e, products = decimal(numbers["DIFFERENCE_BOUND"]), decimal(0.005)  # of errors with one another
    total = e + states + products
    weight = (e + 3 if states == 2 else 2 * e + 2 + states) + products  # of two shares one is exact
    element = weight + products + (0 if single else states)
    bounds = {}
    for name, what, roundings, count in (
        ("SUM", "the new sum", 1, total), ("WEIGHT", "a weight", 1, weight), ("ELEMENT", "an element", states + 1, element)
    ):  # fmt: skip
        text, value = f"{float(count):g} v", count * V
        if single:
            power = f"^{roundings}" if roundings > 1 else ""
            text, value = f"(1 + u){power} (1 + {text}) - 1", (1 + U) ** roundings * (1 + value) - 1
        bounds[name] = Bound(f"{'float32' if single else 'float64'}, {states} states: {what}", text, value)
    return bounds


def proofs(numbers: Mapping[str, Any]) -> Iterator[Proof]:
    """Fill in the scripts; each may use what those before it prove.

    Parameters
    ----------
    numbers : mapping
        The names of rau/arithmetic.py.
    """
    values = {name: float(numbers[name]).hex() for name in ("LOG2_E", "ROUND", "LN2_HIGH", "LN2_LOW", "UNDERFLOW")}
    values |= {"RADIUS": "0.34657362", "K": "1"}
    values["HORNER"], *others = (float(coefficient).hex() for coefficient in numbers["COEFFICIENTS"])
    for coefficient in others:
        values["HORNER"] = f"({values['HORNER']}) * t + {coefficient}"

    def proof(script: str, **bounds: Bound) -> Proof:
        template = Script((HERE / script).read_text(encoding="utf-8"))
        text = template.fill(values | {name: interval(bound.value, outward=False) for name, bound in bounds.items()})
        values.update({name: interval(bound.value) for name, bound in bounds.items()})
        return Proof(script, text, bounds)

    polynomial = in_v("the polynomial, relative to exp(t)", decimal(0.0343))
    rest = Bound("ln(2) - (LN2_HIGH + LN2_LOW)", "0.9 * 2^-86", decimal(0.9) / 2**86)
    yield proof("approximation.sollya", APPROXIMATION=polynomial, LN2_REST=rest)

    lost = Bound("what the difference d has lost", "2^-44", Fraction(1, 2**44))
    reduction = in_v("t - (d - k ln(2))", decimal(0.2501))
    yield proof("reduction.gappa", LOST=lost, REDUCTION=reduction)

    # exp(x) - 1 is less than x + x^2 for x < 1, and (1 + x) / exp(x) - 1 is between -x^2 and 0.
    values |= {"MOVED": interval(reduction.value + reduction.value**2), "SECOND_ORDER": interval(lost.value**2)}
    exponential = in_v("q, relative to exp(d)", decimal(numbers["BOUND"]))
    difference = in_v("q + q * lost, relative to exp(d + lost)", decimal(numbers["DIFFERENCE_BOUND"]))
    yield proof("exponential.gappa", EXPONENTIAL=exponential, DIFFERENCE=difference)
    yield proof("share.gappa", SHARE=in_v("a share of the sum", decimal(numbers["DIFFERENCE_BOUND"]) + decimal(1.001)))

    for single in True, False:
        for states in STATES:
            values |= {"K": str(states), "FORMAT": "single" if single else "double", "STORED": "single" if single else ""}
            values |= {"ROUNDOFF": interval(U if single else V)}
            values |= {"ADDITIONS": " * ".join(f"(1 + d{j})" for j in range(1, states))}
            for letter in "aA":
                values[f"SUM_OF_{letter}"] = "(" * (states - 1) + f"{letter}1"
                values[f"SUM_OF_{letter}"] += "".join(f" + {letter}{i})" for i in range(2, states + 1))
            bounds = of_merge(numbers, states, single)
            element = bounds.pop("ELEMENT")
            yield proof("update.gappa" if states == 2 else "row.gappa", **bounds)
            yield proof("element.gappa", ELEMENT=element)


def conditions(numbers: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """What README.md proves if the numbers allow it: what is bounded, by how much, and whether they do.

    Parameters
    ----------
    numbers : mapping
        The names of rau/arithmetic.py.
    """
    e, most = decimal(numbers["DIFFERENCE_BOUND"]), 2**20
    share = (1 + V) / (1 - e * V) * (1 + Fraction(1, 2**100))
    two = (1 + U / (1 + U)) ** 3 * (1 + of_merge(numbers, 2, single=False)["WEIGHT"].value)
    smallest = decimal(numbers["UNDERFLOW"]) * decimal(1.442695)  # the binary logarithm of its exponential is less

    def grown(count: Fraction | int) -> Fraction:  # exp(x) <= 1 + x + x^2 for x <= 1
        return 1 + count * V + (count * V) ** 2

    def within(shares: int, count: Fraction, roundings: int) -> bool:  # for fewer too, as powers are convex
        return all(share**shares * grown(r) <= 1 + (count + r) * V for r in (0, roundings))

    def step_by_step(count: Fraction) -> bool:
        return share <= 1 + (e + decimal(1.001)) * V and grown(most * (count - decimal(0.009))) <= 1 + most * count * V

    total, row, step = e + decimal(1.01), 2 * e + decimal(2.01), e + decimal(3.01)
    yield "the exponential of 0", "exactly 1", numbers["COEFFICIENTS"][-1] == 1
    yield "the exponential of UNDERFLOW", "2^-1021.4", smallest <= decimal(-1021.4)
    yield "float32, 2 states: an element", "3 u + 6 v", two <= 1 + 3 * U + 6 * V
    yield "K states: the new sum", f"(K + {float(total - 1):g}) v", within(1, total, most)
    yield "float64, K states: an element", f"(2 K + {float(row):g}) v", within(2, row, 2 * most)
    yield "float32, n partials, save (1 + u)^(4 n - 5)", f"{float(step):g} (n - 1) v", step_by_step(step)
    yield "float64, n partials: an element", f"{float(step + 2):g} (n - 1) v", step_by_step(step + 2)


@cache
def run(tool: str, *options: str, script: str) -> str:
    """What a tool says of a script, once; it must take it without a warning, as of expressions that are not equal."""
    done = subprocess.run([tool, *options], input=script, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if (done.returncode or "Warning" in said) and "some properties were not satisfied" not in said:
        sys.exit(f"{tool} does not take this script:\n\n{script}\n{said}")
    return said


def failure(proof: Proof) -> str:
    """What a script does not prove; empty where it proves everything."""
    if proof.script.endswith(".gappa"):
        # Numbers of 120 bits; a bound counts as better from a thousandth on; an interval is halved up to ten times.
        said = run("gappa", "-Eprecision=120", "-Echange-threshold=0.001", "-Edichotomy=10", script=proof.text)
        return said[said.find("Error") :] if "Error" in said else ""
    said = run("sollya", script=proof.text)
    for name, bound in proof.bounds.items():
        found = re.search(rf"^{name} (-?\d+)b(-?\d+) (-?\d+)b(-?\d+)$", said, re.M)
        if not found:
            sys.exit(f"Sollya prints no {name} of this script:\n\n{proof.text}\n{said}")
        for digits, power in found.group(1, 2), found.group(3, 4):
            if abs(int(digits)) * Fraction(2) ** int(power) > bound.value:
                return f"Error: {name} reaches {int(digits) * 2.0 ** int(power):.6g}\n"
    return ""


def failures(some: list[Proof]) -> Iterator[tuple[Proof, str]]:
    """Each proof with its failure, as many at a time as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from zip(some, pool.map(failure, some), strict=True)


def show(holds: bool, verdict: str, what: str, text: str, by: str) -> bool:
    """Print a line of a table."""
    print(f"{verdict if holds else 'NOT ' + verdict.upper():11}  {what:45}  {text:35}  {by}".rstrip(), flush=True)
    return holds


def report(numbers: Mapping[str, Any]) -> bool:
    """Print all bounds; whether every one is proven."""
    print("u = 2^-24 and v = 2^-53; d is a rounded difference of maxima, t its reduced argument; errors are relative,\n"
          "save those of d, t and ln(2).\n")  # fmt: skip
    good = True
    for proof, wrong in failures(list(proofs(numbers))):
        for bound in proof.bounds.values():
            good &= show(not wrong, "proven", bound.what, bound.text, proof.script)
        print(wrong, end="")
    for what, text, holds in conditions(numbers):
        good &= show(holds, "proven", what, text, "README.md")
    return good


def weakened(proof: Proof) -> Iterator[Proof]:
    """The proof of each of its bounds made smaller, by a twentieth or by v."""
    for name, bound in proof.bounds.items():
        less = bound._replace(value=bound.value - min(bound.value / 20, V))
        text = proof.text.replace(interval(bound.value, outward=False), interval(less.value, outward=False))
        yield Proof(proof.script, text, {name: less})


def report_mutants(numbers: Mapping[str, Any]) -> bool:
    """Print what becomes of the proofs where one thing is wrong; whether each is refused."""
    good = True
    print("\nWith a constant that is wrong:\n")
    for what, changed in MUTANTS.items():
        wrong = {**numbers, **changed}
        by = [proof.script for proof, failed in failures(list(proofs(wrong))) if failed]
        by += [f"README.md: {of}" for of, _, holds in conditions(wrong) if not holds]
        good &= show(bool(by), "refused", what, "", ", ".join(by))
    print("\nWith a bound that is smaller, by a twentieth or by v:\n")
    for weaker, failed in failures([each for proof in proofs(numbers) for each in weakened(proof)]):
        for bound in weaker.bounds.values():
            good &= show(bool(failed), "refused", bound.what, bound.text, weaker.script)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description="Prove the bounds of rau's arithmetic with Sollya and Gappa.")
    parser.add_argument("--mutants", action="store_true", help="also see each proof fail where a number is wrong")
    parser.add_argument("--scripts", metavar="FOLDER", type=Path, help="write the scripts there, and prove nothing")
    arguments = parser.parse_args()
    numbers = runpy.run_path(str(ARITHMETIC))
    if arguments.scripts:
        arguments.scripts.mkdir(parents=True, exist_ok=True)
        for i, proof in enumerate(proofs(numbers), 1):
            (arguments.scripts / f"{i:02}-{proof.script}").write_text(proof.text, encoding="utf-8")
        return
    missing = [tool for tool in ("gappa", "sollya") if shutil.which(tool) is None]
    if missing:
        sys.exit(f"The proofs need {' and '.join(missing)}, which this machine does not have; on Debian or Ubuntu:\n"
                 "    apt-get install gappa sollya")  # fmt: skip
    good = report(numbers)
    if arguments.mutants:
        good &= report_mutants(numbers)
    sys.exit(not good)


if __name__ == "__main__":
    main()
