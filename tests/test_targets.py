"""asv_bench/targets.py: the table, the chart, and what it says of mistakes. Nothing here depends on a time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import rau
from rau.cli.bench import survey, workload
from rau.install import command

SCRIPT = Path(__file__).parents[1] / "asv_bench" / "targets.py"
# One thread: on a machine with other work to do, several wait for each other.
QUICK = ["--quick", "--threads", "1"]
WITHOUT_CORE = bool(os.environ.get("RAU_EXPECT_NO_CORE"))

sys.path.insert(0, str(SCRIPT.parent))
probes, targets = import_module("benchmarks.probes"), import_module("targets")
sys.path.remove(str(SCRIPT.parent))


def test_the_targets(monkeypatch, capsys):
    monkeypatch.setattr(targets, "_fresh", lambda function, *arguments: function(*arguments))
    assert targets.main([*QUICK, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["scale"] == targets.QUICK_SCALE._asdict()
    assert [line["what"] for line in document["targets"]] == [target.what for target in targets.TARGETS]
    for line in document["targets"]:
        assert line["verdict"] in (targets.REACHED, targets.MISSED, targets.UNMEASURED)
        assert line["measured"] and bool(line["figures"]) == (line["verdict"] != targets.UNMEASURED)
    verdicts = {line["what"]: line["verdict"] for line in document["targets"]}
    # What is no speed, and holds on every machine.
    assert verdicts["accuracy: worst error by its bound"] == targets.REACHED
    assert verdicts["accuracy: 16-bit elements rounded correctly"] == targets.REACHED
    for line in document["targets"]:
        if line["what"].startswith(("large", "smallest call, NumPy", "10,000")):
            assert (line["verdict"] == targets.UNMEASURED) == WITHOUT_CORE


@pytest.mark.skipif(WITHOUT_CORE, reason="needs the compiled core")
def test_what_is_measured_in_a_process_of_its_own(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as for a script that is run there
    found = targets._fresh(probes.smallest, 1, 0.0, False)
    assert set(found) == {"out=", "fresh", probes.PYTHON} and min(found.values()) > 0
    with pytest.raises(MemoryError, match="was killed"):
        targets._fresh(os._exit, 9)


def test_plain_python_does_the_same_work():
    prev, cur, _ = workload.states(workload.Size("SBH", (5,), 3, 8), "float32", 3)
    rows = probes.python_update(probes.python_rows(prev), probes.python_rows(cur))
    expected = probes.python_rows(rau.ring_attention_update(*prev, *cur))
    assert len(rows) == len(expected) == 15
    for got, wanted in zip(map(list, zip(*rows)), map(list, zip(*expected))):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_the_table_is_printed(monkeypatch, capsys):
    found = {"large": [{"float32": {"out=": 0.95, "in place": 0.5}}, {"float32": {"out=": 0.97, "in place": 0.6}}]}
    missing = ImportError("nothing here")
    monkeypatch.setattr(
        targets, "measurements", lambda *arguments: {one.source: found.get(one.source, missing) for one in targets.TARGETS}
    )
    assert targets.main([]) == 0
    out = capsys.readouterr().out
    assert "float32 0.96 (0.95 to 0.97)" in out and "float32 0.55 (0.50 to 0.60)" in out and "nothing here" in out
    assert [word in out for word in (targets.REACHED, targets.MISSED, targets.UNMEASURED)] == [True] * 3


@pytest.mark.parametrize(
    ("least", "values", "verdict"),
    [
        (True, {"x": 1.0, "y": 2.0}, targets.REACHED),
        (True, {"x": 0.99, "y": 2.0}, targets.MISSED),
        (True, {"x": [0.5, 1.5, 1.0]}, targets.REACHED),
        (False, {"x": 1.0, "y": 0.5}, targets.REACHED),
        (False, {"x": 1.01, "y": 0.5}, targets.MISSED),
        (True, {"x": float("nan")}, targets.MISSED),
        (False, {"x": float("nan")}, targets.MISSED),
        (True, {}, targets.UNMEASURED),
    ],
)
def test_judged_by_the_worst(least, values, verdict):
    target = targets.Target("what", "source", lambda found: found, 1.0, least)
    assert targets.judged(target, values).verdict == verdict


def test_accuracy_notices_a_wrong_backend():
    from rau.backends.numpy_ import NumPyBackend

    class Wrong(NumPyBackend):
        def merge(self, problem, states, out):
            result = super().merge(problem, states, out)
            result.attn_out[-1] *= np.asarray(1.01, result.attn_out.dtype)
            return result

        def update(self, problem, prev, cur, out):
            return self.merge(problem, (prev, cur), out)

    found = probes.accuracy(Wrong(), ("float32", "float16"))
    assert found["share"]["float32"] > 1 and found["rounded"]["float16"] < 0.999


def test_sizes_fit_the_memory():
    size = targets.fitted(workload.LARGE, 512 << 20)
    assert size.tokens == 2048 and size.heads == 32  # sixteen float32 outputs of 32 MiB
    assert targets.fitted(workload.LARGE, 1 << 50) is workload.LARGE
    assert targets.fitted(workload.SEQUENCES, 0).lengths == (1, 1, 1, 1)
    assert targets.available_memory() > 0


def test_dtypes_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert probes.dtypes() == ("float32", "float16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "0"], "argument --threads: got '0'; expected a whole number, 1 or more"),
        (["--plot", "roof.xyz"], "argument --plot: Format 'xyz' is not supported"),
        (["--plot", "missing/roof.png"], "argument --plot: [Errno 2] No such file or directory"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_usage(options, message, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        targets.main([*QUICK, *options])
    captured = capsys.readouterr()
    assert refused.value.code == 2 and captured.out == "" and message in captured.err.splitlines()[-1]


def test_a_chart_without_matplotlib(monkeypatch, tmp_path, capsys):
    for name in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as refused:
        targets.main([*QUICK, "--plot", str(tmp_path / "roof.png")])
    captured = capsys.readouterr()
    assert refused.value.code == 2 and captured.out == "" and command("bench") in captured.err


def test_a_chart(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(survey, "_LEAST_BYTES", 0)  # or the tiny sizes have no roof, and nothing is drawn
    file = tmp_path / "roof.svg"
    assert targets.main([*QUICK, "--plot", str(file)]) == 0
    assert f"drawn: {file}" in capsys.readouterr().out
    text = file.read_text()
    assert "</svg>" in text and all(f"<!-- {word}" in text for word in ("numpy", "in-place triad", "0.40 flop/byte", "out="))
    where = re.search(r"<!-- (.*) -->", text[text.index(" CPUs") - 20 :])[1]
    assert re.fullmatch(r"\d+ CPUs(, .+)?; \d+ threads?; \d\d \w+ 20\d\d", where)
    assert text.count("<!-- numpy -->") == 1  # one legend
    assert text.count("LineCollection") >= 12  # whiskers, of each call


def test_as_typed():
    assert "    python asv_bench/targets.py  " in SCRIPT.read_text()
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "--plot FILE" in done.stdout


def test_the_registry_names_what_asv_measures():
    assert import_module("benchmarks.common").BACKENDS == rau.registry.names()


def test_the_baseline_is_the_one_that_is_named():
    named = re.search(r"asv compare -m (\S+) -f 1\.2 (\w{8}) HEAD", (SCRIPT.parent / "README.md").read_text())
    results = SCRIPT.parent / "results" / named[1]
    assert (results / "machine.json").exists()
    (found,) = results.glob(f"{named[2]}-*.json")
    assert json.loads(found.read_text())["commit_hash"].startswith(named[2])
