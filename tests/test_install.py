"""The command that a message gives for what is missing: it fits the way this package was installed."""

import importlib.metadata
import json
import re
from pathlib import Path

import pytest

import rau
from rau import install

ROOT = Path(rau.__file__).parents[1]


class Installed:
    def __init__(self, origin):
        self.origin = origin

    def read_text(self, name):
        assert name == "direct_url.json"
        return None if self.origin is None else json.dumps(self.origin)


COMMIT = "0123456789abcdef"
WAYS = {
    "pip install -e '/home/me/my checkout[torch]'": {"url": "file:///home/me/my%20checkout", "dir_info": {"editable": True}},
    "pip install '/home/me/rau[torch]'": {"url": "file:///home/me/rau", "dir_info": {}},
    f"pip install 'ring-attention-update[torch] @ git+https://host/rau.git@{COMMIT}'": {
        "url": "https://host/rau.git", "vcs_info": {"vcs": "git", "commit_id": COMMIT}
    },
    "pip install 'ring-attention-update[torch] @ file:///tmp/rau.whl'": {"url": "file:///tmp/rau.whl", "archive_info": {}},
}  # fmt: skip


@pytest.mark.parametrize("command", WAYS)
def test_it_fits_the_way_it_was_installed(command, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed(WAYS[command]))
    assert install.command("torch") == command
    assert install.command() == command.replace("[torch]", "")


def test_a_source_tree_and_an_index(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed(None))
    assert install.command("cli") == f"pip install -e '{ROOT}[cli]'" or not (ROOT / "pyproject.toml").exists()
    monkeypatch.setattr(install, "__file__", str(tmp_path / "site-packages" / "rau" / "install.py"))
    assert install.command("cli") == "pip install 'ring-attention-update[cli]'"

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    assert install.command() == "pip install 'ring-attention-update'"


def test_no_module_has_a_command_of_its_own():
    """ml_dtypes is another project, on the index, and no extra of this one's users."""
    for path in (ROOT / "rau").rglob("*.py"):
        found = [hint for hint in re.findall(r"pip install [^\n]*", path.read_text(encoding="utf-8")) if "ml_dtypes" not in hint]
        assert not found or path.name in ("install.py", "cython_.py"), path
