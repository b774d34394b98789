"""The figures of a report: for each plot what it is called, what to look for, and how it is drawn."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from markupsafe import Markup

from bittern.analysis.charts import Plot, bars, heat_map, lines, short, strips, surface

Result = Mapping[str, Any]


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


def names_of(result: Result) -> list[str]:
    names = [s["name"] for s in result["students"]]
    return names if len(set(names)) == len(names) else [s["path"] for s in result["students"]]


def labels_of(student: Result) -> list[str]:
    """Of the attention modules, by block."""
    return [f"layer {a['block']}{' cross' if a['cross'] else ''}" for a in student["compare"]["attentions"]]


def by_name(result: Result) -> Iterator[tuple[str, str, Result]]:
    """Part of a file name, what to add to a title, and the student."""
    for name, student in zip(names_of(result), result["students"], strict=True):
        many = len(result["students"]) > 1
        yield (
            (f"-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}" if many else ""),
            (f", {name}" if many else ""),
            student,
        )


HEATS = (
    (
        "divergence",
        "divergence",
        "KL divergence of attention maps",
        "Bright cells are heads that no longer attend as the teacher does; 0 is perfect. Click a cell to see its maps.",
    ),
    (
        "cover",
        "cover length ratio",
        "Cover length ratio",
        "How deep in the student's ranking the teacher's five most attended tokens lie; close to {floor} is good.",
    ),
    (
        "ranking",
        "loss per pair",
        "Ranking loss",
        "How much the order of tokens within a row changed; bright heads no longer know what matters most.",
    ),
)


def heads(result: Result) -> Iterator[Figure]:
    for key, name, title, look in HEATS:
        top = max(v for s in result["students"] for a in s["compare"]["attentions"] for v in a[key])
        for suffix, more, student in by_name(result):
            attentions = student["compare"]["attentions"]
            floor = fmean(v for a in attentions for v in a["cover_floor"])
            low = min(v for a in attentions for v in a["cover_floor"]) if key == "cover" else 0.0
            plot = heat_map([a[key] for a in attentions], labels_of(student), name, low=low, top=top)
            yield Figure(f"{key}{suffix}", title + more, look.format(floor=short(floor)), plot)
    top = max(v for s in result["students"] for a in s["compare"]["attentions"] for v in a["gen"]["all"])
    for suffix, more, student in by_name(result):
        values = [a["gen"]["all"] for a in student["compare"]["attentions"]]
        look = "Mean difference of attention probabilities: how far self-attention generation (SA-GEN) is off."
        yield Figure(
            f"sa-gen{suffix}", f"SA-GEN distance{more}", look, heat_map(values, labels_of(student), "distance", top=top)
        )


def classes(result: Result) -> Iterator[Figure]:
    titles = {
        "gen": (
            "SA-GEN distance by class of token",
            "Long bars are classes of tokens that get a wrong amount of attention.",
        ),
        "prop": (
            "SA-PROP distance by class of token",
            "The same of ‖αf(x)‖, what attention passes on: long here and "
            "short in SA-GEN means that values or W_O are off, not the maps.",
        ),
    }
    for key, (title, look) in titles.items():
        attentions = result["students"][0]["compare"]["attentions"]
        kinds = list(dict.fromkeys(k for a in attentions for k in a.get(key, {})))
        if not kinds:
            continue
        series = {
            name: [fmean(v for a in s["compare"]["attentions"] for v in a.get(key, {}).get(k, [])) for k in kinds]
            for name, s in zip(names_of(result), result["students"], strict=True)
        }
        yield Figure(f"sa-{key}-classes", title, look, bars(kinds, _named(series), "mean over layers and heads"))


def _named(series: Mapping[str, Any]) -> dict[str, Any]:
    """A single student's curve needs no legend."""
    return {"": next(iter(series.values()))} if len(series) == 1 else dict(series)


