"""The site: python -m sphinx -W --keep-going docs docs/_build, with the extras test and docs, in an environment that has torch.

Pages are read on the site and in a repository's own view alike, so they link as files do; what stands outside docs/ is
mapped to its place here.
"""

import os
import re
from importlib.metadata import version as installed_version
from pathlib import Path

from rau.constraints.rules import RULES

ROOT = Path(__file__).parent.parent

project = "rau"
author = "The rau developers"
version = release = installed_version("ring-attention-update")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc"]
source_suffix = {".rst": "restructuredtext", ".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = True  # numpydoc leaves the words of "Parameters" alone, so that all that is linked has to be there
default_role = "code"  # what stands in single backticks is an argument
nitpick_ignore_regex = [("py:(class|obj|exc)", r"(?!rau\b).*")]  # others' names: their sites would have to be asked

autodoc_typehints = "none"  # the docstrings have shapes and dtypes
autodoc_member_order = "bysource"
numpydoc_show_class_members = False  # they are listed where the page asks for them
numpydoc_class_members_toctree = False

myst_enable_extensions = ["substitution"]
myst_heading_anchors = 3
myst_substitutions = {
    "rules": "\n".join(
        ["| rule | error | why | says who |", "|---|---|---|---|"]
        + [f"| `{name}` | {rule.error.__name__} | {rule.reason} | {rule.source} |" for name, rule in RULES.items()]
    )
}

html_theme = "furo"
html_title = f"rau {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {
    "light_css_variables": {"font-stack": "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"},
}

# Pages of the repository that stand outside docs/: site/NAME.md here has nothing but a link to one, and shows it.
_SHOWN = {"README.md": "index.md"}
for stub in Path(__file__).parent.glob("site/*.md"):
    _SHOWN[re.fullmatch(r"\[.*\]\(\.\./\.\./(.*)\)\n", stub.read_text(encoding="utf-8"))[1]] = f"site/{stub.name}"


def _from_the_repository(app, docname, source):
    """Put a page in the place of its stub, and lead its links to pages of the site; files that are no pages are named."""
    page = next((path for path, own in _SHOWN.items() if own == f"{docname}.md" and path != "README.md"), f"docs/{docname}.md")
    if not page.startswith("docs/"):
        source[0] = (ROOT / page).read_text(encoding="utf-8")
        app.env.note_dependency(ROOT / page)

    def place(match):
        text, target, anchor = match.groups()
        path = os.path.relpath((ROOT / page).parent / target, ROOT)
        inside = _SHOWN.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if not inside:
            if not (ROOT / path).exists():
                raise ValueError(f"{page}: {match[0]} leads nowhere")
            return text if path in text else f"{text} (`{path}`)"
        if text.endswith(".md"):  # the name of the file: here it is the page's, or the section's, title
            text = ""
        return f"[{text}]({os.path.relpath(inside, os.path.dirname(docname) or '.')}{anchor or ''})"

    if page.endswith(".md"):
        source[0] = re.sub(r"(?<!!)\[([^][]*)\]\((?!https?:|#)([\w./-]+)(#[^)]*)?\)", place, source[0])


def setup(app):
    app.connect("source-read", _from_the_repository)
