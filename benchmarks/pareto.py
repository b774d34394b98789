"""Size, latency and accuracy of one text classifier by our recipes and in the other engines, in one table and one plot.

    python benchmarks/pareto.py MODEL DATA --work WORK --out benchmarks/results/pareto.json --figure docs/figures
    python benchmarks/pareto.py --table benchmarks/results/pareto.json --figure docs/figures

MODEL: a folder with a classifier and its tokenizer. DATA: a folder with train and validation parquet files of sentences
and labels. Every contender gets the same sentences, one at a time, padded to --length tokens; ours are made by
`bittern ptq`, OpenVINO's int8 by NNCF, both with --samples sentences of the training data. --packed NAME=FOLDER adds
a model that was trained (`bittern qat`). WORK keeps the models that are made; accuracies that are in the file are kept,
latencies are measured anew: medians of --rounds alternating rounds, one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from engines import onnxruntime_engines, openvino_engines
from torch import Tensor
from transformers import AutoTokenizer

from bittern import jobs, load
from bittern.analysis.charts import LETTER, WIDTH, Axis, Plot, names_beside, styles, symbol, text
from bittern.analysis.figures import Figure
from bittern.analysis.report import write_plot
from bittern.deploy.bench import FLOAT, alternate
from bittern.deploy.store import float_bytes, measure

OURS = {"bittern w8a8": "w8a8", "bittern w4a8": "w4a8"}
Feeds = Mapping[str, Tensor]


def sentences(
    path: Path, split: str, tokenizer: Any, length: int, most: int | None = None
) -> tuple[list[Feeds], list[int]]:
    """Batches of one padded sentence, and their labels."""
    columns = pq.read_table(path / f"{split}.parquet").to_pydict()
    texts, labels = columns["sentence"][:most], columns["label"][:most]
    coded = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return [{key: values[i : i + 1] for key, values in coded.items()} for i in range(len(texts))], labels


def predict(call: Callable[[], object], feeds: Feeds) -> int:
    """The label that another engine gives; call: as engines.py makes it."""
    assert isinstance(call, partial)
    found: Any = call.func(*call.args[:-1], {key: value.numpy() for key, value in feeds.items()}, **call.keywords)
    return int(np.argmax(found[0]))


def measure_all(options: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    tokenizer, model = AutoTokenizer.from_pretrained(options.model), load(options.model).float().eval()
    tests, labels = sentences(options.data, "validation", tokenizer, options.length)
    calibration, _ = sentences(options.data, "train", tokenizer, options.length, options.samples)
    contenders: dict[str, Callable[[Feeds], int]] = {}
    calls: dict[str, Callable[[], object]] = {}
    sizes = {FLOAT: float_bytes(model)}
    folders = {name: options.work / recipe for name, recipe in OURS.items()}
    for name, recipe in OURS.items():
        if not folders[name].exists():
            jobs.ptq(options.model, recipe, folders[name], data=str(options.data), samples=options.samples)
    folders |= {f"bittern {name}": Path(folder) for name, folder in (given.split("=") for given in options.packed)}
    models = {name: load(folder).eval() for name, folder in folders.items()}
    for name, own in ({FLOAT: model} | models).items():
        contenders[name] = lambda feeds, own=own: int(own(**feeds).logits.argmax())
        calls[name] = partial(own, **tests[0])
        if name in folders:
            sizes[name] = measure(own, folders[name]).file
    for make in (onnxruntime_engines, partial(openvino_engines, calibration=calibration)):
        made = make(model, tests[0], options.work)
        calls |= made
        contenders |= {name: partial(predict, call) for name, call in made.items()}
        for name in made:
            files = [options.work / f"{name}{kind}" for kind in (".onnx", ".xml", ".bin")]
            sizes[name] = sum(file.stat().st_size for file in files if file.exists())
    rows = {row["name"]: row for row in known.get("rows", [])}
    with torch.no_grad():
        for name, label in contenders.items():
            row = rows.setdefault(name, {"name": name})
            row["bytes"] = sizes[name]
            if "accuracy" not in row:
                right = [label(feeds) == wanted for feeds, wanted in zip(tests, labels, strict=True)]
                row["accuracy"] = round(sum(right) / len(right), 4)
                print(name, row["accuracy"], flush=True)
        for name, seconds in alternate(calls, options.rounds).items():
            rows[name]["ms"] = round(1e3 * statistics.median(seconds), 3)
    return {"data": options.data.name, "length": options.length, "threads": 1, "rows": list(rows.values())}


def table(known: dict[str, Any]) -> str:
    lines = ["| engine | MB | ms | accuracy |", "|---|---|---|---|"]
    for row in sorted(known["rows"], key=lambda row: row["ms"]):
        lines.append(f"| {row['name']} | {row['bytes'] / 1e6:.1f} | {row['ms']:.2f} | {100 * row['accuracy']:.2f} |")
    return "\n".join(lines)


def draw(known: dict[str, Any], folder: Path) -> None:
    """Latency across, size up, and the accuracy beside each mark: the lower left corner is best."""
    rows = sorted(known["rows"], key=lambda row: -row["ms"])
    at_y = Axis(0.0, max(row["bytes"] for row in rows) / 1e6 + 8, 240.0, 22.0)
    left = 10 + LETTER * max(len(mark) for _, mark in at_y.marks())
    at_x = Axis(0.0, max(row["ms"] for row in rows) + 2, left + 8, WIDTH - 14)
    parts = [text(4, 12, "size of the file, MB; accuracy in %"), *at_y.beside(left - 5, grid_to=WIDTH - 6)]
    under, below = at_x.below(240.0)
    under.append(text((left + WIDTH) / 2, below + 14, "milliseconds a sentence", "middle"))
    engines = list(dict.fromkeys(row["name"].split()[0] for row in known["rows"]))
    numbers = dict(zip(engines, styles(engines), strict=True))
    places = [(at_x(row["ms"]), at_y(row["bytes"] / 1e6)) for row in rows]
    for row, (x, y) in zip(rows, places, strict=True):
        n, tip = numbers[row["name"].split()[0]], f"{row['bytes'] / 1e6:.1f} MB, {row['ms']} ms"
        parts.append(symbol(n, x, y, 5.0, fill=f"var(--s{n})", data_tip=f"{row['name']}: {tip}"))
    named = [(x, y, f"{row['name']}, {100 * row['accuracy']:.1f}") for row, (x, y) in zip(rows, places, strict=True)]
    parts += names_beside(named, [], (left, WIDTH - 4.0, 18.0, 240.0))
    title = f"Size, latency and accuracy on {known['data']}"
    write_plot(Figure("pareto", title, "", Plot("".join([*parts, *under]), below + 24)), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--work", type=Path, help="folder for the models that are made")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    parser.add_argument("--figure", type=Path, help="folder for the plot")
    parser.add_argument("--packed", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--length", type=int, default=64, help="tokens of each sentence")
    parser.add_argument("--samples", type=int, default=128, help="sentences for calibration")
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--table", type=Path, help="print the table of a file, draw the plot, and measure nothing")
    options = parser.parse_args()
    if options.table:
        known = json.loads(options.table.read_text())
        print(table(known))
        if options.figure:
            draw(known, options.figure)
        return
    if None in (options.model, options.data, options.work, options.out):
        parser.error("MODEL, DATA, --work and --out are needed")
    options.work.mkdir(parents=True, exist_ok=True)
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    found = measure_all(options, known)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.figure:
        draw(found, options.figure)
    print(table(found))


if __name__ == "__main__":
    main()
