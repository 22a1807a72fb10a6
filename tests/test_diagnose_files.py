"""diagnose of files from elsewhere: torch's, incomplete ones, one element of them; and docs/diagnose.md."""

import json
import re

import numpy as np
import pytest
from command import status
from pages import blocks

import rau
from rau import AttentionState
from rau.__main__ import main
from rau.testing import VendorArithmetic, oracle
from rau.testing.cases import Case
from rau.testing.diagnosis import diagnose
from rau.testing.diagnosis.element import element
from rau.testing.differential.record import Record, RecordError, read_record

try:
    import torch
except ImportError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed and was not asked for")
CASE = Case(id="sbh", tokens=8, batch=2, heads=3, head_dim=16)
FIELDS = AttentionState._fields


def called(case=CASE):
    """A case's states as anybody has them, and their right merge."""
    states = [AttentionState(*map(np.ascontiguousarray, state)) for state in case.fill()]
    options = {"layout": case.layout, "profile": "portable", "backend": "numpy"}
    return states, rau.ring_attention_update(*states[0], *states[1], **options)


def named(states, **observed):
    return {f"{side}_{name}": part for side, state in zip(("prev", "cur"), states, strict=True)
            for name, part in zip(FIELDS, state, strict=True)} | observed  # fmt: skip


def tensor(array):
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.tensor(array)


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("way", ["flat", "three tensors", "states"])
def test_files_of_torch_say_what_npz_files_do(way, dtype, tmp_path):
    (prev, cur), merged = called(Case(id="sbh", tokens=8, heads=3, head_dim=16, dtype=dtype))
    wrong = merged._replace(attn_out=prev.attn_out)
    tensors = [AttentionState(*map(tensor, state)) for state in (prev, cur, wrong)]
    if way == "flat":
        given = named(tensors[:2], **tensors[2]._asdict())
    else:
        given = dict(zip(("prev", "cur", "out"), map(tuple, tensors) if way == "three tensors" else tensors, strict=True))
    torch.save(given | {"layout": "SBH"}, tmp_path / "call.pt")
    read = read_record(tmp_path / "call.pt")
    for mine, its in zip((*read.states, read.observed), (prev, cur, wrong), strict=True):
        assert [(a.dtype, a.tobytes()) for a in mine] == [(b.dtype, b.tobytes()) for b in its]
    assert str(diagnose(read)) == str(diagnose(Record(read.case, [prev, cur], wrong)))


