"""The figures of the source papers on our models: trains the students that it needs, then looks at them, resumably.

    python benchmarks/figures.py TEACHER DATA --work WORK --out benchmarks/results/figures_sst2.json
    python benchmarks/figures.py TEACHER DATA --work WORK --out FILE --folders ti=FOLDER plain-1000=FOLDER
    python benchmarks/figures.py --table benchmarks/results/figures_sst2.json

Students are ternary (2-2-8), trained for the same steps on the same samples: `plain` with labels alone, `score`
(TernaryBERT), `map` and `output` with all layers, `single` with the map of the last layer alone. --folders adds
students that were trained elsewhere, such as with Teacher Intervention: `bittern qat` leaves such folders. Every
student is compared with the teacher on --samples of the test data, and gets Hessian spectra of --hessians mini-batches
and a loss surface of --grid points a side. --task NAME=DATA fine-tunes the teacher on another task, for its min-max
curves. Nuclear norms by block are those of the digits ViT of the package, and of --vit. Parts that are in the file are
kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from bittern import calibrate, jobs, load, save, simulate
from bittern.analysis.charts import heat_map, lines, surface
from bittern.analysis.compare import compare, nuclear_norms
from bittern.analysis.curvature import (
    Hessian,
    parameters_of,
    prediction_loss_of,
    surface_row,
    top_eigenvalues,
    trainable,
)
from bittern.analysis.curvature import trace as trace_of
from bittern.analysis.figures import Figure
from bittern.analysis.pair import Pair
from bittern.analysis.report import write_plot
from bittern.analysis.tokens import token_kinds
from bittern.data import load_data
from bittern.demo import DIGITS
from bittern.options import Training, parse_distill

STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("none", {}),
    "score": ("ternarybert", {}),
    "map": ("map", {}),
    "output": ("output", {}),
    "single": ("map", {"layers": (-1,)}),
}


def train(options: argparse.Namespace, name: str) -> Path:
    """The folder of a student, trained now if it is not there."""
    folder: Path = options.work / name
    if not folder.exists():
        kind, more = STUDENTS[name]
        training = Training(steps=options.steps, batch_size=32, learning_rate=options.lr, evaluations=3)
        distill = parse_distill(kind, balance="fixed", **more)
        jobs.qat(
            options.teacher,
            "ternary-2-2-8",
            folder,
            data=options.data,
            distill=distill,
            training=training,
            max_length=64,
            resume=True,
        )
    return folder


def fine_tuned(options: argparse.Namespace, name: str, data: str) -> Path:
    """The teacher, fine-tuned on another task with as many classes."""
    folder: Path = options.work / f"teacher-{name}"
    if folder.exists():
        return folder
    model = load(options.teacher)
    loaded = load_data(data, model, options.teacher, split="train", batch_size=32, max_length=64)
    assert loaded is not None
    assert loaded.labels is not None
    torch.manual_seed(0)
    order = torch.randperm(len(loaded))[: 32 * options.steps].split(32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    model.train()
    for rows in order:
        batch = loaded.collate([loaded.rows[i] for i in rows.tolist()])
        loss = model(**batch, labels=loaded.labels[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save(model.eval(), folder, processors_from=options.teacher)
    return folder


def batches_of(model: PreTrainedModel, path: str | Path, data: str, samples: int, batch_size: int) -> list[Any]:
    loaded = load_data(data, model, path, split="test", batch_size=batch_size, max_length=64)
    assert loaded is not None
    return list(loaded.subset(samples))


def recovery(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    teacher = load(options.teacher)
    pair = Pair(load(folder), teacher)
    found = compare(
        pair,
        batches_of(teacher, options.teacher, options.data, options.samples, 32),
        token_kinds(teacher, options.teacher),
    )
    run = json.loads((folder / "bittern.json").read_text())
    return {"packed": run.get("packed"), "qat": {k: run["qat"][k] for k in ("steps", "best", "metric")}} | found


def curvature(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    teacher = load(options.teacher)
    pair = Pair(load(folder), teacher)
    batches = batches_of(teacher, options.teacher, options.data, 16 * options.hessians, 16)
    model = trainable(pair.student)
    losses = [prediction_loss_of(model, teacher, batch) for batch in batches]
    parameters = parameters_of(model)
    spectra, trace = [], None
    for loss in losses:
        hessian = Hessian(loss, parameters)
        spectra.append(top_eigenvalues(hessian, 1))
        trace = trace or trace_of(hessian, 3)
    steps = torch.linspace(-0.5, 0.5, options.grid).tolist()
    surface = [surface_row(losses[:1], parameters, b, steps) for b in steps]
    return {"spectra": spectra, "trace": trace, "surface": {"steps": steps, "loss": surface}}


def nuclear(path: str | Path, data: str) -> dict[str, Any]:
    """Of a ViT and its w4a8 and untrained ternary students, by block."""
    teacher = load(path)
    batches = batches_of(teacher, path, data, 128, 32)
    found = {}
    for recipe in ("w4a8", "ternary-2-2-8"):
        student = copy.deepcopy(teacher)
        simulate(student, recipe, batches[0])
        calibrate(student, batches)
        found[recipe] = nuclear_norms(Pair(student, load(path)), batches)
    return found


def keep(path: Path, known: dict[str, Any], section: str, name: str, make: Any) -> None:
    """Do a part that is not in the file, and write the file anew."""
    if name in known.setdefault(section, {}):
        return
    known[section][name] = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_suffix(".writing")
    writing.write_text(json.dumps(known, indent=1) + "\n")
    os.replace(writing, path)
    print(f"{section} of {name}: done", file=sys.stderr, flush=True)


def tables(known: dict[str, Any]) -> str:
    """What the docs show."""
    lines = [
        "| student | accuracy | cover length ratio (floor) | ranking loss | KL | SA-GEN | SA-PROP | error, last block |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]

    def mean(found: Any, key: str, kind: str | None = None) -> float:
        return fmean(v for a in found["attentions"] for v in (a[key] if kind is None else a[key][kind]))

    for name, found in known["recovery"].items():
        floor = mean(found, "cover_floor")
        cells = [f"{100 * found['packed']['accuracy']:.1f}", f"{mean(found, 'cover'):.3f} ({floor:.3f})"]
        cells += [f"{mean(found, 'ranking_sum'):.2f}", f"{mean(found, 'divergence'):.3f}"]
        cells += [f"{mean(found, 'gen', 'all'):.4f}", f"{mean(found, 'prop', 'all'):.3f}"]
        cells += [f"{found['depth']['plain'][-1]:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    kinds = list(next(iter(known["recovery"].values()))["attentions"][0]["gen"])
    for key, title in (("gen", "SA-GEN"), ("prop", "SA-PROP")):
        lines += ["", f"| {title} distance | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
        lines += [
            f"| {name} | {' | '.join(f'{mean(found, key, kind):.4f}' for kind in kinds)} |"
            for name, found in known["recovery"].items()
        ]
    if known.get("curvature"):
        lines += [
            "",
            "| student | largest eigenvalues, by mini-batch | trace | loss at the middle; at ±0.5 (mean of edge) |",
        ]
        lines += ["|---|---|---|---|"]
        for name, found in known["curvature"].items():
            values = ", ".join(f"{s[0]:.0f}" for s in found["spectra"])
            grid = found["surface"]["loss"]
            edge = [*grid[0], *grid[-1], *(row[i] for row in grid[1:-1] for i in (0, -1))]
            middle = grid[len(grid) // 2][len(grid) // 2]
            lines.append(
                f"| {name} | {values} | {found['trace'][0]:.0f} ± {found['trace'][1]:.0f} | {middle:.3f}; "
                f"{fmean(edge):.3f} |"
            )
    if known.get("tasks"):
        lines += ["", "| task | smallest and largest unit of Y by layer, mean over tokens |", "|---|---|"]
        for name, found in known["tasks"].items():
            sides = list(zip(list(found.values())[::2], list(found.values())[1::2], strict=True))
            lines.append(f"| {name} | {', '.join(f'{low:.1f} … {high:.1f}' for low, high in sides)} |")
    for model, recipes in known.get("nuclear", {}).items():
        for recipe, found in recipes.items():
            lines += ["", f"| {model}, {recipe}, by block | teacher | student |", "|---|---|---|"]
            for what, both in found.items():
                cells = (", ".join(f"{v:.1f}" for v in both[who]) for who in ("teacher", "student"))
                lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(known: dict[str, Any], folder: Path) -> None:
    """The plots that the docs show: cover length and ranking loss by head of each student, errors by depth, the range
    of Y by layer on each task, loss surfaces."""
    found = known["recovery"]
    for key, title in (("cover", "cover length ratio"), ("ranking_sum", "ranking loss")):
        maps = {name: [a[key] for a in student["attentions"]] for name, student in found.items()}
        for name, rows in maps.items():
            low = min(v for a in found[name]["attentions"] for v in a["cover_floor"]) if key == "cover" else 0.0
            plot = heat_map(rows, title, rows=[f"layer {i}" for i in range(len(rows))], low=low, beside=maps.values())
            file = f"{known['data']}-{title.split()[0]}-{name}"
            write_plot(Figure(file, f"{title.capitalize()}, {name}", "", plot), folder)
    tasks = {}
    for task, units in known.get("tasks", {}).items():
        for side in ("low", "high"):
            tasks[f"{task}, {side}est unit"] = list(enumerate(v for k, v in units.items() if k.endswith(side)))
    if tasks:
        plot = lines(tasks, "attention output", x_name="layer")
        write_plot(Figure(f"{known['data']}-tasks", "Range of the attention output by layer", "", plot), folder)
    curves = {name: list(enumerate(student["depth"]["plain"])) for name, student in found.items()}
    places = next(iter(found.values()))["places"]
    plot = lines(curves, "relative error", labels=places)
    write_plot(Figure(f"{known['data']}-depth", "Error by depth", "", plot), folder)
    surfaces = {name: student["surface"] for name, student in known.get("curvature", {}).items()}
    losses = [around["loss"] for around in surfaces.values()]
    for name, around in surfaces.items():
        plot = surface(around["loss"], "loss, logarithmic", steps=around["steps"], beside=losses)
        write_plot(Figure(f"{known['data']}-surface-{name}", f"Loss surface, {name}", "", plot), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--work", type=Path, help="folder for the students")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--students", nargs="*", default=list(STUDENTS))
    parser.add_argument("--folders", nargs="*", default=[], help="NAME=FOLDER of students that are there already")
    parser.add_argument("--vit", nargs=2, metavar=("MODEL", "IMAGES"), help="nuclear norms of this ViT too")
    parser.add_argument("--task", help="NAME=DATA of another task")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--hessians", type=int, default=4)
    parser.add_argument("--grid", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path, help="print the tables of a file and do nothing else")
    parser.add_argument("--draw", type=Path, help="with --table: also draw its plots into this folder")
    options = parser.parse_args()
    if options.table:
        known = json.loads(options.table.read_text())
        print(tables(known))
        if options.draw:
            draw(known, options.draw)
        return
    torch.set_num_threads(options.threads)
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    known |= {"model": Path(options.teacher).name, "data": Path(options.data).name, "samples": options.samples}
    given = {name: Path(folder) for name, _, folder in (text.partition("=") for text in options.folders)}
    keep(options.out, known, "nuclear", "digits-vit", lambda: nuclear(DIGITS, "digits"))
    if options.vit:
        keep(options.out, known, "nuclear", Path(options.vit[0]).name, lambda: nuclear(*options.vit))
    for name in [*options.students, *given]:
        folder = given.get(name) or train(options, name)
        keep(options.out, known, "recovery", name, lambda folder=folder: recovery(options, folder))
    if options.task:
        name, _, data = options.task.partition("=")
        for task, source in ((Path(options.data).name, options.data), (name, data)):
            path = options.teacher if source == options.data else fine_tuned(options, name, data)

            def ranges(path: Any = path, source: str = source) -> Any:
                both = Pair(load(path), load(path))
                found = compare(both, batches_of(both.teacher, path, source, options.samples, 32))
                return found["extremes"]["teacher"]

            keep(options.out, known, "tasks", task, ranges)
    for name in [*options.students, *given]:
        folder = given.get(name) or train(options, name)
        keep(options.out, known, "curvature", name, lambda folder=folder: curvature(options, folder))


if __name__ == "__main__":
    main()
