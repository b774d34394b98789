"""Plots as SVG: text made of numbers, so the same plot serves a page, a paper and print, without a plotting library.

Colours of text and lines are CSS variables, `var(--ink)`, which a page sets for light and dark; `report` puts values
in their place for files. Cells and points carry `data-layer`, `data-head` and a tooltip (`data-tip`) for the script.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import zip_longest
from typing import Any

WIDTH = 440  # of all plots, in units that are pixels where there is room
# cividis, which looks the same to people who see no red or green, in ten steps
CIVIDIS = ("00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838")
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "12 4")  # so that lines differ without colour too
MARKS = ("circle", "square", "triangle", "diamond", "cross", "circle")
HALF_CROSS = (-1.3, -0.4, -0.4, -0.4, -0.4, -1.3, 0.4, -1.3, 0.4, -0.4, 1.3, -0.4)
CORNERS = {  # x and y in turn, in radii from the middle
    "square": (-1, -1, 1, -1, 1, 1, -1, 1),
    "triangle": (0, -1.3, 1.2, 1, -1.2, 1),
    "diamond": (0, -1.4, 1.4, 0, 0, 1.4, -1.4, 0),
    "cross": (*HALF_CROSS, *(-x for x in HALF_CROSS)),
}


@dataclass(frozen=True)
class Plot:
    """svg: without its frame; height: in the units of WIDTH; rows: the numbers, the first row being their names."""

    svg: str
    height: float
    rows: list[list[Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Axis:
    """Numbers along a side of a plot: `low` lies at `start` and `high` at `end`, in the units of WIDTH."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where a number lies."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)

    def marks(self, count: int = 5) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, count)

    def below(self, y: float, count: int = 5, grid_from: float | None = None) -> Iterator[str]:
        """Numbers under a horizontal axis, with lines of a grid down to it from `grid_from`."""
        for mark in self.marks(count):
            x = self(mark)
            if grid_from is not None:
                yield tag("line", x1=x, x2=x, y1=grid_from, y2=y - 14, stroke="var(--line)")
            yield text(x, y, short(mark), "middle", 11)

    def beside(self, x: float, count: int = 5, grid_to: float | None = None) -> Iterator[str]:
        """Numbers at the left of a vertical axis, with lines of a grid to `grid_to`."""
        for mark in self.marks(count):
            y = self(mark)
            if grid_to is not None:
                yield tag("line", x1=x + 5, x2=grid_to, y1=y, y2=y, stroke="var(--line)")
            yield text(x, y + 4, short(mark), "end", 11)


