"""python -m rau demo --hops: the table, the chart, and what it says when something is missing or wrong."""

import json
import sys

import pytest

import rau
from rau.__main__ import main

SMALL = ["demo", "--hops", "--tokens", "64", "--heads", "2", "--head-dim", "16"]

pytest.importorskip("ml_dtypes")


def hops(capsys, *options):
    status = main([*SMALL, "--json", *options])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("form", [("SBH", "TND"), ("TND", "TND"), ("TND", "SBH")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_stream_has_the_error_of_one_rounding_at_every_length_and_a_chain_has_not(backend, dtype, form, capsys):
    status, document = hops(
        capsys, "--dtype", dtype, "--layout", form[0], "--softmax-layout", form[1], "--backend", backend, "--seed", "3"
    )
    assert status == 0
    assert document["passed"] is True
    rows = document["hops"]
    assert [row["partials"] for row in rows] == [2, 4, 8, 16, 32, 64]
    for row in rows:
        assert row["rounding_error"] <= row["stream_error"] * (1 + 1e-9)
        assert row["stream_error"] <= 1.001 * row["rounding_error"]
    once = 2.0**-9 if dtype == "bfloat16" else 2.0**-12  # half a unit in the last place, relative, at most
    assert all(0.5 * once < row["stream_error"] < once for row in rows)
    assert rows[0]["chain_error"] == rows[0]["stream_error"]
    assert 3 < rows[-1]["chain_error"] / rows[-1]["stream_error"] < 8


def test_in_words(capsys):
    assert main([*SMALL, "--ranks", "6", "--backend", "numpy"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Attention of 64 tokens, 2 heads of dimension 16, bfloat16, layout SBH.\n")
    rows = [line.split() for line in out.splitlines() if line.split()[:1] == ["numpy"]]
    assert [row[1] for row in rows] == ["2", "4", "6"]
    assert "times as far off; StreamingMerge has the error of one" in out


def test_several_backends(capsys):
    pytest.importorskip("rau._core")
    _, document = hops(capsys, "--ranks", "4", "--backend", "numpy", "cython")
    rows = document["hops"]
    assert [row["backend"] for row in rows] == ["numpy", "numpy", "cython", "cython"]
    assert [row["stream_error"] for row in rows[:2]] == [row["stream_error"] for row in rows[2:]]


def test_a_stream_that_rounds_is_noticed(monkeypatch, capsys):
    """The verdict is not a formality."""
    result = rau.StreamingMerge.result

    def twice(self, dtype=None):
        return result(self, dtype)._replace(attn_out=result(self, "float16").attn_out.astype(dtype))

    monkeypatch.setattr(rau.StreamingMerge, "result", twice)
    assert main([*SMALL, "--backend", "numpy"]) == 1
    assert "WRONG: StreamingMerge is further off than one rounding." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--dtype", "float32"], "--hops is about 16 bits; expected --dtype bfloat16 or float16"),
        (["--ranks", "1"], "--ranks is 1; expected 2 or more with --hops"),
        (["--ranks", "65"], "--ranks is 65 and --tokens 64"),
        (["--backend", "nothing"], "nothing"),
    ],
)
def test_wrong_usage(options, says, capsys):
    assert main([*SMALL, *options]) == 2
    assert says in capsys.readouterr().err


def test_a_chart_without_hops(capsys):
    assert main(["demo", "--plot", "chart.png"]) == 2
    assert "--plot draws what --hops shows; expected both" in capsys.readouterr().err


def test_a_chart_without_matplotlib(monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.backend_bases"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main([*SMALL, "--plot", "chart.png"]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        "python -m rau demo: error: --plot needs matplotlib: pip install 'ring-attention-update[bench]'\n"
    )
    assert captured.out == ""  # refused before anything is computed


@pytest.mark.parametrize("name", ["chart.png", "chart.svg"])
def test_a_chart(name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([*SMALL, "--ranks", "4", "--plot", str(tmp_path / name)]) == 0
    assert f"Drawn into {tmp_path / name}." in capsys.readouterr().out
    assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize(("name", "says"), [("chart.nope", "chart.nope"), ("missing/chart.png", "no folder")])
def test_a_chart_that_cannot_be_drawn(name, says, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([*SMALL, "--plot", str(tmp_path / name)]) == 2
    assert says in capsys.readouterr().err
