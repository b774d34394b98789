"""Plots as SVG: text made of numbers, so the same plot serves a page, a paper and print, without a plotting library.

Colours of text and lines are CSS variables, `var(--ink)`, which a page sets for light and dark; `report` puts values
in their place for files. Cells and points carry `data-layer`, `data-head` and a tooltip (`data-tip`) for the script.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import product, zip_longest
from typing import Any

import numpy as np

WIDTH = 340.0  # of all plots, in units that are pixels on a phone, and a little more where there is room
SIZE, LETTER = 12, 7.0  # of text: its height, and about the width of a letter
# cividis, which looks the same to people who see no red or green, in ten steps
CIVIDIS = ("00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838")
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "12 4")  # so that lines differ without colour too
SHAPES = (  # paths of radius 1, so that points differ without colour too
    "M-1 0A1 1 0 1 0 1 0A1 1 0 1 0-1 0Z",  # circle
    "M-1-1H1V1H-1Z",  # square
    "M0-1.3L1.2 1H-1.2Z",  # triangle
    "M0-1.4L1.4 0L0 1.4L-1.4 0Z",  # diamond
    "M-1.3-.4H-.4V-1.3H.4V-.4H1.3V.4H.4V1.3H-.4V.4H-1.3Z",  # cross
    "M0 1.3L1.2-1H-1.2Z",  # triangle upside down
)
CIRCLE, CROSS = 0, 4
XY = tuple[float, float]
Area = tuple[float, float, float, float]  # left, right, top, bottom


@dataclass(frozen=True)
class Plot:
    """svg: without its frame; height: in the units of WIDTH; rows: the numbers, the first row being their names."""

    svg: str
    height: float
    rows: list[list[Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Axis:
    """Numbers along a side of a plot: `low` lies at `start` and `high` at `end`, in the units of WIDTH.

    labels: names of the whole numbers from 0, in place of numbers.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    labels: Sequence[str] | None = None

    def __call__(self, value: float) -> float:
        """Return where a number lies."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)

    def marks(self, count: int = 5) -> list[tuple[float, str]]:
        """Values that are marked, with their texts."""
        if self.labels is not None:
            return list(enumerate(self.labels))
        values = log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, count)
        return [(value, short(value)) for value in values]

    def below(self, y: float) -> tuple[list[str], float]:
        """Marks of a horizontal axis at y, slanting where they are too long to stand side by side; where they end."""
        marks = self.marks(4)
        room = abs(self.end - self.start) / max(len(marks) - 1, 1)
        longest = max((len(name) for _, name in marks), default=0)
        if LETTER * (longest + 1) <= room:
            inside = [min(self(x), WIDTH - LETTER * len(name) / 2) for x, name in marks]
            return [text(x, y + 17, name, "middle") for x, (_, name) in zip(inside, marks, strict=True)], y + 20
        kept, longest = marks[:: math.ceil((SIZE + 1) / room)], min(longest, 10)
        turned = ((self(x), name, f"rotate(-40 {self(x):.1f} {y + 12:.1f})") for x, name in kept)
        return [text(x, y + 12, name[:10], "end", turn) for x, name, turn in turned], y + 16 + 5.0 * longest

    def beside(self, x: float, grid_to: float | None = None) -> Iterator[str]:
        """Marks at the left of a vertical axis, with lines of a grid to `grid_to`."""
        for value, name in self.marks():
            y = self(value)
            if grid_to is not None:
                yield tag("line", x1=x + 5, x2=grid_to, y1=y, y2=y, stroke="var(--line)")
            yield text(x, y + 4, name, "end")


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


def cut(name: str, letters: int) -> str:
    """A name, or as much of its end as has room: ends tell paths and names of runs apart."""
    return name if len(name) <= letters else f"…{name[1 - letters :]}"


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


def styles(names: Iterable[str]) -> list[int]:
    """Number of the colour, dash and mark of each series: the teacher's is 0, others follow from 1, a sixth has 0."""
    others = [name for name in names if name != "teacher"]
    return [0 if name == "teacher" else (1 + others.index(name)) % 6 for name in names]


def tag(name: str, content: str = "", /, **attributes: object) -> str:
    """An SVG element. In names of attributes `_` stands for `-`; floats get one decimal; None leaves one out."""
    values = {k: f"{v:.1f}" if isinstance(v, float) else str(v) for k, v in attributes.items() if v is not None}
    inside = "".join(f' {k.replace("_", "-")}="{escape(v)}"' for k, v in values.items())
    return f"<{name}{inside}>{content}</{name}>" if content else f"<{name}{inside}/>"


def text(x: float, y: float, what: object, anchor: str = "start", turn: str | None = None) -> str:
    where = {"x": float(x), "y": float(y), "text_anchor": anchor, "font_size": SIZE, "transform": turn}
    return tag("text", escape(str(what)), **where, fill="var(--ink)")


