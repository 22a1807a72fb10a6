"""Calls that Hypothesis draws: the same bits from every backend, within the bound of the oracle."""

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings

from rau.backends import Capabilities
from rau.testing import strategies
from rau.testing.cases import Case, generated, placements
from rau.testing.cases.space import Weighted, choose_case
from rau.testing.comparison import compare, same_bits
from rau.testing.trial import check_case, expected_of, problem_of

sought = settings(max_examples=5000, database=None, phases=[Phase.generate])  # and not shrunk
slow_to_draw = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@settings(slow_to_draw, max_examples=150)
@given(strategies.calls())
def test_backends_agree_and_the_oracle_confirms(call):
    case, numbers = call
    expected = expected_of(case.make(numbers))
    one, other = case.make(numbers).run("numpy"), case.make(numbers).run("cython")
    assert not same_bits(one, other)
    comparison = compare(one, expected)
    assert comparison.passed, str(comparison)


@settings(slow_to_draw, max_examples=100)
@given(strategies.cases())
def test_kinds_of_numbers_are_drawn_too(case):
    for name in ("numpy", "cython"):
        problems, _ = check_case(_backend(name), case)
        assert not problems


def _backend(name):
    from rau import registry

    return registry.get(name)


NARROW = Capabilities(
    array_types=("numpy:ndarray",), dtypes=("float16", "float32"), mixed=False, layouts=("TND",),
    softmax_layouts=("SBH",), lanes=(8,), in_place=False, max_heads=4, max_head_dim=128, head_dim_multiple=64,
)  # fmt: skip


@settings(slow_to_draw, max_examples=100)
@given(strategies.cases(NARROW))
def test_a_backend_is_given_what_it_takes(case):
    assert not NARROW.limits_broken(problem_of(case.make()))


def test_so_it_is_by_weights():
    for number in range(100):
        case = choose_case(Weighted(f"narrow/{number}"), f"narrow/{number}", NARROW)
        assert not NARROW.limits_broken(problem_of(case.make()))


@given(strategies.cumulative_lengths(), strategies.cumulative_lengths(7), strategies.cumulative_lengths(0))
def test_cumulative_lengths(some, seven, none):
    for ends, last in ((some, some[-1]), (seven, 7), (none, 0)):
        assert ends[0] == 0 and ends[-1] == last
        assert all(np.diff(ends) >= 0)


@pytest.mark.parametrize(
    "interesting",
    [
        lambda case: case.layout == "TND" and 0 in case.lengths and case.softmax_layout == "SBH",
        lambda case: case.unequal_lanes,
        lambda case: case.out == "cur" and case.attn_placement == "reversed",
        lambda case: case.dtype == "float64" and case.lanes == 1,
        lambda case: case.cur_dtype == "bfloat16" != case.dtype,
        lambda case: case.layout == "BNSD" and case.heads == 0,
        lambda case: case.statistics == "large-sums" and case.states == 9,
    ],
)
def test_everything_is_drawn(interesting):
    find(strategies.cases(), interesting, settings=sought)


def test_an_id_stands_for_one_case_for_good():
    """A finding is replayed by its id: the order of the choices is not free."""
    (case,) = generated(7, 1, first=1)
    assert case == Case(
        id="generated/7/1", layout="TND", tokens=9, heads=3, head_dim=600, lengths=(0, 3, 5, 1), cur_dtype="float16", states=4,
        statistics="large-sums", attn_placement="offset", stats_placement="half", out_placement="transposed", out="prev",
    )  # fmt: skip


def test_it_shrinks_to_the_simplest():
    simplest = find(strategies.cases(), lambda case: case.states > 2, settings=settings(database=None))
    assert simplest == Case(
        id="drawn", batch=1, tokens=1, heads=1, head_dim=1, dtype="float32", cur_dtype="float32", states=3,
    )  # fmt: skip


@pytest.mark.parametrize(
    "hostile",
    [
        lambda output, maximum, total: np.isnan(output).any(),
        lambda output, maximum, total: np.signbit(output[output == 0]).any(),
        lambda output, maximum, total: (maximum == -np.inf).any(),
        lambda output, maximum, total: (maximum == np.inf).any(),
        lambda output, maximum, total: ((total > 0) & (total < 2.0**-126)).any() and (total == 0).any(),
        lambda output, maximum, total: np.isnan(maximum).any() and not np.isnan(maximum).all(),
    ],
)
def test_hostile_numbers_are_drawn(hostile):
    case = Case(id="mine", tokens=3, heads=1, head_dim=3)
    find(strategies.states(case), lambda numbers: bool(hostile(*numbers[0])), settings=sought)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_numbers_fit_their_case(dtype):
    case = Case(id="mine", layout="TND", lengths=(1, 2), tokens=3, dtype=dtype, lanes=1)

    @settings(max_examples=20, database=None)
    @given(strategies.states(case))
    def fits(numbers):
        call = case.make(numbers)
        assert problem_of(call).dtype == dtype
        assert [part.shape for part in call.states[1]] == [*case.shapes[:1], *case.shapes[1:] * 2]

    fits()


def test_placements_are_all_known():
    assert set(placements.PACKED_PLACEMENTS) <= set(placements.PLACEMENTS) >= set(placements.OUT_PLACEMENTS)
