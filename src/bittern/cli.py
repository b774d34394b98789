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
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from bittern.errors import BitternError, InputError
from bittern.show import (
    TrainingBar,
    add_columns,
    err_console,
    kept,
    megabytes,
    out_console,
    print_losses,
    print_quantized,
    print_rows,
    print_trained,
    track,
)

app = typer.Typer(
    help="Make Transformers small and fast without losing what they know.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

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

    runs: dict[str, Any] = {"digits": partial(demos.run_digits, **_tell(as_json)), "minilm": demos.run_minilm}
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
        model, recipe, out, data=data, samples=samples, seed=seed, force=force, track=track(as_json),
        columns=_split(columns), label_column=label_column, batch_size=batch_size,
    )  # fmt: skip
    if as_json:
        print(json.dumps(result))
        return
    print_quantized(result, f"{model} by {result['recipe']}")
    out_console.print(
        f"{result['quantized']} modules quantized; kept float: {kept(result['kept_float'])}", soft_wrap=True
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
        seed=seed, force=force, track=track(as_json), columns=_split(columns), label_column=label_column,
        batch_size=batch_size,
    )  # fmt: skip
    if as_json:
        print(json.dumps(result))
        return
    found = result["ptq"]
    out_console.print(result["what"], highlight=False, soft_wrap=True)
    print_losses(found["solved"])
    if found["bits"]:
        chosen = " ".join(f"{part} {width}" for part, width in found["bits"].items())
        out_console.print(f"bits: {chosen}", highlight=False, soft_wrap=True)
    if found["by_extremes"]:
        out_console.print(f"by extremes: {', '.join(found['by_extremes'])}", highlight=False, soft_wrap=True)
    print_quantized(result, f"{model} by {result['recipe']}, method {found['method']}, {found['samples']} samples")
    seconds = ", ".join(f"{phase} {value:.1f} s" for phase, value in found["seconds"].items())
    memory = f"; peak memory {megabytes(found['peak_memory'])}" if found["peak_memory"] else ""
    out_console.print(f"{seconds}{memory}", highlight=False, soft_wrap=True)
    out_console.print(f"Wrote {out}. Next: [bold]bittern inspect {out}[/]", soft_wrap=True)


