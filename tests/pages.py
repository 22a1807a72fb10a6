"""The code of the pages in docs/."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str) -> dict[str, str]:
    """The Python blocks of a page by the title of their section, and their number in it."""
    return {
        f"{title} {number}": block
        for title, section in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", section, re.S))
    }