def box(x: float, y: float, width: float, height: float, fill: str, **more: object) -> str:
    return tag("rect", x=float(x), y=float(y), width=float(width), height=float(height), fill=fill, **more)


def symbol(shape: int, x: float, y: float, r: float = 3.5, /, **more: object) -> str:
    """The mark of a point, one of SHAPES."""
    place = f"translate({x:.1f} {y:.1f}) scale({r})"
    return tag("path", d=SHAPES[shape], transform=place, vector_effect="non-scaling-stroke", **more)


def names_beside(points: Sequence[tuple[float, float, str]], taken: Sequence[Area], area: Area) -> Iterator[str]:
    """Yield the names of points (x, y, name) inside `area`, where they meet no mark, no other name and nothing `taken`.

    Of the lines of text at both sides of a point the nearest free one is chosen; a thin line leads there from its mark.
    """
    left, right, top, bottom = area
    taken = [*taken, *((x - 6, x + 6, y - 6, y + 6) for x, y, _ in points)]
    for x, y, name in points:
        name = cut(name, int(0.7 * (right - left) / LETTER))
        width, high = LETTER * len(name), SIZE + 1
        above = sorted((y - 7 + high * k for k in range(-30, 31)), key=lambda at: abs(at + 7 - y))
        starts = [min(max(start, left), right - width) for start in (x + 9, x - 9 - width)]
        places = [(at, at + width, up, up + high) for up in above if top <= up <= bottom - high for at in starts]
        free = (p for p in places if not any(p[0] < b and a < p[1] and p[2] < d and c < p[3] for a, b, c, d in taken))
        place = next(free, places[0])
        taken.append(place)
        if not place[2] < y < place[3]:
            end, edge = min(max(x, place[0]), place[1]), place[3] if place[3] <= y else place[2]
            yield tag("line", x1=x, y1=y, x2=end, y2=edge, stroke="var(--ink)", stroke_width=0.5)
        yield text(place[0], place[3] - 3, name) if place[0] > x else text(place[1], place[3] - 3, name, "end")


def curve(points: Iterable[XY], style: int) -> str:
    """A line through points, broken where one is NaN."""
    at = " ".join("M" if math.isnan(y) else f"{x:.1f},{y:.1f}" for x, y in points)
    path = "".join(f"M{piece.strip()}" for piece in at.split("M") if piece.strip())
    return tag("path", d=path, fill="none", stroke=f"var(--s{style})", stroke_width=2, stroke_dasharray=DASHES[style])


def colour(share: float) -> str:
    """A colour of cividis for a share from 0 to 1."""
    channels = zip(*map(bytes.fromhex, CIVIDIS), strict=True)
    values = (np.interp(share * (len(CIVIDIS) - 1), range(len(CIVIDIS)), channel) for channel in channels)
    return "#" + "".join(f"{round(float(value)):02x}" for value in values)


def colour_bar(x: float, y: float, low: float, high: float, name: str) -> tuple[str, float]:
    """Return a bar that tells what the colours of cells mean, and where it ends."""
    parts = [box(x + k * 4, y, 4.5, 8, colour(k / 29)) for k in range(30)]
    parts += [text(x, y + 22, short(low)), text(x + 120, y + 22, short(high), "end"), text(x + 128, y + 9, name)]
    return "".join(parts), y + 28


def legend(names: Iterable[str], y: float) -> tuple[str, float]:
    """Return the names of series, in as many lines as they need, and where it ends; none for a nameless curve alone."""
    if list(names) == [""]:
        return "", y - 8
    parts, x = [], 8.0
    for n, name in zip(styles(names), names, strict=True):
        name = cut(name, int((WIDTH - 40) / LETTER))
        wide = 40 + LETTER * len(name)
        if x > 8 and x + wide > WIDTH:
            x, y = 8.0, y + 18
        mark = symbol(n, x + 11, y, fill=f"var(--s{n})")
        parts += [curve([(x, y), (x + 22, y)], n), mark, text(x + 27, y + 4, name)]
        x += wide
    return "".join(parts), y + 14


Grid = Sequence[Sequence[float]]
Cells = Sequence[Sequence[float | None]]


