"""Conformance as data: cases in plain files, answered by a program in C, and judged."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from rau.__main__ import main
from rau.testing.cases import Case, generated, named
from rau.testing.export import ExportError, export_cases, verify_outputs

FIELDS = ("attn_out", "softmax_max", "softmax_sum")
BY_ID = {case.id: case for case in named()}


def index_of(folder: Path) -> list[dict]:
    return json.loads((folder / "cases.json").read_text())["cases"]


def answer_with_ours(folder: Path) -> None:
    """Let rau's own results be the answers."""
    for entry in index_of(folder):
        for name in FIELDS:
            shutil.copy(folder / entry["rau"][name]["file"], folder / entry["write"][name]["file"])


@pytest.fixture
def answered(tmp_path):
    """A few exported cases, answered right."""
    ids = ("layout/SBH", "tnd/packed-zero-length", "dtype/bfloat16", "dtype/float64", "none/tokens", "views/aliased")
    assert export_cases(tmp_path / "cases", [BY_ID[id] for id in ids]) == []
    answer_with_ours(tmp_path / "cases")
    return tmp_path / "cases"


def spoil(folder: Path, id: str, change, name: str = "attn_out", what: str = "out") -> str:
    """Change one file by a function of its array; return what the verdict then says of that case."""
    path = folder / id / f"{what}.{name}.npy"
    np.save(path, change(np.load(path)))
    return judged(folder, id)


def judged(folder: Path, id: str) -> str:
    report = verify_outputs(folder).report
    assert [failure.id for failure in report.failures] in ([id], []), report.failures
    return report.failures[0].message if report.failures else ""


def test_every_case_is_described_and_our_own_answers_pass(tmp_path):
    small = [case for case in named() if not case.id.startswith("large/")]
    cases = [*small, *generated(0, 30)]
    left_out = export_cases(tmp_path / "cases", cases)
    assert {item.message for item in left_out} == {"it is about places in memory, which files do not record"}
    index = index_of(tmp_path / "cases")
    assert len(index) + len(left_out) == len(cases) and len(index) > 200
    for entry in index:
        stated = [*entry["states"], entry["expected"], entry["bound"], entry["rau"]]
        specs = [spec for group in stated for spec in group.values()]
        specs += [entry["actual_seq_qlen"]] * (entry["actual_seq_qlen"] is not None)
        for spec in specs:
            path = tmp_path / "cases" / spec["file"]
            array = np.load(path, allow_pickle=False)
            assert (array.dtype.name, list(array.shape)) == (spec["stored_as"], spec["shape"])
            assert array.dtype.str[0] in "<|" and b"'fortran_order': False" in path.read_bytes()[:128]
        assert all(spec["dtype"] in ("float64",) for spec in entry["expected"].values())
        if entry["dtype"] == "float32":
            files = [entry[key]["attn_out"]["file"] for key in ("rau", "expected", "bound")]
            ours, exact, bound = (np.load(tmp_path / "cases" / file) for file in files)
            usual = np.isfinite(exact) & np.isfinite(ours)
            assert (np.abs(ours[usual] - exact[usual]) <= bound[usual]).all()
    answer_with_ours(tmp_path / "cases")
    found = verify_outputs(tmp_path / "cases")
    assert found.report.passed and found.missing == 0 and len(found.comparisons) == len(index)


def test_the_instructions(answered):
    text = (answered / "README.txt").read_text(encoding="ascii")
    assert "packed: sequence i" in text and "no live state: o = 0" in text and max(map(len, text.splitlines())) <= 120
    assert json.loads((answered / "cases.json").read_text())["how_to"] == "README.txt"


def test_what_is_missing_fails(answered):
    (answered / "layout/SBH/out.softmax_sum.npy").unlink()
    found = verify_outputs(answered)
    assert not found.report.passed and found.missing == 1
    assert found.report.failures == [("layout/SBH", "missing: layout/SBH/out.softmax_sum.npy")]


@pytest.mark.parametrize(
    ("id", "name", "change", "said"),
    [
        ("layout/SBH", "attn_out", lambda a: a + np.float32(1e-3), "times the bound"),
        ("layout/SBH", "softmax_max", lambda a: np.nextafter(a, np.float32(9)), "softmax_max["),
        ("layout/SBH", "softmax_sum", lambda a: a * np.array([1] * 7 + [2], np.float32), "the lanes must be equal"),
        ("layout/SBH", "attn_out", lambda a: a.astype(np.float64), "has dtype float64; expected float32"),
        ("layout/SBH", "attn_out", lambda a: a[1:], "has shape (6, 3, 80); expected (7, 3, 80)"),
        ("dtype/bfloat16", "attn_out", lambda a: a.view(np.float16), "expected uint16, the bits of bfloat16"),
        ("dtype/bfloat16", "attn_out", lambda a: a ^ 1, "times the bound"),
        ("none/tokens", "attn_out", lambda a: np.zeros((1, *a.shape[1:]), np.float32), "has shape (1, "),
    ],
)
def test_what_is_wrong_fails(answered, id, name, change, said):
    assert said in spoil(answered, id, change, name)


