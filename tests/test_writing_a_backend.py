"""docs/writing-a-backend.md: its example is a backend that the kit passes, found through its entry point."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from command import status
from patience import LIMIT

import plugins

PAGE = Path(__file__).parents[1] / "docs" / "writing-a-backend.md"


def blocks():
    """The page's files, by name."""
    return dict(re.findall(r"```\w+\n(?:#|//) (\S+)\n(.*?)```", PAGE.read_text(), re.S))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment in which the example is a distribution (.ci/run installs it as a real one)."""
    folder = tmp_path_factory.mktemp("site")
    (point,) = re.findall(r"^float64 = \"(.*)\"$", blocks()["pyproject.toml"], re.M)
    plugins.install(folder, "rau-float64", {"float64": point}, rau_float64=blocks()["rau_float64.py"])
    return {**os.environ, "PYTHONPATH": str(folder)}


def run(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=LIMIT, **options)


def test_the_kit_passes_it_by_its_name(installed):
    done = run("-m", "rau", "check", "float64", "--select", "layout/*", env=installed)  # all of it: by its own suite, below
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_kit_passes_it_from_its_own_folder(tmp_path):
    (tmp_path / "rau_float64.py").write_text(blocks()["rau_float64.py"])
    command = re.search(r"python (-m rau check rau_float64\S+)", PAGE.read_text())[1]
    done = run(*command.split(), "--select", "layout/*", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    command = re.search(r"python (-m rau difftest .*)", PAGE.read_text())[1]
    done = run(*command.split(), "--cases", "30", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_kit_passes_the_kernel_with_a_log_sum_exp(tmp_path):
    code = blocks()["rau_logaddexp.py"]
    assert len([line for line in code[code.index("class ") :].splitlines() if line.strip()]) <= 10
    (tmp_path / "rau_logaddexp.py").write_text(code)
    done = run("-m", "rau", "check", "rau_logaddexp:LogAddExp", "--select", "[!g]*", cwd=tmp_path)  # no generated cases
    assert done.returncode == 0, done.stdout + done.stderr
    assert "does not promise two-empty" in done.stdout and "does it: no" in done.stdout
    command = re.search(r"python (-m rau matrix [^`*]*)", PAGE.read_text())[1]
    done = run(*command.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_kit_passes_the_kernel_in_c(compiler, tmp_path):
    for name in ("merge.c", "rau_c.py"):
        (tmp_path / name).write_text(blocks()[name])
    compile_, check = re.findall(r"^    (cc .*)\n    python (-m rau check \S+)$", PAGE.read_text(), re.M)[0]
    done = subprocess.run(
        [compiler, *compile_.split()[1:], "-Wall", "-Wextra", "-Werror"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    done = run(*check.split(), "--select", "[!g]*", cwd=tmp_path)  # no generated cases
    assert done.returncode == 0, done.stdout + done.stderr
    assert "contiguous arrays, others being copied for it" in done.stdout
    assert "does not promise strides (outputs need not be contiguous); does it: no" in done.stdout  # they are copied for it


def test_its_own_test_suite_passes(installed, tmp_path):
    suite = next(text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "BackendConformance" in text)
    (tmp_path / "test_float64.py").write_text(suite)
    options = re.search(r"python (-m pytest --junitxml=kit.xml test_float64.py)", PAGE.read_text())[1].split()
    done = run(*options, "-q", "-p", "no:cacheprovider", cwd=tmp_path, env=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d{3} passed", done.stdout)
    cases = list(ElementTree.parse(tmp_path / "kit.xml").iter("testcase"))  # what a server shows: each check by its id
    assert any("layout/BSND" in case.get("name") for case in cases)
    skipped = {case.get("name"): case.find("skipped").get("message") for case in cases if case.find("skipped") is not None}
    assert skipped["test_conformance[layout/BNSD]"] == "excluded: layout BNSD is not one of BSND"


def test_it_changes_nothing_for_who_does_not_ask(installed):
    code = """
import numpy as np, rau
out, stats = np.ones((1, 2, 1, 4), np.float32), np.ones((1, 1, 2, 8), np.float32)
call = dict(layout="BSND", profile="portable")
print(rau.explain(out, stats, stats, out, stats, stats, **call).selected)
print(rau.explain(out, stats, stats, out, stats, stats, backend="float64", **call).selected)
"""
    done = run("-c", code, env=installed)
    assert done.stdout.split() == ["cython", "float64"], done.stdout + done.stderr


def test_what_a_server_reads(tmp_path, monkeypatch, capsys):
    """The section on continuous integration: exit statuses, and the keys that it names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = blocks()["rau_float64.py"]
    section = PAGE.read_text().partition("## In continuous integration")[2]
    document = section.partition("**The document**")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", document))
    assert named == {"passed", "verdict", "succeeded", "failures", "excluded", "id", "message", "configuration"}
    for name, source, code in (("right64", text, 0), ("wrong64", text.replace("return out", "return None"), 1)):
        (tmp_path / f"{name}.py").write_text(source)
        assert status(["check", f"{name}:Float64Backend", "--select", "[ld]*/*", "--json"]) == code
        found = json.loads(capsys.readouterr().out)
        assert found["passed"] is (code == 0) and found["verdict"].startswith(("PASSED", "FAILED")[code])
        assert found["configuration"]["versions"]["rau"] and named - {"id", "message"} <= set(found)
        assert all(set(item) == {"id", "message"} for item in (*found["failures"], *found["excluded"]))
        assert bool(found["failures"]) is (code == 1) and found["excluded"]
        sys.modules.pop(name, None)
    assert status(["check", "right64:Nobody"]) == 2
