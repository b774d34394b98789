"""What `bittern compress` chooses for limits on the loss, and how often the limit held on data that had no part in it.

    python benchmarks/compress.py digits models/digits-vit/float digits --out benchmarks/results/compress.json
    python benchmarks/compress.py minilm-sst2 MINILM_SST2 SST2 --out benchmarks/results/compress.json
    python benchmarks/compress.py minilm-r8 runs/minilm-r8 runs/minilm-r8/data --max-length 64 \\
        --out benchmarks/results/compress.json
    python benchmarks/compress.py cifar-vit runs/cifar-vit-s14 CIFAR10 --out benchmarks/results/compress.json
    python benchmarks/compress.py detr runs/detr-fashion runs/fashion-scenes --out benchmarks/results/compress.json
    python benchmarks/compress.py --table benchmarks/results/compress.json

The goal is the smallest file. A third of the test data is held out from `compress`, which chooses by the rest: a draw
decides which, and which samples calibrate. What was written is measured on the third. Each cell, a model with a limit
and a draw, is written once it is measured, and cells that are there are not run again; rungs are kept in `--runs`, so
that three limits cost one climb. Two processes may share a file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from ptq_grid import add, read

from bittern import compress, load
from bittern.data import Data
from bittern.data.evaluate import predict
from bittern.errors import InputError
from bittern.jobs import load_parts
from bittern.ladder import Row, paired_loss


def cell(options: argparse.Namespace, seed: int, limit: float) -> dict[str, Any]:
    """One call of `compress`, and what its choice loses on data held out from it; `chosen` is None if it made none."""
    seen: list[Row] = []
    held: list[Data] = []

    def all_but_a_third(*args: Any, **columns: Any) -> tuple[Data, Data]:
        train, test = load_parts(*args, **columns)
        assert test is not None
        rest, third = test.split(len(test) // 3, 1000 + seed)
        held.append(third)
        return train, rest

    out = options.runs / f"{options.name}-{seed}"
    try:
        with patch("bittern.ladder.load_parts", all_but_a_third):
            found = compress(
                options.model,
                out,
                data=options.data,
                max_loss=limit,
                goal="size",
                train_minutes=options.train,
                samples=options.samples,
                seed=seed,
                force=True,
                on_rung=seen.append,
                batch_size=options.batch_size,
                **({"max_length": options.max_length} if options.max_length else {}),
            )
    except InputError as error:
        if not seen:
            raise
        return {"chosen": None, "why": str(error), "tried": [row["rung"] for row in seen]}
    chosen = next(row for row in seen if row["rung"] == found["chosen"])
    shown = {name: chosen[name] for name in ("points", "error", "bits", "file", "smaller", "faster", "kernels")}
    outputs = [predict(load(model), held[0]) for model in (out, options.model)]
    loss = paired_loss(found["metric"], load(out), held[0], *outputs)
    parts = {"other": found["fresh"], "held": loss}
    measured = {f"{part}_{name}": value for part, row in parts.items() for name, value in row.items()}
    head = {name: found[name] for name in ("metric", "float", "chosen", "why")}
    return head | shown | measured | {"tried": [row["rung"] for row in seen]}


def table(path: Path) -> str:
    """By model and limit: what was chosen, how much smaller it is, the losses on held-out data, how often it held."""
    cells: dict[tuple[str, float, float], list[dict[str, Any]]] = {}
    for row in read(path)["rows"]:
        cells.setdefault((row["model"], row["train"], row["limit"]), []).append(row)
    lines = [
        "| model | limit, points | chosen | smaller | lost on held-out data | within the limit | clearly above it |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, train, limit), rows in sorted(cells.items()):
        made = [row for row in rows if row["chosen"]]
        names = [row["chosen"] or "none" for row in rows]
        chosen = ", ".join(f"{name} ×{names.count(name)}" for name in dict.fromkeys(names))
        model += f", {train:g} min of training" if train else ""
        if not made:
            lines.append(f"| {model} | {limit:g} | {chosen} | | | | |")
            continue
        smaller = sum(row["smaller"] for row in made) / len(made)
        lost = [row["held_points"] for row in made]
        held = sum(points <= limit for points in lost)
        above = sum(row["held_at_least"] > limit for row in made)
        lines.append(
            f"| {model} | {limit:g} | {chosen} | {smaller:.1f} | {', '.join(f'{points:.2f}' for points in lost)} | "
            f"{held} of {len(made)} | {above} of {len(made)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="how the table calls the model")
    parser.add_argument("model", nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/compress"), help="where rungs are kept")
    parser.add_argument("--limits", nargs="+", type=float, default=[2.0, 1.0, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train", type=float, default=0.0, help="minutes of training; none by default")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, help="of texts, in tokens; by default the model's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path, help="print the table of a file and do nothing else")
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
        return
    if options.data is None or options.out is None:
        parser.error("give NAME, MODEL, DATA and --out, or --table FILE")
    torch.set_num_threads(options.threads)
    options.runs.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for limit in options.limits:
            key = {"model": options.name, "seed": seed, "limit": limit, "train": options.train}
            if any(key.items() <= row.items() for row in read(options.out)["rows"]):
                continue
            row = key | cell(options, seed, limit)
            add(options.out, {}, row)
            print(json.dumps(row), flush=True, file=sys.stderr)


if __name__ == "__main__":
    main()
