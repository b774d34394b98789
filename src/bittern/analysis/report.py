"""The report of an analysis: one HTML file that needs nothing else, the JSON it was drawn from, an SVG of each plot.

Everything that comes from a model, a tokenizer or data is escaped: by jinja2 in the page, by `charts` in the plots.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from bittern.analysis.charts import CIVIDIS, WIDTH, short
from bittern.analysis.figures import SECTIONS, TEMPLATES, Figure, Result, labels_of, names_of
from bittern.analysis.findings import measured

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


ENVIRONMENT.globals |= {"short": short, "width": WIDTH, "breakable": breakable}


def write_report(result: Result, folder: Path) -> None:
    """Write report.html, report.json and plots/*.svg into a folder."""
    (folder / REPORT).write_text(json.dumps(result, indent=1) + "\n")
    sections = [(title, figures) for title, make in SECTIONS.items() if (figures := list(make(result)))]
    page = ENVIRONMENT.get_template("report.html.j2").render(
        title=f"{' and '.join(names_of(result))} against {Path(result['teacher']['path']).name}",
        result=result,
        sections=sections,
        summary=summary(result),
        labels=labels_of(result),
        data=script_data(result),
        light=PAPER,
        columns=1 + len(result["students"]),
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


def script_data(result: Result) -> Markup:
    """Return the data of the page's script, as JSON that cannot end the element that it stands in."""
    worst = result["students"][0]["worst"]
    data = {
        "shown": result["shown"],
        "names": ["teacher", *names_of(result)],
        "labels": labels_of(result),
        "colours": PAPER,
        "cividis": CIVIDIS,
        "first": {"layer": worst[0]["layer"], "head": worst[0]["head"]} if worst else {},
    }
    return Markup(json.dumps(data).replace("<", "\\u003c"))


def summary(result: Result) -> list[list[str]]:
    """The table at the top: a row for each fact, a column for the teacher and each student."""
    count, reference, own = measured(result)
    students = result["students"]
    sizes, speeds = [s["holds"] for s in students], [s["speed"] for s in students]
    metrics = [
        [
            f"{name.replace('_', ' ')} ({count:,} samples)",
            *(f"{m[name]:.4f}" if name in m else "" for m in (reference, *own)),
        ]
        for name in own[0]
        if name != "max_difference"
    ]
    whole = result["teacher"]["file"]
    smaller = (f"{megabytes(h['file'])} ({whole / h['file']:.1f}× smaller)" for h in sizes)
    time = f"time of {speeds[0]['batch']} samples, threads: {speeds[0]['threads']}"
    return [
        ["", "teacher", *names_of(result)],
        *metrics,
        ["size of the file", megabytes(whole), *smaller],
        ["bits per quantized weight", "32", *(f"{h['bits']:.2f}" for h in sizes)],
        [time, f"{1e3 * speeds[0]['teacher']:.0f} ms", *map(_speed, speeds)],
        ["made by", "", *(f"{s['how']} {s['holds']['recipe']}" for s in students)],
        ["quantized", "nothing", *("; ".join(s["notes"]) for s in students)],
        ["stayed float", "everything", *(_kept(h["kept_float"]) for h in sizes)],
    ]


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _speed(seconds: Mapping[str, float]) -> str:
    ratio = seconds["teacher"] / seconds["student"]
    how = f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"
    return f"{1e3 * seconds['student']:.0f} ms ({how} here)"


def _kept(modules: Sequence[Mapping[str, Any]]) -> str:
    total = sum(m["parameters"] for m in modules)
    layers = [m["name"] for m in modules if m["type"] in ("Linear", "Conv2d", "Embedding", "Conv1D")]
    named = ", ".join(layers[:4]) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
    return f"{total:,} parameters: {named + ', ' if named else ''}norms and biases"
