"""What the formats that no recipe uses are worth: `log2`, `twin`, `learned`, `binary` and storage `base3`, each against
what a recipe could say without it. A few minutes on one core.

    python benchmarks/formats.py --text MODEL DATA --out benchmarks/results/formats.json
    python benchmarks/formats.py --table benchmarks/results/formats.json

The digits ViT of the package serves all questions; a text classifier on its validation data, if given, all that need
no training. Only what is asked about is quantized: maps (log2), inputs of the second FFN layer (twin), all weights
(binary). Scales come from the extremes of 128 training samples or from the search (`ptq --method search`), over three
draws. Training is 5 epochs with the teacher's predictions, over three seeds. divergence: mean KL(float ‖ quantized) of
the predictions, in nats. Cells that are there are not run again, and formats that there are no more are skipped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from kd import divergence
from ptq_grid import add, read
from transformers import PreTrainedModel

from bittern import calibrate, load, pack, save, simulate
from bittern.data import Data, load_data
from bittern.data.evaluate import accuracy, predict
from bittern.demo import DIGITS
from bittern.errors import RecipeError
from bittern.options import Distill, Training
from bittern.ptq import quantize
from bittern.qat.training import train
from bittern.recipe import Recipe

SEEDS = (0, 1, 2)
BITS = {"digits": (4, 3, 2), "text": (4, 3)}
FFN_SECOND = {"digits": "*.mlp.fc2", "text": "*.output.dense"}
Key = dict[str, Any]


def static(bits: int, **more: Any) -> dict[str, Any]:
    return {"bits": bits, "range": "static", **more}


def maps(bits: int) -> dict[str, dict[str, Any]]:
    """Formats of the attention map to choose from."""
    return {
        "unsigned": static(bits, scheme="unsigned"),
        "unsigned per token": {"bits": bits, "scheme": "unsigned", "granularity": "token"},
        "log2": static(bits, kind="log2"),
    }


def after_gelu(bits: int) -> dict[str, dict[str, Any]]:
    """Formats of the second FFN layer's input to choose from."""
    return {
        "symmetric": static(bits),
        "asymmetric": static(bits, scheme="asymmetric"),
        "asymmetric per token": {"bits": bits, "scheme": "asymmetric", "granularity": "token"},
        **{f"twin, shift {s}": static(bits, kind="twin", shift=s) for s in (2, 4, 6)},
    }


def activations(bits: int) -> dict[str, Any]:
    """Rules with activations of few bits to train with, weights of 4 bits, and how their scales are found."""
    ways = {
        "dynamic": ({"bits": bits}, "extremes"),
        "calibrated": (static(bits), "extremes"),
        "calibrated, asymmetric": (static(bits, scheme="asymmetric"), "extremes"),
        "searched": (static(bits), "search"),
        "learned": (static(bits, learned=True), "extremes"),
    }
    weight = {"bits": 4, "granularity": "row"}
    return {
        way: ([{"roles": ["qkv", "attention_output", "ffn"], "weight": weight, "input": fmt}], how)
        for way, (fmt, how) in ways.items()
    }


def weights() -> dict[str, Any]:
    layers = ["qkv", "attention_output", "ffn"]
    kinds = {"ternary": {"kind": "ternary"}, "binary": {"kind": "binary"}}
    kinds |= {f"{k} per row": fmt | {"granularity": "row"} for k, fmt in kinds.items()}
    return {k: ([{"roles": layers, "weight": fmt, "input": {"bits": 8}}], "extremes") for k, fmt in kinds.items()}


def recipe(rules: list[dict[str, Any]]) -> Recipe:
    return Recipe.from_dict({"name": "formats", "rules": rules})


def exists(rules: list[dict[str, Any]]) -> bool:
    """True if recipes may still say so: `log2`, `twin` and `learned` were measured here, and removed for it."""
    try:
        recipe(rules)
    except RecipeError:
        return False
    return True


def prepare(model: PreTrainedModel, rules: list[dict[str, Any]], how: str, data: Data, seed: int) -> None:
    batches = list(data.subset(128, seed))
    if how == "search":
        quantize(model, recipe(rules), batches, method="search", seed=seed)
    else:
        simulate(model, recipe(rules), batches[0])
        calibrate(model, batches)


def cells() -> Iterator[tuple[Key, list[dict[str, Any]], bool]]:
    """Every cell: its key, its rules, and if it is trained."""
    trained = [("activations", bits, activations(bits)) for bits in (4, 3, 2)] + [("weights", 0, weights())]
    for question, bits, options in trained:
        for name, (rules, how) in options.items():
            for seed in SEEDS:
                key = {"model": "digits", "question": question, "bits": bits, "format": name, "scales": how}
                yield key | {"seed": seed}, rules, True
    untrained = [(model, bits, seed) for model in FFN_SECOND for seed in SEEDS for bits in BITS[model]]
    for model, bits, seed in untrained:
        ffn = {"modules": FFN_SECOND[model], "roles": ["ffn"]}
        rules = [("map", name, {"map": fmt}) for name, fmt in maps(bits).items()]
        rules += [("after GELU", name, ffn | {"input": fmt}) for name, fmt in after_gelu(bits).items()]
        for question, name, rule in rules:
            for how in ("dynamic",) if name.endswith("per token") else ("extremes", "search"):
                if how != "dynamic" or not seed:  # nothing about it is random
                    key = {"model": model, "question": question, "bits": bits, "format": name, "scales": how}
                    yield key | {"seed": seed}, [rule], False


