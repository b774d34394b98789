"""Fig. 1 of [TI]: a training of its own for each length, with and without intervention, and the ratio of lengths.

    python benchmarks/plateau.py TEACHER DATA --out benchmarks/results/plateau_digits.json --lengths 150 300 600 1200
    python benchmarks/plateau.py --table benchmarks/results/plateau_digits.json --figure docs/figures/plateau.svg

The settings are the paper's: its losses (prediction, hidden, score, output) as fixed sums, for texts with --padded 64
(CoLA) or 128 (RTE), which weighs scores as there, its optimizer, step 1 of 60 steps at every length. The table tells
how many times fewer steps each variant needs to be as near to its teacher, and as accurate, as `plain` is after its
longest training, by interpolation between lengths; and what `plain` still gained by its last lengthening, since the
paper's ratio is that to a baseline on its plateau.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import kd
from ptq_grid import read
from ti import intervention_of

from bittern.analysis.charts import lines
from bittern.analysis.figures import Figure
from bittern.analysis.report import write_plot
from bittern.data.evaluate import LOWER_IS_BETTER
from bittern.options import parse_distill

Curve = list[tuple[int, float]]  # (steps, mean over seeds), by length


def curves(known: dict[str, Any], name: str) -> dict[str, Curve]:
    """Mean over seeds of a figure of the rows, by variant and length."""
    cells: dict[str, dict[int, list[float]]] = {}
    for row in known["rows"]:
        cells.setdefault(row["variant"], {}).setdefault(row["steps"], []).append(row[name])
    return {v: [(n, sum(x) / len(x)) for n, x in sorted(by_length.items())] for v, by_length in cells.items()}


def length_for(curve: Curve, goal: float, sign: int) -> float | None:
    """The least length at which a curve is as good as the goal, between two lengths by their logarithms."""
    if sign * curve[0][1] >= sign * goal:
        return curve[0][0]
    for (a, x), (b, y) in pairwise(curve):
        if sign * y >= sign * goal:
            return a * (b / a) ** ((goal - x) / (y - x))
    return None


def table(path: Path) -> str:
    """Accuracy and divergence by variant and length; then the ratios of lengths."""
    known = read(path)
    sign, unit = (-1, 1) if known["metric"] in LOWER_IS_BETTER else (1, 100)
    shown = {"last": (known["metric"], unit, 2, sign), "divergence": ("divergence", 1, 4, -1)}
    lengths = sorted({row["steps"] for row in known["rows"]})
    seeds = len({row["seed"] for row in known["rows"]})
    teacher = f"{known['metric']} of the teacher: {unit * known['teacher']:.2f}; {seeds} seeds; steps of"
    rows = [f"{teacher} {known['batch_size']}, {known['samples']} samples", ""]
    rows += ["| | variant | " + " | ".join(f"{n} steps" for n in lengths) + " | fewer steps |"]
    rows += ["|---|---|" + "---|" * (len(lengths) + 1)]
    for name, (title, scale, digits, better) in shown.items():
        of = curves(known, name)
        goal = of["plain"][-1][1]
        for variant, curve in of.items():
            values = [_cell(known, variant, n, name, scale, digits) for n in lengths]
            needed = length_for(curve, goal, better)
            ratio = "not reached" if needed is None else f"{of['plain'][-1][0] / needed:.2f} ×"
            rows.append(f"| {title} | {variant} | {' | '.join(values)} | {ratio} |")
    if len(lengths) > 1:
        before, after = (x for _, x in curves(known, "divergence")["plain"][-2:])
        rows += ["", f"`plain`: its last lengthening took {1 - after / before:.0%} off the divergence."]
    return "\n".join(rows)


def _cell(known: dict[str, Any], variant: str, steps: int, name: str, scale: int, digits: int) -> str:
    values = [scale * r[name] for r in known["rows"] if r["variant"] == variant and r["steps"] == steps]
    if not values:
        return ""
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{spread}"


def draw(path: Path, out: Path) -> None:
    """Draw the divergence against the steps of a training, both on logarithmic axes, as OUT's SVG."""
    found = curves(read(path), "divergence")
    lengths = sorted({n for curve in found.values() for n, _ in curve})
    series = {v: [(float(lengths.index(n)), x) for n, x in curve] for v, curve in found.items()}
    labels = [str(n) for n in lengths]
    plot = lines(series, "divergence from the teacher, nats", x_name="steps of a training", labels=labels, log=True)
    write_plot(Figure(out.stem, "divergence by the length of a training", "", plot), out.parent)


def main() -> None:
    options = kd.parse(
        __doc__,
        ["plain", "gradual-60"],
        lengths={"nargs": "+", "type": int, "default": [150, 300, 600, 1200, 2400]},
        distill={"default": "ti"},
        balance={"default": "fixed"},
        padded={"type": int, "default": 0},
        figure={"type": Path, "help": "draw the divergence of --table's file here"},
    )
    if options.table:
        print(table(options.table))
        if options.figure:
            draw(options.table, options.figure)
        return
    distill = parse_distill(options.distill, balance=options.balance, padded=options.padded)
    for steps in options.lengths:
        options.steps = steps
        kd.run(options, lambda variant, seed: (distill, intervention_of(variant, seed)), steps=steps)


if __name__ == "__main__":
    main()
