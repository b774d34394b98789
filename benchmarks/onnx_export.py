"""Our int8 ONNX export against onnxruntime's own quantizers, on the same float model, in one alternating run.

    python benchmarks/onnx_export.py MINILM_SST2 SST2 --json benchmarks/results/onnx_export.json

MINILM_SST2: folder of MiniLM-L6 fine-tuned on SST-2; SST2: folder with its train.parquet and validation.parquet.
With --work FOLDER the files are kept there and used again, so that a second call only measures.
The second model is DeiT-S with random weights: time does not depend on them, but its error says nothing about accuracy.
All contenders get the same float weights and the same calibration samples, 128 texts or 32 images:
`float` our float export; `static`, `dynamic` our export of w8a8 with extremes; `safe` the same as `static` without
saturation anywhere; `ort static` onnxruntime's quantize_static (QDQ, unsigned activations, signed weights per channel,
MinMax); `ort dynamic` quantize_dynamic per channel; `reduced` with 7-bit weights, which is what its documentation
advises for x86 without VNNI. Error: relative, in the 2-norm, of all outputs from the float export's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from transformers import DeiTConfig, DeiTForImageClassification, PreTrainedModel

from bittern import calibrate, load, pack, save, simulate
from bittern.data import load_splits
from bittern.deploy.bench import alternate, ratios
from bittern.deploy.onnx.export import export
from bittern.deploy.onnx.parity import complete, session

Feed = dict[str, np.ndarray]


class Samples(CalibrationDataReader):
    """Calibration batches as onnxruntime asks for them."""

    def __init__(self, feeds: list[Feed]):
        self.left = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self.left, None)


def theirs(source: Path, folder: Path, feeds: list[Feed]) -> None:
    """What onnxruntime's quantizers make of a float file, by their own recipe: preprocessing first."""
    ready = folder / "ready.onnx"
    quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    weights: dict[str, Any] = {"per_channel": True, "weight_type": QuantType.QInt8}
    for name, reduced in (("ort static", False), ("ort static reduced", True)):
        quantize_static(
            ready,
            folder / f"{name}.onnx",
            Samples(feeds),
            quant_format=QuantFormat.QDQ,
            reduce_range=reduced,
            activation_type=QuantType.QUInt8,
            calibrate_method=CalibrationMethod.MinMax,
            **weights,
        )
    for name, reduced in (("ort dynamic", False), ("ort dynamic reduced", True)):
        model = onnx.load(ready)
        model.graph.ClearField("value_info")  # of Gemm's weights, which it transposes
        quantize_dynamic(model, folder / f"{name}.onnx", reduce_range=reduced, **weights)


def ours(model_folder: Path, folder: Path, batches: list[dict[str, torch.Tensor]], data: str | None) -> None:
    model = load(model_folder)
    simulate(model, "w8a8", batches[0])
    calibrate(model, batches)
    save(pack(model), folder / "w8a8", processors_from=model_folder, force=True)
    export(model_folder, folder / "float.onnx", data=data, samples=16, force=True)
    for name, options in (("static", {}), ("dynamic", {"dynamic": True}), ("safe", {"safe": True})):
        export(folder / "w8a8", folder / f"{name}.onnx", data=data, samples=16, force=True, **options)


def prepare(
    model_folder: Path, folder: Path, batches: list[dict[str, torch.Tensor]], data: str | None
) -> dict[str, Path]:
    """The contenders' files in `folder`, made unless they are there."""
    names = [
        "float",
        "static",
        "dynamic",
        "safe",
        "ort static",
        "ort static reduced",
        "ort dynamic",
        "ort dynamic reduced",
    ]
    files = {name: folder / f"{name}.onnx" for name in names}
    if not all(files[name].exists() for name in names[:4]):
        ours(model_folder, folder, batches, data)
    if not all(files[name].exists() for name in names[4:]):
        theirs(files["float"], folder, [{k: v.numpy() for k, v in b.items()} for b in batches])
    return files


