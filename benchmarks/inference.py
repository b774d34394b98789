"""Packed models and layers against the engines that are installed, in one alternating run.

    python benchmarks/inference.py --json benchmarks/results/inference.json
    python benchmarks/inference.py --quick --json      # two minutes; the last line is one JSON object

Layers: one linear layer with ternary weights and int8 activations, quantized on the way, against onnxruntime in float32
and in int8 (the faster of its dynamic and its static form) and PyTorch. Models: BERT-base, MiniLM-L6, ViT-B/16 and
DeiT-S with random weights, on which times do not depend, by recipe ternary-2-2-8. Each with 1 and 2 threads, quiet and
with another process that keeps one core busy. Figures are medians of paired ratios: other engine's time / our time.
Roofline: our operations a second in the product alone over what the instruction that our kernel lives on gives at most
here (peak.cpp, beside this file): vpmaddubsw with 16-bit sums on AVX2, vpdpbusd on AVX-512, tdpbsud on AMX.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from transformers import BertConfig, BertModel, DeiTConfig, DeiTModel, PreTrainedModel, ViTConfig, ViTModel

from bittern import calibrate, pack, simulate
from bittern.deploy import native
from bittern.deploy.bench import FLOAT, OURS, onnxruntime_engines, sample_batch, using_threads
from bittern.deploy.timing import alternate, ratios

SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "MiniLM-L6": lambda: BertModel(BertConfig(**SMALL | {"num_attention_heads": 12, "num_hidden_layers": 6})),
    "BERT-base": lambda: BertModel(BertConfig()),
    "DeiT-S": lambda: DeiTModel(DeiTConfig(**SMALL)),
    "ViT-B/16": lambda: ViTModel(ViTConfig()),
}
LAYERS = [(768, 3072), (3072, 768), (768, 768), (384, 1536)]
PEAKS = {"float32": (0, "-march=native"), "avx2": (1, "-mavx2"), "avx512": (2, "-march=native"), "amx": (3, "-mavx2")}


def peak(kind: str) -> float:
    """1e9 operations a second of one thread at most."""
    number, flags = PEAKS[kind]
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(__file__).with_name("peak.cpp"), f"{folder}/peak"
        subprocess.run(["c++", "-O2", flags, f"-DKIND={number}", str(source), "-o", program], check=True)
        return float(subprocess.run([program], check=True, capture_output=True, text=True).stdout)


@contextlib.contextmanager
def busy_core(busy: bool) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if process:
            process.kill()


def graph(form: str, codes: Tensor) -> bytes:
    """One linear layer as onnxruntime runs it fastest: Gemm, or int8 with a dynamic or a static scale."""
    outputs, inputs = codes.shape
    weight = codes.t().contiguous().numpy().astype("float32" if form == "float32" else "int8")
    constants = {"w": weight, "b": torch.zeros(outputs).numpy(), "s": torch.ones(outputs).numpy()}
    constants |= {"z": torch.zeros(outputs, dtype=torch.int8).numpy()}
    constants |= {"xs": torch.tensor(0.03).numpy(), "xz": torch.tensor(128, dtype=torch.uint8).numpy()}
    if form == "float32":
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"])]
    elif form == "dynamic":
        nodes = [helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s", "z", "b"], ["y"], domain="com.microsoft")]
    else:
        product = ["q", "w", "xs", "s", "xz", "z", "b"]
        nodes = [helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
                 helper.make_node("MatMulIntegerToFloat", product, ["y"], domain="com.microsoft")]  # fmt: skip
    used = {name for node in nodes for name in node.input}
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["m", k]) for n, k in (("x", inputs), ("y", outputs))]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    whole = helper.make_graph(nodes, "linear", ends[:1], ends[1:], tensors)
    made: bytes = helper.make_model(whole, opset_imports=opsets, ir_version=10).SerializeToString()
    return made


def time_layer(rows: int, inputs: int, outputs: int, rounds: int, most: float) -> dict[str, Any]:
    torch.manual_seed(0)
    codes, x = torch.randint(-1, 2, (outputs, inputs)), torch.randn(rows, inputs)
    panels, coding, weight = native.Panels(codes, torch.ones(()), 2, 1), native.Coding(-128, 127), codes.float()
    bias = native.padded_bias(None, panels)
    quantized = native.quantize(x, coding)
    assert quantized is not None

    def ours() -> Tensor:
        return native.linear(native.quantize(x, coding), panels, bias)  # type: ignore[arg-type]

    contenders: dict[str, Callable[[], object]] = {
        OURS: ours, "product": lambda: native.linear(quantized, panels, bias), FLOAT: lambda: F.linear(x, weight),
    }  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    for form in ("float32", "dynamic", "static"):
        session = onnxruntime.InferenceSession(graph(form, codes), options, providers=["CPUExecutionProvider"])
        contenders[form] = lambda session=session: session.run(None, {"x": x.numpy()})
    times = alternate(contenders, rounds)
    found = ratios(times, OURS)
    rate = 2 * rows * inputs * outputs / statistics.median(times["product"]) / 1e9
    return {
        "rows": rows, "inputs": inputs, "outputs": outputs, "ms": 1e3 * statistics.median(times[OURS]),
        "vs_fp32": found["float32"], "vs_int8": min(found["dynamic"], found["static"]), "vs_torch": found[FLOAT],
        "gops": rate, "roofline_share": rate / (most * torch.get_num_threads()),
    }  # fmt: skip


def time_model(name: str, batch_size: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    batch = sample_batch(model, batch_size, 128)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        engines = onnxruntime_engines(model, batch, Path(folder))
        packed = MODELS[name]().eval()
        simulate(packed, "ternary-2-2-8", batch)
        calibrate(packed, [batch])
        pack(packed)
        contenders: dict[str, Callable[[], object]] = {
            OURS: lambda: packed(**batch),
            FLOAT: lambda: model(**batch),
        } | engines
        times = alternate(contenders, rounds)
    found = ratios(times, OURS)
    return {
        "model": name, "batch": batch_size, "ms": 1e3 * statistics.median(times[OURS]),
        "vs_fp32": found["onnxruntime float32"], "vs_int8": found["onnxruntime int8"], "vs_torch": found[FLOAT],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", nargs="?", const="", help="write the results to this file too; the last line is JSON")
    parser.add_argument("--quick", action="store_true", help="one thread, quiet, fewer shapes")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), help="all by default, two if quick")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--kind", help="avx2, avx512 or amx; the best by default")
    args = parser.parse_args()
    models = args.models or list(MODELS)[: 2 if args.quick else None]
    native.use(args.kind)
    kind = native.engine()[0]
    peaks = {name: peak(name) for name in ("float32", kind)}
    print(f"kernels: {kind}; peaks of one thread, 1e9 operations/s: {peaks}", flush=True)
    results: dict[str, Any] = {"kernels": kind, "peaks": peaks, "layers": [], "models": []}
    rounds = 7 if args.quick else 15
    for threads in [1] if args.quick else args.threads:
        for busy in [False] if args.quick else [False, True]:
            with using_threads(threads), busy_core(busy):
                where = {"threads": threads, "busy": busy}
                for rows in (1, 128) if args.quick else (1, 8, 128, 1024):
                    for inputs, outputs in LAYERS[:3] if args.quick else LAYERS:
                        _tell(results["layers"], time_layer(rows, inputs, outputs, 4 * rounds, peaks[kind]) | where)
                for name in models:
                    for batch in (1,) if args.quick else (1, 8):
                        _tell(results["models"], time_model(name, batch, rounds) | where)
    large = [r for r in results["layers"] if r["rows"] >= 128 and not r["busy"]]
    summary = {
        "linear_vs_fp32": statistics.median(r["vs_fp32"] for r in large),
        "linear_vs_int8": statistics.median(r["vs_int8"] for r in large),
        "model_vs_fp32": min((r["vs_fp32"] for r in results["models"] if not r["busy"]), default=None),
        "roofline_share": statistics.median(r["roofline_share"] for r in large),
    }
    if args.json:
        Path(args.json).write_text(json.dumps(summary | results, indent=2) + "\n")
    print(json.dumps(summary))


def _tell(results: list[Any], found: dict[str, Any]) -> None:
    results.append(found)
    print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()), flush=True)


if __name__ == "__main__":
    main()