def depth(result: Result) -> Iterator[Figure]:
    places = result["students"][0]["compare"]["places"]
    series = {n: list(enumerate(s["compare"]["depth"]["plain"])) for n, s in students_of(result)}
    look = "How the error grows from block to block; a step up marks a block that does harm of its own."
    yield Figure("depth", "Error by depth", look, _depth(series, places))
    titles = {"map": "teacher's maps", "context": "teacher's context", "output": "teacher's attention output"}
    for suffix, more, student in by_name(result):
        curves = student["compare"]["depth"]
        given = {titles.get(how, "nothing put in"): list(enumerate(v)) for how, v in curves.items() if v}
        if len(given) > 1:
            look = "Where the curve falls when the teacher's signal is put in, that part of attention made the error."
            yield Figure(
                f"interventions{suffix}", f"Error with the teacher's signals{more}", look, _depth(given, places)
            )
    students = students_of(result)
    keys = [("teacher", students[0][1], "first_teacher"), *((name, s, "first_student") for name, s in students)]
    curves = {who: [(i, fmean(a[key])) for i, a in enumerate(s["compare"]["attentions"])] for who, s, key in keys}
    look = "1 means that heads attend most to the first token; students should follow the teacher's curve."
    labels = labels_of(result["students"][0])
    yield Figure(
        "first-token",
        "Ranking ratio of the first token",
        look,
        lines(curves, x_name="", y_name="mean over heads", labels=labels, layers=True),
    )


def _depth(series: Mapping[str, Any], places: Sequence[str]) -> Plot:
    return lines(_named(series), x_name="", y_name="‖X - teacher's‖² / ‖teacher's‖²", labels=places)


def students_of(result: Result) -> list[tuple[str, Result]]:
    return list(zip(names_of(result), result["students"], strict=True))


def extremes(result: Result) -> Iterator[Figure]:
    students = students_of(result)
    ranges = {"teacher": students[0][1]["compare"]["extremes"]["teacher"]}
    ranges |= {name: student["compare"]["extremes"]["student"] for name, student in students}
    curves = {
        who: _two(*([v for place, v in found.items() if place.endswith(side)] for side in ("low", "high")))
        for who, found in ranges.items()
    }
    look = "Mean over tokens of the smallest and largest unit of attention's output; a narrower student clips outliers."
    labels = labels_of(result["students"][0])
    yield Figure(
        "min-max",
        "Min–max of the attention output",
        look,
        lines(curves, x_name="", y_name="units of Y", labels=labels, layers=True),
    )
    sample = next((s for s in result["shown"] if "extremes" in s), None)
    if sample is None:
        return
    worst = result["students"][0]["worst"]
    layer = worst[0]["block"] if worst and worst[0]["block"] < len(sample["extremes"][0]) else 0
    both = zip(ranges, sample["extremes"], strict=True)
    curves = {who: _two(*found[layer]) for who, found in both}
    look = f"The same token by token, in layer {layer}: outliers at [CLS], [SEP] or punctuation should survive."
    yield Figure(
        "min-max-tokens",
        "Min–max by token",
        look,
        lines(curves, x_name="", y_name="units of Y", labels=sample["tokens"]),
    )


def _two(low: Sequence[float], high: Sequence[float]) -> list[tuple[float, float]]:
    """Two curves as one, with a break between."""
    return [*enumerate(low), (0, float("nan")), *enumerate(high)]


def sensitivity(result: Result) -> Iterator[Figure]:
    blocks = result["students"][0]["blocks"]
    names = [*(f"block {i}" for i in range(len(blocks) - 2)), blocks[-2]["name"], "all"]
    series = {n: [b["error"] for b in s["blocks"]] for n, s in students_of(result)}
    look = "The teacher with one block of the student: the longest bar is the block to give more bits first."
    yield Figure(
        "blocks",
        "One block quantized at a time",
        look,
        bars(names, _named(series), "relative error of the output", linked=len(blocks) - 2),
    )
    first = [c["name"] for c in result["students"][0]["classes"]]
    if all([c["name"] for c in s["classes"]] == first for s in result["students"]):
        names = [n if n in ("weights", "all") else f"weights, {n}" for n in first]
        series = {n: [c["error"] for c in s["classes"]] for n, s in students_of(result)}
        look = "Weights alone, then with one class of activations: longer is its cost, shorter shows training with it."
        yield Figure(
            "classes",
            "One class of tensors at a time",
            look,
            bars(names, _named(series), "relative error of the output"),
        )
    titles = {"map": "attention maps", "ffn": "FFN outputs", "scores": "QKᵀ"}
    for what, title in titles.items():
        curves = {"teacher": list(enumerate(result["students"][0]["nuclear"][what]["teacher"]))}
        curves |= {n: list(enumerate(s["nuclear"][what]["student"])) for n, s in students_of(result)}
        look = "The sum of singular values: how much variety there is; a student far below has collapsed directions."
        labels = labels_of(result["students"][0]) if what != "ffn" else None
        yield Figure(
            f"nuclear-{what}",
            f"Nuclear norm of {title}",
            look,
            lines(curves, x_name="" if labels else "block", y_name="mean over samples", labels=labels),
        )


