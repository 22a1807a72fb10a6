"""``python -m rau diagnose``: right, wrong and recognised, wrong and not, and files that are none."""

import json

import numpy as np
import pytest
from command import status

import rau
from rau import AttentionState
from rau.__main__ import main
from rau.testing import cases, oracle
from rau.testing.cases import Case
from rau.testing.diagnosis import diagnose
from rau.testing.diagnosis.mistakes import MISTAKES
from rau.testing.diagnosis.steps import Steps
from rau.testing.differential.record import Record, write_record

NAMES = ("attn_out", "softmax_max", "softmax_sum")


class SingleRows(Steps):
    """Rows in float32: the same mistakes, made by somebody whose arithmetic is another."""

    def _read(self, softmax_layout):
        super()._read(softmax_layout)
        self.lanes = tuple(part.astype(np.float32) for part in self.lanes)
        self.maxima, self.sums = (part[..., :1] for part in self.lanes)


def make(case, mistake=None, rows=Steps):
    """Numbers of a case, and what comes of them with a mistake."""
    numbers = case.fill()
    plain = rows(case.make(numbers).states, case.lengths_argument(), case.layout, case.softmax_layout)
    with np.errstate(all="ignore"):
        return numbers, plain.merge() if mistake is None else MISTAKES[mistake](plain)


def write(path, numbers, observed, **more):
    """A file as anybody writes it, with nothing but NumPy."""
    arrays = {f"{side}_{name}": part for side, state in zip(("prev", "cur"), numbers, strict=True)
              for name, part in zip(NAMES, state, strict=True)}  # fmt: skip
    arrays |= dict(zip(NAMES, observed, strict=True)) if observed else {}
    stored = {name: part.view(np.uint16) if part.dtype.name == "bfloat16" else part for name, part in arrays.items()}
    np.savez(path, **stored, **more)
    return str(path)


TND = {"layout": "TND", "tokens": 40, "lengths": (10, 0, 30), "heads": 3, "head_dim": 32}
CASES = [
    Case(id="sbh", tokens=40, heads=3, head_dim=32, statistics="empty", unequal_lanes=True),
    Case(id="token-major", **TND, dtype="bfloat16", statistics="attention"),
    Case(id="packed", **TND, softmax_layout="SBH", dtype="float16", statistics="huge-gaps"),
    Case(id="hops", tokens=20, heads=3, head_dim=16, states=5, dtype="bfloat16"),
]


@pytest.mark.parametrize("rows", [Steps, SingleRows])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_named_first(name, case, rows):
    numbers, observed = make(case, name, rows)
    if observed is None:
        return  # the call leaves no room for it
    diagnosis = diagnose(Record(case, numbers, observed))
    if diagnosis.right:
        assert name in diagnosis.invisible
    elif name in diagnosis.invisible:  # only the other arithmetic shows
        assert rows is SingleRows and diagnosis.slight and not diagnosis.recognised
    else:
        assert diagnosis.recognised[0].mistake.name == name, str(diagnosis)
        assert diagnosis.recognised[0].same_bits or rows is SingleRows


def named(case, numbers, observed):
    return [candidate.mistake.name for candidate in diagnose(Record(case, numbers, AttentionState(*observed))).recognised]


def rows_of(case, numbers):
    """The rows of a call, and its right result in them: outputs, maximum, total; and where both sides are empty."""
    rows = Steps(case.make(numbers).states, case.lengths_argument(), case.layout, case.softmax_layout)
    with np.errstate(all="ignore"):
        factors = rows.factors()
        return rows, (rows.combine(rows.weights(factors)), rows.maximum, rows.total(factors)), ~rows.live.any(axis=0)


# Rows of all kinds with anything behind empty sides; and one row alone, of which nothing else can be told.
EMPTY = [CASES[0], Case(id="both-empty", tokens=1, heads=1, head_dim=8)]


@pytest.mark.parametrize("stats", ["kept", "sum NaN", "all NaN"])
@pytest.mark.parametrize("case", EMPTY, ids=lambda case: case.id)
def test_nan_from_two_empty_sides_is_that(case, stats):
    numbers = case.fill()
    if case.id == "both-empty":
        for state in numbers:
            state.softmax_max[...], state.softmax_sum[...] = -np.inf, 0
    rows, (output, maximum, total), nothing = rows_of(case, numbers)
    assert nothing.any()
    maximum = np.where(nothing & (stats == "all NaN"), np.nan, maximum)
    total = np.where(nothing & (stats != "kept"), np.nan, total)
    names = named(case, numbers, rows.store(np.where(nothing, np.nan, output), maximum, total))
    assert names[0] == "empty-sides-not-guarded"
    # With one row, and statistics of neither, the sigmoid form says the same.
    assert names[1:] in ([], ["sigmoid-form"]) and (case.id == "both-empty" or len(names) == 1)