def train_on(student: PreTrainedModel, teacher: PreTrainedModel, data: Data, test: Data, seed: int) -> None:
    training = Training(epochs=5, batch_size=64, learning_rate=1e-3, evaluations=1, metric="accuracy", seed=seed)

    def measure() -> dict[str, float]:
        return {"accuracy": accuracy(predict(student, test), test.labels)}

    with tempfile.TemporaryDirectory() as folder:
        train(student, teacher, data, measure, Distill(), training, folder)


def storage(source: str | Path, data: Data) -> list[Key]:
    """A ternary model in both storages: bytes of the file, and of it compressed; seconds to load, and of a forward."""
    folders, batch = {}, next(iter(data))
    with tempfile.TemporaryDirectory() as out:
        for name in ("bits", "base3"):
            model = load(source)
            weight = {"kind": "ternary", "storage": name}
            layers = {"roles": ["qkv", "attention_output", "ffn", "pooler"], "weight": weight, "input": {"bits": 8}}
            rules = [layers, {"roles": ["embedding"], "weight": weight}]
            rules = [rule for rule in rules if rule is layers or source != DIGITS]  # a ViT has no word embedding
            simulate(model, recipe(rules), batch)
            folders[name] = Path(out) / name
            save(pack(model), folders[name])
        times: dict[str, dict[str, list[float]]] = {name: {"load": [], "first": [], "next": []} for name in folders}
        for _ in range(7):  # alternating
            for name, folder in folders.items():
                moments = [time.perf_counter()]
                model = load(folder)
                for _ in range(3):
                    moments.append(time.perf_counter())
                    with torch.inference_mode():
                        model(**batch)
                moments.append(time.perf_counter())
                spans = [b - a for a, b in pairwise(moments)]
                for what, seconds in zip(("load", "first", "next"), (spans[0], spans[1], spans[-1]), strict=True):
                    times[name][what].append(seconds)
        files = {name: (folder / "model.safetensors").read_bytes() for name, folder in folders.items()}
    return [
        {
            "format": name,
            "bytes": len(files[name]),
            "gzipped": len(gzip.compress(files[name], 6)),
            **{f"{what}_ms": round(1000 * statistics.median(v), 1) for what, v in times[name].items()},
        }
        for name in folders
    ]


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    sources = {"digits": (DIGITS, "digits")} | ({"text": options.text} if options.text else {})
    models: dict[str, tuple[PreTrainedModel, Data, Data, torch.Tensor]] = {}
    for name, (source, data) in sources.items():
        model = load(source)
        parts = [load_data(data, model, source, split=split, max_length=64) for split in ("train", "test")]
        assert parts[0] is not None
        assert parts[1] is not None
        models[name] = model, parts[0], parts[1], predict(model, parts[1])
    head = {name: round(accuracy(float_output, test.labels), 4) for name, (_, _, test, float_output) in models.items()}
    for key, rules, trained in cells():
        if not exists(rules):
            continue
        if key["model"] not in models or any(key.items() <= row.items() for row in read(options.out)["rows"]):
            continue
        teacher, data, test, reference = models[key["model"]]
        model = load(sources[key["model"]][0])
        prepare(model, rules, key["scales"], data, key["seed"])
        if trained:
            train_on(model, teacher, data, test, key["seed"])
        output = predict(model, test)
        row = key | {"accuracy": accuracy(output, test.labels), "divergence": divergence(output, reference)}
        add(options.out, head, row)
        print(json.dumps(row), flush=True, file=sys.stderr)
    for name, (source, _) in sources.items():
        key = {"model": name, "question": "storage"}
        if not any(key.items() <= row.items() for row in read(options.out)["rows"]):
            for row in storage(source, models[name][2]):
                add(options.out, head, key | row)


def table(path: Path) -> str:
    known = read(path)
    groups: dict[tuple[Any, ...], list[Key]] = {}
    for row in known["rows"]:
        if row["question"] != "storage":
            groups.setdefault(tuple(row[k] for k in ("model", "question", "bits", "format", "scales")), []).append(row)
    lines = ["| model | what | bits | format | scales | accuracy, % | divergence |", "|---|---|---|---|---|---|---|"]
    for key, rows in groups.items():
        texts = []
        for name, scale, digits in (("accuracy", 100, 1), ("divergence", 1, 4)):
            values = [scale * row[name] for row in rows]
            half = (max(values) - min(values)) / 2
            texts.append(f"{statistics.mean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if len(rows) > 1 else ""))
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(texts)} |")
    columns = ["model", "format", "bytes", "gzipped", "load_ms", "first_ms", "next_ms"]
    lines += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    stored = [row for row in known["rows"] if row["question"] == "storage"]
    return "\n".join([*lines, *(f"| {' | '.join(str(row[c]) for c in columns)} |" for row in stored)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs=2, metavar=("MODEL", "DATA"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of a file and do nothing else")
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
    else:
        run(options)


if __name__ == "__main__":
    main()
