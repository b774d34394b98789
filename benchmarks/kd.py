"""What the terms of distillation are worth: ternary students at equal steps, a resumable grid over losses and seeds.

    python benchmarks/kd.py TEACHER DATA --out benchmarks/results/kd_sst2.json
    python benchmarks/kd.py TEACHER DATA --out FILE --variants ternarybert unified --seeds 0 1 2
    python benchmarks/kd.py --table benchmarks/results/kd_sst2.json

Variants are the papers' with fixed weights (`ternarybert`, `map`, `output`, `gamma-0.3`: 0.3 map + 0.7 output), the
same with automatic balance (`auto-unified`), one layer (`layer-2`) and map temperatures (`tau-4`). Each is trained on
the same random part of the training data (--samples, drawn with seed 0) for the same number of steps, and measured on
the test data, all of it or --test-samples. `best` of the evaluations in a run and `last` are kept, and how far the last
predictions are from the teacher's. Cells that are there are not run again; one that was stopped goes on from its last
evaluation, by its checkpoints in a folder beside FILE.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from ptq_grid import add, read, refuse_others

from bittern import load, simulate
from bittern.data import load_splits
from bittern.data.evaluate import LOWER_IS_BETTER, headline, metrics, predict
from bittern.options import Distill, Intervention, Optimizer, Training, parse_distill
from bittern.qat.training import train

VARIANTS = [
    "none",
    "prediction",
    "hidden",
    "ternarybert",
    "map",
    "output",
    "auto-unified",
    "gamma-0.1",
    "gamma-0.3",
    "gamma-0.5",
    "gamma-0.7",
    "gamma-0.9",
    "auto-map",
    "auto-output",
    "auto-ternarybert",
]


def distill_of(variant: str) -> Distill:
    kind, _, value = variant.partition("-")
    match kind:
        case "hidden":
            return parse_distill("prediction,hidden", balance="fixed")
        case "gamma":
            gamma = float(value)
            return parse_distill(f"prediction,hidden,map={gamma},output={1 - gamma:g}", balance="fixed")
        case "tau":
            return parse_distill("map", balance="fixed", map_temperature=float(value))
        case "layer":
            return parse_distill("map", balance="fixed", layers=(int(value),))
        case "auto":
            return parse_distill(value, balance="auto")
    return parse_distill(variant, balance="fixed")


def divergence(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean KL(teacher ‖ student) of the predictions, in nats: less noisy than the accuracy on a small test set.

    Of language models its estimate on the test data: by how much the real tokens are less likely.
    """
    if logits.dim() == 3:
        return float((logits - reference)[..., 0].mean())
    student, teacher = (x.float().log_softmax(-1) for x in (logits, reference))
    return float((teacher.exp() * (teacher - student)).sum(-1).mean())


Method = tuple[Distill, Intervention | None]


def cell(
    options: argparse.Namespace, key: dict[str, Any], method: Method, parts: Any, reference: torch.Tensor, folder: Path
) -> dict[str, Any]:
    teacher = load(options.teacher)
    student = copy.deepcopy(teacher)
    simulate(student, options.recipe)
    data, test = parts
    training = Training(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=key["lr"],
        optimizer=options.optimizer,
        seed=key["seed"],
        evaluations=options.evaluations,
        metric=options.metric,
        arguments={"bf16": True} if options.bf16 else {},
    )
    distill, intervention = method

    def measure() -> dict[str, float]:
        output = predict(student, test)
        return metrics(student, test, output, reference) | {"divergence": divergence(output, reference)}

    needed = teacher if distill.needs_teacher or intervention else None
    done = train(student, needed, data, measure, distill, training, folder, intervention=intervention, resume=True)
    curve, fidelity = (
        [(e["step"], round(e[f"eval_{name}"], 5)) for e in done.history if f"eval_{name}" in e]
        for name in (done.metric, "divergence")
    )
    losses = next(e for e in reversed(done.history) if "loss" in e)
    return key | {
        "best": round(done.best, 5),
        "last": curve[-1][1],
        "best_step": done.best_step,
        "curve": curve,
        "divergence": fidelity[-1][1],
        "divergence_curve": fidelity,
        "losses": {k: float(f"{v:.4g}") for k, v in losses.items() if k.startswith("loss_")},
        "seconds": round(done.seconds, 1),
    }


def title(known: dict[str, Any]) -> str:
    unit = 1 if known["metric"] in LOWER_IS_BETTER else 100
    teacher = f"{known['metric']} of the teacher: {unit * known['teacher']:.2f}"
    return f"{teacher}; {known['steps']} steps of {known['batch_size']}"


