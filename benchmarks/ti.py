"""What Teacher Intervention is worth: ternary students at equal total steps, a resumable grid over schedules and seeds.

    python benchmarks/ti.py TEACHER DATA --out benchmarks/results/ti_sst2.json
    python benchmarks/ti.py TEACHER DATA --out FILE --variants plain gradual-15 gradual-60 --seeds 0 1 2
    python benchmarks/ti.py --table benchmarks/results/ti_sst2.json
    python benchmarks/ti.py TEACHER DATA --errors --out benchmarks/results/ti_errors.json

Variants are `plain` (no intervention) and SCHEDULE-STEPS, such as `gradual-30`; `part-map-30` quantizes in those steps
what the paper trains. All learn what --distill says (TernaryBERT's losses by default). The table tells at which step
the mean over seeds first reached what plain had at its end. --errors measures, before any training, how far each
block's output is from the teacher's, with and without intervention.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import kd
import torch
from ptq_grid import read

from bittern import load, simulate
from bittern.attention import recording
from bittern.data import load_data
from bittern.data.evaluate import LOWER_IS_BETTER
from bittern.options import SIGNALS, Act, Intervention, parse_distill
from bittern.qat.distill import Distiller

VARIANTS = ["plain", "output-30", "context-30", "map-30", "gradual-30", "inverted-30", "stochastic-30", "fade-30"]


def intervention_of(variant: str, seed: int) -> Intervention | None:
    if variant == "plain":
        return None
    *scope, schedule, steps = variant.split("-")
    return Intervention(schedule, int(steps), "part" if scope == ["part"] else "all", seed)


def table(path: Path) -> str:
    """Means over seeds: accuracy and divergence at the end, and when they first were as good as plain at its end."""
    known = read(path)
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in known["rows"]:
        rows.setdefault(row["variant"], []).append(row)
    curves = {v: [_mean(rows[v], name) for name in ("curve", "divergence_curve")] for v in rows}
    sign, unit = (-1, 1) if known["metric"] in LOWER_IS_BETTER else (1, 100)
    accuracy, divergence = (curve[-1][1] for curve in curves["plain"])
    lines = [
        kd.title(known),
        "",
        f"| variant | seeds | {known['metric']} at the end | divergence | steps to plain's | … divergence |",
        "|---|---|---|---|---|---|",
    ]
    for variant, (a, d) in curves.items():
        values = [unit * row["last"] for row in rows[variant]]
        first = next((s for s, x in a if sign * x >= sign * accuracy), None)
        steps = [first, next((s for s, x in d if x <= divergence), None)]
        reached = " | ".join("not reached" if s is None else str(s) for s in steps)
        spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
        lines.append(f"| {variant} | {len(values)} | {unit * a[-1][1]:.2f}{spread} | {d[-1][1]:.3f} | {reached} |")
    return "\n".join(lines)


def _mean(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    points = zip(*(row[name] for row in rows), strict=True)
    return [(p[0][0], sum(x for _, x in p) / len(p)) for p in points]


@torch.no_grad()
def errors(options: Any) -> dict[str, list[float]]:
    """Relative squared error of each block's output against the teacher's, by depth, under each intervention."""
    torch.set_num_threads(options.threads)
    teacher = load(options.teacher)
    student = copy.deepcopy(teacher)
    simulate(student, options.recipe)
    data = load_data(options.data, teacher, options.teacher, split="test", max_length=options.max_length)
    assert data is not None
    batch = next(iter(data.subset(128)))
    batch.pop("labels", None)
    distiller = Distiller(parse_distill("hidden"), student, teacher, Intervention())
    with recording(teacher, "embedding", "hidden", *SIGNALS) as theirs:
        teacher(**batch)
    found: dict[str, list[float]] = {}
    for mode in (None, *SIGNALS):
        if mode:
            distiller.intervener.begin(Act(mode), theirs, "all", batch)
        with recording(student, "embedding", "hidden") as mine:
            student(**batch)
        distiller.release()
        pairs = zip(mine["embedding"] + mine["hidden"], theirs["embedding"] + theirs["hidden"], strict=True)
        real = batch["attention_mask"].bool() if "attention_mask" in batch else slice(None)
        found[mode or "alone"] = [
            round(float((a - b)[real].square().sum() / b[real].square().sum()), 5) for a, b in pairs
        ]
    return found


def main() -> None:
    options = kd.parse(
        __doc__,
        VARIANTS,
        distill={"default": "ternarybert"},
        balance={"default": "fixed"},
        errors={"action": "store_true"},
    )
    if options.table:
        print(table(options.table))
    elif options.errors:
        found = errors(options)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found))
    else:
        distill = parse_distill(options.distill, balance=options.balance)
        kd.run(options, lambda variant, seed: (distill, intervention_of(variant, seed)))


if __name__ == "__main__":
    main()
