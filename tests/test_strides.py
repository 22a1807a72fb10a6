"""Arrays however they lie in memory: inputs of any strides, and what `out` may be and may not.

The reference is the same call on C-contiguous copies.
"""

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from states import NAMES, arguments, bits, sbh, state, tnd

import rau

CALLS = {
    "SBH": (sbh, {}),
    "TND": (tnd, {"layout": "TND", "actual_seq_qlen": [0, 3, 3, 8]}),
    "packed": (tnd, {"layout": "TND", "actual_seq_qlen": [0, 3, 3, 8], "softmax_layout": "SBH"}),
}


class Subclass(np.ndarray):
    """One that nobody knows."""


def transposed(array):
    return array.swapaxes(0, 1).copy().swapaxes(0, 1)


def wider(array):
    """A view of a larger array, in the middle of each axis."""
    larger = np.full([length + 3 for length in array.shape], 99, array.dtype)
    view = larger[tuple(slice(1, 1 + length) for length in array.shape)]
    view[...] = array
    return view


def misaligned(array):
    view = np.zeros(array.nbytes + 1, "u1")[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def a_field(array):
    """Byte strides that are no multiple of the item's length."""
    record = np.zeros(array.shape, [("tag", "u1"), ("number", array.dtype)])
    record["number"] = array
    return record["number"]


def mapped(array):
    import tempfile

    with tempfile.TemporaryFile() as file:
        view = np.memmap(file, array.dtype, "w+", shape=array.shape)
    view[...] = array
    return view


def frozen(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def next_to_each_other(array, axis):
    """Every second place along an axis."""
    view = np.repeat(array, 2, axis)[(slice(None),) * (axis % array.ndim) + (slice(None, None, 2),)]
    assert view.shape == array.shape
    return view


FORMS = {
    "transposed": transposed,
    "within a larger one": wider,
    "reversed": lambda a: a[::-1].copy()[::-1],
    "reversed, second axis": lambda a: a[:, ::-1].copy()[:, ::-1],
    "reversed, last axis": lambda a: a[..., ::-1].copy()[..., ::-1],
    "every second": lambda a: next_to_each_other(a, 0),
    "every second, last axis": lambda a: next_to_each_other(a, -1),
    "Fortran order": np.asfortranarray,
    "misaligned": misaligned,
    "a field": a_field,
    "read-only": frozen,
    "mapped": mapped,
    "subclass": lambda a: a.view(Subclass),
}
# Where packed statistics would not be evenly spaced any more:
IRREGULAR = {
    "transposed", "within a larger one", "reversed", "reversed, second axis", "every second", "Fortran order",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", CALLS)
def test_inputs_may_lie_as_they_like(call, form, backend):
    make, options = CALLS[call]
    given = arguments(make)
    expected = rau.ring_attention_update(**given, **options, backend=backend)
    shaped = {
        name: array if call == "packed" and "softmax" in name and form in IRREGULAR else FORMS[form](array)
        for name, array in given.items()
    }
    before = bits(shaped.values())
    result = rau.ring_attention_update(**shaped, **options, backend=backend)
    assert bits(result) == bits(expected)
    assert bits(shaped.values()) == before
    assert [type(part) for part in result] == [np.ndarray] * 3


@pytest.mark.parametrize("form", sorted(IRREGULAR))
def test_packed_statistics_that_are_not_evenly_spaced_are_refused(form):
    make, options = CALLS["packed"]
    given = arguments(make)
    given["cur_softmax_sum"] = FORMS[form](given["cur_softmax_sum"])
    with pytest.raises(rau.ShapeError) as caught:
        rau.ring_attention_update(**given, **options)
    assert caught.value.rules == ("packed-regular",)


@pytest.mark.parametrize("form", ["within a larger one", "every second, last axis"])
def test_packed_statistics_of_one_head_or_one_token_are_always_evenly_spaced(form, backend):
    for sizes, qlen in (({"T": 8, "N": 1}, [0, 3, 8]), ({"T": 1, "N": 3}, [0, 0, 1])):
        options = {"layout": "TND", "softmax_layout": "SBH", "actual_seq_qlen": qlen, "backend": backend}
        given = arguments(tnd, **sizes)
        expected = rau.ring_attention_update(**given, **options)
        result = rau.ring_attention_update(**{name: FORMS[form](array) for name, array in given.items()}, **options)
        assert bits(result) == bits(expected)


def test_inputs_of_stride_0(backend):
    """The same row for every token, and the 8 lanes that from_lse makes."""
    one = sbh(S=1)
    repeated = [np.broadcast_to(one[0], (4, 2, 24))] + [np.broadcast_to(part, (2, 3, 4, 8)) for part in one[1:]]
    lse = np.linspace(-3, 3, 24, dtype=np.float32).reshape(2, 3, 4)
    cur = rau.AttentionState.from_lse(sbh()[0], lse, base="2", lanes=8)
    expected = rau.ring_attention_update(*(part.copy() for part in (*repeated, *cur)), backend=backend)
    assert bits(rau.ring_attention_update(*repeated, *cur, backend=backend)) == bits(expected)


def test_inputs_may_be_each_other(backend):
    one = sbh()
    expected = rau.ring_attention_update(*one, *(part.copy() for part in one), backend=backend)
    assert bits(rau.ring_attention_update(*one, *one, backend=backend)) == bits(expected)
    square = state((8, 2, 8), (8, 2, 8))  # the statistics of TND with D = 8 look like an output
    same = square.softmax_sum
    options = {"layout": "TND", "profile": "portable", "backend": backend}
    expected = rau.ring_attention_update(*square, *(part.copy() for part in (same, same, same)), **options)
    assert bits(rau.ring_attention_update(*square, same, same, same, **options)) == bits(expected)


# ------------------------------------------------------------------------------------------------------------- out

OUT_FORMS = sorted(
    {"transposed", "within a larger one", "reversed", "reversed, second axis", "every second", "mapped", "subclass"}
)


@pytest.mark.parametrize("form", OUT_FORMS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("inputs_too", [False, True])
def test_outputs_may_be_strided(call, form, inputs_too, backend):
    make, options = CALLS[call]
    given = arguments(make)
    expected = rau.ring_attention_update(**given, **options, backend=backend)
    irregular = call == "packed" and form in IRREGULAR
    shape = [FORMS[form], *[np.copy if irregular else FORMS[form]] * 2]
    out = tuple(make_form(np.zeros_like(part)) for make_form, part in zip(shape, expected, strict=True))
    if inputs_too:
        given = {name: shape[NAMES.index(name) % 3](array) for name, array in given.items()}
    result = rau.ring_attention_update(**given, **options, out=out, backend=backend)
    assert isinstance(result, rau.AttentionState)
    assert all(mine is its for mine, its in zip(result, out, strict=True))
    assert bits(result) == bits(expected)


def test_nothing_is_written_beside_a_view(backend):
    given = arguments()
    out = [wider(np.zeros_like(given[name])) for name in NAMES[:3]]
    rau.ring_attention_update(**given, out=out, backend=backend)
    for view in out:
        larger, size = view.base, view.size
        assert np.count_nonzero(larger == 99) >= larger.size - size
        view[...] = 99
        assert (larger == 99).all()


IN_PLACE = {
    "prev": lambda prev, cur: prev,
    "cur": lambda prev, cur: cur,
    "views of prev": lambda prev, cur: [part[:] for part in prev],
    "some of each": lambda prev, cur: [cur[0], prev[1], cur[2]],
    "statistics only": lambda prev, cur: [np.zeros_like(prev[0]), prev[1], prev[2]],
    "max over sum and sum over max": lambda prev, cur: [prev[0], prev[2], prev[1]],
    "max over the other's sum": lambda prev, cur: [cur[0], prev[2], cur[1]],
}


@pytest.mark.parametrize("over", IN_PLACE)
@pytest.mark.parametrize(
    ("call", "form"),
    [*[(call, "as it is") for call in CALLS], ("SBH", "within a larger one"), ("TND", "within a larger one")],
)
def test_in_place(call, over, form, backend):
    make, options = CALLS[call]
    sizes = {"S": 700} if make is sbh else {"T": 700}
    if make is tnd:
        options = options | {"actual_seq_qlen": [0, 3, 3, 290, 700]}
    given = arguments(make, **sizes)
    expected = rau.ring_attention_update(**given, **options, backend=backend)
    arrays = [array if form == "as it is" else wider(array) for array in given.values()]
    out = IN_PLACE[over](arrays[:3], arrays[3:])
    untouched = [array for array in arrays if not any(np.shares_memory(array, part) for part in out)]
    before = bits(untouched)
    result = rau.ring_attention_update(*arrays, **options, out=out, backend=backend)
    assert bits(result) == bits(expected)
    assert bits(untouched) == before


@pytest.mark.parametrize("form", ["as it is", "within a larger one"])
def test_the_problem_says_whether_it_is_in_place(form):
    def in_place(out):
        return rau.explain(**given, out=out).problem.in_place

    given = arguments() if form == "as it is" else {name: wider(array) for name, array in arguments().items()}
    prev, cur = list(given.values())[:3], list(given.values())[3:]
    fresh = [np.zeros_like(part) for part in prev]
    assert in_place(prev)
    assert in_place([part[:] for part in prev])
    assert in_place([fresh[0], fresh[1], cur[2]])
    assert not in_place(fresh)
    assert not in_place(None)
    assert not in_place([halves(given, NAMES[0], 0), *fresh[1:]])


def test_an_axis_of_length_1_may_have_another_stride_in_place(backend):
    given = arguments(B=1)
    expected = rau.ring_attention_update(**given, backend=backend)
    out = [as_strided(given[name], strides=given[name].strides) for name in NAMES[:3]]
    out[0] = as_strided(out[0], strides=(96, 7 * 4, 4))  # (S, 1, H)
    out[1] = as_strided(out[1], strides=(5 * 4, *out[1].strides[1:]))  # (1, N, S, 8)
    assert bits(rau.ring_attention_update(**given, out=out, backend=backend)) == bits(expected)
    assert bits(given[name] for name in NAMES[:3]) == bits(expected)


def test_in_place_on_itself(backend):
    one = sbh()
    expected = rau.ring_attention_update(*one, *one, backend=backend)
    assert bits(rau.ring_attention_update(*one, *one, out=one, backend=backend)) == bits(expected)


def shared(given, name, shift):
    """Put an input at the beginning of a buffer, and return an output `shift` elements after it."""
    array = given[name]
    buffer = np.zeros(array.size + shift, array.dtype)
    given[name] = buffer[: array.size].reshape(array.shape)
    given[name][...] = array
    return buffer[shift:].reshape(array.shape)


def halves(given, name, axis):
    """Interleave an input with an output."""
    array = given[name]
    both = np.zeros([2 * length if k == axis % array.ndim else length for k, length in enumerate(array.shape)], "f4")
    before = (slice(None),) * (axis % array.ndim)
    given[name] = both[(*before, slice(0, None, 2))]
    given[name][...] = array
    return both[(*before, slice(1, None, 2))]


def test_interleaved_halves_are_fine(backend):
    for axis in (0, 1):
        given = arguments()
        expected = rau.ring_attention_update(**given, backend=backend)
        out = [halves(given, name, axis) for name in NAMES[:3]]
        before = bits(given.values())
        assert bits(rau.ring_attention_update(**given, out=out, backend=backend)) == bits(expected)
        assert bits(given.values()) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [1, 8])
def test_a_shifted_output_is_refused(name, shift):
    given = arguments()
    out = [np.zeros_like(given[other]) for other in NAMES[:3]]
    role = NAMES.index(name) % 3
    out[role] = shared(given, name, shift)
    before = bits([*given.values(), *out])
    with pytest.raises(rau.ShapeError) as caught:
        rau.ring_attention_update(**given, out=out)
    field = rau.AttentionState._fields[role]
    assert str(caught.value) == (
        f"ring_attention_update: [out-overlap] out.{field} shares memory with {name}; expected separate memory or, to "
        f"work in place, exactly an input's {field}: the same address, shape and strides."
    )
    assert bits([*given.values(), *out]) == before


def next_rows(array):
    return array[:-1], array[1:]


def turned(array):
    """Another view of the same memory from the same address on, whose rows come in another order."""
    return as_strided(array, (8, 2, 8), (32, 256, 4))


OVERLAPS = {
    "the other way round": lambda prev, cur: [prev[0][::-1], np.zeros_like(prev[1]), np.zeros_like(prev[2])],
    "attn_out over statistics of the same shape": lambda prev, cur: [cur[1], np.zeros_like(prev[1]), prev[2]],
    "statistics over attn_out of the same shape": lambda prev, cur: [np.zeros_like(prev[0]), prev[1], prev[0]],
    "two outputs at one input": lambda prev, cur: [prev[0], prev[1], prev[1]],
    "outputs that overlap by a row": lambda prev, cur: [prev[0], *next_rows(np.zeros((9, 2, 8), "f4"))],
    "itself": lambda prev, cur: [as_strided(np.zeros(64, "f4"), (8, 2, 8), (32, 0, 4)), prev[1], prev[2]],
    "itself by half a row": lambda prev, cur: [as_strided(np.zeros(99, "f4"), (8, 2, 8), (48, 16, 4)), *prev[1:]],
    "the same address and other strides": lambda prev, cur: [prev[0], turned(cur[1]), prev[2]],
    "itself by a step": lambda prev, cur: [as_strided(np.zeros(99, "f4"), (8, 2, 8), (32, 32, 4)), prev[1], prev[2]],
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_other_overlaps_are_refused(name):
    prev, cur = (state((8, 2, 8), (8, 2, 8), seed=seed) for seed in (1, 2))
    out = OVERLAPS[name](prev, cur)
    before = bits([*prev, *cur, *out])
    with pytest.raises(rau.ShapeError) as caught:
        rau.ring_attention_update(*prev, *cur, layout="TND", profile="portable", out=out)
    assert set(caught.value.rules) == {"out-overlap"}
    assert bits([*prev, *cur, *out]) == before


def test_an_empty_array_between_two_hides_no_overlap():
    memory = np.zeros(64, "f4")
    prev, cur, out = (state((2, 2, 0), (2, 2, 8), seed=seed) for seed in range(3))
    prev = prev._replace(softmax_max=memory[:32].reshape(2, 2, 8))
    out = out._replace(attn_out=memory[8:16].reshape(2, 2, 2)[..., :0], softmax_max=memory[16:48].reshape(2, 2, 8))
    with pytest.raises(rau.ShapeError, match="out.softmax_max shares memory with prev_softmax_max"):
        rau.ring_attention_update(*prev, *cur, layout="TND", profile="portable", out=out)


def test_an_output_that_looks_like_overlapping_itself_but_does_not(backend):
    """Element strides 2*L and 3*L over 3 and 2 places: no nesting, and yet no two elements meet."""
    prev, cur = (state((3, 2, 8), (3, 2, 8), seed=seed) for seed in (1, 2))
    options = {"layout": "TND", "profile": "portable", "backend": backend}
    out = [as_strided(np.zeros(8 * 8, "f4"), (3, 2, 8), (4 * 16, 4 * 24, 4)) for _ in range(3)]
    expected = rau.ring_attention_update(*prev, *cur, **options)
    assert bits(rau.ring_attention_update(*prev, *cur, **options, out=out)) == bits(expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_outputs_have_float32_statistics(dtype, backend):
    given = arguments(dtype=dtype)
    expected = rau.ring_attention_update(**given, backend=backend)
    assert [part.dtype for part in expected] == [given[name].dtype for name in NAMES[:3]]
    out = [np.zeros_like(part) for part in expected]
    assert bits(rau.ring_attention_update(**given, out=out, backend=backend)) == bits(expected)
    with pytest.raises(rau.DTypeError) as caught:
        rau.ring_attention_update(**given, out=[expected[1][..., 0], *(part.astype(out[0].dtype) for part in out[1:])])
    assert caught.value.rules == ("out-dtype", "out-shape", "out-dtype", "out-dtype")


def test_half_the_bytes_of_an_output_are_not_in_place():
    """A float16 cur at the very address and byte strides of the float32 output."""
    prev, cur = sbh(D=1), sbh(D=1, dtype="float16", seed=2)
    attn_out = np.zeros_like(prev[0])
    at_the_same_place = attn_out.view("f2")[..., ::2]
    assert (at_the_same_place.shape, at_the_same_place.strides) == (attn_out.shape, attn_out.strides)
    out = [attn_out, np.zeros_like(prev[1]), np.zeros_like(prev[2])]
    with pytest.raises(rau.ShapeError) as caught:
        rau.ring_attention_update(*prev, at_the_same_place, *cur[1:], profile="portable", out=out)
    assert caught.value.rules == ("out-overlap",)


def test_what_takes_too_long_to_decide_is_refused(monkeypatch):
    monkeypatch.setattr("rau.arrays.memory._MOST_WORK", 1)
    given = arguments()
    out = [np.zeros_like(given[name]) for name in NAMES[:3]]
    buffer = np.zeros(4000, "f4")
    given["prev_attn_out"] = as_strided(buffer, (4, 2, 24), (4 * 2 * 31, 4 * 3 * 37, 4))
    out[0] = as_strided(buffer[25:], (4, 2, 24), (4 * 2 * 29, 4 * 3 * 41, 4))
    with pytest.raises(rau.ShapeError) as caught:
        rau.ring_attention_update(**given, out=out)
    assert "out-overlap" in caught.value.rules
