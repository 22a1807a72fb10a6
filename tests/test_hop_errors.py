"""examples/hop_errors.py: the table, the chart, and what it says when something is missing or wrong."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import rau
from rau.install import command

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--tokens", "64", "--heads", "2", "--head-dim", "16"]

pytest.importorskip("ml_dtypes")


@pytest.fixture
def hop_errors(monkeypatch):
    """The example, called with options."""
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("hop_errors")

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["hop_errors.py", *SMALL, *options])
        try:
            return example.main()
        except SystemExit as ended:
            return ended.code

    return run


def test_as_typed():
    script = EXAMPLES / "hop_errors.py"
    assert "    python examples/hop_errors.py  " in script.read_text()
    done = subprocess.run([sys.executable, script, *SMALL, "--ranks", "4"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "rounding, however many partials there are."


@pytest.mark.parametrize("form", [("SBH", "TND"), ("TND", "TND"), ("TND", "SBH")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_stream_has_the_error_of_one_rounding_and_a_chain_has_not(backend, dtype, form, hop_errors, capsys):
    layout = "--layout", form[0], "--softmax-layout", form[1]
    assert hop_errors("--json", "--dtype", dtype, *layout, "--backends", backend, "--seed", "3") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is True and document["problem"]["ranks"] == 64
    rows = document["hops"]
    assert [row["partials"] for row in rows] == [2, 4, 8, 16, 32, 64]
    for row in rows:
        assert row["rounding_error"] <= row["stream_error"] * (1 + 1e-9)
        assert row["stream_error"] <= 1.001 * row["rounding_error"]
    once = 2.0**-9 if dtype == "bfloat16" else 2.0**-12  # half a unit in the last place, relative, at most
    assert all(0.5 * once < row["stream_error"] < once for row in rows)
    assert rows[0]["chain_error"] == rows[0]["stream_error"]
    assert 3 < rows[-1]["chain_error"] / rows[-1]["stream_error"] < 8


def test_in_words(hop_errors, capsys):
    assert hop_errors("--ranks", "6", "--backends", "numpy") == 0
    out = capsys.readouterr().out
    assert out.startswith("Attention of 64 tokens, 2 heads of dimension 16, bfloat16, layout SBH.\n")
    assert "\nMerged by numpy.\n" in out
    rows = [line.split() for line in out.splitlines() if line.split()[:1] == ["numpy"]]
    assert [row[1] for row in rows] == ["2", "4", "6"]
    assert "times as far off; StreamingMerge has the error of one" in out


def test_it_says_which_backend_merged(hop_errors, capsys):
    assert hop_errors("--ranks", "2") == 0
    first = next(status.name for status in rau.registry.status() if status.available)
    assert f"\nMerged by {first}, since all give the same bits; --backends names others.\n" in capsys.readouterr().out


def test_several_backends(hop_errors, capsys):
    pytest.importorskip("rau._core")
    assert hop_errors("--json", "--ranks", "4", "--backends", "numpy", "cython") == 0
    rows = json.loads(capsys.readouterr().out)["hops"]
    assert [row["backend"] for row in rows] == ["numpy", "numpy", "cython", "cython"]
    assert [row["stream_error"] for row in rows[:2]] == [row["stream_error"] for row in rows[2:]]


def test_a_stream_that_rounds_is_noticed(hop_errors, monkeypatch, capsys):
    """The verdict is not a formality."""
    result = rau.StreamingMerge.result

    def twice(self, dtype=None):
        return result(self, dtype)._replace(attn_out=result(self, "float16").attn_out.astype(dtype))

    monkeypatch.setattr(rau.StreamingMerge, "result", twice)
    assert hop_errors("--backends", "numpy") == 1
    assert "WRONG: StreamingMerge is further off than one rounding." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--dtype", "float32"], "argument --dtype: invalid choice: 'float32'"),
        (["--ranks", "1"], "argument --ranks: got 1; expected 2 or more"),
        (["--ranks", "65"], "--ranks is 65 and --tokens 64"),
        (["--backends", "nothing"], "nothing"),
    ],
)
def test_wrong_usage(options, says, hop_errors, capsys):
    assert hop_errors(*options) == 2
    captured = capsys.readouterr()
    assert says in captured.err.splitlines()[-1] and captured.out == ""


def test_a_chart_without_matplotlib(hop_errors, monkeypatch, capsys):
    for name in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    assert hop_errors("--plot", "chart.png") == 2
    captured = capsys.readouterr()
    assert captured.err.endswith(f"argument --plot: needs matplotlib: {command('bench')}\n")
    assert captured.out == ""  # refused before anything is computed


@pytest.mark.parametrize("name", ["chart.png", "chart.svg"])
def test_a_chart(name, hop_errors, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert hop_errors("--ranks", "4", "--plot", str(tmp_path / name)) == 0
    assert f"Drawn into {tmp_path / name}." in capsys.readouterr().out
    assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize(("name", "says"), [("chart.nope", "Format 'nope'"), ("missing/chart.png", "No such file")])
def test_a_chart_that_cannot_be_drawn(name, says, hop_errors, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert hop_errors("--plot", str(tmp_path / name)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "argument --plot: " in captured.err and says in captured.err
