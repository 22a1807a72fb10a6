"""How this package was installed, and so the command that adds to it: it is on no index."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import unquote, urlsplit

DISTRIBUTION = "ring-attention-update"


def command(extra: str = "") -> str:
    """Word the command that installs this package once more, with an extra if one is named.

    Returns
    -------
    str
        Of a checkout, wherever the command is typed; of what pip was given otherwise (PEP 610).
    """
    from importlib.metadata import (  # slow to import, and needed here alone
        PackageNotFoundError,
        distribution,
    )

    extras = f"[{extra}]" if extra else ""
    try:
        origin = json.loads(distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        origin = {}
    url = origin.get("url", "")
    path = unquote(urlsplit(url).path)
    if "dir_info" in origin:
        editable = "-e " if origin["dir_info"].get("editable") else ""
        return f"pip install {editable}'{path}{extras}'"
    if url:
        vcs = origin.get("vcs_info", {})
        source = f"{vcs['vcs']}+{url}@{vcs['commit_id']}" if vcs else url
        return f"pip install '{DISTRIBUTION}{extras} @ {source}'"
    root = Path(__file__).parents[1]
    if (root / "pyproject.toml").exists():  # a source tree
        return f"pip install -e '{root}{extras}'"
    return f"pip install '{DISTRIBUTION}{extras}'"