def test_what_leaks_from_behind_an_empty_side_is_that():
    case = Case(id="leaks", tokens=40, heads=3, head_dim=32, outputs="special", statistics="empty")
    numbers = case.fill()
    rows, (_, maximum, total), nothing = rows_of(case, numbers)
    with np.errstate(all="ignore"):
        weights = rows.weights(rows.factors())
        output = weights[0] * rows.outputs[0] + weights[1] * rows.outputs[1]
    assert (np.isnan(output) & ~np.isnan(rows_of(case, numbers)[1][0])).any()
    assert named(case, numbers, rows.store(output, maximum, total)) == ["empty-sides-not-guarded"]


@pytest.mark.parametrize("statistics", ["empty", "huge-gaps", "ordinary", "zero-maxima"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lost_sign_of_zero_is_no_mistake_about_numbers(dtype, statistics):
    case = Case(id=f"signs-{dtype}-{statistics}", tokens=40, heads=3, head_dim=32, dtype=dtype, outputs="signed-zeros",
                statistics=statistics)  # fmt: skip
    numbers = case.fill()
    rows, (output, *stats), _ = rows_of(case, numbers)
    negative = (output == 0) & np.signbit(output)
    assert negative.any()
    observed = rows.store(np.where(negative, 0, output), *stats)
    assert not diagnose(Record(case, numbers, observed)).right
    assert named(case, numbers, observed) == []
    # Products of empty sides and of weights of 0 that are added as 0 lose it in some places.
    with np.errstate(all="ignore"):
        weights = rows.weights(rows.factors())
        output = weights[0] * rows.outputs[0] + weights[1] * rows.outputs[1]
    left_out = statistics in ("empty", "huge-gaps")
    assert named(case, numbers, rows.store(output, *stats)) == ["empty-sides-not-guarded"] * left_out
    # One alone is not that: others have kept theirs.
    observed = rows.store(*rows_of(case, numbers)[1])
    kept = np.flatnonzero(negative & (rows.live.sum(axis=0) == 1))
    if len(kept) > 1:
        observed.attn_out.reshape(-1)[kept[0]] = 0
        assert not diagnose(Record(case, numbers, observed)).right
        assert named(case, numbers, observed) == []


@pytest.mark.parametrize("name", MISTAKES)
def test_no_mistake_makes_another_with_two_empty_sides(name):
    """But those that are about empty sides, or leave what stands behind one."""
    case = Case(id="none", tokens=4, heads=2, head_dim=8, statistics="empty", dtype="bfloat16", states=3)
    numbers = case.fill()
    for state in numbers:
        state.softmax_max[...] = np.array([-np.inf, 5, np.nan, -np.inf])[:, None]
        state.softmax_sum[...] = np.array([0, 0, -0.0, np.nan])[:, None]
    about = "empty-sides-not-guarded", "sigmoid-form", "prev-returned", "cur-returned", "last-token-dropped"
    rows, _, nothing = rows_of(case, numbers)
    made = MISTAKES[name](rows)
    assert nothing.all()
    assert name in about or made is None or (made.attn_out.astype("f4") == 0).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_right_result_is_given_no_name(case):
    numbers = case.fill()
    for backend in ("numpy", "cython"):
        diagnosis = diagnose(Record(case, numbers, case.make(numbers).run(backend)))
        assert diagnosis.right and not diagnosis.candidates and not diagnosis.recognised


CHANGES = {
    "a bit more": lambda x: x * (1 + 2.0**-6) + 2.0**-20, "half as much again": lambda x: x * 1.5, "1 more": lambda x: x + 1,
    "0": lambda x: 0 * x, "the other sign": lambda x: -x, "NaN": lambda x: np.nan + x, "infinite": lambda x: np.inf + x,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_one_wrong_number_is_given_no_name(case, change):
    rng = np.random.default_rng(7)
    numbers, right = make(case)
    wrong = 0
    for part in (0, 0, 1, 2):
        observed = [array.copy() for array in right]
        numbers_of_it = observed[part].reshape(-1) if part == 0 else observed[part].reshape(-1, 8)
        place = rng.choice(np.flatnonzero(np.isfinite(right[part].astype("f4")).reshape(len(numbers_of_it), -1).all(axis=1)))
        with np.errstate(all="ignore"):
            numbers_of_it[place] = CHANGES[change](numbers_of_it[place].astype("f8"))
        diagnosis = diagnose(Record(case, numbers, AttentionState(*observed)))
        wrong += not diagnosis.right
        assert not diagnosis.recognised, str(diagnosis)
        assert part or not diagnosis.candidates  # none explains it, hence none fits better than none
    assert wrong


def test_one_number_just_beyond_the_bound_is_given_no_name():
    """Though what a mistake makes of it, with the error of the same arithmetic, is nearer than the exact one."""
    case = Case(id="slight", tokens=40, heads=3, head_dim=32)
    numbers, right = make(case)
    expected = oracle(case.make(numbers).states)
    error = right.attn_out.astype("f8") - expected.attn_out
    place = np.abs(error / expected.attn_bound).argmax()
    beyond = 1.3 * np.sign(error.flat[place]) * expected.attn_bound.flat[place]
    right.attn_out.flat[place] = expected.attn_out.flat[place] + beyond
    diagnosis = diagnose(Record(case, numbers, right))
    assert diagnosis.slight and not diagnosis.candidates


def test_lanes_that_alone_differ_are_given_no_name():
    case = Case(id="lanes", tokens=40, heads=3, head_dim=32, dtype="float64")
    numbers, right = make(case)
    bound = oracle(case.make(numbers).states).sum_bound / np.spacing(right.softmax_sum)
    row = np.unravel_index(bound[..., 3].argmax(), bound.shape[:-1])
    right.softmax_sum[(*row, 3)] = np.nextafter(right.softmax_sum[(*row, 3)], 0)
    diagnosis = diagnose(Record(case, numbers, right))
    assert "the lanes must be equal" in str(diagnosis) and diagnosis.comparison.sum_share < 1
    assert not diagnosis.candidates


@pytest.mark.parametrize(
    ("id", "name"),
    [("statistics/empty-float32", "empty-sides-not-guarded"), ("statistics/negative-sums-bfloat16", "stale-max")],
)
def test_what_fits_less_well_is_not_named(id, name):
    """Though it would be by itself: some elements do not fit, or the statistics."""
    case = next(case for case in cases.named() if case.id == id)
    numbers, observed = make(case, name, SingleRows)
    diagnosis = diagnose(Record(case, numbers, observed))
    assert [candidate.mistake.name for candidate in diagnosis.recognised] == [name]
    assert sum(candidate.reproduces for candidate in diagnosis.candidates) > 1


def test_a_max_of_zero_may_have_either_sign():
    case = Case(id="zeros", tokens=40, heads=3, head_dim=32, statistics="zero-maxima")
    numbers, observed = make(case, "sides-swapped", SingleRows)
    observed.softmax_max[observed.softmax_max == 0] *= -1
    first = diagnose(Record(case, numbers, observed)).recognised[0]
    assert first.mistake.name == "sides-swapped" and first.everything


def log_sum_exp_states(count, offset):
    """States as from_lse makes them: the log-sum-exp for max, and a sum of 1."""
    case = Case(id=f"lse-{offset}", tokens=40, heads=3, head_dim=32, states=count)
    rng = np.random.default_rng(3)
    return case, [
        state._replace(
            softmax_max=case.in_all_lanes((offset + rng.standard_normal((1, 3, 40))).astype("f4")),
            softmax_sum=np.ones_like(state.softmax_sum),
        )
        for state in case.fill()
    ]


def test_weights_that_do_not_sum_to_1():
    """As TransformerEngine corrects outputs: out_i * exp(lse_i - lse), in float32."""
    case, numbers = log_sum_exp_states(2, 1000)
    rows, (output, maximum, total), _ = rows_of(case, numbers)
    one, other = (part.astype("f4") for part in rows.maxima)
    whole = np.maximum(one, other) + np.log1p(np.exp(-np.abs(one - other)))
    weights = np.exp(one - whole), np.exp(other - whole)
    observed = rows.store(weights[0] * rows.outputs[0] + weights[1] * rows.outputs[1], maximum, total)
    assert 1e-5 < np.abs(weights[0] + weights[1] - 1).max() < 1e-4
    assert named(case, numbers, observed) == ["weights-do-not-sum-to-1"]


def test_the_sigmoid_form():
    """As ring-flash-attention updates, in float32: out - sigmoid(block_lse - lse) * (out - block_out)."""
    case, numbers = log_sum_exp_states(2, 3)
    numbers[0].softmax_max[..., :9, :] = numbers[1].softmax_max[..., 5:15, :] = -np.inf
    numbers[0].attn_out[:9] = 1e8
    rows, (output, maximum, total), nothing = rows_of(case, numbers)
    (prev, cur), (lse, block) = rows.outputs, (part.astype("f4") for part in rows.maxima)
    with np.errstate(all="ignore"):
        observed = rows.store(prev - 1 / (1 + np.exp(lse - block)) * (prev - cur), maximum, total)
    assert np.isnan(observed.attn_out).sum() == nothing.sum() * 32 and (observed.attn_out[:5] == 0).any()
    assert named(case, numbers, observed)[0] == "sigmoid-form"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_at_every_hop(dtype):
    """A chain of updates with a 16-bit running output; one that keeps float32 is right."""
    case = Case(id=f"chain-{dtype}", tokens=20, heads=3, head_dim=32, states=8, dtype=dtype)
    numbers = case.fill()
    running = numbers[0]
    for state in numbers[1:]:
        running = rau.ring_attention_update(*running, *state, backend="numpy")
    assert named(case, numbers, running) == ["rounded-at-every-hop"]
    ring = rau.StreamingMerge(backend="numpy")
    for state in numbers:
        ring.update(*state)
    assert named(case, numbers, ring.result(numbers[0].attn_out.dtype)) == []


def test_every_mistake_is_visible_in_some_case():
    seen = set()
    for case in CASES:
        numbers, observed = make(case)
        seen |= MISTAKES.keys() - set(diagnose(Record(case, numbers, observed)).invisible)
    assert seen == MISTAKES.keys()


def test_right(tmp_path, capsys):
    path = write(tmp_path / "right.npz", *make(CASES[0]))
    assert main(["diagnose", path]) == 0
    text = capsys.readouterr().out
    assert "right: attn_out" in text
    assert "cannot show: packed-read-as-token-major" in text


def test_the_trap(tmp_path, capsys):
    """Packed statistics that nobody said were packed: what came off the chip looks wrong, and is right."""
    case = Case(id="trap", **TND, dtype="bfloat16")
    path = tmp_path / "trap.npz"
    lengths = {"actual_seq_qlen": case.lengths_argument(), "layout": "TND"}
    write(path, *make(case, "token-major-read-as-packed"), **lengths)
    assert main(["diagnose", str(path)]) == 1
    text = capsys.readouterr().out
    assert "statistics token-major" in text
    assert "known mistake: token-major-read-as-packed (bit for bit)" in text
    assert 'softmax_layout="SBH"' in text
    write(path, *make(case, "token-major-read-as-packed"), **lengths, softmax_layout="SBH")
    assert main(["diagnose", str(path)]) == 0


def test_json(tmp_path, capsys):
    path = write(tmp_path / "wrong.npz", *make(CASES[0], "sums-left-out"))
    assert main(["diagnose", path, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["recognised"] == ["sums-left-out"]
    assert document["right"] is False and document["comparison"]["attn_share"] == "inf"
    first = document["candidates"][0]
    assert first["same_bits"] and first["explained"] == 1.0 and first["spoiled"] == 0.0
    assert "l_cur" in first["wrong"] and "l_prev * exp" in first["change"]


def test_files_of_the_harness_are_taken(tmp_path):
    numbers, observed = make(CASES[2], "sides-swapped")
    write_record(tmp_path / "case.npz", CASES[2], numbers, observed)
    assert main(["diagnose", str(tmp_path / "case.npz")]) == 1
    write_record(tmp_path / "case.npz", CASES[2], numbers, make(CASES[2])[1])
    assert main(["diagnose", str(tmp_path / "case.npz")]) == 0


def test_another_arithmetic_is_no_mistake(tmp_path, capsys):
    case = Case(id="slight", tokens=40, heads=3, head_dim=32)
    path = write(tmp_path / "slight.npz", *make(case, None, SingleRows))
    assert main(["diagnose", path]) == 1
    text = capsys.readouterr().out
    assert "No known mistake reproduces it." in text
    assert "Capabilities(tolerance=...)" in text
    assert main(["diagnose", path, "--tolerance", "35"]) == 0


def test_what_nobody_knows_is_not_explained_away(tmp_path, capsys):
    numbers, observed = make(CASES[0])
    rng = np.random.default_rng(0)
    observed = observed._replace(attn_out=rng.permutation(observed.attn_out))
    assert main(["diagnose", write(tmp_path / "shuffled.npz", numbers, observed)]) == 1
    text = capsys.readouterr().out
    assert "No known mistake reproduces it." in text and "known mistake:" not in text
    assert "tolerance" not in text


def test_a_wrong_shape_is_wrong(tmp_path, capsys):
    numbers, observed = make(CASES[0])
    observed = observed._replace(attn_out=observed.attn_out[:5])
    assert main(["diagnose", write(tmp_path / "short.npz", numbers, observed)]) == 1
    assert "attn_out has shape (5, 1, 96); expected (40, 1, 96)" in capsys.readouterr().out


def test_mistakes_that_the_inputs_do_not_tell_apart(capsys):
    case = Case(id="tiny", tokens=1)
    numbers, observed = make(case, "prev-returned")
    diagnosis = diagnose(Record(case, numbers, observed))
    assert {candidate.mistake.name for candidate in diagnosis.recognised} == {"prev-returned", "last-token-dropped"}
    assert "do not tell these apart" in str(diagnosis)


def test_statistics_that_are_kept_in_another_way():
    """A kernel that took natural numbers for logarithms to base 2, and returns a log-sum-exp."""
    case = CASES[0]
    numbers, observed = make(case, "base-2-instead-of-e")
    with np.errstate(all="ignore"):
        lse = observed.softmax_max + np.log2(observed.softmax_sum)
    observed = observed._replace(softmax_max=lse, softmax_sum=np.ones_like(lse))
    first = diagnose(Record(case, numbers, observed)).recognised[0]
    assert first.mistake.name == "base-2-instead-of-e" and not first.everything
    assert "not the statistics" in str(first)


def broken(folder):
    """Files that are no use, with a word of what is said about each."""
    numbers, observed = make(CASES[0])
    good = (folder / "good.npz", numbers, observed)
    tnd, seen = make(CASES[1])
    (folder / "text.npz").write_text("not a zip file")
    np.savez(folder / "objects.npz", prev_attn_out=np.array([1, "a"], object))
    np.savez(folder / "empty.npz", attn_out=observed.attn_out)
    write(*good)
    (folder / "cut.npz").write_bytes((folder / "good.npz").read_bytes()[:3000])
    write(folder / "unobserved.npz", numbers, None)
    whole = dict(np.load(folder / "good.npz"))
    del whole["cur_softmax_sum"]
    np.savez(folder / "part.npz", **whole)
    np.savez(folder / "states.npz", **{name.replace("cur_", "states.1."): part for name, part in whole.items()})
    write(folder / "layout.npz", numbers, observed, layout="BSH")
    write(folder / "rank.npz", numbers, observed, layout="TND")
    write(folder / "order.npz", tnd, seen, layout="TND", softmax_layout="packed")
    write(folder / "lengths.npz", tnd, seen, layout="TND", actual_seq_qlen=np.array([2, 12, 42]))
    write(folder / "floats.npz", tnd, seen, layout="TND", actual_seq_qlen=np.array([0.0, 40.0]))
    write(folder / "no-lengths.npz", tnd, seen, layout="TND", softmax_layout="SBH")
    write(folder / "integers.npz", [tnd[0]._replace(softmax_sum=np.ones((40, 3, 8), int)), tnd[1]], seen, layout="TND")
    return {
        "missing": f"missing.npz: no such file in {folder}\n", "god": "; did you mean good.npz?\n", "objects": "allow_pickle",
        "text": "no whole .npz file, and none of torch.save; ", "cut": "no whole .npz file, and none of torch.save; ",
        "part": '"cur_softmax_sum" is missing, but', "states": '"states.1.softmax_sum" is missing, but',
        "empty": "no input states", "unobserved": "nothing was observed", "layout": "'BSH' is not one of",
        "rank": "do not fit layout 'TND'", "order": "softmax_layout = 'packed'", "lengths": "it starts at 2",
        "floats": "float64", "no-lengths": "packed statistics expect the cumulative", "integers": "int64",
    }  # fmt: skip


def test_files_that_are_no_use(tmp_path, capsys):
    for name, words in broken(tmp_path).items():
        assert main(["diagnose", str(tmp_path / f"{name}.npz")]) == 2, name
        said = capsys.readouterr()
        assert words in said.err, f"{name}: {said.err}"
        assert not said.out
        assert "Traceback" not in said.err


@pytest.mark.parametrize("tolerance", ["0", "-1", "nan"])
def test_a_tolerance_is_positive(tolerance, tmp_path, capsys):
    path = write(tmp_path / "right.npz", *make(CASES[0]))
    assert status(["diagnose", path, "--tolerance", tolerance]) == 2
    assert f"argument --tolerance: got '{tolerance}'; expected a number above 0" in capsys.readouterr().err
