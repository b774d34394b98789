"""Commands for packed models in use: export, bench."""

from __future__ import annotations

from collections import Counter
from typing import Any

from bittern.cli.options import BATCH_SIZE, COLUMNS, DATA_HELP, FORCE, MODEL, Option, command
from bittern.deploy import bench as benches
from bittern.deploy.onnx import export as onnx
from bittern.show import err_console, kept, megabytes, print_table, say

KINDS = {
    "static": "multiplied as bytes, static ranges of inputs",
    "dynamic": "multiplied as bytes, ranges of inputs found at run time",
    "nbits": "MatMulNBits, codes packed",
    "portable": "DequantizeLinear and MatMul, codes packed",
    "rows": "embeddings, rows unpacked as they are read",
    "stored": "integer weights, computed in float",
    "float": "float",
}


@command(
    onnx.export,
    {
        "source": MODEL,
        "out": Option("A folder, or a file that ends in .onnx.", ("--out", "-o")),
        "to": Option("The format to write; onnx is what there is."),
        "form": Option("Of the weights: int8 (fast), nbits (small, for onnxruntime) or portable (small)."),
        "dynamic": Option("Find ranges of inputs at run time, not before."),
        "safe": Option("Full 8-bit weights that cannot saturate on x86 without VNNI."),
        "data": Option(f"To check the file on. {DATA_HELP} Made up by default."),
        "samples": Option("Samples to check the file on.", least=1),
        "seed": Option("Of the samples."),
        **COLUMNS,
        "batch_size": BATCH_SIZE,
        **FORCE,
    },
)
def export(result: dict[str, Any], given: dict[str, Any]) -> None:
    """Write a model for another runtime, run the file and compare it with the simulated model."""
    for kind, count in result["layers"].items():
        say(f"{count:4} layers: {KINDS[kind]}")
    nodes = ", ".join(f"{count} {kind}" for kind, count in result["float_nodes"].items())
    say(f"in float: {kept(result['kept_float'])}; of all operators {nodes}")
    if result["may_saturate"]:
        say(
            f"{len(result['may_saturate'])} layers have 8-bit weights that may saturate on x86 without VNNI: there "
            "set session.x64quantprecision=1, or export with --safe"
        )
    parity = result["parity"]
    same = "" if parity["agreement"] is None else f"agreement {parity['agreement']:.4f}, "
    say(
        f"against the simulated model on {parity['samples']} samples ({result['data']}): {same}relative error "
        f"{parity['error']:.2e}, largest {parity['largest']:.2e}"
    )
    say(
        f"against the exact model: the file {parity['file']:.2e}, its arithmetic in PyTorch {parity['twin']:.2e} "
        f"(limit {parity['limit']:.2e}; {parity['drift']:.2e} apart), the simulated model {parity['simulated']:.2e}"
    )
    say(f"Wrote {result['out']}, {megabytes(result['bytes'])}")


@command(
    benches.bench,
    {
        "path": MODEL,
        "against": Option("The float model; by default the one it was made from."),
        "batch_size": BATCH_SIZE,
        "length": Option("Tokens of each text.", least=1),
        "threads": Option("Threads of both models.", least=1),
        "rounds": Option("Timed runs of each model, in turn.", least=1),
    },
)
def bench(result: dict[str, Any], given: dict[str, Any]) -> None:
    """Time a packed model beside its float model in PyTorch."""
    rows = [
        (
            name,
            f"{engine['latency_ms']:.2f}",
            f"{engine['samples_per_second']:.1f}",
            f"{engine['times_ours']:.2f}",
            *("" if engine[size] is None else megabytes(engine[size]) for size in ("weights_in_memory", "file")),
        )
        for name, engine in result["engines"].items()
    ]
    kernels = result["kernels"] or "none"
    title = f"batch {result['batch_size']}, {result['threads']} threads, kernels: {kernels}"
    print_table(("engine", "ms", "samples/s", "time / ours", "weights in memory", "file"), rows, title)
    error = result["difference_kernels_simulated"]
    say(f"medians of runs in turn; kernels and simulated model differ by {error:.1e}")
    if not result["kernels"]:
        why = result["why_none"]
        say(f"no kernels here: {why}; packed layers unpack their weights, which is slow", err_console)
    for formats, count in Counter(result["without_kernel"].values()).items():
        say(f"no fast path for {formats} ({count} modules): they compute in float", err_console)
