"""The HTML page of ``python -m rau difftest --report``: one file, which opens from disk and fetches nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rau.cli import case_options
from rau.cli.session import LEGEND, both, by_reason, counted, share

if TYPE_CHECKING:
    from rau.cli.outcome import Run
    from rau.testing.differential import Finding

_STYLE = """\
:root { color-scheme: light dark; --ground: #fff; --card: #f5f6f8; --ink: #1c2128; --soft: #5b6470; --line: #d5d9df;
        --bar: #3b6fb5; --good: #1a7f37; --bad: #c62828 }
@media (prefers-color-scheme: dark) { :root { --ground: #14171c; --card: #1d2229; --ink: #e4e8ee; --soft: #9aa4b2;
        --line: #363d47; --bar: #6ea3e8; --good: #4cc46a; --bad: #ff6b62 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 66rem; background: var(--ground); color: var(--ink);
       font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.4rem; margin: 0 0 .2rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
p { margin: .3rem 0 } .soft { color: var(--soft); font-size: .9rem }
.verdict { margin: 1rem 0; padding: .7rem 1rem; border-left: .35rem solid var(--good); background: var(--card);
           font-weight: 600 }
.verdict.bad { border-color: var(--bad) } .bad { color: var(--bad); font-weight: 600 }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .92rem; overflow-wrap: normal }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 500 }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
code, pre { font: .88rem/1.45 ui-monospace, monospace }
pre { margin: .5rem 0 0; padding: .6rem .8rem; background: var(--ground); border: 1px solid var(--line);
      white-space: pre-wrap }
.card { background: var(--card); padding: .8rem 1rem; margin: 0 0 .8rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem }
figure { margin: 0; background: var(--card); padding: .7rem .8rem .4rem }
figcaption { font-weight: 600; font-size: .92rem }
svg { display: block; width: 100%; height: auto } svg text { fill: var(--soft); font: 11px system-ui, sans-serif }
.bar { fill: var(--bar) } .beyond { fill: var(--bad) } .grid { stroke: var(--line) }
.limit { stroke: var(--ink); stroke-dasharray: 3 3 }
a { color: inherit }
"""


def render(this: Run) -> str:
    """Make the page of a run.

    Parameters
    ----------
    this : Run

    Returns
    -------
    str
        HTML. Failing cases are linked to as files beside it.
    """
    report, many = this.report, len(this.report.standings) > 1
    now = datetime.now().astimezone()
    options = ", ".join(f"{name} {value}" for name, value in this.options.items() if value is not None)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>difftest of {escape(', '.join(report.standings))}</title><style>{_STYLE}</style></head><body>",
        "<h1>ring_attention_update: backends compared</h1>",
        f'<p class="soft">{now:%d %B %Y, %H:%M %Z}; python -m rau difftest: {escape(options)}</p>',
        f'<p class="verdict{"" if this.passed else " bad"}">{escape(this.verdict)}</p>',
    ]
    if report.findings:
        parts += ["<h2>What went wrong</h2>", *map(_finding, report.findings)]
    parts += ["<h2>Backends against the oracle</h2>", _backends(this)]
    parts.append(
        f'<p class="soft">{LEGEND}. '
        "A case is run again by <code>python -m rau difftest --select ID</code>.</p>"
    )
    if many:
        parts += ["<h2>Backends against one another</h2>", _pairs(this)]
        parts.append('<p class="soft">apart: largest difference of two outputs, as a share of the oracle\'s bound.</p>')
    parts += ["<h2>How large the errors are</h2>", '<div class="charts">']
    parts += [_histogram(name, standing.histogram) for name, standing in report.standings.items()]
    parts.append('</div><p class="soft">Elements of attn_out by their error as a share of the bound; the scale of the '
                 "counts is logarithmic. Elements that are exact are in the first bar.</p>")  # fmt: skip
    left_out = _left_out(this)
    if left_out:
        parts += ["<h2>Not run</h2>", _table(["backend", "cases", "reason"], left_out, {"cases"})]
    parts += ["<h2>Versions and settings</h2>", _configuration(this), "</body></html>"]
    return "\n".join(parts) + "\n"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: set[str]) -> str:
    """A table of cells that are HTML already."""
    kinds = [' class="number"' if name in numbers else "" for name in columns]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(columns, kinds, strict=True))
    head = f"<thead><tr>{head}</tr></thead>" if any(columns) else ""
    body = "\n".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>" for row in rows
    )
    return f'<div class="wide"><table>{head}<tbody>\n{body}\n</tbody></table></div>'


def _alarming(text: str, bad: bool) -> str:
    return f'<span class="bad">{text}</span>' if bad else text


def _finding(finding: Finding) -> str:
    lines = [
        f'<div class="card"><p class="bad">{escape(both(finding.backend))}</p><p>{escape(finding.message)}</p>',
        f'<p class="soft">smallest failing case: {escape(case_options.describe(finding.case))}</p>',
    ]
    if finding.file:
        name = escape(Path(finding.file).name)
        lines.append(f'<p><a href="{name}">{name}</a></p><pre>{escape(finding.replay)}</pre>')
    return "\n".join(lines) + "</div>"


def _backends(this: Run) -> str:
    rows = []
    for name, standing in this.report.standings.items():
        wrong = this.report.wrong.get(name, 0)
        rows.append([
            escape(this.title(name)), f"{standing.cases:,}", f"{len(standing.excluded):,}",
            _alarming(f"{wrong:,}", wrong > 0),
            share(standing.attn_share), share(standing.sum_share), f"<code>{escape(standing.worst)}</code>",
        ])  # fmt: skip
    columns = ["backend", "cases", "excluded", "wrong", "attn_out", "softmax_sum", "worst case"]
    return _table(columns, rows, set(columns[1:6]))


def _pairs(this: Run) -> str:
    rows = [
        [
            escape(" and ".join(names)), f"{pair.cases:,}",
            _alarming(f"{pair.different:,}", ", ".join(names) in this.report.wrong),
            f"{pair.share:.3g}", escape(pair.first) or "none",
        ]
        for names, pair in this.report.pairs.items()
    ]  # fmt: skip
    columns = ["pair", "cases", "different bits", "apart", "first difference"]
    return _table(columns, rows, set(columns[1:4]))


def _left_out(this: Run) -> list[list[str]]:
    rows = [
        [escape(name), f"{len(ids):,}", escape(reason)]
        for name, standing in this.report.standings.items()
        for reason, ids in by_reason(standing.excluded.items())
    ]
    return rows + [[escape(name), "all", escape(reason)] for name, reason in this.not_run.items()]


def _configuration(this: Run) -> str:
    configuration = this.configuration
    core = configuration["core"]
    rows = [[escape(name), escape(version)] for name, version in configuration["versions"].items()]
    rows.append(["platform", escape(configuration["platform"])])
    described = f"{core['simd']}, {core['compiler']}, {core['flags']}" if core["compiled"] else "none"
    rows += [["compiled core", escape(described)], ["threads", str(configuration["threads"]["number"])]]
    variables = configuration["environment"]
    rows += [[f"<code>{escape(name)}</code>", escape(entry["value"])] for name, entry in variables.items()]
    if not variables:
        rows.append(["settings", "no RAU_* variable is set"])
    return _table(["", ""], rows, set())


_LEFT, _TOP, _WIDTH, _HEIGHT, _BASE = 38, 14, 360, 190, 158  # of a chart; _BASE: where the bars stand


def _histogram(name: str, counts: np.ndarray) -> str:
    """A bar chart in SVG; the last count, of what is beyond the bound, stands apart."""
    bins, most = len(counts) - 1, int(counts.max())
    caption = f"<figcaption>{escape(name)}, {counted(int(counts.sum()), 'element')}</figcaption>"
    if not most:
        return f'<figure>{caption}<p class="soft">no element was compared</p></figure>'
    step = (_WIDTH - _LEFT - 40) / bins
    top = math.log10(most) + 0.3  # a count of 1 must be seen

    def height(count: float) -> float:
        return (_BASE - _TOP) * (math.log10(count) + 0.3) / top

    def place(share: float) -> float:
        return _LEFT + share * bins * step

    shapes = []
    for power in range(0, math.floor(math.log10(most)) + 1, 2 if most >= 10_000 else 1):
        y = _BASE - height(10**power)
        shapes.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 4}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{_short(10**power)}</text>')
    for at, count in enumerate(map(int, counts)):
        if count:
            beyond = at == bins
            x = place(1) + 16 if beyond else place(at / bins)
            label = "beyond the bound" if beyond else f"{at / bins:g} to {(at + 1) / bins:g} of the bound"
            shapes.append(
                f'<rect class="{"beyond" if beyond else "bar"}" x="{x + 0.5:.1f}" y="{_BASE - height(count):.1f}" '
                f'width="{step - 1:.1f}" height="{height(count):.1f}">'
                f"<title>{label}: {counted(count, 'element')}</title></rect>"
            )
    x = place(1) + 2
    shapes.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{_BASE}"/>')
    shapes.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 4}" y1="{_BASE}" y2="{_BASE}"/>')
    for share in (0, 0.25, 0.5, 0.75, 1):
        shapes.append(f'<text x="{place(share):.1f}" y="{_BASE + 15}" text-anchor="middle">{share:g}</text>')
    shapes.append(f'<text x="{place(1) + 16 + step / 2:.1f}" y="{_BASE + 15}" text-anchor="middle">&gt; 1</text>')
    shapes.append(f'<text x="{place(0.5):.1f}" y="{_BASE + 29}" text-anchor="middle">share of the bound</text>')
    label = f"error histogram of {escape(name)}: {counted(int(counts[-1]), 'element')} beyond the bound"
    opening = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
    return "\n".join((f"<figure>{caption}{opening}", *shapes, "</svg></figure>"))


def _short(count: int) -> str:
    """Word a power of ten.

    Examples
    --------
    >>> [_short(10**power) for power in (0, 2, 4, 6, 9)]
    ['1', '100', '10 k', '1 M', '1 G']
    """
    for size, letter in ((10**9, " G"), (10**6, " M"), (1000, " k")):
        if count >= size:
            return f"{count // size}{letter}"
    return str(count)
