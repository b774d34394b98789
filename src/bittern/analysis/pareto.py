"""The page of `compress`: what each rung of the ladder lost, its size and its time, in plots whose points lead to rows.

A point is a link to its row of the table, which the page's style then marks: no script is needed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bittern.analysis.charts import LETTER, WIDTH, Axis, names_beside
from bittern.analysis.report import ENVIRONMENT, PAPER

BOTTOM, TOP = 240.0, 22.0


def place(result: Mapping[str, Any], values: Sequence[float], name: str) -> dict[str, Any]:
    """Return where a plot of points lost against a value of each row, called `name`, has what the page draws.

    A loss far beyond the limit lies at the upper end, so that it does not press all others together.
    """
    rows, limit = result["rows"], result["max_loss"]
    top = max([limit, *(min(3 * limit, row["points"] + row["error"]) for row in rows)]) or 1.0
    at_y = Axis(min([0.0, *(row["points"] - row["error"] for row in rows if row["within"])]), 1.05 * top, BOTTOM, TOP)
    left = 10 + LETTER * max(len(mark) for _, mark in at_y.marks())
    at_x = Axis(0.0, 1.1 * max(values), left + 8, WIDTH - 12.0)
    under, below = at_x.below(BOTTOM)
    marks = [  # x, y and both ends of the bar
        (at_x(value), *(at_y(max(at_y.low, min(top, row["points"] + k * row["error"]))) for k in (0, 1, -1)))
        for value, row in zip(values, rows, strict=True)
    ]
    better = [{other for other in marks if other[0] <= x and other[1] >= y} for x, y, *_ in marks]
    edge = sorted(mark[:2] for mark, others in zip(marks, better, strict=True) if others == {mark})
    line = at_y(limit)
    taken = [(left, WIDTH, line - 1, line + 1), *((x - 1, x + 1, high, low) for x, _, high, low in marks)]
    names = [row["rung"] if row["points"] <= top else f"{row['rung']} ↑ {row['points']:.3g}" for row in rows]
    named = [(x, y, who) for (x, y, *_), who in zip(marks, names, strict=True)]
    texts = "".join(names_beside(named, taken, (left, WIDTH - 6.0, TOP - 4, BOTTOM)))
    axes = "".join([*at_y.beside(left - 5, grid_to=WIDTH - 6.0), *under])
    drawn = {"axes": axes, "edge": edge, "marks": list(zip(rows, marks, strict=True)), "names": texts}
    return drawn | {"left": left, "below": below, "limit": line, "name": name}


def write_page(result: Mapping[str, Any], file: Path) -> None:
    """Write the page of a result of `compress`."""
    rows, (unit, name) = result["rows"], (1e6, "size in MB") if result["float_bytes"] > 2e6 else (1e3, "size in kB")
    plots = [
        place(result, [row["file"] / unit for row in rows], name),
        place(result, [1 / row["faster"] for row in rows], "time of one sample, as a share of float's"),
    ]
    page = ENVIRONMENT.get_template("compress.html.j2").render(result=result, plots=plots, light=PAPER, columns=3)
    file.write_text(page, encoding="utf-8")
