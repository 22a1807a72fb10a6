"""Hypothesis strategies: calls with hostile numbers, for testing a backend of your own. Needs Hypothesis.

The rule of this room: `rau.testing.cases.space` says which calls there are; here they, and their numbers, are drawn.

A test of a backend is then a few lines::

    from hypothesis import given
    from rau.testing import strategies
    from rau.testing.trial import check_case

    backend = MyBackend()

    @given(strategies.calls(backend.capabilities))
    def test_any_call(call):
        case, numbers = call
        problems, _ = check_case(backend, case, numbers=numbers)
        assert not problems

A failure shrinks to the simplest call: one token, one head, float32, fresh outputs, plain numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rau.arrays.numpy_ import named_dtype
from rau.backends import Capabilities
from rau.state import AttentionState
from rau.testing.cases import Case
from rau.testing.cases.space import EVERYTHING, T, choose_case

_HOSTILE_MAXIMA = (0.0, -0.0, -np.inf, np.inf, np.nan, 87.0, -87.0, -104.0, 708.0, -2.0**127)
_HOSTILE_SUMS = (0.0, -0.0, np.inf, np.nan, 2.0**-149, 2.0**-126, 2.0**127, -1.0)


def cumulative_lengths(tokens: int | None = None, *, max_sequences: int = 6) -> st.SearchStrategy[list[int]]:
    """Draw cumulative sequence lengths for `actual_seq_qlen`; empty sequences included.

    Parameters
    ----------
    tokens : int, optional
        T, the last length; any small number by default.
    max_sequences : int, default 6

    Returns
    -------
    SearchStrategy of list of int
        From 0 to T, non-decreasing.

    Examples
    --------
    >>> from hypothesis import given, settings
    >>> @settings(max_examples=10, database=None)
    ... @given(cumulative_lengths(20))
    ... def test(ends):
    ...     assert ends[0] == 0 and ends[-1] == 20 and ends == sorted(ends)
    >>> test()
    """
    if tokens is None:
        return _lengths((0, 1, 2, 3, 9), max_sequences).map(lambda drawn: [0, *np.cumsum(drawn, dtype=int).tolist()])
    cuts = st.lists(st.integers(0, tokens), max_size=max_sequences - 1)
    return cuts.map(lambda drawn: [0, *sorted(drawn), tokens])


@st.composite
def cases(draw: st.DrawFn, capabilities: Capabilities = EVERYTHING) -> Case:
    """Draw a case: layout, orders, dtypes, lanes, lengths, kinds of numbers, places in memory, where the result goes.

    Parameters
    ----------
    capabilities : Capabilities, optional
        Those of the backend that will run it: what they exclude is not drawn. Everything by default.

    Returns
    -------
    Case
        Its own numbers depend only on the case; :func:`states` draws others.

    Examples
    --------
    >>> from hypothesis import given, settings
    >>> @settings(max_examples=10, database=None)
    ... @given(cases())
    ... def test(case):
    ...     assert case.make().run("numpy").attn_out.shape == case.shapes[0]
    >>> test()
    """
    return choose_case(_Drawn(draw), "drawn", capabilities)


class _Drawn:
    """Hypothesis as a chooser. All is drawn, needed or not: what needs fewer draws is simpler to it."""

    largest = 33  # numbers are drawn one by one

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw

    def one(self, options: Mapping[T, float] | Sequence[T], when: bool = True) -> T:
        drawn = self.draw(st.sampled_from(list(options)))
        return drawn if when else next(iter(options))

    def chance(self, probability: float, when: bool = True) -> bool:
        return self.draw(st.booleans()) and when

    def several(self, options: Sequence[int], most: int) -> Sequence[int]:
        return self.draw(_lengths(options, most))


def _lengths(options: Sequence[int], most: int) -> st.SearchStrategy[list[int]]:
    # An empty sequence is not the simplest: what fails shrinks to sequences of one token.
    return st.lists(st.sampled_from(sorted(options, key=lambda n: (n == 0, n))), max_size=most)


def states(case: Case) -> st.SearchStrategy[list[AttentionState]]:
    """Draw the numbers of a case, one by one: NaN, infinities, subnormal numbers, zeros of both signs.

    Parameters
    ----------
    case : Case
        Its own kinds of numbers do not matter.

    Returns
    -------
    SearchStrategy of list of AttentionState
        For ``case.make(numbers)``.

    Examples
    --------
    >>> from hypothesis import given, settings
    >>> case = Case(id="mine", heads=3)
    >>> @settings(max_examples=10, database=None)
    ... @given(states(case))
    ... def test(numbers):
    ...     assert len(case.make(numbers).states) == 2
    >>> test()
    """
    shape, stats_shape = case.shapes
    width: Any = 64 if case.stats_dtype == "float64" else 32
    any_number = st.floats(width=width)
    maxima = st.one_of(st.floats(-100, 100, width=width), st.sampled_from(_HOSTILE_MAXIMA), any_number)
    sums = st.one_of(st.floats(1, 1000, width=width), st.sampled_from(_HOSTILE_SUMS), any_number)

    def statistic(elements: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
        return hnp.arrays(case.stats_dtype, stats_shape[:-1], elements=elements).map(case.in_all_lanes)

    def state(dtype: str) -> st.SearchStrategy[AttentionState]:
        return st.builds(AttentionState, _numbers(dtype, shape), statistic(maxima), statistic(sums))

    return st.tuples(*map(state, case.dtypes)).map(list)


def _numbers(dtype: str, shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    if dtype in ("float32", "float64"):
        return hnp.arrays(dtype, shape)
    # Rounded from float32: bfloat16 is unknown to Hypothesis, and to draw float16 is to discard most of what it draws.
    hostile = st.sampled_from((0.0, -0.0, np.inf, np.nan, 65504.0, 2.0**-24, -(2.0**-133)))
    elements = st.one_of(st.floats(-100, 100, width=32), hostile, st.floats(width=32))

    def rounded(drawn: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return drawn.astype(named_dtype(dtype))

    return hnp.arrays(np.float32, shape, elements=elements).map(rounded)


@st.composite
def calls(draw: st.DrawFn, capabilities: Capabilities = EVERYTHING) -> tuple[Case, list[AttentionState]]:
    """Draw a case and its numbers.

    Parameters
    ----------
    capabilities : Capabilities, optional
        As in :func:`cases`.

    Returns
    -------
    case : Case
    numbers : list of AttentionState
        ``case.make(numbers)`` is the call, with fresh arrays each time.

    Examples
    --------
    >>> from hypothesis import given, settings
    >>> from rau.testing.comparison import same_bits
    >>> @settings(max_examples=10, database=None)
    ... @given(calls())
    ... def test(call):
    ...     case, numbers = call
    ...     once, again = case.make(numbers).run("numpy"), case.make(numbers).run("numpy")
    ...     assert not same_bits(once, again)
    >>> test()
    """
    case = draw(cases(capabilities))
    return case, draw(states(case))
