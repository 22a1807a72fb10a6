"""Whether a backend gives the published bits: digests of merges whose inputs are made of integers alone.

No library's random stream, logarithm or printing has a part in them, so that any two machines merge the same numbers, and
``digests.json`` beside this file holds a digest of what comes out, for each group of merges.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rau.arrays.numpy_ import EIGHT_BITS, named_dtype
from rau.state import AttentionState
from rau.streaming import StreamingMerge
from rau.testing.apart import Apart, Here, NoAnswer, Patience
from rau.testing.cases import Case
from rau.testing.trial import excluded_by
from rau.testing.trial.judge import promises_bits
from rau.testing.under_test import described, host_state, own_state
from rau.update import merge_states

_PUBLISHED = Path(__file__).with_name("digests.json")
_BITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}  # of a significand
_DTYPES = [(name, name) for name in _BITS] + [("float32", "float16"), ("float32", "bfloat16")]
_LAYOUTS = ("SBH", "TND", "packed", "BSND", "BNSD")
_DIGITS = 16  # of a digest
_HEAD_DIMS = (1, 7, 8, 22, 64, 100, 128)


def words(seed: int, count: int) -> np.ndarray:
    """Make 64-bit integers by SplitMix64 [1]_, by integer operations that are the same everywhere.

    Returns
    -------
    ndarray of uint64, shape (count,)

    References
    ----------
    .. [1] G. L. Steele Jr., D. Lea, C. H. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.

    Examples
    --------
    >>> hex(words(0, 2)[0]), hex(words(0, 2)[1])
    ('0xe220a8397b1dcdaf', '0x6e789e6aa1b965f4')
    """
    z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def fractions(integers: np.ndarray, bits: int) -> np.ndarray:
    """Make numbers from -4 on and below 4, of so many bits, which any dtype with as many holds exactly."""
    return ((integers >> np.uint64(64 - bits)).astype(np.float64) - 2.0 ** (bits - 1)) * 2.0 ** (3 - bits)


_SPECIAL = (np.nan, np.inf, -np.inf, 0.0, -0.0, 2.0**-14, -(2.0**-20), 60000.0)  # of outputs
# What is made of one row in two of a state: of its maximum, its sum, and the first state's maximum, new ones of the first two.
_NASTY: tuple[Callable[[Any, Any, Any], tuple[Any, Any]], ...] = (
    lambda m, l, first: (-np.inf, l), lambda m, l, first: (m, 0.0), lambda m, l, first: (np.nan, l),
    lambda m, l, first: (m, np.nan), lambda m, l, first: (np.inf, l), lambda m, l, first: (m, np.inf),
    lambda m, l, first: (m, -l), lambda m, l, first: (m, l * 2.0**126), lambda m, l, first: (m, l * 2.0**-140),
    lambda m, l, first: (m * 2.0**125, l), lambda m, l, first: (m - 88.0, l), lambda m, l, first: (m - 103.5, l),
    lambda m, l, first: (m - 708.0, l), lambda m, l, first: (first, l), lambda m, l, first: (0.0, l), lambda m, l, first: (-0.0, l),
)  # fmt: skip


def fill(case: Case, seed: int) -> list[AttentionState]:
    """Make the states of a case: half of the rows with statistics that no kernel should write, and some do."""
    shape, stats_shape = case.shapes
    rows, size = int(np.prod(stats_shape[:-1])), int(np.prod(shape))
    states, first = [], np.zeros(rows)
    for k, dtype in enumerate(case.dtypes):
        drawn = words((seed << 16) + k, size + 3 * rows)
        output = fractions(drawn[:size], _BITS[dtype])
        special = np.asarray(_SPECIAL)[(drawn[:size] % np.uint64(8)).astype(np.intp)]
        output = np.where(drawn[:size] >> np.uint64(3) & np.uint64(63) == 0, special, output)
        maximum = 4 * fractions(drawn[size : size + rows], 24)
        total = 5 + fractions(drawn[size + rows : size + 2 * rows], 24)
        first = maximum if k == 0 else first
        kinds = drawn[size + 2 * rows :] % np.uint64(2 * len(_NASTY))
        with np.errstate(all="ignore"):
            for kind, nasty in enumerate(_NASTY):
                its_maximum, its_total = nasty(maximum, total, first)
                maximum, total = np.where(kinds == kind, its_maximum, maximum), np.where(kinds == kind, its_total, total)
            parts = [part.astype(case.stats_dtype).reshape(stats_shape[:-1]) for part in (maximum, total)]
            states.append(AttentionState(output.reshape(shape).astype(named_dtype(dtype)), *map(case.in_all_lanes, parts)))
    return states


@cache
def cases() -> dict[str, list[Case]]:
    """List the merges, by group; what a backend's capabilities exclude, they exclude by groups."""
    groups: dict[str, list[Case]] = {}
    for first, later in _DTYPES:
        dtype = first if first == later else f"{first} from {later}"
        for layout in _LAYOUTS:
            base = Case(
                id="", layout="TND" if layout == "packed" else layout, softmax_layout="SBH" if layout == "packed" else "TND",
                batch=2, tokens=9, heads=3, lengths=(4, 0, 5), dtype=first, cur_dtype=later,
            )  # fmt: skip
            sizes = [replace(base, head_dim=head_dim) for head_dim in _HEAD_DIMS]
            groups[f"{dtype}, {layout}"] = [*sizes, replace(base, out="prev", head_dim=64), replace(base, out="given", head_dim=17)]
            groups[f"{dtype}, {layout}, 1 lane"] = [replace(base, lanes=1, head_dim=32)]
        for states in (1, 3, 4, 5, 8, 17) if first == later else (3, 4, 5, 8, 17):
            groups[f"{dtype}, {states} states"] = [replace(base, layout="TND", states=states, head_dim=D) for D in (5, 64)]
    for first, later in (("float32", "float32"), ("float32", "bfloat16"), ("float16", "float16")):
        large = Case(id="", layout="TND", tokens=2304, lengths=(2304,), heads=8, head_dim=128, dtype=first, cur_dtype=later)
        groups[f"large, {first} from {later}"] = [large]  # an output of more than 8 MB in float32
    return groups


