"""Methods × formats × calibration draws on one model and its test data: a resumable grid, and its table.

    python benchmarks/ptq_grid.py runs/cifar-vit-s14 DATA --out benchmarks/results/ptq_cifar10.json
    python benchmarks/ptq_grid.py MODEL DATA --out FILE --methods bittern vt --recipes w4a4 --seeds 0 1 2
    python benchmarks/ptq_grid.py --table benchmarks/results/ptq_cifar10.json

Each cell is written as soon as it is measured, and cells that are there are not run again; two processes may share a
file. A recipe such as `w6a6@6` is mixed precision with a target of 6 bits a weight (candidates 4 to 8).
What is measured is the packed model, on the kernels where they serve its formats.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bittern import load, pack
from bittern.data import Data, load_data
from bittern.data.evaluate import metrics, predict
from bittern.ptq import METHODS, Mixed, quantize

RECIPES = ["w8a8", "w6a6", "w4a8", "w4a4"]
SHOWN = ("AP", "accuracy", "similarity")
HEADLINE = {"AP": "AP", "accuracy": "top-1", "similarity": "rank correlation"}


def mixed_of(recipe: str) -> tuple[str, Mixed | None]:
    name, _, target = recipe.partition("@")
    if not target:
        return name, None
    return name, Mixed(int(target), tuple(range(int(target) - 2, int(target) + 3)))


def cell(model_path: str, train: Data, test: Data, reference: Any, options: Any, key: dict[str, Any]) -> dict[str, Any]:
    """One method on one recipe with one draw of calibration samples."""
    model = load(model_path)
    recipe, mixed = mixed_of(key["recipe"])
    calibration = train.subset(options.samples, key["seed"])
    start = time.perf_counter()
    result = quantize(model, recipe, calibration, method=key["method"], mixed=mixed, seed=key["seed"])
    seconds = time.perf_counter() - start
    pack(model)
    found = metrics(model, test, predict(model, test), reference)
    losses = [s.after for s in result.solved]
    return (
        key
        | {name: round(value, 5) for name, value in found.items()}
        | {
            "seconds": round(seconds, 1),
            "output_error": float(f"{statistics.mean(losses):.3e}"),
            "folded": sum(s.folded for s in result.solved),
            "peak_memory": result.peak_memory,
        }
        | ({"bits": result.bits} if mixed else {})
    )


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"rows": []}


def refuse_others(path: Path, head: dict[str, Any]) -> None:
    """End with a line if a file holds runs of another model, or by other settings: such are not to be mixed."""
    known = read(path)
    names = sorted((known.keys() | head.keys()) - {"rows", "float"})
    others = [f"{name} {known.get(name)}, not {head.get(name)}" for name in names if known.get(name) != head.get(name)]
    if known["rows"] and others:
        sys.exit(f"{path} holds other runs: {'; '.join(others)}. Choose another --out")


def add(path: Path, head: dict[str, Any], row: dict[str, Any]) -> None:
    """Append a row, whoever else writes to the same file."""
    with (Path(tempfile.gettempdir()) / f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = head | {"rows": [*read(path)["rows"], row]}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(known, indent=1) + "\n")
        temporary.rename(path)


def table(path: Path) -> str:
    """Mean over draws, and half the range, by method and recipe."""
    known = read(path)
    cells: dict[tuple[str, str], list[float]] = {}
    metric = next(m for m in SHOWN if m in known["rows"][0])
    for row in known["rows"]:
        cells.setdefault((row["method"], row["recipe"]), []).append(row[metric])
    recipes = list(dict.fromkeys(recipe for _, recipe in cells))
    scale = 100 if metric != "similarity" else 1
    titles = [f"mixed, {r.partition('@')[2]} bits" if "@" in r else r for r in recipes]
    lines = [f"| {HEADLINE[metric]} | " + " | ".join(titles) + " |", "|---|" + "---|" * len(recipes)]
    for method in (m for m in reversed(METHODS) if any(m == name for name, _ in cells)):
        texts = []
        for recipe in recipes:
            values = [scale * v for v in cells.get((method, recipe), [])]
            spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
            texts.append(f"{statistics.mean(values):.2f}{spread}" if values else "")
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    return "\n".join([f"float: {scale * known['float'][metric]:.2f}", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--test", type=int, help="measure on this many test samples, drawn with seed 0; all by default")
    parser.add_argument("--batch-size", type=int, default=50, help="of calibration; tests take four times as many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path, help="print the table of a file and do nothing else")
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
        return
    torch.set_num_threads(options.threads)
    model = load(options.model)
    train, test = (
        load_data(options.data, model, options.model, split=split, batch_size=size)
        for split, size in (("train", options.batch_size), ("test", 4 * options.batch_size))
    )
    if train is None or test is None:
        parser.error(f"{options.data} needs a train and a test split")
    if options.test:
        test = test.subset(options.test)
    reference = predict(model, test)
    head = {
        "model": Path(options.model).name,
        "samples": options.samples,
        "test": len(test),
        "measured": "packed",
        "float": {k: round(v, 5) for k, v in metrics(model, test, reference, reference).items()},
    }
    refuse_others(options.out, head)
    print(json.dumps(head["float"]), flush=True)
    for seed in options.seeds:
        for recipe in options.recipes:
            for method in options.methods:
                key = {"method": method, "recipe": recipe, "seed": seed}
                if any(key.items() <= row.items() for row in read(options.out)["rows"]):
                    continue
                row = cell(options.model, train, test, reference, options, key)
                add(options.out, head, row)
                print(json.dumps(row), flush=True, file=sys.stderr)


if __name__ == "__main__":
    main()