def table(path: Path) -> str:
    """Mean ± half the range over seeds, best and last, by variant."""
    known = read(path)
    unit = 1 if known["metric"] in LOWER_IS_BETTER else 100
    lines = [title(known), ""]
    lines += ["| variant | lr | seeds | best | last | divergence |", "|---|---|---|---|---|---|"]
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in known["rows"]:
        cells.setdefault((row["variant"], row["lr"]), []).append(row)
    for (variant, lr), rows in cells.items():
        texts = []
        for name in ("best", "last", "divergence"):
            scale, digits = (1, 3) if name == "divergence" else (unit, 2)
            values = [scale * row[name] for row in rows]
            spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
            texts.append(f"{sum(values) / len(values):.{digits}f}{spread}")
        lines.append(f"| {variant} | {lr:g} | {len(rows)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def course(path: Path, *lengths: int) -> str:
    """Metric and divergence as they were measured during each training of a file, or those of so many steps."""
    known = read(path)
    unit = 1 if known["metric"] in LOWER_IS_BETTER else 100
    trainings = [row for row in known["rows"] if not lengths or row["curve"][-1][0] in lengths]
    steps = sorted({step for row in trainings for step, _ in row["curve"]})
    lines = [f"| variant | seed | steps | {' | '.join(map(str, steps))} |", "|---|---|---|" + "---|" * len(steps)]
    for row in trainings:
        values = {step: f"{unit * value:.2f}" for step, value in row["curve"]}
        errors = {step: f"{value:.3f}" for step, value in row["divergence_curve"]}
        for name, cells in ((known["metric"], values), ("divergence", errors)):
            shown = " | ".join(cells.get(step, "") for step in steps)
            lines.append(f"| {row['variant']} | {row['seed']} | {name} | {shown} |")
    return "\n".join(lines)


def parse(doc: str | None, variants: list[str], **more: dict[str, Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--variants", nargs="+", default=variants)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-4])
    parser.add_argument("--recipe", default="ternary")
    parser.add_argument("--samples", type=int, default=16_000)
    parser.add_argument("--test-samples", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text, or of a pair of them")
    parser.add_argument("--evaluations", type=int, default=5)
    parser.add_argument("--optimizer", choices=get_args(Optimizer), default="adamw")
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast; measured in float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path, help="print the table of a file and do nothing else")
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    return parser.parse_args()


def run(options: argparse.Namespace, method_of: Callable[[str, int], Method], **more: Any) -> None:
    """Run the cells of a grid that are missing. method_of: what a variant and seed stand for; more: names cells too."""
    for variant in options.variants:
        method_of(variant, 0)  # a wrong name fails here, before anything is loaded
    torch.set_num_threads(options.threads)
    teacher = load(options.teacher)
    data, test = load_splits(options.data, teacher, options.teacher, max_length=options.max_length)
    if data is None or test is None:
        sys.exit(f"{options.data} needs a train and a test split")
    data, test = data.subset(options.samples), test.subset(options.test_samples)
    reference = predict(teacher, test)
    found = metrics(teacher, test, reference, reference)
    options.metric = headline(options.data, found)
    head = {
        "model": Path(options.teacher).name,
        "data": Path(options.data).name,
        "samples": len(data),
        "test": len(test),
        "recipe": Path(options.recipe).stem,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "metric": options.metric,
        "teacher": round(found[options.metric], 5),
        **({"max_length": options.max_length} if options.max_length != 64 else {}),
        **({"bf16": True} if options.bf16 else {}),
        **({"optimizer": options.optimizer} if options.optimizer != "adamw" else {}),
        **({"distill": options.distill, "balance": options.balance} if "distill" in options else {}),
        **({"padded": options.padded} if getattr(options, "padded", 0) else {}),
    }
    head = {name: value for name, value in head.items() if name not in more}
    refuse_others(options.out, head)
    for seed in options.seeds:
        for lr in options.lr:
            for variant in options.variants:
                key = {"variant": variant, "lr": lr, "seed": seed} | more
                if any(key.items() <= row.items() for row in read(options.out)["rows"]):
                    continue
                settings = Path(options.recipe).stem, options.steps, options.batch_size, *key.values()
                folder = options.out.with_suffix("") / "-".join(map(str, settings))
                row = cell(options, key, method_of(variant, seed), (data, test), reference, folder)
                add(options.out, head, row)
                shutil.rmtree(folder)  # not before the row is written
                print(json.dumps({k: v for k, v in row.items() if k != "losses"}), flush=True, file=sys.stderr)


def main() -> None:
    options = parse(__doc__, VARIANTS)
    if options.table:
        print(table(options.table))
    else:
        run(options, lambda variant, _: (distill_of(variant), None))


if __name__ == "__main__":
    main()
