"""The page of `compress`: what each rung of the ladder lost, its size and its time, in plots whose points lead to rows.

A point is a link to its row of the table, which the page's style then marks: no script is needed.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bittern.analysis.charts import CIRCLE, LETTER, WIDTH, Axis, symbol, tag, text
from bittern.analysis.report import ENVIRONMENT, PAPER
from bittern.progress import megabytes

BOTTOM, TOP = 240.0, 62.0  # above is room for names, which slant


def unbeaten(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in one number without being worse in the other, from left to right.

    >>> unbeaten([(1, 5), (2, 3), (3, 4), (4, 1)])
    [0, 1, 3]
    """
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not found or points[i][1] < points[found[-1]][1]:
            found.append(i)
    return found


def plot(result: Mapping[str, Any], key: str, unit: float, name: str) -> str:
    """Draw points lost against `key` of each row divided by `unit`, called `name`: an SVG."""
    rows, limit = result["rows"], result["max_loss"]
    points = [(row[key] / unit, row["points"]) for row in rows]
    most, worst = max(x for x, _ in points), max([limit, *(row["points"] + row["error"] for row in rows)])
    at_y = Axis(min([0.0, *(row["points"] - row["error"] for row in rows)]), 1.05 * worst, BOTTOM, TOP)
    left = 10 + LETTER * max(len(mark) for _, mark in at_y.marks())
    at_x = Axis(0.0, 1.1 * most, left + 8, WIDTH - 12.0)
    under, below = at_x.below(BOTTOM)
    parts = [text(4, 12, "points lost"), *at_y.beside(left - 5, grid_to=WIDTH - 6.0), *under]
    parts.append(text((left + WIDTH) / 2, below + 14, name, "middle"))
    dashed = {"stroke": "var(--s1)", "stroke_dasharray": "6 3"}
    parts.append(tag("line", x1=left, x2=WIDTH - 6.0, y1=at_y(limit), y2=at_y(limit), **dashed))
    edge = " ".join(f"{at_x(points[i][0]):.1f},{at_y(points[i][1]):.1f}" for i in unbeaten(points))
    parts.append(tag("polyline", points=edge, fill="none", stroke="var(--line)", stroke_width=2))
    for row, (x, y) in zip(rows, points, strict=True):
        ends = {"y1": at_y(y - row["error"]), "y2": at_y(y + row["error"])}
        colour = "var(--s2)" if row["rung"] == result["chosen"] else "var(--s0)" if row["within"] else "var(--s1)"
        tip = f"{row['rung']}: loses {y:.2f} ± {row['error']:.2f}, {megabytes(row['file'])}, {row['latency_ms']:.1f} ms"
        mark = tag("line", x1=at_x(x), x2=at_x(x), **ends, stroke=colour)
        mark += symbol(CIRCLE, at_x(x), at_y(y), 6.0, fill=colour, data_tip=tip)
        place = at_x(x) + 6, at_y(y) - 8
        mark += text(*place, row["rung"], turn=f"rotate(-50 {place[0]:.1f} {place[1]:.1f})")
        parts.append(tag("a", tag("title", escape(tip)) + mark, href=f"#{row['rung']}"))
    height = below + 20
    label = {"role": "img", "aria_label": f"points lost by {name}"}
    return tag("svg", "".join(parts), viewBox=f"0 0 {WIDTH} {height:.0f}", **label)


def write_page(result: Mapping[str, Any], file: Path) -> None:
    """Write the page of a result of `compress`."""
    unit, name = (1e6, "size in MB") if result["float_bytes"] > 2e6 else (1e3, "size in kB")
    page = ENVIRONMENT.get_template("compress.html.j2").render(
        result=result,
        plots=[plot(result, "file", unit, name), plot(result, "latency_ms", 1.0, "milliseconds for one sample")],
        light=PAPER,
        columns=2,
    )
    file.write_text(page, encoding="utf-8")
