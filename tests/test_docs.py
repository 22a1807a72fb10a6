"""The pages of docs/ that no other test runs, and what all of them say of the package: tables, drawings, links."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from pages import DOCS, blocks

import rau
from rau.constraints.profiles import PROFILES
from rau.registry import _AUTOMATIC
from rau.testing import precedence

ROOT = DOCS.parent
RUN_BY = {  # pages with Python in them, and the test that runs it
    "ascend.md": "test_compat.py", "diagnose.md": "test_diagnose_files.py", "interop.md": "test_interop.py",
    "migration.md": "test_compat_peers.py", "scaling.md": "test_distributed.py", "writing-a-backend.md": "test_writing_a_backend.py",
}  # fmt: skip


def right_index(names, printed):
    assert (names["out"].shape, names["lse"].shape) == ((6, 2, 64), (6, 2))


def right_ring(names, printed):
    found = np.concatenate(names["outputs"])
    assert found.shape == (64, 1, 64) and np.abs(found - names["whole"]).max() < 1e-6


def right_split(names, printed):
    assert len(names["pairs"]) == 16 and np.abs(names["out"] - names["whole"]).max() < 1e-6
    assert printed.endswith("the same bits: True\n")


def right_ascend(names, printed):
    lines = printed.splitlines()
    assert lines[:2] == ["right: True", "max and sum agree: True"]
    assert np.abs(names["right"].attn_out - names["wrong"].attn_out).max() > 0.1
    assert any(line.startswith("  ascend: within its limits; ") for line in lines)


def right_backend(names, printed):
    apart, message, passed = printed.splitlines()
    assert float(apart) < 1e-6 and "is nan, expected" in message and passed == "passed: True"
    wrong = rau.testing.check_backend(names["Mine"](), select="statistics/*").failures
    assert {failure.id for failure in wrong} == {"statistics/empty-float32@TND", "statistics/infinite-max-float32@TND"}
    assert rau.testing.check_backend(names["Mended"](), select="outputs/*").passed


def right_choosing(names, printed):
    *explained, chosen = printed.splitlines()
    assert chosen == "numpy cython"
    (shown,) = re.findall(r"```text\n(.*?)```", (DOCS / "choosing.md").read_text(encoding="utf-8"), re.S)
    said = "\n".join(explained)
    assert shown and all(line in said for line in shown.splitlines())


def right_numerics(names, printed):
    chain, stream = (float(line.split()[-1]) for line in printed.splitlines())
    assert chain > 3 * stream > 0


PAGES = {
    "index.md": right_index, "tutorials/ring.md": right_ring, "tutorials/split-kv.md": right_split, "tutorials/ascend.md": right_ascend,
    "tutorials/backend.md": right_backend, "choosing.md": right_choosing, "numerics.md": right_numerics,
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_and_is_right(page, capsys, monkeypatch):
    for name in ("RAU_BACKEND", "RAU_BLOCK"):
        monkeypatch.delenv(name, raising=False)
    names = {"__name__": "page"}
    for section, code in blocks(page).items():
        exec(compile(code, f"docs/{page}, {section}", "exec"), names)
    PAGES[page](names, capsys.readouterr().out)


def test_all_python_of_the_pages_is_run():
    with_code = {
        path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if "```python" in path.read_text(encoding="utf-8")
    }
    assert with_code == {*PAGES, *RUN_BY}
    for page, test in RUN_BY.items():
        assert page in Path(__file__).with_name(test).read_text(encoding="utf-8")
    for page in PAGES:  # none stands before the first section, where `blocks` does not look
        assert len(blocks(page)) == (DOCS / page).read_text(encoding="utf-8").count("```python")


# ------------------------------------------------------------------------------------------------------ what the pages say


def table(page, heading, column):
    """Rows of the table of a section, by the text of its first column, or of the one whose title begins so."""
    section = (DOCS / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line.startswith("|")]
    titles, _, *rows = rows
    return {row[titles.index(column)]: dict(zip(titles, row, strict=True)) for row in rows}


def test_the_contract_has_the_rules_that_are_exported():
    page = (DOCS / "contract.md").read_text(encoding="utf-8")
    assert f"\n{precedence.as_markdown()}\n" in page, f"write this table into the page:\n{precedence.as_markdown()}"
    from rau.testing.export import _TEXT

    assert precedence.as_text() in _TEXT


def test_the_contract_lists_the_layouts():
    shown = table("contract.md", "Layouts", "layout")
    assert set(shown) == set(rau.layouts.LAYOUTS)
    for name, layout in rau.layouts.LAYOUTS.items():
        assert shown[name]["`attn_out`"] == layout.attn.replace("H)", "N·D)")
        assert shown[name]["statistics"].split(", in one")[0] == layout.stats.format(lanes="lanes")
        assert (shown[name]["known to"] == "the vendors") == (name in PROFILES["mindspore"].layouts)


def test_limits_by_operator():
    shown = table("limits.md", "By operator", "profile")
    assert set(shown) == {f"`{name}`" for name in PROFILES}
    for name, profile in PROFILES.items():
        row = shown[f"`{name}`"]
        assert row["layouts"] == ", ".join(profile.layouts) and row["lanes"] == ", ".join(map(str, profile.lanes))
        assert row["dtypes"].split(";")[0] == ", ".join(profile.dtypes)
        assert ("`actual_seq_qlen` is required" in row["in TND"]) is profile.vendor


def test_limits_by_backend():
    shown = table("limits.md", "By backend", "backend")
    assert set(shown) == {"`cython`", "`numpy`", "`torch`", "`cuda`", "`ascend`", "`jax`", "`jax_numpy`"}
    for name, row in shown.items():
        takes = rau.registry.capabilities(name.strip("`"))
        kinds = {"numpy": "NumPy", "torch": "torch", "mindspore": "MindSpore", "jax": "JAX"}
        assert row["arrays"] == ", ".join(kinds[kind.partition(":")[0].partition(".")[0]] for kind in takes.array_types)
        assert row["dtypes"] == ", ".join(takes.dtypes) and row["layouts"] == ", ".join(takes.layouts)
        assert row["lanes"] == ", ".join(map(str, takes.lanes)) and row["rows held to"] == f"{takes.tolerance:g} × bound"
        if name != "`cuda`":  # under Triton's interpreter it is the CPU's
            anywhere = "any with float64" if takes.tolerance == 1 else "any"
            assert row["devices"] == (anywhere if takes.devices is None else ", ".join(takes.devices))
        assert (takes.max_heads, takes.max_head_dim, takes.max_states, takes.head_dim_multiple) == (None, None, None, 1)
        assert (takes.limits is None) is (name != "`ascend`")


def test_who_runs_a_call_unasked():
    shown = table("choosing.md", "What chooses, in order of precedence", "arrays")
    words = {"numpy": "NumPy", "mindspore": "MindSpore", "jax": "JAX", "cpu": "the CPU", "cuda": "CUDA", "npu": "an NPU", "ascend": "Ascend"}
    expected = {f"{words.get(kind, kind)} on {words[device]}": backends for (kind, device), backends in _AUTOMATIC.items()}
    expected["NumPy"] = expected.pop("NumPy on the CPU")
    assert {arrays: row["unasked"] for arrays, row in shown.items()} == {
        arrays: ", ".join(f"`{name}`" for name in backends) for arrays, backends in expected.items()
    }


def test_the_drawings_are_what_their_script_draws():
    spec = importlib.util.spec_from_file_location("draw", DOCS / "drawings" / "draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    pictures = [one() for one in draw.PICTURES]
    assert {f"{picture.name}.svg" for picture in pictures} == {path.name for path in (DOCS / "drawings").glob("*.svg")}
    for picture in pictures:
        assert (DOCS / "drawings" / f"{picture.name}.svg").read_text(encoding="utf-8") == picture.drawn()


# ------------------------------------------------------------------------------------------------------------------- links

TEXTS = [path for path in (*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("*/README.md")) if "_build" not in path.parts]


def anchors(page):
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    slugs = [re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)]
    return set(slugs)


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    """In the repository's own view; on the site Sphinx looks, with warnings as errors."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", text):
        path = (page.parent / target) if target else page
        assert path.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}: no such heading"
    assert not re.search(r"^\s*\+ ", text, re.M), "a line that begins with + is a list's"


