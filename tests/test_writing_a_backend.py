"""docs/writing-a-backend.md: its example is a backend that the kit passes, found through its entry point."""

import os
import re
import subprocess
import sys
from pathlib import Path

import plugins
import pytest

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
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options)


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
    done = subprocess.run([compiler, *compile_.split()[1:], "-Wall", "-Wextra", "-Werror"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    done = run(*check.split(), "--select", "[!g]*", cwd=tmp_path)  # no generated cases
    assert done.returncode == 0, done.stdout + done.stderr
    assert "contiguous arrays, others being copied for it" in done.stdout
    assert "does not promise strides (outputs need not be contiguous); does it: no" in done.stdout  # they are copied for it


def test_its_own_test_suite_passes(installed, tmp_path):
    suite = next(text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "BackendConformance" in text)
    (tmp_path / "test_float64.py").write_text(suite)
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_float64.py", cwd=tmp_path, env=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d{3} passed", done.stdout)


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