@app.command()
def qat(
    teacher: Model,
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A ready-made recipe, or a YAML file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the packed model.")],
    distill: Annotated[
        str,
        typer.Option(
            help="What is learned from the teacher: none, prediction, ternarybert, map, output, unified, "
            "or terms with weights such as prediction,map=0.3."
        ),
    ] = "unified",
    balance: Annotated[
        str, typer.Option(help="auto gives all terms the same pull; fixed adds them as they are.")
    ] = "auto",
    layers: Annotated[str, typer.Option(help="Blocks whose attention is compared, such as 0,-1; all by default.")] = "",
    mapping: Annotated[str, typer.Option(help="Block of the student:block of the teacher, such as 0:1,1:3.")] = "",
    temperature: Annotated[float, typer.Option(help="Of the prediction term.")] = 1.0,
    map_temperature: Annotated[float, typer.Option(help="Of the map term.")] = 1.0,
    student: Annotated[str | None, typer.Option(help="Float model that the student starts from.")] = None,
    epochs: Annotated[float, typer.Option(help="Times over the training data.")] = 3.0,
    steps: Annotated[int | None, typer.Option(help="Steps of the optimizer, in place of epochs.")] = None,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", help="After warm-up.")] = 2e-5,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the learning rate rises.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Not of biases and norms.")] = 0.01,
    evaluations: Annotated[int, typer.Option(help="How often to measure and to write a checkpoint.")] = 10,
    patience: Annotated[int | None, typer.Option(help="Stop after so many evaluations without a better one.")] = None,
    metric: Annotated[str | None, typer.Option(help="Which metric decides between checkpoints.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of transformers.TrainingArguments; may be repeated.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples for static scales of activations.")] = 128,
    seed: Annotated[int, typer.Option(help="Of order, dropout and draws.")] = 0,
    columns: Columns = "",
    label_column: LabelColumn = None,
    max_length: Annotated[int, typer.Option(min=2, help="Most tokens of a text; of a language model's block.")] = 128,
    batch_size: BatchSize = 32,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the same run.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a quantized student with a float teacher, down to ternary weights, and write it packed.

    On several GPUs: torchrun --nproc_per_node N -m bittern qat …
    """
    from bittern import pipeline
    from bittern.qat.distill import parse_distill
    from bittern.qat.run import Training, leave_processes

    lesson = parse_distill(
        distill, balance=balance, layers=_numbers(layers, "layers") or None, mapping=_mapping(mapping),
        temperature=temperature, map_temperature=map_temperature,
    )  # fmt: skip
    training = Training(
        epochs=epochs, steps=steps, batch_size=batch_size, learning_rate=learning_rate, warmup=warmup,
        weight_decay=weight_decay, seed=seed, evaluations=evaluations, patience=patience, metric=metric,
        arguments=_settings(options or []),
    )  # fmt: skip
    leads = os.environ.get("RANK", "0") == "0"  # of several processes
    quiet = as_json or not leads
    result = pipeline.qat(
        teacher, recipe, out, data=data, distill=lesson, training=training, student=student, samples=samples,
        resume=resume, force=force, track=track(quiet), columns=_split(columns), label_column=label_column,
        max_length=max_length, **_tell(quiet),
    )  # fmt: skip
    if as_json and leads:
        print(json.dumps(result))
    elif leads:
        print_trained(result, f"{teacher} by {result['recipe']}, learned from {', '.join(lesson.terms)}")
        out_console.print(f"Wrote {out}. Next: [bold]bittern inspect {out}[/]", soft_wrap=True)
    leave_processes()


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
        model, data, against=against, track=track(as_json), columns=_split(columns), label_column=label_column,
        batch_size=batch_size,
    )  # fmt: skip
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        if name in ("file", "float32"):
            value = megabytes(value)
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
        + f": {megabytes(result['file'])} on disk ({megabytes(result['float32'])} in float32), "
        f"{result['bits']:.2f} bits per quantized weight, {result['tensors']} tensors", highlight=False, soft_wrap=True,
    )  # fmt: skip
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


def _mixed(target: float | None, bits: str, sensitivity: str) -> Any:
    from bittern.ptq.run import Mixed

    if target is None:
        return None
    if not all(b.isdigit() for b in _split(bits)) or sensitivity not in ("relative", "paper"):
        raise InputError(
            f"mixed precision needs whole numbers as --bits and relative or paper as --sensitivity, got {bits!r} and "
            f"{sensitivity!r}"
        )
    return Mixed(target, tuple(map(int, _split(bits))), sensitivity)  # type: ignore[arg-type]


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, _split(text)))
    except ValueError:
        raise InputError(f"{option} is {text!r}; expected whole numbers separated by commas") from None


def _mapping(text: str) -> dict[int, int] | None:
    pairs = [part.split(":") for part in _split(text)]
    if not all(len(pair) == 2 and all(number.strip().isdigit() for number in pair) for pair in pairs):
        raise InputError(f"mapping is {text!r}; expected student:teacher pairs of blocks, such as 0:1,1:3")
    return {int(mine): int(theirs) for mine, theirs in pairs} or None


def _settings(options: list[str]) -> dict[str, Any]:
    """NAME=VALUE options, values read as YAML."""
    import yaml

    found = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise InputError(f"--set {option} has no value; expected NAME=VALUE")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--set {option}: the value cannot be read") from None
    return found


def _tell(quiet: bool) -> dict[str, Any]:
    return {} if quiet else {"tell": TrainingBar()}


def _split(columns: str) -> tuple[str, ...]:
    return tuple(c.strip() for c in columns.split(",") if c.strip())


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
