"""Commands for packed models in use: bench."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any

import typer
from rich.table import Table

from bittern.cli.options import BatchSize, Json, Model
from bittern.show import add_columns, err_console, megabytes, out_console


def bench(
    model: Model,
    against: Annotated[str | None, typer.Option(help="The float model; by default the one it was made from.")] = None,
    batch_size: BatchSize = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each text.")] = 128,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of both models.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each model, in turn.")] = 15,
    as_json: Json = False,
) -> None:
    """Time a packed model beside its float model in PyTorch."""
    from bittern.deploy import bench as benches

    result = benches.bench(
        model,
        against=against,
        batch_size=batch_size,
        length=length,
        threads=threads,
        rounds=rounds,
    )
    if as_json:
        print(json.dumps(result))
        return
    _print(result)


def _print(result: dict[str, Any]) -> None:
    kernels = result["kernels"] or "none"
    table = Table(
        title=f"batch {result['batch_size']}, {result['threads']} threads, kernels: {kernels}", title_justify="left"
    )
    add_columns(table, "engine", "ms", "samples/s", "time / ours", "weights in memory", "file")
    for name, engine in result["engines"].items():
        sizes = (engine["weights_in_memory"], engine["file"])
        table.add_row(
            name,
            f"{engine['latency_ms']:.2f}",
            f"{engine['samples_per_second']:.1f}",
            f"{engine['times_ours']:.2f}",
            *("" if size is None else megabytes(size) for size in sizes),
        )
    out_console.print(table)
    out_console.print(
        f"medians of runs in turn; kernels and simulated model differ by {result['difference_kernels_simulated']:.1e}",
        highlight=False,
        soft_wrap=True,
    )
    if not result["kernels"]:
        err_console.print(
            f"no kernels here: {result['why_none']}; packed layers unpack their weights, which is slow", soft_wrap=True
        )
    for formats, count in Counter(result["without_kernel"].values()).items():
        err_console.print(f"no fast path for {formats} ({count} modules): they compute in float", soft_wrap=True)
