"""What a checkout and an install have to be. The sdist and the wheel take longer: .ci/run looks at them."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from patience import LIMIT

import rau

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TEXTS = sorted(
    path
    for pattern in (
        "*.md",
        "*.py",
        "*.toml",
        "rau/**/*",
        "docs/**/*",
        "examples/**/*",
        "asv_bench/**/*",
        "proofs/**/*",
        "tests/**/*",
    )
    for path in ROOT.glob(pattern)
    if path.is_file() and path.suffix in {".h", ".ipynb", ".json", ".md", ".py", ".pyi", ".pyx", ".rst", ".toml", ".txt"}
    if path != Path(__file__)
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the repository root, without the RAU_* variables of this one."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAU_")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT, stdin=subprocess.DEVNULL)


# ---------------------------------------------------------------------------------------------------------------- core


def test_core_is_compiled_and_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without this test everything else would pass on NumPy alone.
    monkeypatch.delenv("RAU_BACKEND", raising=False)
    out, stats = np.ones((4, 1, 16), np.float32), np.ones((1, 2, 4, 8), np.float32)
    if os.environ.get("RAU_EXPECT_NO_CORE"):
        with pytest.raises(ImportError):
            importlib.import_module("rau._core")
        expected = "numpy"
    else:
        core = importlib.import_module("rau._core")
        assert str(core.__file__).endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))
        expected = "cython"
    explanation = rau.explain(out, stats, stats, out, stats, stats)
    assert (explanation.selected, explanation.origin) == (expected, "automatic")


# -------------------------------------------------------------------------------------------------------------- import


def test_import_is_light() -> None:
    done = run(
        "-c",
        "import json, logging, sys, numpy; before = set(sys.modules); import rau; "
        "print(json.dumps([sorted(set(sys.modules) - before), len(logging.getLogger('rau').handlers), len(logging.root.handlers)]))",
    )
    assert done.returncode == 0, done.stderr
    modules, own_handlers, root_handlers = json.loads(done.stdout)
    heavy = {"torch", "mindspore", "triton", "ml_dtypes", "rich", "pytest", "hypothesis", "importlib.metadata"}
    assert not heavy & set(modules)
    assert (own_handlers, root_handlers) == (0, 0)


def test_installed_version_is_that_of_the_sources() -> None:
    # Otherwise an old install lies about what is being tested.
    assert importlib.metadata.version("ring-attention-update") == PYPROJECT["project"]["version"]


@pytest.mark.parametrize("arguments", [("info",), ("--help",)], ids=" ".join)
def test_python_m_rau_works(arguments: tuple[str, ...]) -> None:
    done = run("-m", "rau", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_console_script_beside_python_m_rau() -> None:
    from importlib.metadata import EntryPoint

    from rau.__main__ import main

    (name, value), = PYPROJECT["project"]["scripts"].items()
    assert name == "rau" and EntryPoint(name, value, "console_scripts").load() is main


def test_the_metadata_keep_no_ascend_machine_out() -> None:
    """They have Python 3.10 and torch 2.7 to 2.9, which an extra must not replace."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    project = PYPROJECT["project"]
    assert SpecifierSet(project["requires-python"]).contains("3.10.0")
    extras = {extra: [Requirement(line) for line in lines] for extra, lines in project["optional-dependencies"].items()}
    for extra in ("torch", "cuda"):
        (torch,) = (one.specifier for one in extras[extra] if one.name == "torch")
        assert all(torch.contains(version) for version in ("2.7.1", "2.8.0", "2.9.1", "2.13.0+cpu"))
    # A CUDA build of torch asks for one release of Triton: to want a newer one would replace torch too.
    assert [str(one) for one in extras["cuda"] if one.name == "triton"] == ["triton"]
    for extra in set(extras) - {"torch", "cuda"}:
        assert not any(one.name in ("torch", "triton") for one in extras[extra])


# --------------------------------------------------------------------------------------------------------------- tests


def test_no_test_has_a_limit_of_its_own() -> None:
    """tests/patience.py has the one that there is, which the environment can stretch; nothing is wrong for being slow."""
    own = re.compile(r"timeout=[1-9]|\.(?:wait|join|result|alarm)\([1-9]|(?:monotonic|perf_counter)\(\) - \w+ < \d")
    for path in sorted((ROOT / "tests").glob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert path == Path(__file__) or not own.search(line), f"{path.name}:{number}: {line.strip()}"


# --------------------------------------------------------------------------------------------------------------- words


def install_hints(text: str) -> list[str]:
    """What ``pip install`` is told to install, requirement by requirement."""
    words = [word for hint in re.findall(r"\bpip3?\s+install\b([^\n`&|;]*)", text) for word in hint.split()]
    return [word.strip("'\"\\,.:)(") for word in words]


def test_install_hints_are_found() -> None:
    assert install_hints("run `pip install 'rau[cli]'` now") == ["rau[cli]"]
    assert install_hints("python -m pip install --quiet rau.") == ["--quiet", "rau"]


def test_install_hints_name_the_distribution() -> None:
    # "rau" is somebody else's on the package index.
    extras = set(PYPROJECT["project"]["optional-dependencies"])
    for path in TEXTS:
        for word in install_hints(path.read_text(encoding="utf-8")):
            assert not re.match(r"rau\b", word), f"{path.relative_to(ROOT)}: pip install {word}"
            if match := re.match(r"(?:ring-attention-update|\.)\[([\w,-]+)", word):
                unknown = set(match[1].split(",")) - extras
                assert not unknown, f"{path.relative_to(ROOT)}: no such extra: {sorted(unknown)}"


@pytest.mark.parametrize(
    "command",
    [
        "python3 -m venv .venv && .venv/bin/python -m pip install -e '.[cli]' && .venv/bin/python -m rau demo",
        "python3 -m venv .venv && .venv/bin/python -m pip install -e '.[test]' && .venv/bin/python -m pytest",
    ],
    ids=["demo", "tests"],
)
def test_readme_has_the_two_commands(command: str) -> None:
    # Each alone on its line, once: .ci/run reads them there.
    lines = [line.strip() for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    assert lines.count(command) == 1
