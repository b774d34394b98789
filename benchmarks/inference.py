"""Packed models and layers against the engines that are installed, in one alternating run.

    python benchmarks/inference.py --json benchmarks/results/inference.json
    python benchmarks/inference.py --quick --json      # two minutes; the last line is one JSON object
    python benchmarks/inference.py --table benchmarks/results/inference.json

Layers: one linear layer with ternary weights and int8 activations, quantized on the way, against onnxruntime in
float32 and in int8 (the faster of its dynamic and its static form) and PyTorch. Models: BERT-base, MiniLM-L6, ViT-B/16
and DeiT-S with random weights, on which times do not depend, by three recipes: ternary-2-2-8 (dynamic scales), w4a8 and
w8a8 (static). `vs_ENGINE` is that engine's time by ours with ternary weights; `vs_best` the least such ratio over all
other engines and our three recipes. Each with 1 and 2 threads, quiet and with another process that keeps one core busy.
Figures are medians of paired ratios: other engine's time / our time. With 2 threads a call that counts comes after a
pause and a call that does not: onnxruntime's threads spin for up to 50 ms, and would take a core of whoever comes next.
Roofline: our operations a second in the product alone over what the instruction that our kernel lives on gives at most
here (peak.cpp, beside this file): vpmaddubsw with 16-bit sums on AVX2, vpdpbusd on AVX-512, tdpbsud on AMX.

Breakdown: milliseconds of a quiet model with ternary weights on one thread in products of linear layers (and at least,
by the roofline), rounding, attention with its softmax, norms and activations, each by itself; in its blocks as they
run, where these share passes; and in Python and all else outside the blocks.

`load_before` is the machine's load average when a measurement began: what else ran there, besides us.

With --json FILE each figure is written as soon as it is there, and those in the file already are not measured again;
--seconds ends a run early. --cache FOLDER keeps the exported models.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torch.nn.functional as F
from engines import all_engines
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from transformers import BertConfig, BertModel, DeiTConfig, DeiTModel, PreTrainedModel, ViTConfig, ViTModel

from bittern import calibrate, native, pack, simulate
from bittern.deploy import blocks
from bittern.deploy.bench import FLOAT, OURS, alternate, ratios, sample_batch, using_threads
from bittern.native.block import LAYER_NAMES

SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "MiniLM-L6": lambda: BertModel(BertConfig(**SMALL | {"num_attention_heads": 12, "num_hidden_layers": 6})),
    "BERT-base": lambda: BertModel(BertConfig()),
    "DeiT-S": lambda: DeiTModel(DeiTConfig(**SMALL)),
    "ViT-B/16": lambda: ViTModel(ViTConfig()),
}
RECIPES = {OURS: "ternary-2-2-8", f"{OURS} w4a8": "w4a8", f"{OURS} w8a8": "w8a8"}
LAYERS = [(768, 3072), (3072, 768), (768, 768), (384, 1536)]
PAUSE = 0.1  # seconds that threads of other engines may spin on after a call
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


def in_turn(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """`alternate`; with several threads, each call that counts comes after a pause and one that does not."""
    if torch.get_num_threads() == 1:
        return alternate(contenders, rounds)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        for name in list(contenders)[:: 1 if i % 2 == 0 else -1]:
            time.sleep(PAUSE)
            contenders[name]()
            start = time.perf_counter()
            contenders[name]()
            times[name].append(time.perf_counter() - start)
    return times


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
        inputs_of = ["q", "w", "xs", "s", "xz", "z", "b"]
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
            helper.make_node("MatMulIntegerToFloat", inputs_of, ["y"], domain="com.microsoft"),
        ]
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
    quantized = native.quantize_rows(x, coding)
    assert quantized is not None

    def ours() -> Tensor:
        return native.linear(native.quantize_rows(x, coding), panels, bias)  # type: ignore[arg-type]

    contenders: dict[str, Callable[[], object]] = {
        OURS: ours,
        "product": lambda: native.linear(quantized, panels, bias),
        FLOAT: lambda: F.linear(x, weight),
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    for form in ("float32", "dynamic", "static"):
        session = onnxruntime.InferenceSession(graph(form, codes), options, providers=["CPUExecutionProvider"])
        contenders[form] = lambda session=session: session.run(None, {"x": x.numpy()})
    times = alternate(contenders, rounds)
    found = ratios(times, OURS)
    rate = 2 * rows * inputs * outputs / statistics.median(times["product"]) / 1e9
    return {
        "ms": 1e3 * statistics.median(times[OURS]),
        "vs_fp32": found["float32"],
        "vs_int8": min(found["dynamic"], found["static"]),
        "vs_torch": found[FLOAT],
        "gops": rate,
        "roofline_share": rate / (most * torch.get_num_threads()),
    }


@dataclass
class Contenders:
    """One model by every engine, for one batch size and number of tokens (images have their own).

    Other engines are made for each number of threads.
    """

    name: str
    batch_size: int
    tokens: int
    cache: Path

    def __post_init__(self) -> None:
        self.model = self.make()
        self.batch = sample_batch(self.model, self.batch_size, self.tokens)
        self.packed = {name: self.make() for name in RECIPES}
        for name, model in self.packed.items():
            simulate(model, RECIPES[name], self.batch)
            calibrate(model, [self.batch])
            pack(model)
        self.folder = self.cache / f"{self.name.replace('/', '-')}-{self.batch_size}-{self.tokens}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def make(self) -> PreTrainedModel:
        torch.manual_seed(0)
        return MODELS[self.name]().eval()

    @torch.no_grad()
    def time(self, rounds: int, most: float, threads: int, busy: bool) -> dict[str, Any]:
        contenders: dict[str, Callable[[], object]] = {
            name: partial(model, **self.batch) for name, model in self.packed.items()
        }
        contenders |= {FLOAT: partial(self.model, **self.batch)} | all_engines(self.model, self.batch, self.folder)
        for name in RECIPES:  # plans are made, and blocks seen to follow each other
            for _ in range(3):
                contenders[name]()
        times = in_turn(contenders, rounds)
        found = {base: ratios(times, base) for base in RECIPES}
        others = [name for name in contenders if name not in RECIPES]
        best, engine, ours = min((found[base][name], name, base) for base in RECIPES for name in others)
        made = {"ms": 1e3 * statistics.median(times[OURS])}
        made |= {f"ms_{RECIPES[name]}": 1e3 * statistics.median(times[name]) for name in RECIPES if name != OURS}
        made |= {key: found[OURS][name] for key, name in ENGINES.items() if name in contenders}
        made |= {"vs_best": best, "best": engine, "best_against": RECIPES[ours]}
        return made if busy or threads > 1 else made | {"breakdown": self.breakdown(rounds, most)}

    def breakdown(self, rounds: int, most: float) -> dict[str, float]:
        """Milliseconds of the parts of a forward."""
        model, run, seen = (
            self.packed[OURS],
            blocks.run_blocks,
            list[tuple[Sequence[blocks.KernelBlock], Tensor, Tensor | None]](),
        )
        blocks.run_blocks = lambda *given: seen.append(given) or run(*given)
        try:
            model(**self.batch)
        finally:
            blocks.run_blocks = run
        library, ran = native.library.required(), [block for some, *_ in seen for block in some]
        batch, tokens, hidden = seen[0][1].shape
        x, mask, rows = torch.randn(batch, tokens, hidden), seen[0][2], batch * tokens
        products: list[Callable[[], object]] = []
        rounding: list[Callable[[], object]] = []
        middle: list[Callable[[], object]] = []
        attentions: list[Callable[[], object]] = []
        operations = 0
        for block in ran:
            for part in LAYER_NAMES:
                layer = block.layers[part]
                wide = torch.randn(rows, layer.panels.inputs)
                codes = native.quantize_rows(wide, layer.coding)
                assert codes is not None
                out = torch.empty(rows, layer.panels.outputs)
                operations += 2 * out.numel() * layer.panels.inputs
                given = (codes.structure(), layer.panels.structure(layer.bias, layer.coding), 0, 1, out.data_ptr())
                products.append(lambda given=given, keep=(codes, out): library.bittern_linear(*given))
                if part not in ("key", "value"):  # which read what the query reads
                    rounding.append(partial(native.quantize_rows, wide, layer.coding))
            middle += [partial(native.norm, x, n.weight, n.bias, n.epsilon) for n in block.norms]
            middle.append(
                partial(native.activate, torch.randn(rows, block.layers["up"].panels.outputs), block.activation)
            )
            heads = torch.randn(batch, tokens, block.shape[1], hidden // block.shape[1]).transpose(1, 2)
            attentions.append(partial(native.attention, heads, heads, heads, mask, 0.1, dict(block.codings)))

        def each(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
            return lambda: [call() for call in calls]

        whole = {"whole": partial(model, **self.batch), "blocks": each([partial(run, *given) for given in seen])}
        parts = {"products": products, "rounding": rounding, "attention": attentions, "norms, activations": middle}
        times = alternate(whole | {name: each(calls) for name, calls in parts.items()}, 2 * rounds)
        found = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
        limit = 1e3 * operations / (most * 1e9)
        return found | {"products at least": limit, "outside": found["whole"] - found["blocks"]}


# How a result calls another engine's time by ours.
ENGINES = {
    "vs_fp32": "onnxruntime float32",
    "vs_int8": "onnxruntime int8",
    "vs_ctranslate2": "ctranslate2 int8",
    "vs_openvino_fp32": "openvino float32",
    "vs_openvino": "openvino int8",
    "vs_torch": FLOAT,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", nargs="?", const="", help="write the results to this file too; the last line is JSON")
    parser.add_argument("--quick", action="store_true", help="one thread, quiet, fewer shapes")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), help="all by default, two if quick")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--kind", help="avx2, avx512 or amx; the best by default")
    parser.add_argument(
        "--busy", nargs="*", type=int, default=[0, 1], help="0: quiet, 1: one core busy; both by default"
    )
    parser.add_argument("--no-layers", action="store_true", help="models only")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="measure nothing new after so many seconds")
    parser.add_argument("--cache", type=Path, help="folder for exported models; by default they are made anew")
    parser.add_argument("--table", type=Path, help="print the tables of a file and do nothing else")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    started = time.monotonic()
    models = args.models if args.models is not None else list(MODELS)[: 2 if args.quick else None]
    native.use(args.kind)
    kind = native.engine()[0]
    results = _load(args.json)
    if results.setdefault("kernels", kind) != kind:
        raise SystemExit(f"{args.json} holds figures of kernels {results['kernels']}, not of {kind}")
    if "peaks" not in results:
        results["peaks"] = {name: peak(name) for name in ("float32", kind)}
    print(f"kernels: {kind}; peaks of one thread, 1e9 operations/s: {results['peaks']}", flush=True)
    conditions = [(1, False)] if args.quick else [(t, bool(b)) for b in args.busy for t in args.threads]

    def measure(part: str, what: dict[str, Any], call: Callable[[], dict[str, Any]]) -> None:
        if time.monotonic() - started > args.seconds or any(what.items() <= known.items() for known in results[part]):
            return
        with using_threads(what["threads"]), busy_core(what["busy"]):
            load = os.getloadavg()[0]
            results[part].append(what | call() | {"load_before": load})
        print(_line(results[part][-1]), flush=True)
        _save(args.json, results)

    rounds = 6 if args.quick else 9
    for threads, busy in [] if args.no_layers else conditions:
        for rows in (1, 128) if args.quick else (1, 8, 128, 1024):
            for inputs, outputs in LAYERS[:3] if args.quick else LAYERS:
                what = {"rows": rows, "inputs": inputs, "outputs": outputs, "threads": threads, "busy": busy}
                few = rounds if rows > 128 else 4 * rounds
                measure("layers", what, partial(time_layer, rows, inputs, outputs, few, results["peaks"][kind]))
    with tempfile.TemporaryDirectory() as folder:
        for name in models:
            text = name in ("BERT-base", "MiniLM-L6")
            lengths = (128, 16) if text and not (args.quick and name == "BERT-base") else (128,)
            for batch, tokens in product((1,) if args.quick else (1, 8), lengths):
                made: list[Contenders] = []  # when first needed
                for threads, busy in conditions:

                    def call(
                        key: tuple[str, int, int] = (name, batch, tokens),
                        made: list[Contenders] = made,
                        condition: tuple[int, bool] = (threads, busy),
                    ) -> dict[str, Any]:
                        made[:] = made or [Contenders(*key, args.cache or Path(folder))]
                        return made[0].time(rounds if key[1] == 1 else 5, results["peaks"][kind], *condition)

                    size = {"tokens": tokens} if text else {}
                    what = {"model": name, "batch": batch, "threads": threads, "busy": busy} | size
                    measure("models", what, call)
    print(json.dumps(_summary(results)))


def _summary(results: dict[str, Any]) -> dict[str, Any]:
    large = [r for r in results["layers"] if r["rows"] >= 128 and not r["busy"]]
    middle = {
        key: statistics.median(r[key] for r in large) if large else None
        for key in ("vs_fp32", "vs_int8", "roofline_share")
    }
    worst = min(
        (r for r in results["models"] if not r["busy"] and "vs_best" in r), key=itemgetter("vs_best"), default={}
    )
    return {
        "model_vs_best": worst.get("vs_best"),
        "model_vs_best_engine": worst.get("best"),
        "linear_vs_fp32": middle["vs_fp32"],
        "linear_vs_int8": middle["vs_int8"],
        "model_vs_fp32": min((r["vs_fp32"] for r in results["models"] if not r["busy"]), default=None),
        "roofline_share": middle["roofline_share"],
    }


def table(results: dict[str, Any]) -> str:
    """Models, then layers: a row for each shape and number of threads; the last columns are with a busy core."""
    ratios_shown = {"vs_fp32": "onnxruntime float32", "vs_int8": "onnxruntime int8"}
    others = {
        "vs_ctranslate2": "CTranslate2 int8",
        "vs_openvino_fp32": "OpenVINO float32",
        "vs_openvino": "OpenVINO int8",
        "vs_torch": "PyTorch float32",
        "vs_best": "best / slowest of ours",
    }

    def grid(part: str, keys: list[str], more: dict[str, str]) -> list[str]:
        times = {"ms": "ms", "ms_w4a8": "ms w4a8", "ms_w8a8": "ms w8a8"} if part == "models" else {"ms": "ms"}
        columns = [(False, *pair) for pair in times.items()] + [
            (False, *pair) for pair in (ratios_shown | more).items()
        ]
        columns += [(True, name, f"busy: {text}") for name, text in ratios_shown.items()]
        rows: dict[tuple[Any, ...], dict[bool, dict[str, Any]]] = {}
        for found in results[part]:
            rows.setdefault(tuple(found.get(k, "") for k in keys), {})[found["busy"]] = found
        head = [*keys, *(text for _, _, text in columns)]
        lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for key, cells in rows.items():
            values = (cells.get(busy, {}).get(name) for busy, name, _ in columns)
            lines.append(f"| {' | '.join([*map(str, key), *('' if v is None else f'{v:.3g}' for v in values)])} |")
        return lines

    models = grid("models", ["model", "batch", "tokens", "threads"], others)
    parts = [
        ({key: r.get(key, "") for key in ("model", "batch", "tokens")}, r.get("breakdown")) for r in results["models"]
    ]
    rows = [what | {key: f"{ms:.3g}" for key, ms in found.items()} for what, found in parts if found]
    head = list(rows[0]) if rows else []
    broken = [f"| {' | '.join(map(str, row))} |" for row in ([head] if head else []) + [[*r.values()] for r in rows]]
    broken[1:1] = [f"|{'---|' * len(head)}"] if head else []
    return "\n".join(
        [
            *models,
            "",
            *broken,
            "",
            *grid("layers", ["inputs", "outputs", "rows", "threads"], {"roofline_share": "roofline"}),
        ]
    )


def _load(file: str | None) -> dict[str, Any]:
    known = json.loads(Path(file).read_text()) if file and Path(file).exists() else {}
    return {"layers": [], "models": []} | known


def _save(file: str | None, results: dict[str, Any]) -> None:
    if file:
        part = Path(file).with_suffix(".part")
        part.write_text(json.dumps(results | _summary(results), indent=2) + "\n")
        part.rename(file)


def _line(found: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items())


if __name__ == "__main__":
    main()
