"""The roofline chart: what the memory allows, and what the calls reach under it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rau.cli.bench.survey import Group

_FLOPS = 3  # an element: two products and their sum; the rows' own arithmetic, once for D elements, is left out
_STYLES = {"triad": "-", "in-place triad": "--", "copy": ":"}


def obstacles(file: str) -> list[str]:
    """Say what stands against drawing into a file, in sentences.

    Parameters
    ----------
    file : str

    Returns
    -------
    list of str
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        return ["--plot needs matplotlib: pip install 'ring-attention-update[bench]'"]
    found = []
    path, known = Path(file), FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        found.append(f"--plot is {file}; expected a name that ends in one of .{', .'.join(sorted(known))}")
    if not path.parent.is_dir():
        found.append(f"--plot is {file}; there is no folder {path.parent}")
    return found


def draw(groups: Sequence[Group], file: str) -> None:
    """Draw the chart: a column for each size, its roof, and a point for each call under it.

    Every call does so little with a byte that the memory alone is its roof, and calls of one dtype and head dimension do
    the same: columns are therefore side by side, with their flop/byte written beneath, and the scale is bandwidth.

    Parameters
    ----------
    groups : sequence of Group
        Those without a roof are left out.
    file : str
    """
    from matplotlib.figure import Figure

    shown = [group for group in groups if group.roof]
    figure = Figure(figsize=(2.5 + 1.7 * max(2, len(shown)), 6), layout="constrained")
    axes = figure.add_subplot(yscale="log")
    names = list(dict.fromkeys(row.name for group in shown for row in (*group.rows, *group.peers)))
    markers = {"out=": "o", "fresh": "s", "in place": "^"}
    labels = []
    for column, group in enumerate(shown):
        for name, style in _STYLES.items():
            rate = group.roof[name].rate
            axes.plot([column - 0.4, column + 0.4], [rate, rate], style, color="black", linewidth=1)
        for row in (*group.rows, *group.peers):
            place = names.index(row.name)
            x = column - 0.35 + 0.7 * (place + 0.5) / len(names)
            axes.plot(x, row.rate, markers[row.how], color=f"C{place}", fillstyle="none")
        intensity = _FLOPS * group.size.tokens * group.size.heads * group.size.head_dim / group.bytes
        labels.append(f"{group.size.title}\n{group.dtype}\n{intensity:.2f} flop/byte")
    for place, name in enumerate(names):
        axes.plot([], [], "o", color=f"C{place}", label=name)
    for how, marker in markers.items():
        axes.plot([], [], marker, color="grey", fillstyle="none", label=how)
    for name, style in _STYLES.items():
        axes.plot([], [], style, color="black", linewidth=1, label=name)
    axes.set_xticks(range(len(shown)), labels)
    axes.set_ylabel("GB/s")
    axes.set_title("Merging attention states: the memory's roof, and what is reached under it")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(True, which="both", axis="y", alpha=0.2)
    figure.savefig(file)