def training(result: Result) -> Iterator[Figure]:
    for suffix, more, student in by_name(result):
        curves: dict[str, list[tuple[float, float]]] = {}
        for entry in student["history"]:
            for name, value in entry.items():
                if name == "loss" or name.startswith("loss_") or name.startswith("eval_"):
                    curves.setdefault(name, []).append((entry["step"], value))
        losses = {n.removeprefix("loss_"): c for n, c in curves.items() if n.startswith("loss_")}
        losses = losses or {n: c for n, c in curves.items() if n == "loss"}
        bands = student["phases"]
        if losses:
            look = "Each term should fall and level off; one that stays flat is not learned."
            plot = lines(losses, x_name="step", y_name="terms of the loss", log=True, bands=bands)
            yield Figure(f"losses{suffix}", f"Training: losses{more}", look, plot)
        metric = f"eval_{student['metric']}"
        if metric in curves:
            name = str(student["metric"]).replace("_", " ")
            plot = lines({"": curves[metric]}, x_name="step", y_name=name, bands=bands, zero=False)
            look = "Still rising at the end: train longer. The best evaluation is what was kept."
            yield Figure(f"metric{suffix}", f"Training: {name}{more}", look, plot)


def frontier(result: Result) -> Iterator[Figure]:
    for suffix, more, student in by_name(result):
        points = student["frontier"]
        if len(points) < 2:
            continue
        chosen = next((p for p in points if p["bits"] == student["bits"]), None)
        kept = points[:: -(-len(points) // 300)]
        curve = [(p["size"] / 8e6, p["sensitivity"]) for p in kept]
        marked = [] if chosen is None else [(chosen["size"] / 8e6, chosen["sensitivity"], "chosen")]
        look = "Every point is the best choice of widths of its size; left of a bend, bytes are saved at a high price."
        positive = all(y > 0 for _, y in curve)
        yield Figure(
            f"frontier{suffix}",
            f"Mixed precision{more}",
            look,
            lines(
                {"": curve}, x_name="megabytes of weights in blocks", y_name="sensitivity", log=positive, marked=marked
            ),
        )


def sharpness(result: Result) -> Iterator[Figure]:
    curved = [(n, s["curvature"]) for n, s in students_of(result) if "curvature" in s]
    if not curved:
        return
    traces = "; ".join(
        f"trace {short(c['trace'][0])} ± {short(c['trace'][1])}" + (f" ({n})" if len(curved) > 1 else "")
        for n, c in curved
    )
    look = f"Top eigenvalues of mini-batches: small and close together means a flat, easy minimum. {traces}."
    yield Figure("spectrum", "Hessian spectrum", look, strips({n: c["spectra"] for n, c in curved}, "eigenvalue"))
    top = max(v for _, c in curved for row in c["surface"]["loss"] for v in row)
    for suffix, more, student in by_name(result):
        if "curvature" in student:
            found = student["curvature"]["surface"]
            look = (
                "The loss along two random filter-normalised directions: wide, round basins train and generalise well."
            )
            yield Figure(f"surface{suffix}", f"Loss surface{more}", look, surface(found["steps"], found["loss"], top))


SECTIONS = (
    ("Attention by layer and head", heads),
    ("Attention by class of token", classes),
    ("Error by depth", depth),
    ("Range of the attention output", extremes),
    ("Where the loss comes from", sensitivity),
    ("Training", training),
    ("Size against sensitivity", frontier),
    ("Curvature", sharpness),
)