def test_a_stub_of_the_site_is_a_link():
    for stub in (DOCS / "site").iterdir():
        (target,) = re.findall(r"\A\[.*\]\((.*)\)\n\Z", stub.read_text(encoding="utf-8"))
        assert (stub.parent / target).is_file()


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    version, name = (re.search(rf'^{key} = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1] for key in ("version", "license"))
    assert f"\nversion: {version}\n" in citation and f"\nlicense: {name}\n" in citation


def test_the_tests_need_nothing_of_the_site():
    (needs,), (site,) = (re.findall(rf"^{extra} = (\[.*\])$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M) for extra in ("test", "docs"))
    assert not set(re.findall(r'"([\w-]+)', needs)) & set(re.findall(r'"([\w-]+)', site)) and "sphinx" in site


def test_the_layers_are_those_that_are_enforced():
    """In both drawings of architecture.md, from top to bottom; the core is no module of Python's, and stands below them all."""
    enforced = re.findall(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    page = (DOCS / "architecture.md").read_text()
    drawn = re.findall(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[: len(enforced)]
    assert len(enforced) == 2
    for layers, drawing in zip(enforced, drawn, strict=True):
        names = [name for line in drawing.splitlines() for name in re.findall(r"(?:^|\|) +(\w+)(?:\.py|/)?(?= )", line[:53])]
        assert [name for name in names if name != "_core"] == re.findall(r"\w+", layers)
    assert all(path.name in page for path in (ROOT / "rau" / "csrc").iterdir())