@pytest.mark.parametrize(
    ("id", "change"),
    [
        ("layout/SBH", lambda a: a.astype(">f4")),
        ("layout/SBH", np.asfortranarray),
        ("dtype/bfloat16", lambda a: a.view(ml_dtypes.bfloat16)),
        ("dtype/bfloat16", lambda a: a.astype(">u2")),
    ],
)
def test_other_ways_to_write_the_same_are_taken(answered, id, change):
    assert spoil(answered, id, change) == ""


def test_files_that_are_none(answered):
    path = answered / "layout/SBH/out.attn_out.npy"
    whole = path.read_bytes()
    for content in (b"", b"no array", whole[:-4], pickle.dumps({"attn_out": 1})):
        path.write_bytes(content)
        assert "out.attn_out.npy is not a .npy file that can be read without pickle" in judged(answered, "layout/SBH")
    np.save(path, np.array([{}]), allow_pickle=True)
    assert "without pickle" in judged(answered, "layout/SBH")


@pytest.mark.parametrize(("what", "name"), [("in.0", "attn_out"), ("in.1", "softmax_sum"), ("bound", "attn_out")])
def test_inputs_and_bounds_that_were_changed_are_noticed(answered, what, name):
    said = spoil(answered, "layout/SBH", lambda a: a * np.asarray(1.01, a.dtype), name, what)
    assert "is not the bound of these inputs" in said


def test_tolerance(answered):
    path = answered / "layout/SBH/out.attn_out.npy"
    np.save(path, np.load(path) * np.float32(1 + 1e-6))
    assert not verify_outputs(answered).report.passed
    assert verify_outputs(answered, tolerance=1e6).report.passed


def test_without_ml_dtypes(answered, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert main(["cases", "--verify", str(answered)]) == 2
    assert "bfloat16 NumPy arrays need ml_dtypes" in capsys.readouterr().err
    (left,) = export_cases(tmp_path / "more", [BY_ID["dtype/bfloat16"]])
    assert "ml_dtypes" in left.message


def test_folders_that_do_not_do(answered, tmp_path):
    with pytest.raises(ExportError, match="is not empty"):
        export_cases(answered, [Case(id="x")])
    with pytest.raises(ExportError, match="holds no exported cases"):
        verify_outputs(tmp_path)
    contents = {"{": "holds no exported cases", '{"format": 99}': "format 1", '{"format": 1, "cases": [{}]}': "lacks some"}
    for text, said in contents.items():
        (tmp_path / "cases.json").write_text(text)
        with pytest.raises(ExportError, match=said):
            verify_outputs(tmp_path)


@pytest.mark.parametrize("id", ["../x", "/x", "a//b", "a b", ".hidden", ""])
def test_ids_that_make_no_folder_are_left_out(tmp_path, id):
    (left,) = export_cases(tmp_path / "cases", [Case(id=id)])
    assert left.message == "its id cannot be used as a folder name" and index_of(tmp_path / "cases") == []


# -------------------------------------------------------------------------------------------------------- command line


def test_commands(tmp_path, capsys):
    folder = str(tmp_path / "out")
    assert main(["cases", "--export", folder, "--select", "layout/*"]) == 0
    out = capsys.readouterr().out
    assert f"6 cases written to {folder}" in out and f"python -m rau cases --verify {folder}" in out
    assert main(["cases", "--verify", folder]) == 1
    out = capsys.readouterr().out
    assert "wrong: layout/SBH\n    missing: layout/SBH/out.attn_out.npy" in out
    assert out.splitlines()[-1] == f"FAILED: {folder}: 0 right, 0 wrong, 6 without all outputs"
    answer_with_ours(Path(folder))
    assert main(["cases", "--verify", folder]) == 0
    out = capsys.readouterr().out
    assert "largest error of attn_out: 0." in out and out.splitlines()[-1] == f"PASSED: 6 cases in {folder} right"
    assert main(["cases", "--verify", folder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True and len(found["succeeded"]) == 6 and found["shares"]["layout/SBH"]["attn_out"] < 1


def test_export_json(tmp_path, capsys):
    options = ["--select", "*TND*", "--layout", "TND", "--dtype", "float32", "--json"]
    assert main(["cases", "--export", str(tmp_path / "out"), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["written"] == len(index_of(tmp_path / "out")) > 0 and found["bytes"] > 1000
    assert {item["id"].split("/")[0] for item in found["left_out"]} >= {"views"}


# ----------------------------------------------------------------------------------------------------- another language


def test_a_program_in_c(compiler, tmp_path, capsys):
    """Export, answer, verify: a small C program passes, and fails when it is made wrong."""
    folder = tmp_path / "cases"
    cases = [
        case for case in [*named(), *generated(1, 150)]
        if (case.layout, case.dtype, case.cur_dtype or case.dtype) == ("SBH", "float32", "float32")
        if not case.id.startswith("large/")
    ]  # fmt: skip
    export_cases(folder, cases)
    entries = index_of(folder)
    assert len(entries) > 50 and any(len(entry["states"]) > 2 for entry in entries)
    source = Path(__file__).with_name("answer.c")
    for flags, status in (([], 0), (["-DWRONG"], 1)):
        program = tmp_path / "answer"
        subprocess.run([compiler, "-O2", "-Wall", "-Werror", *flags, "-o", program, source, "-lm"], check=True)
        subprocess.run([program, *(folder / entry["id"] for entry in entries)], check=True)
        assert main(["cases", "--verify", str(folder)]) == status, capsys.readouterr().out
    assert "FAILED" in capsys.readouterr().out
