"""The figures of a report: for each plot how it is drawn; its title and what to look for are in figures.yaml."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from markupsafe import Markup

from bittern.analysis.charts import Plot, bars, heat_map, lines, short, strips, surface

Result = Mapping[str, Any]
TEMPLATES = Path(__file__).parent / "templates"
TEXTS: dict[str, dict[str, str]] = yaml.safe_load((TEMPLATES / "figures.yaml").read_text(encoding="utf-8"))
HEATS = {  # figure → the values of heads that it shows, and their name in it
    "divergence": ("divergence", "divergence"),
    "cover": ("cover", "cover length ratio"),
    "ranking": ("ranking", "loss per pair"),
    "sa-gen": ("gen", "distance"),
}
SIGNALS = {"map": "teacher's maps", "context": "teacher's context", "output": "teacher's attention output"}


@dataclass(frozen=True)
class Figure:
    """One plot of the report. name: of its file; look: one sentence on what to look for."""

    name: str
    title: str
    look: str
    plot: Plot

    @property
    def is_heat(self) -> bool:
        return "data-head" in self.plot.svg

    @property
    def svg(self) -> Markup:
        return Markup(self.plot.svg)

    @property
    def table(self) -> list[list[str]]:
        return [[short(x) if isinstance(x, float | None) else str(x) for x in row] for row in self.plot.rows]


def figure(name: str, plot: Plot, student: str = "", **values: object) -> Figure:
    """A figure with its texts of figures.yaml, filled in with `values`. student: whose it is, if there are two."""
    title, look = (TEXTS[name][part].format(**values) for part in ("title", "look"))
    suffix, more = ("-" + re.sub(r"[^A-Za-z0-9]+", "-", student).strip("-"), f", {student}") if student else ("", "")
    return Figure(name + suffix, title + more, look, plot)


def names_of(result: Result) -> list[str]:
    """The names of the students that tell them apart: of their folders, or whole paths."""
    names = [s["name"] for s in result["students"]]
    return names if len(set(names)) == len(names) else [s["path"] for s in result["students"]]


def students_of(result: Result) -> list[tuple[str, Result]]:
    return list(zip(names_of(result), result["students"], strict=True))


def each_of(result: Result) -> list[tuple[str, Result]]:
    """Students with a name where there are two, for figures that show one of them."""
    return students_of(result) if len(result["students"]) > 1 else [("", result["students"][0])]


def attentions_of(student: Result) -> list[Any]:
    found: list[Any] = student["compare"]["attentions"]
    return found


def labels_of(result: Result) -> list[str]:
    """Labels of the attention modules, by block; those of all students agree."""
    attentions = attentions_of(result["students"][0])
    return [f"layer {a['block']}{' cross' if a['cross'] else ''}" for a in attentions]


def heads(result: Result) -> Iterator[Figure]:
    for name, (key, unit) in HEATS.items():
        maps = [
            [a[key]["all"] if isinstance(a[key], dict) else a[key] for a in attentions_of(student)]
            for student in result["students"]
        ]
        top = max(v for values in maps for row in values for v in row)
        for (of, student), values in zip(each_of(result), maps, strict=True):
            floors = [v for a in attentions_of(student) for v in a["cover_floor"]]
            plot = heat_map(values, labels_of(result), unit, low=min(floors) if key == "cover" else 0.0, top=top)
            yield figure(name, plot, of, floor=short(fmean(floors)))


def classes(result: Result) -> Iterator[Figure]:
    for key in ("gen", "prop"):
        kinds = list(dict.fromkeys(k for a in attentions_of(result["students"][0]) for k in a.get(key, {})))
        series = {
            name: [fmean(v for a in attentions_of(s) for v in a.get(key, {}).get(kind, [])) for kind in kinds]
            for name, s in students_of(result)
        }
        if kinds:
            yield figure(f"sa-{key}-classes", bars(kinds, _named(series), "mean over layers and heads"))


def _named(series: Mapping[str, Any]) -> dict[str, Any]:
    """The series; a single student's needs no legend."""
    return {"": next(iter(series.values()))} if len(series) == 1 else dict(series)


def depth(result: Result) -> Iterator[Figure]:
    def errors(series: Mapping[str, Sequence[float]]) -> Plot:
        curves = {name: list(enumerate(values)) for name, values in series.items()}
        places = result["students"][0]["compare"]["places"]
        return lines(_named(curves), x_name="", y_name="‖X - teacher's‖² / ‖teacher's‖²", labels=places)

    yield figure("depth", errors({name: s["compare"]["depth"]["plain"] for name, s in students_of(result)}))
    for of, student in each_of(result):
        depths = student["compare"]["depth"]
        given = {SIGNALS.get(how, "nothing put in"): values for how, values in depths.items() if values}
        if len(given) > 1:
            yield figure("interventions", errors(given), of)
    students = students_of(result)
    keys = [("teacher", students[0][1], "first_teacher"), *((name, s, "first_student") for name, s in students)]
    curves = {who: [(i, fmean(a[key])) for i, a in enumerate(attentions_of(s))] for who, s, key in keys}
    yield figure(
        "first-token", lines(curves, x_name="", y_name="mean over heads", labels=labels_of(result), layers=True)
    )


