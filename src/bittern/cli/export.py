"""The command that leaves for other runtimes: export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bittern.cli.options import DATA_HELP, BatchSize, Columns, Force, Json, LabelColumn, Model, split
from bittern.errors import InputError
from bittern.show import kept, megabytes, out_console, track

KINDS = {
    "static": "multiplied as bytes, static ranges of inputs",
    "dynamic": "multiplied as bytes, ranges of inputs found at run time",
    "nbits": "MatMulNBits, codes packed",
    "portable": "DequantizeLinear and MatMul, codes packed",
    "rows": "embeddings, rows unpacked as they are read",
    "stored": "integer weights, computed in float",
    "float": "float",
}


def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder, or a file that ends in .onnx.")],
    to: Annotated[str, typer.Option(help="The format to write; onnx is what there is.")] = "onnx",
    form: Annotated[
        str, typer.Option(help="Of the weights: int8 (fast), nbits (small, for onnxruntime) or portable (small).")
    ] = "int8",
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Find ranges of inputs at run time, not before.")] = False,
    safe: Annotated[
        bool, typer.Option("--safe", help="Full 8-bit weights that cannot saturate on x86 without VNNI.")
    ] = False,
    data: Annotated[str | None, typer.Option(help=f"To check the file on. {DATA_HELP} Made up by default.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to check the file on.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    columns: Columns = "",
    label_column: LabelColumn = None,
    batch_size: BatchSize = 32,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a model for another runtime, run the file and compare it with the simulated model."""
    if to != "onnx":
        raise InputError(f"cannot export to {to!r}; give onnx")
    from bittern.deploy.onnx import export as onnx

    result = onnx.export(
        model,
        out,
        form=form,  # type: ignore[arg-type]
        dynamic=dynamic,
        safe=safe,
        data=data,
        samples=samples,
        seed=seed,
        force=force,
        track=track(as_json),
        columns=split(columns),
        label_column=label_column,
        batch_size=batch_size,
    )
    print(json.dumps(result)) if as_json else _print(result)


def _print(result: dict[str, Any]) -> None:
    def line(text: str) -> None:
        out_console.print(text, highlight=False, soft_wrap=True)

    for kind, count in result["layers"].items():
        line(f"{count:4} layers: {KINDS[kind]}")
    nodes = ", ".join(f"{count} {kind}" for kind, count in result["float_nodes"].items())
    line(f"in float: {kept(result['kept_float'])}; of all operators {nodes}")
    if result["may_saturate"]:
        line(
            f"{len(result['may_saturate'])} layers have 8-bit weights that may saturate on x86 without VNNI: there "
            "set session.x64quantprecision=1, or export with --safe"
        )
    parity = result["parity"]
    same = "" if parity["agreement"] is None else f"agreement {parity['agreement']:.4f}, "
    line(
        f"against the simulated model on {parity['samples']} samples ({result['data']}): {same}relative error "
        f"{parity['error']:.2e}, largest {parity['largest']:.2e}"
    )
    line(
        f"against the exact model: the file {parity['file']:.2e}, its arithmetic in PyTorch {parity['twin']:.2e} "
        f"(limit {parity['limit']:.2e}; {parity['drift']:.2e} apart), the simulated model {parity['simulated']:.2e}"
    )
    line(f"Wrote {result['out']}, {megabytes(result['bytes'])}")
