"""The figures of a report: for each plot how it is drawn; its title and what to look for are in figures.yaml."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

from bittern.analysis.charts import XY, Plot, bars, heat_map, lines, short, surface

Facts = Mapping[str, Any]
TEMPLATES = Path(__file__).parent / "templates"
TEXTS: dict[str, dict[str, Any]] = yaml.safe_load((TEMPLATES / "figures.yaml").read_text(encoding="utf-8"))
DRAWN: dict[str, Callable[..., Plot]] = {"heat": heat_map, "lines": lines, "bars": bars, "surface": surface}
HEATS = {"divergence": "divergence", "cover": "cover", "ranking": "ranking", "sa-gen": "gen"}  # figure → its measure


class Figure(NamedTuple):
    """One plot of the report. name: of its file; look: one sentence on what to look for."""

    name: str
    title: str
    look: str
    plot: Plot


def figure(name: str, data: Any, student: str = "", values: Mapping[str, str] = {}, **options: Any) -> Figure:
    """Draw data as figures.yaml says, its texts filled in with `values`. student: whose it is, if there are two."""
    known = TEXTS[name]
    title, look, y_name = (known[part].format(**values) for part in ("title", "look", "shows"))
    plot = DRAWN[known["kind"]](data, name=y_name, **known.get("options", {}), **options)
    suffix, more = ("-" + re.sub(r"[^A-Za-z0-9]+", "-", student).strip("-"), f", {student}") if student else ("", "")
    return Figure(name + suffix, title + more, look, plot)


def paired(name: str, data: Facts, each: Sequence[Facts] = (), **options: Any) -> Iterator[Figure]:
    """Draw a figure for each student that has data for it, all on the same scale. each: options of each student."""
    for (student, own), more in zip(data.items(), each or [{}] * len(data), strict=True):
        if own:
            yield figure(name, own, student, beside=[other for other in data.values() if other], **options, **more)


def names_of(result: Facts) -> list[str]:
    """The names of the students that tell them apart: of their folders, or whole paths."""
    names = [s["name"] for s in result["students"]]
    return names if len(set(names)) == len(names) else [s["path"] for s in result["students"]]


def by_name(result: Facts, get: Callable[[Facts], Any], teacher: Any = None) -> dict[str, Any]:
    """Return what `get` tells of each student, after the teacher's; one alone has no name, and needs no legend."""
    found = {name: get(student) for name, student in zip(names_of(result), result["students"], strict=True)}
    if teacher is not None:
        return {"teacher": teacher, **found}
    return found if len(found) > 1 else {"": next(iter(found.values()))}


def labels_of(result: Facts) -> list[str]:
    """Labels of the attention modules, by block; those of all students agree."""
    attentions = result["students"][0]["compare"]["attentions"]
    return [f"layer {a['block']}{' cross' if a['cross'] else ''}" for a in attentions]


def of_heads(student: Facts, key: str, kind: str = "all") -> list[list[float]]:
    """A measure of attention, by module and head; of the keys of one kind, where it is told by kind."""
    measures = (a[key] for a in student["compare"]["attentions"] if key in a)
    return [found if isinstance(found, list) else found.get(kind, []) for found in measures]


def numbered(values: Mapping[str, Sequence[float]]) -> dict[str, list[XY]]:
    """Curves of values over their numbers from 0."""
    return {name: list(enumerate(of)) for name, of in values.items()}


def two_sided(low: Sequence[float], high: Sequence[float]) -> list[XY]:
    """Two curves as one, with a break between."""
    return [*enumerate(low), (0, float("nan")), *enumerate(high)]


def heads(result: Facts) -> Iterator[Figure]:
    floors = [v for row in of_heads(result["students"][0], "cover_floor") for v in row]
    for name, key in HEATS.items():
        low = min(floors) if key == "cover" else 0.0
        maps = by_name(result, partial(of_heads, key=key))
        yield from paired(name, maps, rows=labels_of(result), low=low, values={"floor": short(fmean(floors))})


def classes(result: Facts) -> Iterator[Figure]:
    attentions = result["students"][0]["compare"]["attentions"]
    for key in ("gen", "prop"):
        kinds = list(dict.fromkeys(k for a in attentions for k in a.get(key, {})))

        def means(student: Facts, key: str = key, kinds: Sequence[str] = kinds) -> list[float]:
            return [fmean(v for row in of_heads(student, key, kind) for v in row) for kind in kinds]

        if kinds:
            yield figure(f"sa-{key}-classes", by_name(result, means), labels=kinds)


def depth(result: Facts) -> Iterator[Figure]:
    first = result["students"][0]
    places = first["compare"]["places"]
    yield figure("depth", numbered(by_name(result, lambda s: s["compare"]["depth"]["plain"])), labels=places)
    teacher = [fmean(row) for row in of_heads(first, "first_teacher")]
    ratios = by_name(result, lambda s: [fmean(row) for row in of_heads(s, "first_student")], teacher)
    yield figure("first-token", numbered(ratios), labels=labels_of(result))

    def given(student: Facts) -> dict[str, list[XY]]:
        signals = TEXTS["interventions"]["signals"]
        found = {signals[how]: values for how, values in student["compare"]["depth"].items() if values}
        return numbered(found) if len(found) > 1 else {}

    yield from paired("interventions", by_name(result, given), labels=places)