def short(x: float | None) -> str:
    """A number in at most three digits, or a dash.

    >>> short(0.012345), short(1234.5), short(None)
    ('0.0123', '1,230', '–')
    """
    if x is None:
        return "–"
    rounded = float(f"{x:.3g}")
    if rounded and not 1e-3 <= abs(rounded) < 1e6:
        return f"{rounded:.2g}"
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:.4g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high.

    >>> ticks(0.0, 0.93)
    [0.0, 0.2, 0.4, 0.6, 0.8]
    """
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= count)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between low and high, at most six of them, or both ends."""
    found = [10.0**e for e in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    return found[:: -(-len(found) // 6)] if len(found) > 1 else [low, high]


def styles(names: Sequence[str]) -> list[int]:
    """Number of the colour, dash and mark of each series: the teacher's is 0, others follow from 1, a sixth has 0."""
    others = [name for name in names if name != "teacher"]
    return [0 if name == "teacher" else (1 + others.index(name)) % 6 for name in names]


def tag(name: str, content: str = "", /, **attributes: object) -> str:
    """An SVG element. In names of attributes `_` stands for `-`; floats get one decimal; None leaves one out."""
    values = {k: f"{v:.1f}" if isinstance(v, float) else str(v) for k, v in attributes.items() if v is not None}
    inside = "".join(f' {k.replace("_", "-")}="{escape(v)}"' for k, v in values.items())
    return f"<{name}{inside}>{content}</{name}>" if content else f"<{name}{inside}/>"


def text(x: float, y: float, what: object, anchor: str = "start", size: int = 12, turn: str | None = None) -> str:
    where = {"x": float(x), "y": float(y), "text_anchor": anchor, "font_size": size, "transform": turn}
    return tag("text", escape(str(what)), **where, fill="var(--ink)")


def box(x: float, y: float, width: float, height: float, fill: str, **more: object) -> str:
    return tag("rect", x=float(x), y=float(y), width=float(width), height=float(height), fill=fill, **more)


def symbol(kind: str, x: float, y: float, r: float = 3.5, /, **more: object) -> str:
    """The mark of a point: a circle or one of CORNERS."""
    if kind == "circle":
        return tag("circle", cx=float(x), cy=float(y), r=r, **more)
    corners = CORNERS[kind]
    points = " ".join(f"{x + r * a:.1f},{y + r * b:.1f}" for a, b in zip(corners[::2], corners[1::2], strict=True))
    return tag("polygon", points=points, **more)


def curve(path: str, style: int) -> str:
    return tag("path", d=path, fill="none", stroke=f"var(--s{style})", stroke_width=2, stroke_dasharray=DASHES[style])


def colour(share: float) -> str:
    """A colour of cividis for a share from 0 to 1."""
    at = min(max(share, 0.0), 1.0) * (len(CIVIDIS) - 1)
    i = min(int(at), len(CIVIDIS) - 2)
    low, high = (bytes.fromhex(CIVIDIS[j]) for j in (i, i + 1))
    return "#" + "".join(f"{round(a + (b - a) * (at - i)):02x}" for a, b in zip(low, high, strict=True))


def heat_map(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    name: str,
    *,
    low: float = 0.0,
    top: float | None = None,
) -> Plot:
    """A cell for each layer (row) and head (column). low, top: of the colours, top the largest value by default."""
    columns = max(map(len, values))
    top = max((v for row in values for v in row if v is not None), default=0.0) if top is None else top
    left = min(130.0, 12 + 6.5 * max(map(len, rows)))
    cell = min(34.0, (WIDTH - left - 8) / columns)
    high, share = min(cell, 26.0), Axis(low, top, 0.0, 1.0)
    parts = [text(left + (j + 0.5) * cell, 12, j, "middle", 11) for j in range(0, columns, 1 if columns <= 16 else 4)]
    for i, (label, row) in enumerate(zip(rows, values, strict=True)):
        y = 18 + i * high
        parts.append(text(left - 6, y + high / 2 + 4, label, "end", 11))
        for j, value in enumerate(row):
            if value is not None:
                of = {"data_layer": i, "data_head": j, "data_tip": f"{label}, head {j}: {name} {short(value)}"}
                parts.append(box(left + j * cell, y, cell - 1, high - 1, colour(share(value)), **of))
    y = 18 + len(rows) * high + 10
    parts += [box(left + k * 4, y, 4.5, 8, colour(k / 39)) for k in range(40)]
    parts += [text(left, y + 22, short(low), size=11), text(left + 160, y + 22, short(top), "end", 11)]
    parts.append(text(left + 168, y + 8, name, size=11))
    table = [[r, *v] for r, v in zip(rows, values, strict=True)]
    return Plot("".join(parts), y + 28, [["", *(f"head {j}" for j in range(columns))], *table])


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_name: str,
    y_name: str,
    labels: Sequence[str] | None = None,
    log: bool = False,
    bands: Sequence[Mapping[str, Any]] = (),
    layers: bool = False,
    zero: bool = True,
    marked: Sequence[tuple[float, float, str]] = (),
) -> Plot:
    """Curves of (x, y) points, broken where y is NaN. labels: of whole x from 0; bands: stretches of x as
    {name, from, to}; layers: x is the number of a layer, that its points are linked by; marked: single points and what
    they are; zero: y starts there."""

    def drawn(y: float) -> bool:
        return math.isfinite(y) and (y > 0 or not log)

    points = [(x, y) for curve in series.values() for x, y in curve if drawn(y)]
    if not points:
        return Plot(text(10, 20, "no values"), 30)
    xs, ys = zip(*points, strict=True)
    above, bottom, right = 20.0, 210.0, WIDTH - 12.0
    at_y = Axis(*_range_of(ys, log, zero), bottom, above, log)
    left = 14 + 6.8 * max(len(short(m)) for m in at_y.marks())
    at_x = Axis(min(xs), max(xs), left + 8, right - 8)
    parts = [text(4, 12, y_name, size=11)]
    for band in bands:
        a, b = (at_x(min(max(float(band[side]), at_x.low), at_x.high)) for side in ("from", "to"))
        parts.append(box(a, above, b - a, bottom - above, "var(--band)"))
        parts.append(text((a + b) / 2, above + 13, band["name"], "middle", 11))
    parts += at_y.beside(left - 5, grid_to=right)
    parts += at_x.below(bottom + 16) if labels is None else _labels_below(labels, at_x, bottom)
    parts.append(text((left + right) / 2, bottom + 34, x_name, "middle", 11))
    for n, (name, curve_of) in zip(styles(list(series)), series.items(), strict=True):
        kept = [(x, y) for x, y in curve_of if drawn(y)]
        if len(kept) > 1:
            at = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" if drawn(y) else "M" for x, y in curve_of)
            parts.append(curve("".join(f"M{piece.strip()}" for piece in at.split("M") if piece.strip()), n))
        for x, y in kept if len(kept) <= 400 else ():
            where = labels[int(x)] if labels else short(x)
            tip = f"{name}, {where}: {short(y)}" if name else f"{where}: {short(y)}"
            link = {"data_layer": int(x) if layers else None, "data_tip": tip}
            parts.append(symbol(MARKS[n], at_x(x), at_y(y), fill=f"var(--s{n})", **link))
    for x, y, what in marked:
        parts.append(symbol("circle", at_x(x), at_y(y), 7.0, fill="none", stroke="var(--ink)", stroke_width=2))
        side, anchor = (10, "start") if at_x(x) < WIDTH / 2 else (-10, "end")
        parts.append(text(at_x(x) + side, at_y(y) - 8, what, anchor, 11))
    key, below = _key(list(series), bottom + 50)
    table: list[list[Any]] = [[x_name, *series]]
    for x in sorted({x for curve_of in series.values() for x, _ in curve_of}):
        columns = [[y for at, y in curve_of if at == x and math.isfinite(y)] for curve_of in series.values()]
        table += [[labels[int(x)] if labels else x, *row] for row in zip_longest(*columns)]
    return Plot("".join(parts) + key, below, table)


def _range_of(ys: Sequence[float], log: bool, zero: bool) -> tuple[float, float]:
    """The ends of a vertical axis, with some room."""
    low, high = min(ys), max(ys)
    if log:
        return (low, high) if low < high else (low / 2, high * 2)
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    pad = 0.05 * ((high - low) or abs(high) or 1.0)
    return low - (pad if low < 0 or not zero else 0.0), high + pad


def _labels_below(labels: Sequence[str], at_x: Axis, bottom: float) -> Iterator[str]:
    """Names under a horizontal axis, slanting where they are too long to stand side by side."""
    room = (at_x.end - at_x.start) / max(len(labels) - 1, 1)
    slanting = 6.5 * max(map(len, labels)) > room
    for i in range(0, len(labels), math.ceil(11 / room) if slanting else 1):
        x, y = at_x(i), bottom + 12
        if slanting:
            yield text(x, y, labels[i][:10], "end", 10, f"rotate(-40 {x:.1f} {y:.1f})")
        else:
            yield text(x, y + 4, labels[i][:10], "middle", 10)


def _key(names: Sequence[str], y: float) -> tuple[str, float]:
    """The legend, in as many lines as it needs; and where it ends. None for a single nameless curve."""
    if list(names) == [""]:
        return "", y - 8
    parts, x = [], 10.0
    for n, name in zip(styles(names), names, strict=True):
        wide = 40 + 6.6 * len(name)
        if x > 10 and x + wide > WIDTH:
            x, y = 10.0, y + 18
        parts.append(curve(f"M{x:.1f},{y:.1f}H{x + 22:.1f}", n))
        parts.append(symbol(MARKS[n], x + 11, y, fill=f"var(--s{n})"))
        parts.append(text(x + 27, y + 4, name, size=11))
        x += wide
    return "".join(parts), y + 14


def bars(labels: Sequence[str], series: Mapping[str, Sequence[float]], name: str, linked: int = 0) -> Plot:
    """Horizontal bars, one for each series under each label. linked: how many of the labels, the first, are layers."""
    left = min(200.0, 16 + 6.4 * max(map(len, labels)))
    top = max((v for values in series.values() for v in values), default=0.0) or 1.0
    thick = 16 if len(series) == 1 else 11
    parts, y = [text(4, 12, name, size=11)], 22.0
    for i, label in enumerate(labels):
        parts.append(text(left - 6, y + thick * len(series) / 2 + 4, label, "end", 11))
        for n, (who, values) in zip(styles(list(series)), series.items(), strict=True):
            wide = max(values[i] / top * (WIDTH - left - 60), 1.0)
            tip = f"{who + ', ' if who else ''}{label}: {short(values[i])}"
            link = {"data_layer": i if i < linked else None, "data_tip": tip}
            parts.append(box(left, y, wide, thick - 2, f"var(--s{n})", **link))
            parts.append(text(left + wide + 5, y + thick - 4, short(values[i]), size=10))
            y += thick
        y += 6
    key, below = _key(list(series), y + 10)
    rows = [[label, *(values[i] for values in series.values())] for i, label in enumerate(labels)]
    return Plot("".join(parts) + key, below, [["", *series], *rows])


def surface(steps: Sequence[float], loss: Sequence[Sequence[float]], top: float | None = None) -> Plot:
    """A square of cells, in colours of log(loss), with lines of equal loss, the middle marked."""
    n, left, above, side = len(steps), 46.0, 8.0, 330.0
    cell = side / n
    logs = [[math.log(max(v, 1e-12)) for v in row] for row in loss]
    low = min(map(min, logs))
    high = max(map(max, logs)) if top is None else math.log(top)
    share = Axis(low, high, 0.0, 1.0)
    at_x = Axis(0, n - 1, left + cell / 2, left + side - cell / 2)  # where the middles of cells lie, by number
    at_y = Axis(0, n - 1, above + side - cell / 2, above + cell / 2)
    parts = []
    for i, row in enumerate(logs):
        for j, value in enumerate(row):
            tip = f"({short(steps[j])}, {short(steps[i])}): loss {short(loss[i][j])}"
            x, y = at_x(j) - cell / 2, at_y(i) - cell / 2
            parts.append(box(x, y, cell + 0.3, cell + 0.3, colour(share(value)), data_tip=tip))
    for k in range(1, 9):
        pieces = (
            f"M{at_x(a):.1f},{at_y(b):.1f}L{at_x(c):.1f},{at_y(d):.1f}"
            for (a, b), (c, d) in contour(logs, low + (high - low) * k / 9)
        )
        parts.append(tag("path", d="".join(pieces), fill="none", stroke="#fff", stroke_opacity="0.55"))
    parts.append(symbol("cross", left + side / 2, above + side / 2, 6, fill="#fff", stroke="#000"))
    parts += Axis(steps[0], steps[-1], at_x.start, at_x.end).below(side + 24, 4)
    parts += Axis(steps[0], steps[-1], at_y.start, at_y.end).beside(left - 6, 4)
    parts += [box(390, above + (29 - k) * 5, 10, 5.5, colour(k / 29)) for k in range(30)]
    parts += [text(404, 18, short(math.exp(high)), size=11), text(404, 158, short(math.exp(low)), size=11)]
    rows: list[list[Any]] = [["", *map(short, steps)], *([short(s), *r] for s, r in zip(steps, loss, strict=True))]
    return Plot("".join(parts), side + 34, rows)


def contour(
    values: Sequence[Sequence[float]], level: float
) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    """Pieces of the line where a grid has this value, as pairs of (column, row): marching squares."""
    for i in range(len(values) - 1):
        for j in range(len(values[0]) - 1):
            corners = [(j, i), (j + 1, i), (j + 1, i + 1), (j, i + 1)]
            crossings = []
            for (a, b), (c, d) in zip(corners, corners[1:] + corners[:1], strict=True):
                v, w = values[b][a] - level, values[d][c] - level
                if (v < 0) != (w < 0):
                    share = v / (v - w)
                    crossings.append((a + share * (c - a), b + share * (d - b)))
            yield from zip(crossings[::2], crossings[1::2], strict=True)


def strips(series: Mapping[str, Sequence[Sequence[float]]], x_name: str) -> Plot:
    """A line of points for each name, the last number of each group largest: spectra of mini-batches."""
    flat = [v for groups in series.values() for group in groups for v in group]
    at_x = Axis(min([0.0, *flat]), max(flat), 12.0, WIDTH - 22.0)
    y, parts = 14.0, []
    for n, (name, groups) in zip(styles(list(series)), series.items(), strict=True):
        parts.append(text(12, y, name, size=11))
        for k, group in enumerate(groups):
            at_y = y + 14 + 22 * (k + 0.5) / len(groups)
            for value in group:
                more = {"fill_opacity": "0.6", "data_tip": f"{name}, batch {k}: {short(value)}"}
                parts.append(symbol(MARKS[n], at_x(value), at_y, fill=f"var(--s{n})", **more))
        y += 54
    parts += at_x.below(y + 6, grid_from=18.0)
    parts.append(text(WIDTH / 2, y + 24, x_name, "middle", 11))
    rows = [[name, k, *group] for name, groups in series.items() for k, group in enumerate(groups)]
    return Plot("".join(parts), y + 32, [["", "batch", *(f"λ{i + 1}" for i in range(len(rows[0]) - 2))], *rows])
