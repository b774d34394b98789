"""The parity table: each family by three recipes, float against simulated, packed and ONNX.

    python benchmarks/parity.py --minilm MODEL --sst2 DATA --out benchmarks/results/parity.json

Real models: MiniLM-L6 fine-tuned on SST-2 (--minilm, --sst2; left out without them) and the ViT of
`bittern demo digits`. The other families have random weights of a small size: their differences and sizes are real,
their accuracy does not exist, and agreement of their made-up classes is not a measure of quality. Nothing is trained,
so ternary rows show what the formats cost before training.
quality: accuracy where there are labels, else agreement with the float model (of classes or tokens). error, largest: of
the outputs from the simulated model's, relative in the 2-norm, and of one output. speed: of one sample on one thread,
packed in PyTorch × float in PyTorch, ONNX × float ONNX, medians of one alternating run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bittern import calibrate, load, pack, save, simulate
from bittern.data import load_splits, task_of
from bittern.demo import DIGITS
from bittern.deploy.bench import alternate, ratios
from bittern.deploy.onnx.export import export
from bittern.deploy.onnx.parity import Outputs, complete, made_up, run_file, run_model, session
from bittern.errors import BitternError

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from families import SUPPORTED

RECIPES = ("w8a8", "w4a8", "ternary-2-2-8")
FAMILIES = ("bert", "roberta", "vit", "deit", "dinov2", "detr", "gpt2")
Batches = list[dict[str, Tensor]]


def subjects(minilm: Path | None, sst2: str | None) -> Iterator[tuple[str, Path | None, str | None]]:
    """Name, folder (None: made in place) and data of each model."""
    if minilm and sst2:
        yield "MiniLM-L6, SST-2", minilm, sst2
    yield "ViT, digits", DIGITS, "digits"
    for family in FAMILIES:
        yield f"{family} (random)", None, None


def samples(
    model: PreTrainedModel, folder: Path, data: str | None, most: int
) -> tuple[Batches, Batches, Tensor | None]:
    """Calibration batches, test batches and the labels of these."""
    if data is None:
        return [made_up(model, 32, seed=1)], [made_up(model, 32, 12, seed=i) for i in (2, 3)], None
    train, test = load_splits(data, model, folder)
    assert train is not None
    assert test is not None
    test = test.subset(most)
    calibration = [complete(model, b) for b in train.subset(128)]
    return calibration, [complete(model, b) for b in test], test.labels if task_of(model) == "classes" else None


def quality(outputs: Outputs, reference: Outputs, labels: Tensor | None) -> float | None:
    """Accuracy, or agreement with the reference where there are no labels; None without classes."""
    if "logits" not in outputs:
        return None
    chosen, wanted = (torch.cat([t.argmax(-1).flatten() for t in o["logits"]]) for o in (outputs, reference))
    return (chosen == (wanted if labels is None else labels)).float().mean().item()


def difference(outputs: Outputs, simulated: Outputs) -> dict[str, float]:
    a, b = (torch.cat([t.flatten() for part in o.values() for t in part]).double() for o in (outputs, simulated))
    return {"error": ((a - b).norm() / b.norm()).item(), "largest": (a - b).abs().max().item()}


def study(name: str, folder: Path | None, data: str | None, most: int, rounds: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if folder is None:
            save(SUPPORTED[name.partition(" ")[0]]()[0], work / "float")
        folder = folder or work / "float"
        models = {"float": load(folder)}
        calibration, test, labels = samples(models["float"], folder, data, most)
        reference = run_model(models["float"], test)
        files = {"float": work / "float.onnx"}
        float_bytes = export(folder, files["float"], samples=16)["bytes"]
        score = quality(reference, reference, labels)
        rows: list[dict[str, Any]] = [{"model": name, "recipe": "float", "float": score, "onnx_bytes": float_bytes}]
        for recipe in RECIPES:
            model = load(folder)
            simulate(model, recipe, test[0])
            calibrate(model, calibration)
            simulated = run_model(model, test)
            save(pack(model), work / recipe)
            models[recipe], files[recipe] = load(work / recipe), work / f"{recipe}.onnx"
            found = {"packed": run_model(models[recipe], test)}
            onnx_bytes = export(work / recipe, files[recipe], samples=16)["bytes"]
            found["onnx"] = run_file(files[recipe], list(simulated), test)
            rows.append(
                {
                    "model": name,
                    "recipe": recipe,
                    "simulated": quality(simulated, reference, labels),
                    **{kind: quality(outputs, reference, labels) for kind, outputs in found.items()},
                    **{f"{kind}_difference": difference(outputs, simulated) for kind, outputs in found.items()},
                    "packed_bytes": (work / recipe / "model.safetensors").stat().st_size,
                    "onnx_bytes": onnx_bytes,
                }
            )
        yield from (row | speeds for row, speeds in zip(rows, measure(models, files, test[0], rounds), strict=True))


@torch.no_grad()
def measure(
    models: Mapping[str, PreTrainedModel], files: Mapping[str, Path], batch: Mapping[str, Tensor], rounds: int
) -> Iterator[dict[str, float]]:
    one = {key: values[:1] for key, values in batch.items()}
    feed = {key: values.numpy() for key, values in one.items()}
    calls = {("packed", recipe): (lambda m=model: m(**one)) for recipe, model in models.items()}
    for recipe, file in files.items():
        running = session(file, 1)
        calls["onnx", recipe] = lambda s=running: s.run(None, feed)
    times = alternate(calls, rounds)
    slower = {kind: ratios(times, (kind, "float")) for kind in ("packed", "onnx")}
    for recipe in models:
        yield {f"{kind}_speed": 1 / slower[kind][kind, recipe] for kind in slower}


def table(rows: list[dict[str, Any]]) -> str:
    heads = (
        "model",
        "recipe",
        "quality: simulated",
        "packed",
        "ONNX",
        "largest difference: packed",
        "ONNX",
        "error: ONNX",
        "kB: packed",
        "ONNX",
        "speed: packed",
        "ONNX",
    )
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    for row in rows:
        if row["recipe"] == "float":
            score = number(row["float"])
            cells = ["float", score, score, score, "", "", "", "", f"{row['onnx_bytes'] / 1e3:,.0f}", "1.00", "1.00"]
        else:
            packed, file = row["packed_difference"], row["onnx_difference"]
            largest = packed["largest"]
            cells = [
                row["recipe"],
                *(number(row[kind]) for kind in ("simulated", "packed", "onnx")),
                f"{largest:{'.3f' if largest >= 1e-3 else '.1g'}}",
                f"{file['largest']:.3f}",
                f"{file['error']:.4f}",
                *(f"{row[kind] / 1e3:,.0f}" for kind in ("packed_bytes", "onnx_bytes")),
                *(f"{row[kind]:.2f}" for kind in ("packed_speed", "onnx_speed")),
            ]
        lines.append("| " + " | ".join([row["model"], *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--sst2")
    parser.add_argument("--samples", type=int, default=400, help="test samples of the real models")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, folder, data in subjects(options.minilm, options.sst2):
        try:
            rows += study(name, folder, data, options.samples, options.rounds)
        except BitternError as error:
            raise SystemExit(f"{name}: {error}") from error
        print(f"{name} is done", file=sys.stderr, flush=True)
        if options.out:  # after each model, so that an interrupted run leaves what it has
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
