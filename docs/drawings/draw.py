"""Draw the pictures of the pages: python docs/drawings/draw.py writes them beside this file; a test compares.

Numbers and places are computed, so that no picture can say what rau does not do. Each has a ground of its own, to be read on
a light page and a dark one, and is narrow, to be read on a phone.
"""

from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np

import rau

HERE = Path(__file__).parent
WIDTH = 440
INK, SOFT, GROUND, EDGE = "#1f2933", "#52606d", "#fbfaf7", "#cbd2d9"
SIDES = (("#d6e6fa", "#8fbcec"), ("#fde3c4", "#f3b566"))  # of two parts, or two sequences; the second shade is head 1


class Picture:
    """An SVG file that grows downwards."""

    def __init__(self, name: str, height: int, title: str) -> None:
        self.name = name
        size = {"viewBox": f"0 0 {WIDTH} {height}", "width": str(WIDTH), "height": str(height)}
        style = {"role": "img", "font-family": "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"}
        self.root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size, **style})
        ET.SubElement(self.root, "title").text = title
        self.box(0.5, 0.5, WIDTH - 1, height - 1, GROUND, 10)

    def box(self, x: float, y: float, width: float, height: float, fill: str, radius: int = 4) -> None:
        place = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{width:g}", "height": f"{height:g}", "rx": f"{radius}"}
        ET.SubElement(self.root, "rect", {**place, "fill": fill, "stroke": EDGE})

    def text(
        self, x: float, y: float, words: str, size: int = 15, fill: str = INK, anchor: str = "start", weight: str = "400"
    ) -> None:
        assert len(words) * size * 0.56 < WIDTH - 20, f"too long to be drawn: {words}"  # of the wider fonts that stand in
        look = {"font-size": f"{size}", "fill": fill, "text-anchor": anchor, "font-weight": weight}
        ET.SubElement(self.root, "text", {"x": f"{x:g}", "y": f"{y:g}", **look}).text = words

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """A line with a head that points down."""
        ET.SubElement(self.root, "path", {"d": f"M{x:g} {y:g}L{to_x:g} {to_y - 5:g}", "stroke": SOFT, "stroke-width": "2"})
        head = f"M{to_x - 5:g} {to_y - 8:g}h10l-5 8z"
        ET.SubElement(self.root, "path", {"d": head, "fill": SOFT})

    def drawn(self) -> str:
        ET.indent(self.root, " ")
        return ET.tostring(self.root, encoding="unicode") + "\n"


