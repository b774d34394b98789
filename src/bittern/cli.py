"""The command line: one short function per command, and the only place that prints."""

from __future__ import annotations

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # what goes wrong is told once, by us

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bittern.errors import BitternError

app = typer.Typer(
    help="Make Transformers small and fast without losing what they know.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
out_console, err_console = Console(), Console(stderr=True)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder of a model with config.json and .safetensors, or a hub name.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output if it exists.")]
Columns = Annotated[str, typer.Option(help="Input columns of the data, separated by commas.")]
LabelColumn = Annotated[str | None, typer.Option(help="Label column of the data.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples per batch.")]
DATA_HELP = (
    "Folder or file of texts or images, for detectors a folder in COCO format, a dataset name, or the built-in digits "
    "or sentences."
)


@app.command()
def demo(
    what: Annotated[str, typer.Argument(help="digits, minilm, or all of what is installed.")] = "digits",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the packed models.")] = Path("bittern-demo"),
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Quantize real models on real data that come with the package, and check them in a fresh process."""
    from bittern import demo as demos
    from bittern.errors import InputError

    runs = {"digits": demos.run_digits, "minilm": demos.run_minilm}
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
    started = {name: run(out, force, _track(as_json)) for name, run in runs.items() if what in (name, "all")}
    results = {}
    for name, run in started.items():
        rows = list(run)
        results[name] = [asdict(row) for row in rows]
        if not as_json:
            _print_rows(titles[name], rows)
    if as_json:
        print(json.dumps(results))
        return
    best = rows[1].path
    out_console.print(f"Next: [bold]bittern inspect {best}[/]    your own model: [bold]bittern quantize MODEL "
                      "--recipe w8a8 --data DATA -o OUT[/]", soft_wrap=True)  # fmt: skip


@app.command()
def quantize(
    model: Model,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A ready-made recipe, or a YAML file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the packed model.")],
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples, drawn at random.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    columns: Columns = "",
    label_column: LabelColumn = None,
    batch_size: BatchSize = 32,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Quantize a model by a recipe and write it packed: the file is really smaller."""
    from bittern import pipeline

    result = pipeline.quantize(
        model, recipe, out, data=data, samples=samples, seed=seed, force=force, track=_track(as_json),
        columns=_split(columns), label_column=label_column, batch_size=batch_size,
    )  # fmt: skip
    if as_json:
        print(json.dumps(result))
        return
    _print_quantized(result, f"{model} by {result['recipe']}")
    out_console.print(
        f"{result['quantized']} modules quantized; kept float: {_kept(result['kept_float'])}", soft_wrap=True
    )
    if "packed" not in result:
        why = "the data has no test or validation split" if data else "no data was given; add --data"
        out_console.print(f"No accuracy was measured: {why}.", soft_wrap=True)
    out_console.print(f"Wrote {out}. Next: [bold]bittern inspect {out}[/]", soft_wrap=True)


@app.command()
def ptq(
    model: Model,
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A ready-made recipe, or a YAML file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the packed model.")],
    method: Annotated[str, typer.Option("--method", "-m", help="How scales and weights are found.")] = "bittern",
    target: Annotated[
        float | None, typer.Option(help="Mixed precision: bits a weight on average in the blocks.")
    ] = None,
    bits: Annotated[str, typer.Option(help="Mixed precision: candidate widths, separated by commas.")] = "4,5,6,7,8",
    sensitivity: Annotated[str, typer.Option(help="Mixed precision: relative, or paper (nuclear norm).")] = "relative",
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples, drawn at random.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    columns: Columns = "",
    label_column: LabelColumn = None,
    batch_size: BatchSize = 32,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Quantize after training: search for the scales that lose least, on a few samples of data.

    Interrupted, the same command goes on where it was.
    """
    from bittern import pipeline

    result = pipeline.ptq(
        model, recipe, out, data=data, method=method, mixed=_mixed(target, bits, sensitivity), samples=samples,
        seed=seed, force=force, track=_track(as_json), columns=_split(columns), label_column=label_column,
        batch_size=batch_size,
    )  # fmt: skip
    if as_json:
        print(json.dumps(result))
        return
    found = result["ptq"]
    out_console.print(result["what"], highlight=False, soft_wrap=True)
    _print_losses(found["solved"])
    if found["bits"]:
        chosen = " ".join(f"{part} {width}" for part, width in found["bits"].items())
        out_console.print(f"bits: {chosen}", highlight=False, soft_wrap=True)
    if found["by_extremes"]:
        out_console.print(f"by extremes: {', '.join(found['by_extremes'])}", highlight=False, soft_wrap=True)
    _print_quantized(result, f"{model} by {result['recipe']}, method {found['method']}, {found['samples']} samples")
    seconds = ", ".join(f"{phase} {value:.1f} s" for phase, value in found["seconds"].items())
    memory = f"; peak memory {_megabytes(found['peak_memory'])}" if found["peak_memory"] else ""
    out_console.print(f"{seconds}{memory}", highlight=False, soft_wrap=True)
    out_console.print(f"Wrote {out}. Next: [bold]bittern inspect {out}[/]", soft_wrap=True)


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    against: Annotated[str | None, typer.Option(help="Another model to compare outputs with.")] = None,
    columns: Columns = "",
    label_column: LabelColumn = None,
    batch_size: BatchSize = 32,
    as_json: Json = False,
) -> None:
    """Measure a float, simulated or packed model on data."""
    from bittern import pipeline

    result = pipeline.evaluate(
        model, data, against=against, track=_track(as_json), columns=_split(columns), label_column=label_column,
        batch_size=batch_size,
    )  # fmt: skip
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        if name in ("file", "float32"):
            value = _megabytes(value)
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        out_console.print(f"{name.replace('_', ' '):16} {text}", highlight=False)


@app.command()
def inspect(model: Model, as_json: Json = False) -> None:
    """Show what a model folder holds: sizes, which module has which format, and what stayed float."""
    from bittern.deploy.store import inspect as inspect_folder

    result = inspect_folder(model)
    if as_json:
        print(json.dumps(result))
        return
    out_console.print(
        f"{result['model']}, {result['state']}" + (f" by {result['recipe']}" if result["recipe"] else "")
        + f": {_megabytes(result['file'])} on disk ({_megabytes(result['float32'])} in float32), "
        f"{result['bits']:.2f} bits per quantized weight, {result['tensors']} tensors", highlight=False, soft_wrap=True,
    )  # fmt: skip
    groups: dict[tuple[str, str], int] = {}
    for module in result["modules"]:  # the same part of all blocks in one row
        formats = "\n".join(f"{point}: {fmt}" for point, fmt in module.items() if point != "name")
        key = re.sub(r"\.\d+(?=\.|$)", ".*", module["name"]), formats
        groups[key] = groups.get(key, 0) + 1
    table = Table(show_lines=True)
    _columns(table, "modules", "count", "formats")
    table.columns[2].justify = "left"
    for (name, formats), count in groups.items():
        table.add_row(name, str(count), formats)
    if groups:
        out_console.print(table)
    total = sum(module["parameters"] for module in result["kept_float"])
    out_console.print(f"kept float: {_kept(result['kept_float'])}; {total:,} parameters in all", soft_wrap=True)


def _print_quantized(result: dict[str, Any], title: str) -> None:
    """Sizes and metrics, float against packed."""
    table = Table(title=title, title_justify="left")
    _columns(table, "", "float", "packed")
    table.add_row("size", _megabytes(result["float_bytes"]), _megabytes(result["file"]))
    table.add_row("bits per quantized weight", "32", f"{result['bits']:.2f}")
    if "packed" in result:
        for name, value in result["packed"].items():
            table.add_row(name.replace("_", " "), f"{result['float'][name]:.4f}", f"{value:.4f}")
        error = result["max_error_simulated_packed"]
        table.add_row("max error simulated–packed", "", f"{error:g}")
    out_console.print(table)


def _print_losses(solved: list[dict[str, Any]]) -> None:
    """1 - similarity of outputs before and after, the same part of all blocks in one row."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in solved:
        groups.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", entry["name"]), []).append(entry)
    table = Table(title="output error: with scales of the extremes, and as found (mean; worst)", title_justify="left")
    _columns(table, "layer or product", "count", "before", "after", "worst", "rounds")
    for name, entries in groups.items():
        before, after = (sum(e[k] for e in entries) / len(entries) for k in ("before", "after"))
        worst, rounds = (max(e[k] for e in entries) for k in ("after", "rounds"))
        table.add_row(name, str(len(entries)), f"{before:.2e}", f"{after:.2e}", f"{worst:.2e}", str(rounds))
    out_console.print(table)


def _mixed(target: float | None, bits: str, sensitivity: str) -> Any:
    from bittern.errors import InputError
    from bittern.ptq.run import Mixed

    if target is None:
        return None
    if not all(b.isdigit() for b in _split(bits)) or sensitivity not in ("relative", "paper"):
        raise InputError(
            f"mixed precision needs whole numbers as --bits and relative or paper as --sensitivity, got {bits!r} and "
            f"{sensitivity!r}"
        )
    return Mixed(target, tuple(map(int, _split(bits))), sensitivity)  # type: ignore[arg-type]


def _print_rows(title: str, rows: list[Any]) -> None:
    table = Table(title=title, title_justify="left")
    with_accuracy = rows[0].accuracy is not None
    _columns(table, "format", "bits", "kB", "×", *(["accuracy"] if with_accuracy else []),
             "agreement", "max error")  # fmt: skip
    for row in rows:
        table.add_row(
            row.format, f"{row.bits:.2f}", f"{row.bytes / 1e3:,.0f}", f"{rows[0].bytes / row.bytes:.1f}",
            *([f"{row.accuracy:.4f}"] if with_accuracy else []), f"{row.agreement:.4f}",
            "" if row.max_error is None else f"{row.max_error:g}",
        )  # fmt: skip
    out_console.print(table)
    out_console.print("bits: per quantized weight, with scales · kB: whole file · agreement: with float · max error: "
                      "simulated against packed, loaded in a fresh process")  # fmt: skip


def _columns(table: Table, *names: str) -> None:
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")


def _split(columns: str) -> tuple[str, ...]:
    return tuple(c.strip() for c in columns.split(",") if c.strip())


def _kept(modules: list[dict[str, Any]]) -> str:
    """Layers by name, if few; what has no weight matrix, such as norms, by type and count."""
    layers = [m["name"] for m in modules if m["type"] in ("Linear", "Conv2d", "Embedding", "Conv1D")]
    others = Counter(m["type"] for m in modules if m["name"] not in layers)
    named = layers[:6] + ([f"{len(layers) - 6} more layers"] if len(layers) > 6 else [])
    return ", ".join(named + [f"{count} {kind}" for kind, count in others.items()]) or "nothing"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _track(quiet: bool) -> Any:
    """A progress bar on stderr around an iterable, gone when it is done."""

    def track(items: Iterable[Any], description: str) -> Iterable[Any]:
        if quiet or not err_console.is_terminal:
            yield from items
            return
        total = -(-len(items) // items.batch_size) if hasattr(items, "batch_size") else len(items)  # type: ignore[arg-type]
        bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*bars, console=err_console, transient=True) as progress:
            yield from progress.track(items, total=total, description=description)

    return track


def main() -> None:
    """Run the command line: a known error is one line on stderr and exit code 1, Ctrl-C exits with 130."""
    try:
        from transformers.utils import logging

        logging.disable_progress_bar()
        if app(standalone_mode=False) == 130:  # what newer typer makes of Ctrl-C
            raise KeyboardInterrupt
    except typer.Exit as exit:
        sys.exit(exit.exit_code)
    except BitternError as error:
        err_console.print(f"[red]error:[/] {' '.join(str(error).split())}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        err_console.print("interrupted; nothing was left half-written")
        sys.exit(130)
    except Exception as error:
        usage = getattr(error, "show", None)
        if usage is None:
            raise
        usage()
        sys.exit(2)
