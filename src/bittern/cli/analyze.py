"""The command that looks at what quantization did: analyze."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from bittern.cli.options import DATA_HELP, BatchSize, Columns, Force, Json, LabelColumn, split
from bittern.errors import InputError
from bittern.show import err_console, out_console, track


def analyze(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="Folder of a packed or simulated model.")],
    teacher: Annotated[str, typer.Option(help="Folder of the float model that it was made from.")],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report.")],
    against: Annotated[str | None, typer.Option(help="Another student of this teacher, shown beside it.")] = None,
    samples: Annotated[int, typer.Option(min=3, help="Samples of the test data, drawn at random.")] = 128,
    few: Annotated[int, typer.Option(min=1, help="How many of them serve what runs the model many times.")] = 32,
    with_curvature: Annotated[
        bool, typer.Option("--curvature", help="Hessian and loss surface too; takes long on large models.")
    ] = False,
    hessians: Annotated[int, typer.Option(min=1, help="Curvature: mini-batches that get a spectrum.")] = 8,
    eigenvalues: Annotated[int, typer.Option(min=1, help="Curvature: top eigenvalues of each.")] = 5,
    grid: Annotated[int, typer.Option(min=3, help="Curvature: points along a side of the loss surface.")] = 15,
    seed: Annotated[int, typer.Option(help="Seed of the draw and of random directions.")] = 0,
    columns: Columns = "",
    label_column: LabelColumn = None,
    max_length: Annotated[int, typer.Option(min=2, help="Most tokens of a text; of a language model's block.")] = 128,
    batch_size: BatchSize = 32,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show what quantization did to a model: a report by layer and head, in one HTML file.

    Interrupted, the same command goes on where it was.
    """
    from bittern.analysis.study import Curvature
    from bittern.analysis.study import analyze as run

    if grid % 2 == 0:
        raise InputError(f"grid is {grid}; expected an odd number, so that the student itself is in the middle")
    curvature = Curvature(hessians, eigenvalues, grid=grid) if with_curvature else None
    result = run(
        student,
        teacher,
        data,
        out,
        against=against,
        samples=samples,
        subset=few,
        seed=seed,
        curvature=curvature,
        force=force,
        on_estimate=None if as_json else print_estimate,
        track=track(as_json),
        columns=split(columns),
        label_column=label_column,
        max_length=max_length,
        batch_size=batch_size,
    )
    if as_json:
        print(json.dumps(result))
        return
    for model in result["students"]:
        out_console.print(f"What stands out in {model['name']}:", highlight=False, soft_wrap=True)
        for i, block in enumerate(model["worst"], 1):
            out_console.print(
                f"{i}. {block['name']}: alone it changes the output by {100 * block['error']:.2g} %; head "
                f"{block['head']} diverges most, {block['times']:.1f}× the median. {block['advice']}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
    out_console.print(f"Wrote {out}. Next: open [bold]{out / 'report.html'}[/] in a browser", soft_wrap=True)


def print_estimate(seconds: Mapping[str, float]) -> None:
    """Print what the analysis will take, before it starts, if that is more than a moment."""
    total = sum(seconds.values())
    if total > 10 and err_console.is_terminal:
        parts = ", ".join(f"{name} {duration(part)}" for name, part in seconds.items())
        err_console.print(f"about {duration(total)}: {parts}", highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