def attention(scores: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """What a kernel returns of one query: output, maximum, sum."""
    p = np.exp(scores - scores.max())
    return float(p @ values / p.sum()), float(scores.max()), float(p.sum())


def merge() -> Picture:
    """One query, eight keys in two parts: what each part gives, and that the merge is what all give."""
    scores = np.array([1.2, 0.3, 2.0, -0.5, 0.8, 2.6, -1.0, 0.4])
    values = np.array([0.5, -1.0, 2.0, 1.0, -0.5, 1.5, 3.0, 0.0])
    halves = [attention(scores[part], values[part]) for part in (slice(4), slice(4, 8))]
    states = [rau.AttentionState(*(np.full((1, 1, 1), x, np.float32) for x in half)) for half in halves]
    merged = rau.merge_states(states, layout="TND")
    whole = attention(scores, values)
    assert all(abs(float(part[0, 0, 0]) - x) < 1e-6 for part, x in zip(merged, whole, strict=True))

    picture = Picture("merge", 470, "Two partial attention states are merged into the state of all the keys")
    picture.text(20, 30, "One query, its scores against eight keys", 16, weight="600")
    for k, score in enumerate(scores):
        x = 20 + 50 * k + 2 * (k > 3)
        picture.box(x, 44, 46, 34, SIDES[k // 4][0])
        picture.text(x + 23, 67, f"{score:.1f}", 15, anchor="middle")
    for part, (x, where) in enumerate(((20, "keys on rank 0"), (224, "keys on rank 1"))):
        picture.text(x + 98, 98, where, 14, SOFT, "middle")
        picture.arrow(x + 98, 106, x + 98, 132)
        picture.box(x, 134, 196, 92, SIDES[part][0])
        picture.text(x + 98, 156, "a partial state", 15, anchor="middle", weight="600")
        for line, (name, number) in enumerate(zip(("output", "max", "sum"), halves[part], strict=True)):
            picture.text(x + 30, 178 + 19 * line, name)
            picture.text(x + 166, 178 + 19 * line, f"{number:.3f}", anchor="end")
        picture.arrow(x + 98, 230, 220 + 60 * (part - 0.5), 258)
    picture.box(20, 260, 400, 78, "#ffffff")
    picture.text(220, 282, "merge: m is the larger max", 15, anchor="middle", weight="600")
    picture.text(220, 304, "sum = a + b,  a = sum₀ exp(max₀ − m),  b alike", 15, anchor="middle")
    picture.text(220, 325, "output = (a output₀ + b output₁) / sum", 15, anchor="middle")
    picture.arrow(220, 342, 220, 366)
    picture.box(20, 368, 400, 56, "#dcefdc")
    for x, name, part in zip((90, 220, 350), ("output", "max", "sum"), merged, strict=True):
        picture.text(x, 390, name, 15, anchor="middle")
        picture.text(x, 412, f"{float(part[0, 0, 0]):.3f}", 15, anchor="middle", weight="600")
    picture.text(220, 450, "the same as one softmax over all eight keys", 15, anchor="middle", weight="600")
    return picture


def ribbon(picture: Picture, y: int, rows: list[tuple[str, str, int, int]]) -> None:
    """Twelve rows as they follow one another in memory: two lines of text, part, head."""
    for place, (upper, lower, part, head) in enumerate(rows):
        x = 10 + 35 * place
        picture.box(x, y, 35, 44, SIDES[part][head], 0)
        picture.text(x + 17.5, y + 19, upper, 15, anchor="middle")
        picture.text(x + 17.5, y + 37, lower, 15, anchor="middle")


def layouts() -> Picture:
    """The rows of attn_out and of the statistics, in memory, in SBH and TND."""
    picture = Picture("layouts", 420, "Where the rows of attn_out and of the statistics lie in memory, in layouts SBH and TND")
    s, b, n = (part.ravel() for part in np.indices((3, 2, 2)))
    out = [(f"s{i}", f"n{k}", int(j), int(k)) for i, j, k in zip(s, b, n, strict=True)]
    b, n, s = (part.ravel() for part in np.indices((2, 2, 3)))
    stats = [(f"s{i}", f"n{k}", int(j), int(k)) for i, j, k in zip(s, b, n, strict=True)]
    picture.text(10, 28, "SBH: 3 tokens, batch of 2, 2 heads", 16, weight="600")
    picture.text(10, 54, "attn_out (S, B, N·D): each box D numbers")
    ribbon(picture, 62, out)
    picture.text(10, 130, "max and sum (B, N, S, lanes): each box one number")
    ribbon(picture, 138, stats)
    picture.text(10, 204, "blue: batch entry 0, orange: 1; darker: head 1", 14, SOFT)
    picture.text(10, 248, "TND: 6 tokens of 2 sequences, 2 heads", 16, weight="600")
    picture.text(10, 274, "attn_out (T, N, D): each box D numbers")
    tokens = [(f"t{i}", f"n{k}", int(i >= 2), int(k)) for i, k in np.ndindex(6, 2)]
    ribbon(picture, 282, tokens)
    picture.text(10, 350, "max and sum (T, N, lanes), token-major: the same")
    picture.text(10, 370, "if packed: see below")
    picture.text(10, 402, "blue: sequence 0 (t0, t1), orange: 1; darker: head 1", 14, SOFT)
    return picture


def orders() -> Picture:
    """The statistics of one TND call in both orders."""
    lengths = np.array([0, 2, 6])
    number = np.arange(12, dtype=np.float32).reshape(6, 2, 1)  # token and head, as one number
    packed = rau.reorder_softmax(number, lengths, to="SBH")

    def rows(stats: np.ndarray) -> list[tuple[str, str, int, int]]:
        return [(f"t{i // 2}", f"n{i % 2}", int(i >= 4), i % 2) for i in stats.ravel().astype(int).tolist()]

    picture = Picture("orders", 296, "Statistics of shape (T, N, lanes) in both orders: token-major, and packed per sequence")
    picture.text(10, 28, "actual_seq_qlen = [0, 2, 6], 2 heads", 16, weight="600")
    picture.text(10, 56, 'token-major, softmax_layout="TND"')
    ribbon(picture, 64, rows(number))
    picture.text(10, 126, "each token has its heads side by side", 14, SOFT)
    picture.text(10, 164, 'packed per sequence, softmax_layout="SBH"')
    ribbon(picture, 172, rows(packed))
    picture.text(10, 234, "each head of a sequence has its tokens side by side", 14, SOFT)
    picture.text(10, 268, "Both have the shape (6, 2, lanes).", 15, weight="600")
    return picture


PICTURES = (merge, layouts, orders)

if __name__ == "__main__":
    for draw in PICTURES:
        picture = draw()
        (HERE / f"{picture.name}.svg").write_text(picture.drawn(), encoding="utf-8")
