"""Files that a kernel under test, or anybody, has written: one sentence and a status, never a traceback, never a wait."""

import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from command import status
from states import state

from rau.cli.console import visible
from rau.layouts import FIELDS

pytestmark = pytest.mark.filterwarnings("ignore:rau runs on NumPy")
FIFO = pytest.param("fifo", marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders here"))

CASE = dict(  # noqa: C408 - as a call has it
    id="x", layout="SBH", softmax_layout="TND", batch=1, tokens=2, heads=2, head_dim=8, lengths=[], qlen="none", lanes=8,
    dtype="float32", cur_dtype="float32", states=2,
)  # fmt: skip
WORDS = {
    "list": "[1]", "deep": "[" * 100_000, "text": "{", "none": "null",
    **{
        name: json.dumps(CASE | change)
        for name, change in {
            "layout": {"layout": "X"}, "layouts": {"layout": ["SBH"]}, "order": {"softmax_layout": 3}, "states": {"states": 0},
            "many": {"states": 10**9}, "id": {"id": 5}, "place": {"attn_placement": "x"}, "read": {"read_only": "no"},
            "tokens": {"tokens": 3}, "dtype": {"dtype": "float16"}, "lanes": {"lanes": 1}, "lengths": {"lengths": 5},
            "profile": {"profile": "x"}, "out": {"out": "x"}, "statistics": {"statistics": None}, "stranger": {"y": 1},
        }.items()
    },
}  # fmt: skip


def header(shape):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


MEMBERS = {"huge": header("(1, 100000000000)"), "brackets": header("(" * 90), "bytes": b"text", "nothing": b""}


def arrays():
    sides = {"prev": 0, "cur": 1}
    return {
        f"{side}_{name}": part
        for side, seed in sides.items()
        for name, part in zip(FIELDS, state((2, 1, 16), (1, 2, 2, 8), "float32", seed), strict=True)
    }


@pytest.mark.parametrize("kind", [*WORDS, *MEMBERS, "zip", "text-file", "folder", FIFO])
@pytest.mark.parametrize("command", [["difftest", "--backends", "numpy", "--replay"], ["diagnose"]])
def test_a_record_that_is_none(kind, command, tmp_path, capsys):
    file = tmp_path / f"{kind}.npz"
    if kind in WORDS:
        np.savez(file, **arrays(), case=np.array(WORDS[kind]))
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "text-file":
        file.write_text("text")
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("prev_attn_out.npy" if kind in MEMBERS else "a", MEMBERS.get(kind, b"b"))
    assert status([*command, str(file)]) == 2
    captured = capsys.readouterr()
    assert str(file) in captured.err and "Traceback" not in captured.err and len(captured.err) < 2000


@pytest.mark.parametrize("key", ["prev_lse", "lse"])
@pytest.mark.parametrize(
    "lse", [np.full((1, 2, 2), "abc"), np.zeros((1, 2, 2), "V8"), np.ones((1, 2, 2), int), np.float32(1)], ids=repr
)
def test_a_log_sum_exp_that_is_none(lse, key, tmp_path, capsys):
    file, right = tmp_path / "lse.npz", np.ones((1, 2, 2), np.float32)
    outputs = dict.fromkeys(("prev_attn_out", "cur_attn_out", "attn_out"), np.ones((2, 1, 16), np.float32))
    np.savez(file, **outputs, **{"prev_lse": right, "cur_lse": right, "lse": right, "lse_base": "e"} | {key: lse})
    assert status(["diagnose", str(file)]) == 2
    told = capsys.readouterr().err
    assert str(file) in told and f'lse" is {lse.dtype.name} of shape {lse.shape}; expected float32 or float64' in told


def test_a_record_that_is_one(tmp_path, capsys):
    np.savez(tmp_path / "good.npz", **arrays(), case=np.array(json.dumps(CASE)))
    assert status(["difftest", "--backends", "numpy", "--replay", str(tmp_path / "good.npz")]) == 0


@pytest.fixture
def exported(tmp_path):
    """An exported case, answered right; and a way to change its description."""
    folder = tmp_path / "e"
    assert status(["cases", "--export", str(folder), "--select", "smallest/one-token-one-head", "--dtype", "float32"]) == 0
    index = json.loads((folder / "cases.json").read_text())
    (entry,) = index["cases"]
    for name in FIELDS:
        (folder / entry["write"][name]["file"]).write_bytes((folder / entry["rau"][name]["file"]).read_bytes())

    def rewrite(change):
        change(index, entry)
        (folder / "cases.json").write_text(json.dumps(index))
        return folder

    return rewrite


ANSWERS = {
    "zip": None, "header": b"\x93NUMPY\x01\x00\x00\x10" + b"(" * 4096, "empty": b"", "text": b"text",
    "huge": header("(1, 100000000000)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*ANSWERS, FIFO])
def test_an_answer_that_is_none(kind, exported, tmp_path, capsys):
    """That case is wrong, and the judgement goes on."""
    folder = exported(lambda index, entry: index["cases"].append(entry | {"id": "again"}))
    index = json.loads((folder / "cases.json").read_text())
    file = folder / index["cases"][0]["write"]["attn_out"]["file"]
    other = file.with_name("out.other.npy")
    other.write_bytes(file.read_bytes())
    index["cases"][1]["write"]["attn_out"]["file"] = str(other.relative_to(folder))
    (folder / "cases.json").write_text(json.dumps(index))
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a", "b")
    else:
        file.write_bytes(ANSWERS[kind])
    assert status(["cases", "--verify", str(folder)]) == 1
    text = capsys.readouterr().out.splitlines()[-1]
    assert text.startswith(f"FAILED: {folder}: 1 right, ")


CHANGES = {
    "write": {"write": None}, "states": {"states": None}, "a state": {"states": [5]}, "id": {"id": [1]}, "lengths": {"actual_seq_qlen": "x"},
    "layout": {"layout": "X"}, "layouts": {"layout": ["SBH"]}, "bound": {"bound": {}},
}  # fmt: skip


def outside(index, entry):
    entry["states"][0]["attn_out"]["file"] = "/etc/passwd"


def above(index, entry):
    entry["write"]["attn_out"]["file"] = "../e/../../x.npy"


def shapeless(index, entry):
    entry["write"]["attn_out"]["shape"] = None


@pytest.mark.parametrize(
    "change",
    [
        *(pytest.param(lambda index, entry, fields=fields: entry.update(fields), id=name) for name, fields in CHANGES.items()),
        pytest.param(lambda index, entry: index.update(cases=None), id="cases"),
        pytest.param(lambda index, entry: index.update(cases=[5]), id="entry"),
        pytest.param(outside, id="outside"), pytest.param(above, id="above"), pytest.param(shapeless, id="shapeless"),
    ],
)  # fmt: skip
def test_a_description_that_is_none(change, exported, capsys):
    folder = exported(change)
    assert status(["cases", "--verify", str(folder)]) == 2
    err = capsys.readouterr().err
    assert "cases.json" in err and "Traceback" not in err


def test_a_number_that_is_no_id(capsys):
    assert status(["cases", "--select", f"generated/0/{'9' * 5000}"]) == 2
    assert status(["cases", "--select", f"generated/{'9' * 5000}/0", "--generated", "1"]) == 2
    assert capsys.readouterr().err.count("no case matches") == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("words", [["info"], ["--help"], ["cases", "--select", "smallest/*"], ["cases", "--json", "--select", "smallest/*"]])
def test_a_full_disk(words):
    with open("/dev/full", "w") as full:
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # as a user has it
        done = subprocess.run([sys.executable, "-m", "rau", *words], stdout=full, stderr=subprocess.PIPE, text=True, env=buffered)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("No space left on device") and "Traceback" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="no limit on the size of files here")
def test_a_report_that_cannot_be_written(tmp_path):
    words = ["difftest", "--backends", "numpy", "--select", "smallest/one-token-one-head", "--report", str(tmp_path)]
    code = f"import resource; from rau.__main__ import main; resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1)); exit(main({words}))"
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.endswith("the page could not be written: [Errno 27] File too large\n")
    assert "Traceback" not in done.stderr


def test_what_a_terminal_would_obey(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RAU_X", "\x1b[31mred\x1b]0;title\x07")
    assert status(["info"]) == 0
    captured = capsys.readouterr()
    assert "\\x1b[31mred\\x1b]0;title\\x07" in captured.out and "\x1b" not in captured.out + captured.err
    assert status(["check", "no\x1b[2Jbody"]) == 2
    assert "\x1b" not in capsys.readouterr().err
    assert visible("a\tb\n\r\x85\u202eé") == "a\tb\n\\r\\x85\\u202eé"
