"""The report of an analysis: one HTML file that needs nothing else, the JSON it was drawn from, an SVG of each plot.

Everything that comes from a model, a tokenizer or data is escaped: by jinja2 in the page, by `charts` in the plots.
"""

import json
import re
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from bittern.analysis.charts import CIVIDIS, WIDTH, short
from bittern.analysis.figures import SECTIONS, TEMPLATES, Facts, Figure, labels_of, names_of
from bittern.analysis.findings import measured
from bittern.errors import listed
from bittern.options import LAYER_TYPES
from bittern.progress import megabytes

REPORT = "report.json"
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


ENVIRONMENT.globals |= {"short": short, "width": WIDTH, "megabytes": megabytes, "listed": listed}
ENVIRONMENT.filters["breakable"] = breakable