def extremes(result: Result) -> Iterator[Figure]:
    students = students_of(result)
    ranges = {"teacher": students[0][1]["compare"]["extremes"]["teacher"]}
    ranges |= {name: student["compare"]["extremes"]["student"] for name, student in students}
    curves = {
        who: _two(*([v for place, v in found.items() if place.endswith(side)] for side in ("low", "high")))
        for who, found in ranges.items()
    }
    yield figure("min-max", lines(curves, x_name="", y_name="units of Y", labels=labels_of(result), layers=True))
    sample = next((s for s in result["shown"] if "extremes" in s), None)
    if sample is not None:
        worst = students[0][1]["worst"]
        layer = worst[0]["block"] if worst and worst[0]["block"] < len(sample["extremes"][0]) else 0
        curves = {who: _two(*found[layer]) for who, found in zip(ranges, sample["extremes"], strict=True)}
        plot = lines(curves, x_name="", y_name="units of Y", labels=sample["tokens"])
        yield figure("min-max-tokens", plot, layer=layer)


def _two(low: Sequence[float], high: Sequence[float]) -> list[tuple[float, float]]:
    """Two curves as one, with a break between."""
    return [*enumerate(low), (0, float("nan")), *enumerate(high)]


def sensitivity(result: Result) -> Iterator[Figure]:
    def errors(part: str, labels: Sequence[str], linked: int = 0) -> Plot:
        series = {name: [entry["error"] for entry in s[part]] for name, s in students_of(result)}
        return bars(labels, _named(series), "relative error of the output", linked)

    first = result["students"][0]
    count = len(first["blocks"]) - 2  # the last two are the rest and the whole
    blocks = [*(f"block {i}" for i in range(count)), first["blocks"][-2]["name"], "all"]
    yield figure("blocks", errors("blocks", blocks, count))
    names = [c["name"] for c in first["classes"]]
    if all([c["name"] for c in s["classes"]] == names for s in result["students"]):
        labels = [n if n in ("weights", "all") else f"weights, {n}" for n in names]
        yield figure("classes", errors("classes", labels))
    for what in ("map", "ffn", "scores"):
        norms = {"teacher": first["nuclear"][what]["teacher"]}
        norms |= {name: s["nuclear"][what]["student"] for name, s in students_of(result)}
        curves = {name: list(enumerate(values)) for name, values in norms.items()}
        x_name, tick_labels = ("block", None) if what == "ffn" else ("", labels_of(result))
        plot = lines(curves, x_name=x_name, y_name="mean over samples", labels=tick_labels)
        yield figure(f"nuclear-{what}", plot)


def training(result: Result) -> Iterator[Figure]:
    for of, student in each_of(result):
        curves: dict[str, list[tuple[float, float]]] = {}
        for entry in student["history"]:
            for name, value in entry.items():
                curves.setdefault(name, []).append((entry["step"], value))
        losses = {n.removeprefix("loss_"): c for n, c in curves.items() if n.startswith("loss_")}
        losses = losses or {n: c for n, c in curves.items() if n == "loss"}
        bands, metric = student["phases"], student["metric"]
        if losses:
            yield figure("losses", lines(losses, x_name="step", y_name="terms of the loss", log=True, bands=bands), of)
        if f"eval_{metric}" in curves:
            name = str(metric).replace("_", " ")
            plot = lines({"": curves[f"eval_{metric}"]}, x_name="step", y_name=name, bands=bands, zero=False)
            yield figure("metric", plot, of, metric=name)


def frontier(result: Result) -> Iterator[Figure]:
    for of, student in each_of(result):
        points = student["frontier"]
        if len(points) < 2:
            continue
        chosen = next((p for p in points if p["bits"] == student["bits"]), None)
        marked = [] if chosen is None else [(chosen["size"] / 8e6, chosen["sensitivity"], "chosen")]
        curve = [(p["size"] / 8e6, p["sensitivity"]) for p in points[:: -(-len(points) // 300)]]
        log, x_name = all(y > 0 for _, y in curve), "megabytes of weights in blocks"
        yield figure("frontier", lines({"": curve}, x_name=x_name, y_name="sensitivity", log=log, marked=marked), of)


def sharpness(result: Result) -> Iterator[Figure]:
    curved = {name: s["curvature"] for name, s in students_of(result) if "curvature" in s}
    if not curved:
        return
    traces = [
        f"trace {short(c['trace'][0])} ± {short(c['trace'][1])}" + (f" ({name})" if len(curved) > 1 else "")
        for name, c in curved.items()
    ]
    spectra = strips({name: c["spectra"] for name, c in curved.items()}, "eigenvalue")
    yield figure("spectrum", spectra, traces="; ".join(traces))
    top = max(v for c in curved.values() for row in c["surface"]["loss"] for v in row)
    for of, student in each_of(result):
        if "curvature" in student:
            found = student["curvature"]["surface"]
            yield figure("surface", surface(found["steps"], found["loss"], top), of)


SECTIONS = {
    "Attention by layer and head": heads,
    "Attention by class of token": classes,
    "Error by depth": depth,
    "Range of the attention output": extremes,
    "Where the loss comes from": sensitivity,
    "Training": training,
    "Size against sensitivity": frontier,
    "Curvature": sharpness,
}
