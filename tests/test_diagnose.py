"""``python -m rau diagnose``: right, wrong and recognised, wrong and not, and files that are none."""

import json

import numpy as np
import pytest
from command import status

from rau.__main__ import main
from rau.testing.cases import Case
from rau.testing.diagnosis import diagnose
from rau.testing.mistakes import MISTAKES
from rau.testing.plain import Rows
from rau.testing.record import Record, save

NAMES = ("attn_out", "softmax_max", "softmax_sum")


class SingleRows(Rows):
    """Rows in float32: the same mistakes, made by somebody whose arithmetic is another."""

    def _read(self, softmax_layout):
        super()._read(softmax_layout)
        self.lanes = tuple(part.astype(np.float32) for part in self.lanes)
        self.maxima, self.sums = (part[..., :1] for part in self.lanes)


def make(case, mistake=None, rows=Rows):
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
]


@pytest.mark.parametrize("rows", [Rows, SingleRows])
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
    save(tmp_path / "case.npz", CASES[2], numbers, observed)
    assert main(["diagnose", str(tmp_path / "case.npz")]) == 1
    save(tmp_path / "case.npz", CASES[2], numbers, make(CASES[2])[1])
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
    write(folder / "layout.npz", numbers, observed, layout="BSH")
    write(folder / "rank.npz", numbers, observed, layout="TND")
    write(folder / "order.npz", tnd, seen, layout="TND", softmax_layout="packed")
    write(folder / "lengths.npz", tnd, seen, layout="TND", actual_seq_qlen=np.array([2, 12, 42]))
    write(folder / "floats.npz", tnd, seen, layout="TND", actual_seq_qlen=np.array([0.0, 40.0]))
    write(folder / "no-lengths.npz", tnd, seen, layout="TND", softmax_layout="SBH")
    write(folder / "integers.npz", [tnd[0]._replace(softmax_sum=np.ones((40, 3, 8), int)), tnd[1]], seen, layout="TND")
    return {
        "missing": "No such file", "text": "not a .npz file", "objects": "allow_pickle", "cut": "not a .npz file",
        "empty": "no input states", "unobserved": "nothing was observed", "layout": "'BSH' is none of",
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