def measure(
    files: dict[str, Path], test: list[Feed], timed: list[Feed], labels: np.ndarray | None, rounds: int, threads: int
) -> dict[str, Any]:
    running = {name: session(file, threads) for name, file in files.items()}
    result: dict[str, Any] = {name: {"speed": [], "best_ms": []} for name in running}
    for feed in timed:
        calls: dict[str, Callable[[], object]] = {n: (lambda s=s, f=feed: s.run(None, f)) for n, s in running.items()}
        times = alternate(calls, rounds)
        relative = ratios(times, "float")
        for name, entry in result.items():
            entry["speed"].append(round(1 / relative[name], 3))
            entry["best_ms"].append(round(1e3 * min(times[name]), 2))
    print("   timed; now the errors", flush=True)
    outputs = {name: np.concatenate([s.run(None, f)[0] for f in test]) for name, s in running.items()}
    for name, entry in result.items():
        wrong, chosen = outputs[name] - outputs["float"], outputs[name].argmax(-1)
        entry["error"] = round(float(np.linalg.norm(wrong) / np.linalg.norm(outputs["float"])), 5)
        entry["agreement"] = round(float((chosen == outputs["float"].argmax(-1)).mean()), 4)
        if labels is not None:
            entry["accuracy"] = round(float((chosen == labels).mean()), 4)
        entry["megabytes"] = round(files[name].stat().st_size / 1e6, 2)
        entry["nodes"] = fused(files[name])
    return result


def fused(file: Path) -> dict[str, int]:
    """Integer products in the graph that onnxruntime makes of a file."""
    optimized = file.with_suffix(".optimized")
    session(file, 1, optimized)
    kinds = [node.op_type for node in onnx.load(optimized).graph.node]
    wanted = (
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "QLinearMatMul",
        "QGemm",
        "MatMulInteger",
        "QLinearConv",
        "ConvInteger",
    )
    return {kind: kinds.count(kind) for kind in wanted if kind in kinds}


def texts(folder: Path, data: str, work: Path, rounds: int, threads: int) -> dict[str, Any]:
    model = load(folder)
    train, test = load_splits(data, model, folder)
    assert train is not None
    assert test is not None
    assert test.labels is not None
    files = prepare(folder, work, [complete(model, b) for b in train.subset(128)], data)
    timed = [random_text(model, batch, length) for batch, length in ((1, 128), (8, 128), (1, 16))]
    feeds = [{k: v.numpy() for k, v in complete(model, b).items()} for b in test]
    return measure(files, feeds, timed, test.labels.numpy(), rounds, threads)


def random_text(model: PreTrainedModel, batch: int, length: int) -> Feed:
    ids = torch.randint(1000, 30000, (batch, length), generator=torch.Generator().manual_seed(0))
    return {k: v.numpy() for k, v in complete(model, {"input_ids": ids}).items()}


def images(work: Path, rounds: int, threads: int) -> dict[str, Any]:
    torch.manual_seed(0)
    config = DeiTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, num_labels=1000
    )
    pictures = torch.randn(48, 3, 224, 224)
    if not (work / "float").exists():
        save(DeiTForImageClassification(config).eval(), work / "float")
    files = prepare(work / "float", work, [{"pixel_values": pictures[i : i + 8]} for i in range(0, 32, 8)], None)
    feeds = [{"pixel_values": pictures[i : i + 8].numpy()} for i in range(32, 48, 8)]
    timed = [{"pixel_values": pictures[:n].numpy()} for n in (1, 8)]
    return measure(files, feeds, timed, None, rounds, threads)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in lines if line.startswith("flags"))
    name = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return name + ", " + " ".join(f for f in ("avx2", "avx512_vnni", "avx_vnni", "amx_int8") if f in flags)


def show(name: str, result: dict[str, Any]) -> None:
    print(f"{name}: speed × float at each shape", flush=True)
    for contender, entry in result.items():
        speeds = " ".join(f"{speed:5.2f}" for speed in entry["speed"])
        print(f"   {contender:20} {speeds}   { {k: v for k, v in entry.items() if k not in ('speed', 'best_ms')} }")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minilm", type=Path)
    parser.add_argument("sst2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", choices=("MiniLM-L6", "DeiT-S"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {
        "processor": processor(),
        "threads": options.threads,
        "rounds": options.rounds,
        "shapes": {"MiniLM-L6": ["1 × 128", "8 × 128", "1 × 16"], "DeiT-S": ["1 × 197", "8 × 197"]},
    }
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        for name in ("MiniLM-L6", "DeiT-S"):
            if options.only in (None, name):
                (work / name).mkdir(parents=True, exist_ok=True)
                how = work / name, options.rounds, options.threads
                results[name] = texts(options.minilm, options.sst2, *how) if name == "MiniLM-L6" else images(*how)
                show(name, results[name])
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