def rings(backend: Any) -> Iterator[tuple[str, Case, Callable[[list[AttentionState]], AttentionState]]]:
    """List what is merged otherwise, each with a name, a case that it takes states of, and how."""
    base = Case(id="", layout="TND", tokens=24, lengths=(24,), heads=3, head_dim=40, states=5, lanes=1)
    for dtype in _BITS:
        def ring(states: list[AttentionState]) -> AttentionState:
            merge = StreamingMerge("TND", backend=backend)
            for state in states:
                merge.update(*state)
            return merge.result()

        yield f"ring of {dtype}", replace(base, dtype=dtype), ring
    mask = words(7, 24) % np.uint64(2) == 0
    yield "some tokens", base, lambda states: merge_states(states, layout="TND", tokens=mask, backend=backend)
    yield "output alone", base, lambda states: states[0]._replace(
        attn_out=merge_states(states, layout="TND", statistics=False, backend=backend)
    )
    for dtype in EIGHT_BITS:
        try:
            named_dtype(dtype)
        except ImportError:  # of ml_dtypes: not taken here, as what excluded_by says of bfloat16
            continue
        how = {"dtype": dtype, "scale": 100.0, "layout": "TND", "backend": backend}
        yield dtype, base, lambda states, how=how: merge_states(states, **how)  # type: ignore[misc]


