"""python -m rau demo: as a person runs it, and what it says when something is wrong."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from command import status
from lse_kernels import Guarded, Weights
from mutants import Pairs

import rau
from rau.__main__ import main
from rau.backends.numpy_ import NumPyBackend
from rau.cli import console
from rau.cli.console import table
from rau.cli.demo import ring

SMALL = ["demo", "--tokens", "48", "--heads", "2", "--head-dim", "8", "--ranks", "3"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ring, "_SECONDS", 0.0)


def test_as_typed(backend):
    command = [sys.executable, "-m", "rau", *SMALL, "--backends", backend]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress where nobody watches
    assert done.stdout.startswith("Attention of 48 tokens, 2 heads of dimension 8, float32, layout SBH.\n")
    rows = [line.split() for line in done.stdout.splitlines() if line.split()[:1] == [backend]]
    assert [row[1:3] for row in rows] == [["one", "merge"], ["2", "updates"]]
    assert "Right: every merge by " + backend in done.stdout
    worst = max(float(cell) for row in rows for cell in row[-4:-2])  # of merge and sum
    assert f"allows, {worst:.0%} of it" in done.stdout


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("form", [("SBH", "TND"), ("TND", "TND"), ("TND", "SBH")])
def test_json(form, dtype, causal, backend, capsys):
    options = ["--json", "--layout", form[0], "--softmax-layout", form[1], "--dtype", dtype, "--seed", "7"]
    assert main([*SMALL, *options, "--backends", backend, *(["--causal"] if causal else [])]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is True and document["problem"]["causal"] is causal
    assert [result["call"] for result in document["results"]] == ["merge_states", "ring_attention_update"]
    limit = {"float32": 1e-6, "float16": 3e-3, "bfloat16": 3e-2}[dtype]
    for result in document["results"]:
        assert 0 < result["merge_share"] <= 1 and 0 < result["sum_share"] <= 1
        assert result["attention_error"] < limit and result["problems"] == []
        assert result["seconds"] > 0 and result["gigabytes_per_second"] > 0
    assert 0 < document["partials_error"] < limit
    ends = document["problem"]["actual_seq_qlen"]
    assert (
        (ends is None)
        if form[0] == "SBH"
        else (ends[0] == 0 and ends[-1] == 48 and len(set(np.diff(ends))) > 1)
    )


def test_packed_statistics_read_as_token_major_are_noticed(monkeypatch, capsys):
    """The verdict is not a formality: a call that says the wrong order of the statistics is judged wrong."""
    merge = ring.merge_states
    monkeypatch.setattr(
        ring, "merge_states", lambda *args, **kw: merge(*args, **(kw | {"softmax_layout": "TND"}))
    )
    assert main([*SMALL, "--layout", "TND", "--softmax-layout", "SBH", "--backends", "numpy"]) == 1
    out = capsys.readouterr().out
    assert "WRONG: numpy merged partial attention with a larger error than the contract allows." in out
    assert "numpy, merge_states: attn_out[" in out and "times the bound" in out


def test_a_wrong_backend_is_noticed(capsys):
    class Wrong(NumPyBackend):
        name = "wrong"

        def merge(self, problem, states, out):
            result = super().merge(problem, states, out)
            result.attn_out[-1] *= 1 + 1e-5
            return result

    rau.registry.register(Wrong)
    try:
        assert main([*SMALL, "--in-process", "--json"]) == 1
    finally:
        rau.registry.refresh()
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is False and document["same_bits"] is False
    passed = {result["backend"]: result["passed"] for result in document["results"]}
    assert passed.pop("wrong") is False and all(passed.values())
    assert any(
        "times the bound" in problem for result in document["results"] for problem in result["problems"]
    )


class Drifts(Pairs):
    """Each of its updates is a little more off than may be."""

    name = "drifts"

    def update(self, problem, prev, cur, out):
        result = super().update(problem, prev, cur, out)
        result.attn_out[-1] *= np.float32(1 + 1e-6)
        return result


class LSEWrong(Weights):
    name = "lse-wrong"

    def merge_lse(self, prev_out, prev_lse, cur_out, cur_lse):
        out, lse = super().merge_lse(prev_out, prev_lse, cur_out, cur_lse)
        return out, lse + 1e-4


@pytest.mark.parametrize("backend", [Pairs, Guarded, Weights, Drifts, LSEWrong], ids=lambda backend: backend.name)
@pytest.mark.parametrize("form", [[], ["--layout", "TND", "--softmax-layout", "SBH"], ["--dtype", "float16", "--ranks", "9"]], ids=str)
def test_a_backend_is_held_to_what_it_promises(monkeypatch, capsys, backend, form):
    monkeypatch.setattr("rau.testing.under_test.load", lambda name: backend())
    right = backend in (Pairs, Guarded, Weights)
    assert main([*SMALL, *form, "--backends", backend.name, "--in-process", "--json"]) == (not right)
    results = json.loads(capsys.readouterr().out)["results"]
    if right or "float16" not in form:
        assert [result["passed"] for result in results] == [right, right]


def test_backends_that_cannot_run_are_listed(monkeypatch, capsys):
    monkeypatch.setenv("RAU_BLOCK", "cython")
    rau.registry.refresh()
    try:
        assert main(SMALL) == 0
        out = capsys.readouterr().out
        assert "not run: cython (RAU_BLOCK" in out
        assert main([*SMALL, "--backends", "cython"]) == 2
    finally:
        monkeypatch.undo()
        rau.registry.refresh()
    captured = capsys.readouterr()
    assert captured.out == "" and 'backend "cython" is not available' in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "-1"], "argument --tokens: got '-1'; expected a whole number, 1 or more"),
        (["--tokens", "many"], "argument --tokens: got 'many'; expected a whole number, 1 or more"),
        (["--head-dim", "0"], "argument --head-dim: got '0'; expected a whole number, 1 or more"),
        (["--ranks", "0"], "argument --ranks: got '0'; expected a whole number, 1 or more"),
        (["--tokens", "4", "--ranks", "5"], "expected at most as many ranks as tokens"),
        (["--seed", "-3"], "argument --seed: got '-3'; expected a whole number, 0 or more"),
        (["--layout", "BSH"], "argument --layout: invalid choice: 'BSH'"),
        (["--backends", "nump"], 'Did you mean "numpy"?'),
    ],
)
@pytest.mark.parametrize("json_too", [[], ["--json"]])
def test_wrong_usage(options, message, json_too, capsys):
    assert status(["demo", *options, *json_too]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err


def test_bfloat16_without_ml_dtypes(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert main([*SMALL, "--dtype", "bfloat16", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("python -m rau demo: error: ") and "ml_dtypes" in captured.err


def test_the_smallest_problem(capsys):
    assert (
        main(["demo", "--tokens", "1", "--ranks", "1", "--heads", "1", "--head-dim", "1", "--layout", "TND"])
        == 0
    )
    assert "Right" in capsys.readouterr().out


def test_table(capsys):
    lines = console.table(["name", "time"], [["a[b]", "1"], ["long name", "12"]], right=["time"])
    assert lines == ["name       time", "---------  ----", "a[b]          1", "long name    12"]


@pytest.mark.parametrize("rich", [True, False])
def test_progress_is_shown_on_a_terminal_only(rich, monkeypatch, capsys):
    if not rich:
        for name in ("rich.console", "rich.markup", "rich.progress"):
            monkeypatch.setitem(sys.modules, name, None)
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        for quiet in (False, True):
            with console.progress(4, quiet) as step:
                step("first", 3)
                step("[/second]")
            captured = capsys.readouterr()
            assert captured.out == ""
            assert ("[/second]" in captured.err) is (terminal and rich and not quiet)


def test_equal_digests_mean_equal_bits(capsys):
    """So that one may compare what two machines print."""
    assert main([*SMALL, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["same_bits"] is True
    digests = {call: {one["digest"] for one in document["results"] if one["call"] == call} for call in ("merge_states",)}
    assert len(digests["merge_states"]) == 1
    assert main([*SMALL, "--json", "--seed", "1", "--backends", "numpy"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["digest"] not in digests["merge_states"]


def test_the_parser_costs_nothing():
    code = (
        "import sys, argparse; from rau.cli import demo;"
        "demo.add_parser(argparse.ArgumentParser().add_subparsers());"
        "assert not {'rich', 'rau.testing', 'rau.cli.demo.ring', 'ml_dtypes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    text = capsys.readouterr().out
    shape, form = "tokens heads head-dim ranks seed", "dtype layout softmax-layout causal backend json"
    for option in f"{shape} {form}".split():
        assert f"--{option}" in text


@pytest.mark.parametrize("form", ["csv", "markdown", "latex"])
def test_a_table_for_a_paper(form, capsys):
    """The figures of --json and nothing else on stdout."""
    if form != "csv":
        pytest.importorskip("tabulate")
    assert main([*SMALL, "--backends", "numpy", f"--{form}"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(out)))
        assert [row["updates"] for row in rows] == ["0", "2"] and {row["backend"] for row in rows} == {"numpy"}
        assert 0 < float(rows[0]["softmax_sum share"]) <= 1 and len(rows[0]["attention error"]) > 8
    elif form == "markdown":
        assert lines[0].startswith("| backend ") and lines[1].startswith("|---") and len(lines) == 4
    else:
        assert lines[0] == r"\begin{tabular}{lrrrrrrr}" and lines[1] == r"\toprule" and r"attn\_out share" in out


def test_tables_that_cannot_be_made(monkeypatch, capsys):
    assert status([*SMALL, "--csv", "--json"]) == 2
    assert "--json: not allowed with --csv" in capsys.readouterr().err
    assert status([*SMALL, "--csv", "--latex"]) == 2
    assert "not allowed with argument" in capsys.readouterr().err
    monkeypatch.setattr("rau.cli.session.find_spec", lambda name: None)
    assert status([*SMALL, "--latex"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and re.search(r"--latex needs tabulate: pip install .*\[cli\]", captured.err)


@pytest.mark.parametrize("room", [40, 60, 80, 200])
def test_no_number_is_broken_in_a_narrow_terminal(room, monkeypatch):
    monkeypatch.setattr("rau.cli.console.sys.stdout", Terminal())
    monkeypatch.setenv("COLUMNS", str(room))
    columns = ["backend", "how", "time", "GB/s", "merge", "sum", "attention", "partials"]
    rows = [["cython", "one merge", "30.58 ms", "0.2", "0.61", "1.00", "6.54e-08", "4.19e-08"],
            ["numpy", "15 updates", "23.32 ms", "0.5", "0.85", "1.00", "1.15e-07", "4.19e-08"]]  # fmt: skip
    lines = table(columns, rows, right=columns[2:])
    assert max(map(len, lines)) <= room and (len(lines) == 4) is (room >= 80)
    for row in rows:
        told = [line for line in lines if line.startswith(row[0])]
        assert all(line.split("  ")[0] == row[0] and row[1] in line for line in told)
        assert [cell for line in told for cell in re.split(r"\s{2,}", line)[2:]] == row[2:]


def test_a_table_is_whole_where_nobody_looks_on(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert len(table(["name", "number"], [["x" * 30, "1"]], right=["number"])) == 3


class Terminal(io.StringIO):
    def isatty(self):
        return True