def extremes(result: Facts) -> Iterator[Figure]:
    first = result["students"][0]
    ranges = by_name(result, lambda s: s["compare"]["extremes"]["student"], first["compare"]["extremes"]["teacher"])
    curves = {
        who: two_sided(*([v for place, v in found.items() if place.endswith(side)] for side in ("low", "high")))
        for who, found in ranges.items()
    }
    yield figure("min-max", curves, labels=labels_of(result))
    if (sample := next((s for s in result["shown"] if "extremes" in s), None)) is not None:
        layer = first["worst"][0]["layer"] if first["worst"] else 0
        curves = {who: two_sided(*found[layer]) for who, found in zip(ranges, sample["extremes"], strict=True)}
        yield figure("min-max-tokens", curves, labels=sample["tokens"], values={"layer": labels_of(result)[layer]})


def sensitivity(result: Facts) -> Iterator[Figure]:
    first = result["students"][0]
    of_block = [a["block"] for a in first["compare"]["attentions"]]
    count = len(first["blocks"]) - 2  # the last two are the rest and the whole
    blocks = by_name(result, lambda s: [entry["error"] for entry in s["blocks"]])
    labels, layers = [*(f"block {i}" for i in range(count)), "the rest", "all"], map(of_block.index, range(count))
    yield figure("blocks", blocks, labels=labels, layers=list(layers))
    names = [[entry["name"] for entry in s["classes"]] for s in result["students"]]
    if all(own == names[0] for own in names):
        errors = by_name(result, lambda s: [entry["error"] for entry in s["classes"]])
        yield figure("classes", errors, labels=[n if n in ("weights", "all") else f"+ {n}" for n in names[0]])
    teacher = {what: both["teacher"] for what, both in first["nuclear"].items()}
    nuclear = by_name(result, lambda s: {what: both["student"] for what, both in s["nuclear"].items()}, teacher)
    for what in teacher:
        norms = numbered({who: found[what] for who, found in nuclear.items()})
        yield figure(f"nuclear-{what}", norms, labels=None if what == "ffn" else labels_of(result))


def training(result: Facts) -> Iterator[Figure]:
    def curves(student: Facts, prefix: str) -> dict[str, list[XY]]:
        names = [name for entry in student["history"] for name in entry if name.startswith(prefix)]
        return {
            name.removeprefix(prefix): [(e["step"], e[name]) for e in student["history"] if name in e]
            for name in dict.fromkeys(names)
        }

    metrics = [str(s["metric"]).replace("_", " ") for s in result["students"]]
    each = [{"bands": s["phases"], "values": {"metric": m}} for s, m in zip(result["students"], metrics, strict=True)]
    yield from paired("losses", by_name(result, lambda s: curves(s, "loss_") or curves(s, "loss")), each)
    best = by_name(result, lambda s: {"": p} if (p := curves(s, "eval_").get(s["metric"])) else {})
    yield from paired("metric", best, each)


def size_against_sensitivity(result: Facts) -> Iterator[Figure]:
    def points(student: Facts) -> list[tuple[float, float]]:
        return [(p["size"] / 8e6, p["sensitivity"]) for p in student["frontier"]]

    def chosen(student: Facts) -> dict[str, Any]:
        found = zip(points(student), student["frontier"], strict=True)
        return {"marked": [(*at, "chosen") for at, p in found if p["bits"] == student["bits"]][:1]}

    curves = by_name(result, lambda s: {"": p[:: -(-len(p) // 300)]} if len(p := points(s)) > 1 else {})
    log = all(y > 0 for s in result["students"] for _, y in points(s))
    yield from paired("frontier", curves, [chosen(s) for s in result["students"]], log=log)


def sharpness(result: Facts) -> Iterator[Figure]:
    if any("curvature" not in s for s in result["students"]):
        return
    curved = by_name(result, lambda s: s["curvature"])
    losses = {of: c["surface"]["loss"] for of, c in curved.items()}
    yield from paired("surface", losses, steps=next(iter(curved.values()))["surface"]["steps"])
    traces = [f"trace {short(c['trace'][0])} ± {short(c['trace'][1])}{of and f' ({of})'}" for of, c in curved.items()]
    spectra = {of: [(v, float(k)) for k, group in enumerate(c["spectra"]) for v in group] for of, c in curved.items()}
    drawn = figure("spectrum", spectra, values={"traces": "; ".join(traces)})
    rows = [[name, k, *group] for name, c in curved.items() for k, group in enumerate(c["spectra"])]
    head = ["", "batch", *(f"λ{i + 1}" for i in range(len(rows[0]) - 2))]
    yield drawn._replace(plot=replace(drawn.plot, rows=[head, *rows]))


SECTIONS = {
    "Attention by layer and head": heads,
    "Attention by class of token": classes,
    "Error by depth": depth,
    "Range of the attention output": extremes,
    "Where the loss comes from": sensitivity,
    "Training": training,
    "Size against sensitivity": size_against_sensitivity,
    "Curvature": sharpness,
}