def heat_map(values: Cells, name: str, *, rows: Sequence[str], low: float = 0.0, beside: Iterable[Cells] = ()) -> Plot:
    """A cell for each layer (row) and head (column). low: of the colours; beside: values of plots of the same scale."""
    columns = max(map(len, values))
    top = max((v for grid in (values, *beside) for row in grid for v in row if v is not None), default=0.0)
    left = 8 + LETTER * max(map(len, rows))
    cell = min(34.0, (WIDTH - left - 4) / columns)
    high, share = min(max(cell, 15.0), 24.0), Axis(low, top, 0.0, 1.0)
    parts = [text(left + (j + 0.5) * cell, 12, j, "middle") for j in range(0, columns, math.ceil(18 / cell))]
    for i, (label, row) in enumerate(zip(rows, values, strict=True)):
        y = 18 + i * high
        parts.append(text(left - 6, y + high / 2 + 4, label, "end"))
        for j, value in enumerate(row):
            if value is not None:
                of = {"data_layer": i, "data_head": j, "data_tip": f"{label}, head {j}: {name} {short(value)}"}
                parts.append(box(left + j * cell, y, cell - 1, high - 1, colour(share(value)), **of))
    key, below = colour_bar(left, 18 + len(rows) * high + 10, low, top, name)
    table = [[r, *v] for r, v in zip(rows, values, strict=True)]
    return Plot("".join(parts) + key, below, [["", *(f"head {j}" for j in range(columns))], *table])


def lines(
    series: Mapping[str, Sequence[XY]],
    name: str,
    *,
    x_name: str = "",
    labels: Sequence[str] | None = None,
    log: bool = False,
    bands: Sequence[Mapping[str, Any]] = (),
    layers: bool = False,
    zero: bool = True,
    joined: bool = True,
    marked: Sequence[tuple[float, float, str]] = (),
    beside: Iterable[Mapping[str, Sequence[XY]]] = (),
) -> Plot:
    """Curves of (x, y) points, broken where y is NaN.

    name: of y; labels: of whole x from 0; bands: stretches of x as {name, from, to}; layers: x is the number of a
    layer, that its points are linked by; marked: single points and what they are; zero: y starts there; joined: by
    lines, or else in groups of the same whole y; beside: series of plots of the same scale.
    """

    def drawn(y: float) -> bool:
        return math.isfinite(y) and (y > 0 or not log)

    points = [(x, y) for of in (series, *beside) for curve_of in of.values() for x, y in curve_of if drawn(y)]
    if not points:
        return Plot(text(10, 20, "no values"), 30)
    xs, ys = zip(*points, strict=True)
    above, bottom, right = 38.0 if bands else 22.0, 200.0, WIDTH - 6.0
    numbers = None if joined else [str(k) for k in range(int(max(ys)) + 1)]  # single points are in whole groups
    at_y = Axis(*_range_of(ys, log, zero), bottom, above, log, numbers)
    left = 10 + LETTER * max(len(mark) for _, mark in at_y.marks())
    left = max(left, 0.8 * LETTER * min(len(labels[0]), 10)) if labels else left  # room for a first one that slants
    at_x = Axis(min(xs), max(xs), left + 8, right - 8, labels=labels)
    parts = [text(4, 12, name)]
    for band in bands:
        a, b = (at_x(min(max(float(band[side]), at_x.low), at_x.high)) for side in ("from", "to"))
        parts.append(box(a, above, b - a, bottom - above, "var(--band)", data_tip=band["name"], stroke="var(--line)"))
        if LETTER * len(band["name"]) < b - a:
            parts.append(text((a + b) / 2, above - 5, band["name"], "middle"))
    parts += at_y.beside(left - 5, grid_to=right)
    under, below = at_x.below(bottom)
    if x_name:
        under.append(text((left + right) / 2, below + 14, x_name, "middle"))
        below += 18
    for n, (who, curve_of) in zip(styles(series), series.items(), strict=True):
        if joined:
            parts.append(curve([(at_x(x), at_y(y)) if drawn(y) else (x, math.nan) for x, y in curve_of], n))
        for x, y in filter(lambda point: drawn(point[1]), curve_of if len(curve_of) <= 400 else ()):
            tip = f"{who}{who and ', '}{labels[int(x)] if labels else short(x)}: {short(y)}"
            link = {"data_layer": int(x) if layers else None, "data_tip": tip}
            parts.append(symbol(n, at_x(x), at_y(y), fill=f"var(--s{n})", **link))
    named = [(at_x(x), at_y(y), what) for x, y, what in marked]
    for x, y, _ in named:
        parts.append(symbol(CIRCLE, x, y, 7.0, fill="none", stroke="var(--ink)", stroke_width=2))
    parts += names_beside(named, [], (left, right, above, bottom))
    key, below = legend(series, below + 16)
    table: list[list[Any]] = [[x_name, *series]]
    for x in sorted({x for curve_of in series.values() for x, _ in curve_of}):
        columns = [[y for at, y in curve_of if at == x and math.isfinite(y)] for curve_of in series.values()]
        table += [[labels[int(x)] if labels else x, *row] for row in zip_longest(*columns)]
    return Plot("".join([*parts, *under, key]), below, table)