@needs_torch
def test_files_of_torch_that_are_not_read(tmp_path, monkeypatch, capsys):
    file = str(tmp_path / "call.pt")
    for given, said in (
        (torch.nn.Linear(2, 2), "as weights only, since it holds torch.nn.modules.linear.Linear; expected a dict of tensors"),
        ([torch.ones(2)], "holds of type list; expected a dict of tensors, with keys such as prev_attn_out"),
        ({"prev_attn_outs": torch.ones(2)}, "no input states; expected keys such as"),
    ):
        torch.save(given, file)
        assert status(["diagnose", file]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and said in captured.err
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert status(["diagnose", file]) == 2
    assert re.search(r"torch wrote it, and is needed to read it: pip install .*\[torch\]", capsys.readouterr().err)


@pytest.mark.parametrize("kept", [("attn_out",), ("attn_out", "softmax_max"), ("softmax_sum",), ("softmax_max",), FIELDS])
@pytest.mark.parametrize("right", [True, False])
def test_what_is_there_is_judged(kept, right, tmp_path, capsys):
    states, merged = called()
    other = states[0] if not right else merged
    np.savez(tmp_path / "call.npz", **named(states, **{name: getattr(other, name) for name in kept}))
    assert main(["diagnose", str(tmp_path / "call.npz")]) == (0 if right else 1)
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("right: " if right else "wrong: ")
    missing = [name for name in FIELDS if name not in kept]
    assert (f"not judged, since the file does not have it: {', '.join(missing)}\n" in out) == bool(missing)
    for name in ("attn_out", "softmax_sum"):
        assert (f"{name} " in out.splitlines()[1]) == (name in kept)
    if not right and "attn_out" in kept:
        assert "known mistake: prev-returned" in out


def test_keys_that_mean_nothing_are_listed(tmp_path, capsys):
    states, merged = called()
    np.savez(tmp_path / "call.npz", **named(states, **merged._asdict()), cur_attn_otu=np.ones(3), step=np.array(7))
    assert main(["diagnose", str(tmp_path / "call.npz")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "not read: cur_attn_otu, which means nothing here; did you mean cur_attn_out?" in lines
    assert "not read: step, which means nothing here" in lines
    assert main(["diagnose", str(tmp_path / "call.npz"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unread"] == ["cur_attn_otu", "step"]


@pytest.mark.parametrize(
    "case",
    [CASE, Case(id="tnd", layout="TND", tokens=9, lengths=(4, 0, 5), heads=3, head_dim=64, softmax_layout="SBH"),
     Case(id="bsnd", layout="BSND", batch=2, tokens=5, heads=3, head_dim=8),
     Case(id="bnsd", layout="BNSD", batch=2, tokens=5, heads=3, head_dim=8, dtype="bfloat16", states=4)],
    ids=lambda case: case.id,
)  # fmt: skip
def test_every_number_of_an_element(case):
    """By the formula, from the numbers that are shown; at a place that each layout counts in its own way."""
    states = case.fill()
    call = case.make(states)
    expected = oracle(call.states, case.lengths_argument(), case.layout, softmax_layout=case.softmax_layout)
    b, t, h, d = (0 if case.layout == "TND" else case.batch - 1), case.tokens - 2, 1, 5
    found = element(Record(case, states, AttentionState(*states[0])), (b, t, h, d))
    place = {"SBH": (t, b, h * case.head_dim + d), "TND": (t, h, d), "BSND": (b, t, h, d), "BNSD": (b, h, t, d)}[case.layout]
    assert found.where == f"attn_out[{', '.join(map(str, place))}]"
    assert [side.output for side in found.sides] == [float(state.attn_out[place]) for state in call.states]
    assert found.exact == expected.attn_out[place] and found.bound == expected.attn_bound[place]
    m = max(side.maximum for side in found.sides)
    a = [side.sum * np.exp(side.maximum - m) for side in found.sides]
    assert (found.maximum, found.sum) == (m, pytest.approx(sum(a), rel=1e-12))
    for side, factor in zip(found.sides, a, strict=True):
        assert side.factor == pytest.approx(factor, rel=1e-12) and side.weight == pytest.approx(factor / sum(a), rel=1e-7)
        assert side.term == pytest.approx(side.weight * side.output, rel=1e-7)  # rounded to float32
    assert sum(side.term for side in found.sides) == pytest.approx(found.exact, abs=4 * found.bound + 1e-12)
    assert found.observed == float(states[0].attn_out[place])
    assert found.share == pytest.approx(abs(found.observed - found.exact) / found.bound, rel=1e-6)


def test_an_element_in_words(tmp_path, capsys):
    states, merged = called()
    np.savez(tmp_path / "call.npz", **named(states, **merged._asdict()))
    file = str(tmp_path / "call.npz")
    assert main(["diagnose", file, "--element", "1,7,2,15"]) == 0
    out = capsys.readouterr().out
    assert "attn_out[7, 1, 47], step by step:" in out
    assert re.search(r"observed: \S+, off by \S+: right, 0\.\d{4} of the bound\n", out)
    assert out.count("\n    0  ") == out.count("\n    1  ") == 1
    assert main(["diagnose", file, "--element", "1,7,2,15", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["element"]["where"] == "attn_out[7, 1, 47]"
    for index, said in (("8,0,0", "below (8, 3, 16), and a batch entry below 2"), ("1,2", "expected token,head,place"),
                        ("a,1,2", "expected token,head,place")):  # fmt: skip
        assert status(["diagnose", file, "--element", index]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(RecordError, match="there is no element 0,0,0,0,0"):
        element(read_record(file), (0, 0, 0, 0, 0))


# ----------------------------------------------------------------------------------------------------- the vendor's arithmetic


def test_the_vendors_nan_without_its_chip():
    (prev, cur), _ = called(Case(id="vendor", tokens=8, heads=2, head_dim=16))
    for state in (prev, cur):
        state.softmax_max[:, 1, 3:5], state.softmax_sum[:, 1, 3:5] = -np.inf, 0.0
    made = rau.ring_attention_update(*prev, *cur, backend=VendorArithmetic())
    right = rau.ring_attention_update(*prev, *cur)
    expected = np.zeros((8, 1, 2, 16), bool)
    expected[3:5, :, 1] = True
    assert np.array_equal(np.isnan(made.attn_out).reshape(expected.shape), expected) and not np.isnan(right.attn_out).any()
    found = diagnose(Record(Case(id="vendor", tokens=8, heads=2, head_dim=16), [prev, cur], made))
    assert found.vendors and "It is what the vendor's operator computes (rau.testing.VendorArithmetic)" in str(found)
    assert not diagnose(Record(Case(id="vendor", tokens=8, heads=2, head_dim=16), [prev, cur], prev)).vendors


def test_its_element_d_reads_lane_d_mod_8():
    case = Case(id="lanes", layout="TND", tokens=6, heads=2, head_dim=64, lengths=(2, 4), softmax_layout="SBH", unequal_lanes=True)
    states = case.make(case.fill()).states
    prev, cur = (AttentionState(*map(np.array, state)) for state in states)
    how = {"actual_seq_qlen": case.lengths_argument(), "layout": "TND", "softmax_layout": "SBH"}
    made = rau.ring_attention_update(*prev, *cur, **how, backend=VendorArithmetic())
    for lane in range(8):
        one = [AttentionState(s.attn_out, *(part[..., lane : lane + 1].repeat(8, -1) for part in s[1:])) for s in (prev, cur)]
        alone = rau.ring_attention_update(*one[0], *one[1], **how, backend=VendorArithmetic())
        assert np.array_equal(made.attn_out[..., lane::8], alone.attn_out[..., lane::8])
        assert np.array_equal(made.softmax_sum[..., lane], alone.softmax_sum[..., lane])
    assert not np.array_equal(made.attn_out, alone.attn_out)


def test_it_is_within_its_tolerance_on_ordinary_numbers():
    for dtype in ("float32", "float16", "bfloat16"):
        (prev, cur), _ = called(Case(id="o", tokens=40, heads=3, head_dim=32, dtype=dtype))
        out = AttentionState(*map(np.empty_like, prev))
        made = rau.ring_attention_update(*prev, *cur, out=out, backend=VendorArithmetic())
        compared = rau.testing.compare(made, oracle([prev, cur]), tolerance=40.0)
        assert compared.passed and compared.sum_share > 1 and made is out


@needs_torch
def test_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = blocks("diagnose.md")
    assert list(code) == ["Write the call down 0", "A chip's output, without the chip 0"]
    exec(compile(code["Write the call down 0"], "diagnose.md", "exec"), {})
    for file in ("observed.npz", "observed.pt"):
        assert main(["diagnose", file, "--element", "3,1,63"]) == 1
        assert "attn_out[3, 0, 127], step by step" in capsys.readouterr().out
    exec(compile(code["A chip's output, without the chip 0"], "diagnose.md", "exec"), {})
    assert capsys.readouterr().out.split() == ["1.0", "0.0"]
