"""Write the tables of docs/results.md from benchmarks/results/*.json, so that text and figures cannot part.

    python scripts/results.py            # `make results`; a test tells when it should have been run

A line `<!-- table: KIND FILE ... -->` says which table follows: KIND is a function below, FILE the name of a JSON file.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import compress  # noqa: E402
import kd  # noqa: E402
import plateau  # noqa: E402
import ptq_grid  # noqa: E402
import ti  # noqa: E402

PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table: (.+) -->\n\n)(?:\|.*\n)*\n*")


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def rows(head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    first, *others = (f"| {' | '.join(map(str, row))} |" for row in [head, *body])
    return "\n".join([first, "|" + "---|" * len(head), *others])


def recipes(name: str) -> str:
    """Each recipe's size and accuracy without search or training, the float model first."""
    known = sorted(load(name)["rows"], key=lambda row: (-row["bits"], row["recipe"] != "w4a8"))
    size, accuracy = known[-1]["file"] * known[-1]["smaller"], known[0]["float"]
    head = ["recipe", "bits per quantized weight", "file, MB", "smaller", "accuracy", "range"]
    body = [
        [r["recipe"], r["bits"], f"{r['file'] / 1e6:.1f}", f"{r['smaller']:.1f}", r["accuracy"], f"{r['spread']:.4f}"]
        for r in known
    ]
    return rows(head, [["float32", 32, f"{size / 1e6:.1f}", "1.0", f"{accuracy:.4f}", ""], *body])


def fidelity(name: str) -> str:
    """Relative error and cosine of the last hidden states, by method and recipe: means, ± half the range over draws."""
    cells: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for r in load(name)["rows"]:
        cells.setdefault((r["method"], r["recipe"]), []).append((r["relative_error"], r["cosine"]))

    def shown(draws: list[tuple[float, float]]) -> str:
        errors, cosines = zip(*draws, strict=True)
        spread = f" ± {(max(errors) - min(errors)) / 2:.3f}" if len(draws) > 1 else ""
        return f"{sum(errors) / len(draws):.3f}{spread} ({sum(cosines) / len(draws):.3f})"

    methods, formats = (list(dict.fromkeys(key)) for key in zip(*cells, strict=True))
    body = [[m, *(shown(cells[m, f]) for f in formats)] for m in methods]
    return rows(["relative error (cosine)", *formats], sorted(body, key=lambda row: row[2]))


def speed(*names: str) -> str:
    """The search against brute force."""
    head = ["images", "ours, s", "brute force, s", "ratio", "objective, ours / brute force"]
    runs = sorted(map(load, names), key=lambda run: run["images"])
    return rows(
        [*head, "three products at GEMM speed, s"],
        [
            [
                r["images"],
                f"{r['seconds_ours']:.2f}",
                f"{r['seconds_brute_force']:.2f}",
                f"**{r['speedup']:.2f}**",
                f"{r['objective_ratio']:.8f}",
                f"{r['roofline_seconds']:.2f}",
            ]
            for r in runs
        ],
    )


def growth(name: str) -> str:
    """Time and memory of the search by images, blocks and width."""
    head = ["images", "blocks", "width", "forward, s", "search, s", "peak memory, MB"]
    return rows(
        head,
        [
            [f"{r['images']:,}", r["layers"], r["width"], r["forward"], r["search"], f"{r['peak_memory'] / 2**20:,.0f}"]
            for r in load(name)
        ],
    )


def errors(name: str) -> str:
    """Relative squared error by depth under each intervention."""
    shown = {"alone": "nothing", "map": "maps (TI-M)", "context": "contexts (TI-C)", "output": "outputs (TI-O)"}
    known = load(name)
    head = ["replaced", "embedding", *range(1, len(known["alone"]))]
    return rows([*map(str, head)], [[text, *(f"{x:.2f}" for x in known[key])] for key, text in shown.items()])


def schedules(*names: str) -> str:
    """The last accuracy by schedule of intervention, a row for each file."""
    found = []
    for known in map(load, names):
        unit = 1 if known["metric"] == "perplexity" else 100
        cells: dict[str, list[float]] = {}
        for row in known["rows"]:
            cells.setdefault(row["variant"].partition("-")[0], []).append(unit * row["last"])
        texts = {v: f"{sum(x) / len(x):.2f} ± {(max(x) - min(x)) / 2:.2f}" for v, x in cells.items()}
        found.append(
            [
                f"{known['model']}, {known['metric']}",
                known["steps"],
                *(texts.get(v, "") for v in ("plain", "gradual", "output")),
            ]
        )
    return rows(["model", "steps", "plain", "gradual", "output"], found)


def depth(*names: str) -> str:
    """The last divergence by loss, a row for each file: teachers that differ in depth."""
    found = []
    for known in map(load, names):
        cells: dict[str, list[float]] = {}
        for row in known["rows"]:
            cells.setdefault(row["variant"], []).append(row["divergence"])
        texts = {v: f"{sum(x) / len(x):.4f} ± {(max(x) - min(x)) / 2:.4f}" for v, x in cells.items()}
        found.append([known["model"], f"{100 * known['teacher']:.2f}", *texts.values()])
    return rows(["model", "teacher's accuracy", *texts], found)


def overhead(one: str, two: str) -> str:
    """The time of a simulated forward beside the float model's, with one thread and with two."""
    shown = {
        "eager": "float, explicit attention of the family (the limit)",
        "sites": "float, Bittern's attention, nothing recorded",
        "w8a8": "w8a8, static",
        "w4a8": "w4a8, static",
        "ternary-2-2-8": "ternary-2-2-8, dynamic",
    }
    models = [run[name] for run in map(load, (one, two)) for name in run if name.startswith(("BERT", "ViT"))]
    head = ["forward time / float", "BERT-base, 8 × 128", "ViT-B/16, 4 × 197", "2 threads, busy: BERT", "ViT"]
    return rows(head, [[text, *(f"{model[key]:.2f}" for model in models)] for key, text in shown.items()])


KINDS: dict[str, Callable[..., str]] = {
    "recipes": recipes,
    "compress": lambda name: compress.table(RESULTS / f"{name}.json"),
    "ptq": lambda name: ptq_grid.table(RESULTS / f"{name}.json"),
    "kd": lambda name: kd.table(RESULTS / f"{name}.json"),
    "course": lambda name, *steps: kd.course(RESULTS / f"{name}.json", *map(int, steps)),
    "ti": lambda name: ti.table(RESULTS / f"{name}.json"),
    "plateau": lambda name: plateau.table(RESULTS / f"{name}.json"),
    "fidelity": fidelity,
    "speed": speed,
    "growth": growth,
    "errors": errors,
    "depth": depth,
    "schedules": schedules,
    "overhead": overhead,
}


def filled(page: str) -> str:
    """Return the page with each marked table made anew."""

    def made(found: re.Match[str]) -> str:
        kind, *names = found[2].split()
        lines = [line for line in KINDS[kind](*names).splitlines() if line.startswith("|")]
        return found[1] + "\n".join(lines) + "\n\n"

    return MARKED.sub(made, page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
