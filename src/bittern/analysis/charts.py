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


@dataclass(frozen=True)
class Plot:
    """svg: without its frame; height: in the units of WIDTH; rows: the numbers, the first row being their names."""

    svg: str
    height: float
    rows: list[list[Any]] = field(default_factory=list)


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


def styles(names: Sequence[str]) -> list[int]:
    """Number of the colour, dash and mark of each series: the teacher's is 0, others follow from 1, a sixth has 0."""
    others = [name for name in names if name != "teacher"]
    return [0 if name == "teacher" else (1 + others.index(name)) % 6 for name in names]


def text(x: float, y: float, what: object, anchor: str = "start", size: int = 12, extra: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="var(--ink)"{extra}>'
        f"{escape(str(what))}</text>"
    )


def colour(share: float) -> str:
    """Of cividis, 0 to 1."""
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
    known = [v for row in values for v in row if v is not None]
    top = max(known, default=0.0) if top is None else top
    left = min(130.0, 12 + 6.5 * max(map(len, rows)))
    cell = min(34.0, (WIDTH - left - 8) / columns)
    high = min(cell, 26.0)
    parts = []
    for j in range(columns):
        if columns <= 16 or j % 4 == 0:
            parts.append(text(left + (j + 0.5) * cell, 12, j, "middle", 11))
    for i, (label, row) in enumerate(zip(rows, values, strict=True)):
        y = 18 + i * high
        parts.append(text(left - 6, y + high / 2 + 4, label, "end", 11))
        for j, value in enumerate(row):
            if value is None:
                continue
            share = (value - low) / (top - low) if top > low else 0.0
            tip = f"{label}, head {j}: {name} {short(value)}"
            parts.append(
                f'<rect x="{left + j * cell:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{high - 1:.1f}" '
                f'fill="{colour(share)}" data-layer="{i}" data-head="{j}" '
                f'data-tip="{escape(tip)}"/>'
            )
    y = 18 + len(rows) * high + 10
    for k in range(40):
        parts.append(f'<rect x="{left + k * 4}" y="{y:.1f}" width="4.5" height="8" fill="{colour(k / 39)}"/>')
    parts.append(text(left, y + 22, short(low), "start", 11))
    parts.append(text(left + 160, y + 22, short(top), "end", 11))
    parts.append(text(left + 168, y + 8, name, "start", 11))
    table: list[list[Any]] = [
        ["", *(f"head {j}" for j in range(columns))],
        *([r, *v] for r, v in zip(rows, values, strict=True)),
    ]
    return Plot("".join(parts), y + 28, table)


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


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_name: str,
    y_name: str,
    labels: Sequence[str] | None = None,
    log: bool = False,
    bands: Sequence[Mapping[str, Any]] = (),
    layers: bool = False,
    joined: bool = True,
    zero: bool = True,
    marked: Sequence[tuple[float, float, str]] = (),
) -> Plot:
    """Curves of (x, y) points, broken where y is NaN. labels: of whole x from 0; bands: stretches of x as
    {name, from, to}; layers: x is the number of a layer, that its points are linked by; marked: single points and what
    they are; zero: y starts there."""
    points = [p for curve in series.values() for p in curve if math.isfinite(p[1]) and (p[1] > 0 or not log)]
    if not points:
        return Plot(text(10, 20, "no values"), 30)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min(ys), max(ys)
    if not log:
        low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
        pad = 0.05 * ((high - low) or abs(high) or 1.0)
        low, high = low - (pad if low < 0 or not zero else 0.0), high + pad
    elif low == high:
        low, high = low / 2, high * 2
    marks = log_ticks(low, high) if log else ticks(low, high)
    first, last = min(xs), max(xs)
    left, right, above, height = 14 + 6.8 * max(len(short(m)) for m in marks), WIDTH - 12.0, 20.0, 190.0

    def at_x(x: float) -> float:
        return left + 8 + (x - first) / ((last - first) or 1.0) * (right - left - 16)

    def at_y(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return above + (1 - share) * height

    parts = [text(4, 12, y_name, "start", 11)]
    for band in bands:
        a, b = (at_x(min(max(float(band[side]), first), last)) for side in ("from", "to"))
        parts.append(f'<rect x="{a:.1f}" y="{above}" width="{b - a:.1f}" height="{height}" fill="var(--band)"/>')
        parts.append(text((a + b) / 2, above + 13, band["name"], "middle", 11))
    for mark in marks:
        y = at_y(mark)
        parts.append(f'<line x1="{left:.1f}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        parts.append(text(left - 5, y + 4, short(mark), "end", 11))
    parts += _x_axis(at_x, first, last, above + height, labels)
    parts.append(text((left + right) / 2, above + height + 34, x_name, "middle", 11))
    for n, (name, curve) in zip(styles(list(series)), series.items(), strict=True):
        kept = [(x, y) for x, y in curve if math.isfinite(y) and (y > 0 or not log)]
        if joined and len(kept) > 1:
            at = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" if (x, y) in kept else "M" for x, y in curve)
            path = "".join(f"M{piece.strip()}" for piece in at.split("M") if piece.strip())
            parts.append(
                f'<path d="{path}" fill="none" stroke="var(--s{n})" stroke-width="2" stroke-dasharray="{DASHES[n]}"/>'
            )
        if len(kept) <= 400:
            for x, y in kept:
                where = labels[int(x)] if labels else short(x)
                link = f' data-layer="{int(x)}"' if layers else ""
                tip = f"{name}, {where}: {short(y)}" if name else f"{where}: {short(y)}"
                extra = f'fill="var(--s{n})"{link} data-tip="{escape(tip)}"'
                parts.append(_mark(MARKS[n], at_x(x), at_y(y), extra))
    for x, y, what in marked:
        parts.append(_mark("circle", at_x(x), at_y(y), 'fill="none" stroke="var(--ink)" stroke-width="2"', 7))
        side, anchor = (10, "start") if at_x(x) < WIDTH / 2 else (-10, "end")
        parts.append(text(at_x(x) + side, at_y(y) - 8, what, anchor, 11))
    key, below = _key(list(series), above + height + 50)
    table: list[list[Any]] = [[x_name, *series]]
    for x in sorted({x for curve in series.values() for x, _ in curve}):
        columns = [[y for at, y in curve if at == x and math.isfinite(y)] for curve in series.values()]
        table += [[labels[int(x)] if labels else x, *row] for row in zip_longest(*columns)]
    return Plot("".join(parts) + key, below, table)


def _x_axis(at_x: Any, first: float, last: float, y: float, labels: Sequence[str] | None) -> Iterator[str]:
    if labels is None:
        for mark in ticks(first, last):
            yield text(at_x(mark), y + 16, short(mark), "middle", 11)
        return
    room = (at_x(last) - at_x(first)) / max(len(labels) - 1, 1)
    upright = 6.5 * max(map(len, labels)) > room
    for i, label in enumerate(labels):
        x = at_x(i)
        if upright and room < 11 and i % math.ceil(11 / room):
            continue
        turn = f' transform="rotate(-40 {x:.1f} {y + 12:.1f})"' if upright else ""
        yield text(x, y + (12 if upright else 16), label[:10], "end" if upright else "middle", 10, turn)


def _mark(kind: str, x: float, y: float, extra: str, r: float = 3.5) -> str:
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" {extra}/>'
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "triangle": ((0, -1.3), (1.2, 1), (-1.2, 1)),
        "diamond": ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
        "cross": (
            (-1.3, -0.4),
            (-0.4, -0.4),
            (-0.4, -1.3),
            (0.4, -1.3),
            (0.4, -0.4),
            (1.3, -0.4),
            (1.3, 0.4),
            (0.4, 0.4),
            (0.4, 1.3),
            (-0.4, 1.3),
            (-0.4, 0.4),
            (-1.3, 0.4),
        ),
    }[kind]
    return f'<polygon points="{" ".join(f"{x + r * a:.1f},{y + r * b:.1f}" for a, b in corners)}" {extra}/>'


def _key(names: Sequence[str], y: float) -> tuple[str, float]:
    """The legend, in as many lines as it needs; and where it ends. None for a single nameless curve."""
    if list(names) == [""]:
        return "", y - 8
    parts, x = [], 10.0
    for n, name in zip(styles(names), names, strict=True):
        wide = 40 + 6.6 * len(name)
        if x > 10 and x + wide > WIDTH:
            x, y = 10.0, y + 18
        parts.append(
            f'<line x1="{x:.1f}" x2="{x + 22:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--s{n})" '
            f'stroke-width="2" stroke-dasharray="{DASHES[n]}"/>'
        )
        parts.append(_mark(MARKS[n], x + 11, y, f'fill="var(--s{n})"'))
        parts.append(text(x + 27, y + 4, name, "start", 11))
        x += wide
    return "".join(parts), y + 14


def bars(labels: Sequence[str], series: Mapping[str, Sequence[float]], name: str, linked: int = 0) -> Plot:
    """Horizontal bars, one for each series under each label. linked: how many of the labels, the first, are layers."""
    top = max((v for values in series.values() for v in values), default=0.0) or 1.0
    left = min(200.0, 16 + 6.4 * max(map(len, labels)))
    thick = 16 if len(series) == 1 else 11
    parts, y = [text(4, 12, name, "start", 11)], 22.0
    for i, label in enumerate(labels):
        parts.append(text(left - 6, y + thick * len(series) / 2 + 4, label, "end", 11))
        for n, (who, values) in zip(styles(list(series)), series.items(), strict=True):
            wide = values[i] / top * (WIDTH - left - 60)
            link = f' data-layer="{i}"' if i < linked else ""
            tip = f"{who + ', ' if who else ''}{label}: {short(values[i])}"
            parts.append(
                f'<rect x="{left:.1f}" y="{y:.1f}" width="{max(wide, 1):.1f}" height="{thick - 2}" '
                f'fill="var(--s{n})"{link} data-tip="{escape(tip)}"/>'
            )
            parts.append(text(left + max(wide, 1) + 5, y + thick - 4, short(values[i]), "start", 10))
            y += thick
        y += 6
    key, below = _key(list(series), y + 10)
    rows = [[label, *(values[i] for values in series.values())] for i, label in enumerate(labels)]
    return Plot("".join(parts) + key, below, [["", *series], *rows])


def surface(steps: Sequence[float], loss: Sequence[Sequence[float]], top: float | None = None) -> Plot:
    """A square of cells, in colours of log(loss), with lines of equal loss, the middle marked."""
    n, left, side = len(steps), 46.0, 330.0
    cell = side / n
    logs = [[math.log(max(v, 1e-12)) for v in row] for row in loss]
    low = min(map(min, logs))
    high = max(map(max, logs)) if top is None else math.log(top)
    parts = []
    for i, row in enumerate(logs):
        for j, value in enumerate(row):
            share = (value - low) / ((high - low) or 1.0)
            tip = f"({short(steps[j])}, {short(steps[i])}): loss {short(loss[i][j])}"
            parts.append(
                f'<rect x="{left + j * cell:.1f}" y="{8 + (n - 1 - i) * cell:.1f}" width="{cell + 0.3:.1f}" '
                f'height="{cell + 0.3:.1f}" fill="{colour(share)}" data-tip="{escape(tip)}"/>'
            )
    for k in range(1, 9):
        level = low + (high - low) * k / 9
        pieces = (
            f"M{left + (a + 0.5) * cell:.1f},{8 + (n - 0.5 - b) * cell:.1f}"
            f"L{left + (c + 0.5) * cell:.1f},{8 + (n - 0.5 - d) * cell:.1f}"
            for (a, b), (c, d) in contour(logs, level)
        )
        parts.append(f'<path d="{"".join(pieces)}" fill="none" stroke="#fff" stroke-opacity="0.55"/>')
    middle = left + side / 2, 8 + side / 2
    parts.append(_mark("cross", *middle, 'fill="#fff" stroke="#000"', 6))
    for mark in ticks(steps[0], steps[-1], 4):
        at = (mark - steps[0]) / (steps[-1] - steps[0]) * (side - cell) + cell / 2
        parts.append(text(left + at, side + 24, short(mark), "middle", 11))
        parts.append(text(left - 6, 8 + side - at + 4, short(mark), "end", 11))
    for k in range(30):
        parts.append(f'<rect x="390" y="{8 + (29 - k) * 5}" width="10" height="5.5" fill="{colour(k / 29)}"/>')
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
    low, high = min([0.0, *flat]), max(flat)
    left, y, parts = 12.0, 14.0, []
    span = (high - low) or 1.0

    def at_x(x: float) -> float:
        return left + (x - low) / span * (WIDTH - 2 * left - 10)

    for n, (name, groups) in zip(styles(list(series)), series.items(), strict=True):
        parts.append(text(left, y, name, "start", 11))
        for k, group in enumerate(groups):
            for value in group:
                tip = f"{name}, batch {k}: {short(value)}"
                extra = f'fill="var(--s{n})" fill-opacity="0.6" data-tip="{escape(tip)}"'
                parts.append(_mark(MARKS[n], at_x(value), y + 14 + 22 * (k + 0.5) / len(groups), extra, 3.5))
        y += 54
    for mark in ticks(low, high):
        parts.append(f'<line x1="{at_x(mark):.1f}" x2="{at_x(mark):.1f}" y1="18" y2="{y - 8}" stroke="var(--line)"/>')
        parts.append(text(at_x(mark), y + 6, short(mark), "middle", 11))
    parts.append(text(WIDTH / 2, y + 24, x_name, "middle", 11))
    rows = [[name, k, *group] for name, groups in series.items() for k, group in enumerate(groups)]
    return Plot("".join(parts), y + 32, [["", "batch", *(f"λ{i + 1}" for i in range(len(rows[0]) - 2))], *rows])
