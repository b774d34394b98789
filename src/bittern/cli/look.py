"""Commands that show what there is and what quantization did to it: demo, eval, inspect, analyze."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from bittern import demo as demos
from bittern import jobs
from bittern.analysis import study
from bittern.cli.options import BATCH_SIZE, COLUMNS, DATA, FORCE, MAX_LENGTH, MODEL, Option, command
from bittern.deploy import store
from bittern.show import kept, megabytes, print_rows, print_table, say


@command(
    demos.demo,
    {
        "what": Option("digits, minilm, or all of what is installed.", argument="what"),
        "out": Option("Folder for the packed models.", ("--out", "-o")),
        **FORCE,
    },
)
def demo(result: dict[str, Any], given: dict[str, Any]) -> None:
    """Quantize real models on real data that come with the package, and check them in a fresh process."""
    for name, rows in result.items():
        print_rows(demos.TITLES[name], rows)
    say(
        f"Next: [bold]bittern inspect {rows[1]['path']}[/]    your own model: [bold]bittern quantize MODEL "
        "--recipe w8a8 --data DATA -o OUT[/]",
        markup=True,
    )


@command(
    jobs.evaluate,
    {
        "source": MODEL,
        "data": DATA,
        "against": Option("Another model to compare outputs with."),
        **COLUMNS,
        "batch_size": BATCH_SIZE,
        "kernels": Option("Multiply in integers; without, a packed model gives the simulated one's bits."),
    },
)
def evaluate(result: dict[str, Any], given: dict[str, Any]) -> None:
    """Measure a float, simulated or packed model on data."""
    for name, value in result.items():
        shown = megabytes(value) if name in ("file", "float32") else value
        say(
            f"{name.replace('_', ' '):16} {shown:.4f}"
            if isinstance(shown, float)
            else f"{name.replace('_', ' '):16} {shown}"
        )


@command(store.inspect, {"path": MODEL})
def inspect(result: dict[str, Any], given: dict[str, Any]) -> None:
    """Show what a model folder holds: sizes, which module has which format, and what stayed float."""
    recipe = f" by {result['recipe']}" if result["recipe"] else ""
    say(
        f"{result['model']}, {result['state']}{recipe}: {megabytes(result['file'])} on disk "
        f"({megabytes(result['float32'])} in float32), {result['bits']:.2f} bits per quantized weight, "
        f"{result['tensors']} tensors"
    )
    if result["state"] == "packed":
        kernels = result["kernels"] or "none: weights are unpacked in each forward, which is slow"
        say(f"integer kernels on this machine: {kernels}")
    groups = Counter(  # the same part of all blocks in one row
        (
            re.sub(r"\.\d+(?=\.|$)", ".*", module["name"]),
            "\n".join(f"{point}: {fmt}" for point, fmt in module.items() if point != "name"),
        )
        for module in result["modules"]
    )
    if groups:
        rows = [(name, str(count), formats) for (name, formats), count in groups.items()]
        print_table(("modules", "count", "formats"), rows, left=("modules", "formats"), show_lines=True)
    total = sum(module["parameters"] for module in result["kept_float"])
    say(f"kept float: {kept(result['kept_float'])}; {total:,} parameters in all")


@command(
    study.analyze,
    {
        "student": Option("Folder of a packed or simulated model.", argument="STUDENT"),
        "teacher": Option("Folder of the float model that it was made from."),
        "data": DATA,
        "out": Option("Folder for the report.", ("--out", "-o")),
        "against": Option("Another student of this teacher, shown beside it."),
        "samples": Option("Samples of the test data, drawn at random.", least=3),
        "subset": Option("How many of them serve what runs the model many times.", ("--few",), least=1),
        "curvature": Option("Hessian and loss surface too; takes long on large models."),
        "curvature.batches": Option("Curvature: mini-batches that get a spectrum.", ("--hessians",), least=1),
        "curvature.eigenvalues": Option("Curvature: top eigenvalues of each.", least=1),
        "curvature.grid": Option("Curvature: points along a side of the loss surface.", least=3),
        "seed": Option("Seed of the draw and of random directions."),
        **COLUMNS,
        "max_length": MAX_LENGTH,
        "batch_size": BATCH_SIZE,
        **FORCE,
    },
)
def analyze(result: dict[str, Any], given: dict[str, Any]) -> None:
    """Show what quantization did to a model: a report by layer and head, in one HTML file.

    Interrupted, the same command goes on where it was.
    """
    for model in result["students"]:
        say(f"What stands out in {model['name']}:")
        for i, block in enumerate(model["worst"], 1):
            say(
                f"{i}. {block['name']}: alone it changes the output by {100 * block['error']:.2g} %; head "
                f"{block['head']} diverges most, {block['times']:.1f}× the median. {block['advice']}"
            )
    out = Path(given["out"])
    say(f"Wrote {out}. Next: open [bold]{out / 'report.html'}[/] in a browser", markup=True)
