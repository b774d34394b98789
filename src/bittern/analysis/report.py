"""Pages that need nothing else, drawn from JSON: that of an analysis, with an SVG file of each plot, and what each rung
of `compress` lost, its size and its time, in plots whose points are links to rows of a table: without a script.

Everything that comes from a model, a tokenizer or data is escaped: by jinja2 in the page, by `charts` in the plots.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from bittern.analysis.charts import CIVIDIS, LETTER, WIDTH, Axis, names_beside, short
from bittern.analysis.figures import SECTIONS, TEMPLATES, Facts, Figure, labels_of, names_of
from bittern.analysis.findings import measured
from bittern.errors import listed
from bittern.options import LAYER_TYPES
from bittern.progress import megabytes

REPORT = "report.json"
BOTTOM, TOP = 240.0, 22.0  # of the plots of rungs
PAPER: dict[str, str] = yaml.safe_load((TEMPLATES / "paper.yaml").read_text(encoding="utf-8"))  # colours

ENVIRONMENT = Environment(
    loader=PackageLoader("bittern.analysis"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def breakable(text: str) -> Markup:
    """Escape a text, in which a long name may go on in the next line after a dot or an underscore."""
    return Markup(re.sub(r"([._])(?=[^\W\d])", r"\1<wbr>", str(escape(text))))


def write_report(result: Facts, folder: Path) -> None:
    """Write report.html, report.json and plots/*.svg into a folder."""
    (folder / REPORT).write_text(json.dumps(result, indent=1) + "\n")
    sections = [(title, figures) for title, make in SECTIONS.items() if (figures := list(make(result)))]
    page = ENVIRONMENT.get_template("report.html.j2").render(
        title=f"{' and '.join(names_of(result))} against {Path(result['teacher']['path']).name}",
        result=result,
        sections=sections,
        measured=measured(result),
        names=names_of(result),
        labels=labels_of(result),
        light=PAPER,
        cividis=CIVIDIS,
        columns=1 + len(result["students"]),
        layer_types=LAYER_TYPES,
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    for _, figures in sections:
        for figure in figures:
            write_plot(figure, folder / "plots")


def write_plot(figure: Figure, folder: Path) -> None:
    """Write a plot as SVG, in the colours of paper, into a folder."""
    svg = ENVIRONMENT.get_template("plot.svg.j2").render(figure=figure)
    svg = re.sub(r"var\(--(\w+)\)", lambda name: PAPER[name[1]], svg)
    folder.mkdir(exist_ok=True)
    (folder / f"{figure.name}.svg").write_text(svg, encoding="utf-8")


def place_rungs(result: Mapping[str, Any], values: Sequence[float], name: str) -> dict[str, Any]:
    """Return where a plot of points lost against a value of each row, called `name`, has what the page draws. A loss
    far beyond the limit lies at the upper end, so that it does not press all others together."""
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
        place_rungs(result, [row["file"] / unit for row in rows], name),
        place_rungs(result, [1 / row["faster"] for row in rows], "time of one sample, as a share of float's"),
    ]
    page = ENVIRONMENT.get_template("compress.html.j2").render(result=result, plots=plots, light=PAPER, columns=3)
    file.write_text(page, encoding="utf-8")


ENVIRONMENT.globals |= {"short": short, "width": WIDTH, "megabytes": megabytes, "listed": listed}
ENVIRONMENT.filters["breakable"] = breakable
