"""The report of an analysis: one HTML file that needs nothing else, the JSON it was drawn from, an SVG of each plot.

Everything that comes from a model, a tokenizer or data is escaped: by jinja2 in the page, by `charts` in the plots.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bittern.analysis.charts import WIDTH, short
from bittern.analysis.figures import SECTIONS, Figure, Result, labels_of, names_of

REPORT = "report.json"
PAPER = {  # after Okabe and Ito, whose colours colour-blind people tell apart; the page has brighter ones in the dark
    "ink": "#1b1f24",
    "line": "#d5d9df",
    "band": "#eef0f3",
    "s0": "#0072b2",
    "s1": "#d55e00",
    "s2": "#009e73",
    "s3": "#b4558b",
    "s4": "#8a6d00",
    "s5": "#5f3dc4",
}


ENVIRONMENT = Environment(
    loader=PackageLoader("bittern.analysis"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.globals |= {"short": short, "width": WIDTH}


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
        "first": {"layer": worst[0]["block"], "head": worst[0]["head"]} if worst else {},
    }
    return Markup(json.dumps(data).replace("<", "\\u003c"))


def summary(result: Result) -> list[list[str]]:
    """The table at the top: a row for each fact, a column for the teacher and each student."""
    students, teacher = result["students"], result["teacher"]
    rows = [["", "teacher", *names_of(result)]]
    runs = [s["run"] for s in students]
    counts = {run.get("samples", 0) for run in runs}
    whole = all("packed" in run for run in runs) and len(counts) == 1  # measured on all of the test data by the runs
    count = counts.pop() if whole else result["samples"]
    own = [run["packed"] if whole else s["metrics"] for run, s in zip(runs, students, strict=True)]
    reference = runs[0]["float"] if whole else teacher["metrics"]
    for name in own[0]:
        if name != "max_difference":
            label = f"{name.replace('_', ' ')} ({count:,} samples)"
            rows.append([label, _metric(reference.get(name)), *(_metric(m.get(name)) for m in own)])
    sizes = [s["holds"] for s in students]
    rows.append(
        [
            "size of the file",
            megabytes(sizes[0]["float32"]),
            *(f"{megabytes(h['file'])} ({h['float32'] / h['file']:.1f}× smaller)" for h in sizes),
        ]
    )
    rows.append(["bits per quantized weight", "32", *(f"{h['bits']:.2f}" for h in sizes)])
    speeds = [s["speed"] for s in students]
    rows.append(
        [
            f"time of {speeds[0]['batch']} samples, threads: {speeds[0]['threads']}",
            f"{1e3 * speeds[0]['teacher']:.0f} ms",
            *(_speed(s) for s in speeds),
        ]
    )
    rows.append(["made by", "", *(f"{s['how']} {s['holds']['recipe']}" for s in students)])
    rows.append(["stayed float", "everything", *(_kept(h["kept_float"]) for h in sizes)])
    return rows


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _metric(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _speed(seconds: Mapping[str, float]) -> str:
    ratio = seconds["teacher"] / seconds["student"]
    how = f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"
    return f"{1e3 * seconds['student']:.0f} ms ({how} here)"


def _kept(modules: Sequence[Mapping[str, Any]]) -> str:
    total = sum(m["parameters"] for m in modules)
    layers = [m["name"] for m in modules if m["type"] in ("Linear", "Conv2d", "Embedding", "Conv1D")]
    named = ", ".join(layers[:4]) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
    return f"{total:,} parameters: {named + ', ' if named else ''}norms and biases"
