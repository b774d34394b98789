"""Commands that make a smaller model: quantize, ptq, qat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bittern.cli.options import (
    DATA_HELP,
    BatchSize,
    Columns,
    Force,
    Json,
    LabelColumn,
    Model,
    parse_mapping,
    parse_mixed,
    parse_numbers,
    parse_settings,
    split,
    training_bar,
)
from bittern.show import kept, megabytes, out_console, print_losses, print_quantized, print_trained, track


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
    from bittern import jobs

    result = jobs.quantize(
        model,
        recipe,
        out,
        data=data,
        samples=samples,
        seed=seed,
        force=force,
        track=track(as_json),
        columns=split(columns),
        label_column=label_column,
        batch_size=batch_size,
    )
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
    from bittern import jobs

    result = jobs.ptq(
        model,
        recipe,
        out,
        data=data,
        method=method,
        mixed=parse_mixed(target, bits, sensitivity),
        samples=samples,
        seed=seed,
        force=force,
        track=track(as_json),
        columns=split(columns),
        label_column=label_column,
        batch_size=batch_size,
    )
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
        str, typer.Option(help="auto lets all compared tensors pull alike; fixed adds the terms.")
    ] = "auto",
    layers: Annotated[str, typer.Option(help="Blocks whose attention is compared, such as 0,-1; all by default.")] = "",
    mapping: Annotated[str, typer.Option(help="Block of the student:block of the teacher, such as 0:1,1:3.")] = "",
    temperature: Annotated[float, typer.Option(help="Of the prediction term.")] = 1.0,
    map_temperature: Annotated[float, typer.Option(help="Of the map term.")] = 1.0,
    intervene: Annotated[
        str | None,
        typer.Option(
            help="First let the teacher's signals replace the student's: gradual, output, context, map, inverted, "
            "stochastic or fade."
        ),
    ] = None,
    intervene_steps: Annotated[int, typer.Option(help="Steps in which the teacher intervenes.")] = 60,
    intervene_scope: Annotated[
        str, typer.Option(help="What is quantized in them: all, or part (what the teacher does not replace).")
    ] = "all",
    baseline_run: Annotated[
        str | None,
        typer.Option("--plain", help="Folder of a finished run without intervention, to count the steps saved."),
    ] = None,
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
    from bittern import jobs
    from bittern.qat.distill import parse_distill
    from bittern.qat.intervention import Intervention
    from bittern.qat.training import Training, is_main_process, leave_processes

    distillation = parse_distill(
        distill,
        balance=balance,
        layers=parse_numbers(layers, "layers") or None,
        mapping=parse_mapping(mapping),
        temperature=temperature,
        map_temperature=map_temperature,
    )
    training = Training(
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        seed=seed,
        evaluations=evaluations,
        patience=patience,
        metric=metric,
        arguments=parse_settings(options or []),
    )
    intervention = None
    if intervene:
        intervention = Intervention(intervene, intervene_steps, intervene_scope, seed)  # type: ignore[arg-type]
    quiet = as_json or not is_main_process()
    result = jobs.qat(
        teacher,
        recipe,
        out,
        data=data,
        distill=distillation,
        training=training,
        intervention=intervention,
        baseline_run=baseline_run,
        student=student,
        samples=samples,
        resume=resume,
        force=force,
        track=track(quiet),
        columns=split(columns),
        label_column=label_column,
        max_length=max_length,
        **training_bar(quiet, intervention),
    )
    if as_json and is_main_process():
        print(json.dumps(result))
    elif is_main_process():
        print_trained(result, f"{teacher} by {result['recipe']}, learned from {', '.join(distillation.terms)}")
        out_console.print(f"Wrote {out}. Next: [bold]bittern inspect {out}[/]", soft_wrap=True)
    leave_processes()
