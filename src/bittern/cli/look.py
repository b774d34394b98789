"""Commands that show what there is: demo, eval, inspect."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from bittern.cli.options import DATA_HELP, BatchSize, Columns, Force, Json, LabelColumn, Model, split, training_bar
from bittern.errors import InputError
from bittern.show import add_columns, err_console, kept, megabytes, out_console, print_rows, track


def demo(
    what: Annotated[str, typer.Argument(help="digits, minilm, or all of what is installed.")] = "digits",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the packed models.")] = Path("bittern-demo"),
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Quantize real models on real data that come with the package, and check them in a fresh process."""
    from bittern import demo as demos

    runs: dict[str, Any] = {"digits": partial(demos.run_digits, **training_bar(as_json)), "minilm": demos.run_minilm}
    if what != "all" and what not in runs:
        raise InputError(f"no demo {what!r}; give digits, minilm or all")
    titles = {
        "digits": "A ViT of 77,000 weights on scikit-learn's handwritten digits, 360 test images",
        "minilm": "all-MiniLM-L6-v2 on English sentences; agreement: rank correlation of all pairs' similarities",
    }
    if what == "all":
        try:
            demos.minilm_folder()
        except InputError as missing:  # the other one still runs
            del runs["minilm"]
            err_console.print(str(missing), soft_wrap=True)
    started = {name: run(out, force, track(as_json)) for name, run in runs.items() if what in (name, "all")}
    results = {}
    for name, run in started.items():
        rows = list(run)
        results[name] = [asdict(row) for row in rows]
        if not as_json:
            print_rows(titles[name], rows)
    if as_json:
        print(json.dumps(results))
        return
    best = rows[1].path
    out_console.print(
        f"Next: [bold]bittern inspect {best}[/]    your own model: [bold]bittern quantize MODEL "
        "--recipe w8a8 --data DATA -o OUT[/]",
        soft_wrap=True,
    )


def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    against: Annotated[str | None, typer.Option(help="Another model to compare outputs with.")] = None,
    columns: Columns = "",
    label_column: LabelColumn = None,
    batch_size: BatchSize = 32,
    kernels: Annotated[
        bool,
        typer.Option(help="Multiply in integers; without, a packed model gives the simulated one's bits."),
    ] = True,
    as_json: Json = False,
) -> None:
    """Measure a float, simulated or packed model on data."""
    from bittern import jobs

    result = jobs.evaluate(
        model,
        data,
        against=against,
        kernels=kernels,
        track=track(as_json),
        columns=split(columns),
        label_column=label_column,
        batch_size=batch_size,
    )
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        if name in ("file", "float32"):
            value = megabytes(value)
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        out_console.print(f"{name.replace('_', ' '):16} {text}", highlight=False)


def inspect(model: Model, as_json: Json = False) -> None:
    """Show what a model folder holds: sizes, which module has which format, and what stayed float."""
    from bittern.deploy.store import inspect as inspect_folder

    result = inspect_folder(model)
    if as_json:
        print(json.dumps(result))
        return
    out_console.print(
        f"{result['model']}, {result['state']}"
        + (f" by {result['recipe']}" if result["recipe"] else "")
        + f": {megabytes(result['file'])} on disk ({megabytes(result['float32'])} in float32), "
        f"{result['bits']:.2f} bits per quantized weight, {result['tensors']} tensors",
        highlight=False,
        soft_wrap=True,
    )
    if result["state"] == "packed":
        kernels = result["kernels"] or "none: weights are unpacked in each forward, which is slow"
        out_console.print(f"integer kernels on this machine: {kernels}", soft_wrap=True)
    groups: dict[tuple[str, str], int] = {}
    for module in result["modules"]:  # the same part of all blocks in one row
        formats = "\n".join(f"{point}: {fmt}" for point, fmt in module.items() if point != "name")
        key = re.sub(r"\.\d+(?=\.|$)", ".*", module["name"]), formats
        groups[key] = groups.get(key, 0) + 1
    table = Table(show_lines=True)
    add_columns(table, "modules", "count", "formats")
    table.columns[2].justify = "left"
    for (name, formats), count in groups.items():
        table.add_row(name, str(count), formats)
    if groups:
        out_console.print(table)
    total = sum(module["parameters"] for module in result["kept_float"])
    out_console.print(f"kept float: {kept(result['kept_float'])}; {total:,} parameters in all", soft_wrap=True)
