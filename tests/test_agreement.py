"""numpy and cython, every SIMD version and any number of threads: the same bits, within the bound of the oracle.

The cases mix layouts, orders, dtypes, lanes, numbers of states, hostile statistics and outputs, strides, alignment,
read-only and aliased inputs, and every way to say where the result goes.
"""

import numpy as np
import own_arrays
import pytest

import rau
from rau.testing import compare, oracle
from rau.testing.cases import Case, generated
from rau.testing.comparison import same_bits

CASES_IN_A_BATCH = 125


@pytest.fixture
def threads():
    before = rau.get_num_threads()
    yield
    rau.set_num_threads(before)


@pytest.mark.parametrize("seed", range(10))
def test_backends_agree_and_the_oracle_confirms(seed):
    """1,250 cases: the worst of it all is one bit off, or one share above 1."""
    wrong = []
    for case in generated(seed, CASES_IN_A_BATCH):
        pristine = case.make()
        expected = oracle(
            pristine.states, case.lengths_argument(), case.layout, softmax_layout=case.softmax_layout
        )
        results = {}
        for name in ("numpy", "cython"):
            call = case.make()
            results[name] = call.run(name)
            if call.out is not None:
                for part, placed in zip(results[name], call.out, strict=True):
                    assert part is placed.view, f"{case}: {name} returned another array than out's"
                if not all(placed.guards_intact() for placed in call.out):
                    wrong.append(f"{case}: {name} wrote beside its output")
            written = () if call.out is None else tuple(placed.view for placed in call.out)
            for before, after in zip(pristine.states, call.states, strict=True):
                if not any(part is target for part in after for target in written) and same_bits(before, after):
                    wrong.append(f"{case}: {name} changed an input")
        wrong += [f"{case}: {difference}" for difference in same_bits(results["numpy"], results["cython"])]
        comparison = compare(results["numpy"], expected)
        if not comparison.passed:
            wrong.append(f"{case}: {comparison}")
    assert not wrong, "\n".join(wrong[:5])


def simd_versions():
    try:
        from rau import _core
    except ImportError:
        return []
    return _core.simd_versions()


@pytest.mark.parametrize("version", simd_versions())
def test_simd_versions_and_threads_agree(version, threads):
    from rau import _core

    before = _core.simd()
    try:
        for case in generated(1000, 250):
            reference = case.make().run("numpy")
            _core.use_simd(version)
            for count in (1, 2, 3, 7):
                rau.set_num_threads(count)
                assert not same_bits(reference, case.make().run("cython")), f"{case}, {version}, {count} threads"
    finally:
        _core.use_simd(before)


LARGE = [
    # Larger than every threshold: streamed around the cache, several tiles, several workers.
    Case(id="large/f32", tokens=3000, heads=8, head_dim=128, out="given", statistics="empty", outputs="special"),
    Case(id="large/f32-offset", tokens=3000, heads=8, head_dim=128, out="given", out_placement="offset"),
    Case(id="large/f32-odd", tokens=3000, heads=7, head_dim=131, out="given", out_placement="offset"),
    Case(id="large/bf16", tokens=5000, heads=8, head_dim=128, dtype="bfloat16", outputs="special"),
    Case(id="large/f16", tokens=5000, heads=8, head_dim=128, dtype="float16", outputs="tiny"),
    Case(id="large/f64", tokens=1500, heads=8, head_dim=128, dtype="float64", statistics="huge-gaps"),
    Case(id="large/mixed", tokens=3000, heads=8, head_dim=128, cur_dtype="bfloat16", out="prev", statistics="empty"),
    Case(id="large/head-dim", tokens=3, heads=2, head_dim=12816, dtype="float16", out="given"),
    Case(id="large/heads", tokens=2, heads=20000, head_dim=3, statistics="empty", outputs="special"),
    Case(
        id="large/sequences", layout="TND", softmax_layout="SBH", tokens=10000, heads=3, head_dim=16,
        lengths=(1,) * 10000, dtype="bfloat16", statistics="empty",
    ),
    Case(
        id="large/uneven", layout="TND", softmax_layout="SBH", tokens=13000, heads=2, head_dim=64,
        lengths=(*(1,) * 3000, 0, 9000, *(0, 1) * 1000), statistics="infinite-max", out="given",
    ),
    Case(id="large/states", tokens=200, heads=4, head_dim=64, states=133, dtype="bfloat16", statistics="empty"),
]  # fmt: skip


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_large_cases(case, threads):
    pristine = case.make()
    expected = oracle(pristine.states, case.lengths_argument(), case.layout, softmax_layout=case.softmax_layout)
    reference = case.make().run("numpy")
    comparison = compare(reference, expected)
    assert comparison.passed, str(comparison)
    for count in (1, 2, 5):
        rau.set_num_threads(count)
        call = case.make()
        assert not same_bits(reference, call.run("cython")), f"{count} threads"
        if call.out is not None and case.out == "given":
            assert all(placed.guards_intact() for placed in call.out)


@pytest.fixture(scope="module", params=[2, 3])
def far_apart(request):
    """A million rows of float64 whose maxima lie up to 680 apart, and whose weights are alike."""
    case = Case(id=f"million/balanced-{request.param}", layout="TND", qlen="none", tokens=125_000, heads=8, head_dim=1,
                lanes=1, dtype="float64", statistics="balanced", states=request.param)  # fmt: skip
    states = case.fill()
    return states, oracle(states, layout="TND")


def test_float64_stays_within_its_bound_where_maxima_lie_far_apart(any_backend, far_apart):
    states, expected = far_apart
    if "float64" not in rau.registry.capabilities(any_backend).dtypes:
        pytest.skip(f"{any_backend} has no float64")
    merged = own_arrays.merge(any_backend, states, layout="TND", profile="portable")
    comparison = compare(merged, expected)
    assert comparison.passed, str(comparison)
    assert not same_bits(merged, rau.merge_states(states, layout="TND", backend="numpy"))


def test_prev_and_cur_swapped_give_the_same_bits(any_backend):
    """Commutativity, for states of one dtype."""
    for case in generated(2000, 300):
        if case.states != 2 or case.cur_dtype != case.dtype or case.out in ("prev", "cur"):
            continue
        prev, cur = case.make().states
        arguments = case.lengths_argument(), case.layout
        options = {"softmax_layout": case.softmax_layout, "profile": "portable"}
        one = own_arrays.update(any_backend, prev, cur, *arguments, **options)
        other = own_arrays.update(any_backend, cur, prev, *arguments, **options)
        assert not same_bits(one, other), case


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_ordinary_16_bit_elements_are_correctly_rounded(dtype, any_backend):
    """The target of design: at least 99.9 % of the elements of ordinary inputs."""
    case = Case(id=f"rounding/{dtype}", tokens=500, heads=8, head_dim=64, dtype=dtype)
    call = case.make()
    expected = oracle(call.states, layout="SBH")
    result = own_arrays.update(any_backend, *call.states).attn_out
    exact = expected.attn_out.astype(np.float32).astype(result.dtype)  # float64 to float32 rounds far below 16 bits
    assert np.mean(exact == result) >= 0.999