def digest(states: list[AttentionState], results: list[AttentionState]) -> str:
    """Hash results, byte by byte in little-endian order; and what they are of, so that no other numbers go unseen.

    All NaN are one, and a maximum of zero has no sign, as the contract has it.
    """
    found = hashlib.sha256()
    for state in (*states, *(result._replace(softmax_max=result.softmax_max + 0) for result in results)):
        for array in state:
            bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
            with np.errstate(invalid="ignore"):
                bits = np.where(np.isnan(array.astype(np.float64)), np.array(-1).astype(bits.dtype), bits)
            found.update(repr((array.dtype.name, array.shape)).encode())
            found.update(bits.astype(bits.dtype.newbyteorder("<")).tobytes())
    return found.hexdigest()[:_DIGITS]


def digests(
    backend: Any, progress: Callable[[str, float], None] = lambda name, share: None, place: Here | Apart = Here()
) -> dict[str, str]:
    """Run all groups on a backend.

    Parameters
    ----------
    backend : Backend
    progress : callable, optional
        Called after each group with its name and its share of the work.
    place : Here or Apart, optional
        Where the backend runs, as :func:`rau.testing.check_backend` takes it.

    Returns
    -------
    dict of str
        The digest of each group that the backend takes; of one that it fails in, the exception, or how it crashed.
    """
    found, patience = {}, Patience(place)
    names = [*cases(), *(name for name, _, _ in rings(backend))]
    for name in names:
        try:
            its = patience.call(_digest, backend, name)
        except NoAnswer as lost:
            its = str(lost)
        if its:
            found[name] = its
        progress(name, 1 / len(names))
    return found


def promised(backend: Any) -> set[str]:
    """Name the groups of which a backend promises the published bits, whether it takes them or not."""
    if not backend.capabilities.deterministic:
        return set()
    groups = cases() | {name: [case] for name, case, _ in rings(backend)}
    for name in groups:
        if name.startswith("ring of "):  # one update after another, whatever its merge does
            groups[name] = [replace(case, states=2) for case in groups[name]]
    return {name for name, merges in groups.items() if all(promises_bits(backend, case) for case in merges)}


def _digest(backend: Any, name: str) -> str:
    """Run a group: its digest or the exception, nothing if the backend does not take it."""
    others = {name: (case, merge) for name, case, merge in rings(backend)}
    merges = cases().get(name) or [others[name][0]]
    if any(excluded_by(backend, _wherever(backend, case)) for case in merges):
        return ""
    numbers = [fill(case, number) for number, case in enumerate(merges)]
    try:
        if name in others:
            results = [host_state(backend, others[name][1]([own_state(backend, state) for state in numbers[0]]))]
        else:
            results = [_merged(backend, case, states) for case, states in zip(merges, numbers, strict=True)]
            for case, states, result in zip(merges, numbers, results, strict=True):
                if case.out == "prev":  # what was written there, if it was: memory may be of the backend's own
                    states[0] = result
        return digest([state for states in numbers for state in states], results)
    except Exception as error:
        return described(error)


def _wherever(backend: Any, case: Case) -> Case:
    """A case for a backend that may not write into given arrays: a result has the same bits wherever it is."""
    return case if backend.capabilities.out else replace(case, out="fresh")


def _merged(backend: Any, case: Case, states: list[AttentionState]) -> AttentionState:
    """Make the call of a case on a backend's own arrays, the result on its own memory where the case says so."""
    own = [own_state(backend, state) for state in states]
    out, case = None, _wherever(backend, case)
    if case.out == "prev":
        out = own[0]
    elif case.out == "given":
        out = own_state(backend, AttentionState(*(part.copy() for part in case.blank()[0])))
    return host_state(backend, case.call(own, out, backend))


def published() -> dict[str, str]:
    """Read the digests that belong to this version."""
    found: dict[str, str] = json.loads(_PUBLISHED.read_text())
    return found


def publish(backend: Any) -> None:
    """Write what a backend gives to the file that :func:`published` reads: for a new group, or a decision to change bits."""
    found = digests(backend)
    failed = {group: told for group, told in found.items() if len(told) != _DIGITS}
    if failed:
        raise RuntimeError(f"{backend.name} fails in {failed}")
    _PUBLISHED.write_text(json.dumps(found, indent=0) + "\n")