def _range_of(ys: Sequence[float], log: bool, zero: bool) -> tuple[float, float]:
    """The ends of a vertical axis, with some room."""
    low, high = min(ys), max(ys)
    if log:
        return (low, high) if low < high else (low / 2, high * 2)
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    pad = 0.05 * ((high - low) or abs(high) or 1.0)
    return low - (pad if low < 0 or not zero else 0.0), high + pad


def bars(series: Mapping[str, Sequence[float]], name: str, labels: Sequence[str], layers: Sequence[int] = ()) -> Plot:
    """Horizontal bars, one for each series under each label. layers: those that the first labels are linked by."""
    left = 10 + LETTER * max(map(len, labels))
    top = max((v for values in series.values() for v in values), default=0.0) or 1.0
    at_x, thick = Axis(0.0, top, left, WIDTH - 55), 16 if len(series) == 1 else 13
    parts, y = [text(4, 12, name)], 22.0
    for i, label in enumerate(labels):
        parts.append(text(left - 6, y + thick * len(series) / 2 + 4, label, "end"))
        for n, (who, values) in zip(styles(series), series.items(), strict=True):
            end = max(at_x(values[i]), left + 1)
            tip = f"{who + ', ' if who else ''}{label}: {short(values[i])}"
            link = {"data_layer": layers[i] if i < len(layers) else None, "data_tip": tip}
            parts.append(box(left, y, end - left, thick - 2, f"var(--s{n})", **link))
            parts.append(text(end + 5, y + thick - 3, short(values[i])))
            y += thick
        y += 6
    key, below = legend(series, y + 10)
    rows = [[label, *(values[i] for values in series.values())] for i, label in enumerate(labels)]
    return Plot("".join(parts) + key, below, [["", *series], *rows])


def surface(loss: Grid, name: str, *, steps: Sequence[float], beside: Iterable[Grid] = ()) -> Plot:
    """A square of cells, coloured by log(loss), lines of equal loss, a mark in the middle. beside: as for `lines`."""
    n, left, above = len(steps), 46.0, 8.0
    side = WIDTH - left - 8
    cell = side / n
    logs = [[math.log(max(v, 1e-12)) for v in row] for row in loss]
    every = [math.log(max(v, 1e-12)) for grid in (loss, *beside) for row in grid for v in row]
    share = Axis(min(every), max(every), 0.0, 1.0)
    at_x = Axis(0, n - 1, left + cell / 2, left + side - cell / 2)  # where the middles of cells lie, by number
    at_y = Axis(0, n - 1, above + side - cell / 2, above + cell / 2)
    parts = []
    for i, j in product(range(n), repeat=2):
        tip = f"({short(steps[j])}, {short(steps[i])}): loss {short(loss[i][j])}"
        x, y = at_x(j) - cell / 2, at_y(i) - cell / 2
        parts.append(box(x, y, cell + 0.3, cell + 0.3, colour(share(logs[i][j])), data_tip=tip))
    for k in range(1, 9):
        pieces = (
            f"M{at_x(a):.1f},{at_y(b):.1f}L{at_x(c):.1f},{at_y(d):.1f}"
            for (a, b), (c, d) in contour(logs, share.low + (share.high - share.low) * k / 9)
        )
        parts.append(tag("path", d="".join(pieces), fill="none", stroke="#fff", stroke_opacity="0.55"))
    parts.append(symbol(CROSS, left + side / 2, above + side / 2, 6, fill="#fff", stroke="#000"))
    under, below = Axis(steps[0], steps[-1], at_x.start, at_x.end).below(above + side)
    parts += [*under, *Axis(steps[0], steps[-1], at_y.start, at_y.end).beside(left - 6)]
    key, below = colour_bar(left, below + 10, math.exp(share.low), math.exp(share.high), name)
    rows: list[list[Any]] = [["", *map(short, steps)], *([short(s), *r] for s, r in zip(steps, loss, strict=True))]
    return Plot("".join(parts) + key, below, rows)


def contour(values: Grid, level: float) -> Iterator[tuple[XY, XY]]:
    """Pieces of the line where a grid has this value, as pairs of (column, row): marching squares."""
    for i, j in product(range(len(values) - 1), range(len(values[0]) - 1)):
        corners = [(j, i), (j + 1, i), (j + 1, i + 1), (j, i + 1)]
        crossings = []
        for (a, b), (c, d) in zip(corners, corners[1:] + corners[:1], strict=True):
            v, w = values[b][a] - level, values[d][c] - level
            if (v < 0) != (w < 0):
                share = v / (v - w)
                crossings.append((a + share * (c - a), b + share * (d - b)))
        yield from zip(crossings[::2], crossings[1::2], strict=True)
