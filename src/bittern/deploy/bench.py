"""How fast and how large a packed model is, beside its float model and the other engines that are installed."""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bittern import attention, native
from bittern.anatomy import dummy_batch
from bittern.deploy.checkpoint import is_packed, module_formats
from bittern.deploy.engines import ctranslate2_engine
from bittern.deploy.packed import PackedLayer
from bittern.deploy.store import REPORT, load, measure
from bittern.deploy.timing import alternate, ratios
from bittern.errors import InputError, ModelError
from bittern.kernels import has_kernel
from bittern.progress import Track, silent
from bittern.recipe import OPERANDS, Rule

OURS, FLOAT = "bittern", "torch float32"


def bench(
    path: str | Path,
    *,
    against: str | Path | None = None,
    batch_size: int = 1,
    length: int = 128,
    threads: int | None = None,
    rounds: int = 15,
    track: Track = silent,
) -> dict[str, Any]:
    """Paired timings of the packed model in `path` and of its float model by every engine that is there.

    against: the float model; by default the one that the report in `path` names. Raises ModelError if `path` holds no
    packed model and InputError if there is no float model to compare with.
    """
    model = load(path)
    if not is_packed(model):
        raise ModelError(f"{path} holds no packed model; make one with bittern quantize, ptq or qat")
    other = load(_source(Path(path)) if against is None else against)
    batch = sample_batch(other, batch_size, length)
    with using_threads(threads), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        contenders: dict[str, Callable[[], object]] = {OURS: lambda: model(**batch), FLOAT: lambda: other(**batch)}
        contenders |= onnxruntime_engines(other, batch, Path(folder), track)
        contenders |= ctranslate2_engine(other, batch, Path(folder))
        times = alternate(contenders, rounds)
        out, with_kernels = model(**batch), native.available()
        with native.disabled():
            expected = model(**batch)
        files = {name: file.stat().st_size for name in contenders if (file := Path(folder) / f"{name}.onnx").exists()}
    found = ratios(times, OURS)
    size = measure(model, path)
    model(**batch)  # puts the codes in the kernels' order again
    memory = {OURS: weight_bytes(model), FLOAT: weight_bytes(other)}
    sizes = files | {OURS: size.file, FLOAT: size.float32}
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "model": str(path),
        "kernels": native.engine()[0] if with_kernels else "",
        "why_none": native.engine()[1],
        "batch_size": batch_size,
        "threads": threads or torch.get_num_threads(),
        "engines": {
            name: {
                "latency_ms": 1e3 * median[name],
                "samples_per_second": batch_size / median[name],
                "times_ours": found[name],
                "weights_in_memory": memory.get(name),
                "file": sizes.get(name),
            }
            for name in contenders
        },
        "difference_kernels_simulated": _difference(out, expected),
        "without_kernel": without_kernel(model),
    }


def _source(path: Path) -> str:
    try:
        return str(json.loads((path / REPORT).read_text())["source"])
    except (OSError, ValueError, KeyError):
        raise InputError(f"{path} has no {REPORT} that names its float model; give it with --against") from None


def _difference(out: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """Largest distance of an output from the simulated model's, relative to its norm."""
    pairs = [(out[k], expected[k]) for k in expected if isinstance(expected[k], Tensor)]
    return max((((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs), default=0.0)


@contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """Let PyTorch, and so the kernels, use this many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sample_batch(model: PreTrainedModel, size: int, length: int) -> dict[str, Tensor]:
    """Made-up inputs of `size` samples: texts of `length` tokens, or images as large as the model wants them."""
    batch = {key: value[:1].expand(size, *value.shape[1:]).contiguous() for key, value in dummy_batch(model).items()}
    if "input_ids" in batch and "pixel_values" not in batch:
        longest = getattr(model.config, "max_position_embeddings", None) or length
        length = min(length, longest - 2)
        batch["input_ids"] = (torch.arange(size * length) % min(model.config.vocab_size, 97)).view(size, length)
        batch["attention_mask"] = torch.ones(size, length, dtype=torch.long)
    return batch


def onnxruntime_engines(
    model: PreTrainedModel, batch: Mapping[str, Tensor], folder: Path, track: Track = silent
) -> dict[str, Callable[[], object]]:
    """The float model in onnxruntime, and quantized dynamically to int8 by its own tool; nothing if not installed.

    Files that are in the folder already are used again.
    """
    if any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")):
        return {}
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    onnxruntime.set_default_logger_severity(3)
    names = ("onnxruntime float32", "onnxruntime int8")
    feeds = {key: value.numpy() for key, value in batch.items()}
    engines: dict[str, Callable[[], object]] = {}
    for name in track(names, "exporting to onnxruntime"):
        file = folder / f"{name}.onnx"
        if not file.exists():
            part = file.with_suffix(".part")
            with _silence():
                if name == names[0]:
                    export_float(model, batch, part)
                else:
                    graph = onnx.load(folder / f"{names[0]}.onnx")
                    del graph.graph.value_info[:]  # the tool infers shapes itself, and stumbles over the exporter's
                    quantize_dynamic(graph, part, weight_type=QuantType.QInt8)
            part.rename(file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        engines[name] = partial(session.run, None, feeds)
    return engines


@contextmanager
def _silence() -> Iterator[None]:
    """The exporter and the tool tell of much that is no fault."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


class _Tensors(nn.Module):
    """A model that takes tensors by position and gives its first output, as the exporter wants it."""

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True)), return_dict=True)[0]  # type: ignore[no-any-return]


def export_float(model: PreTrainedModel, batch: Mapping[str, Tensor], file: Path) -> None:
    """A float model as an ONNX file for this batch, with explicit attention, which onnxruntime runs fastest."""
    was = [config._attn_implementation for config in attention.attention_configs(model)]
    model.set_attn_implementation("eager")
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    try:
        torch.onnx.export(
            _Tensors(model, tuple(batch)).eval(),
            tuple(batch.values()),
            file,
            input_names=list(batch),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    finally:
        for config, name in zip(attention.attention_configs(model), was, strict=True):
            config._attn_implementation_internal = name


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, scales and codes in memory, in whatever order the kernels keep them."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    panels = (m._panels for m in model.modules() if isinstance(m, PackedLayer))
    return sum(tensors.values()) + sum(p.nbytes for p in panels if p is not None)


def without_kernel(model: nn.Module) -> dict[str, str]:
    """Layers and attentions whose formats the kernels lack: they compute in float, slower than the float model."""
    return {name: _texts(rule) for name, rule in module_formats(model) if not _served(rule, model.get_submodule(name))}


def _texts(rule: Rule) -> str:
    points = ("weight", "input", *OPERANDS)
    return ", ".join(f"{point} {fmt}" for point in points if (fmt := getattr(rule, point)))


def _served(rule: Rule, module: nn.Module) -> bool:
    if rule.for_attention:
        operands = (rule.query, rule.key, rule.value)
        known = all(f is not None and f.scheme == "symmetric" and has_kernel(input_format=f) for f in operands)
        fine = all(f is not None and f.granularity == "tensor" for f in (*operands, rule.map))
        return bool(
            known and fine and rule.map and rule.map.scheme != "asymmetric" and has_kernel(input_format=rule.map)
        )
    if isinstance(module, nn.Embedding):
        return True  # rows are looked up, not multiplied
    return rule.weight is not None and rule.input is not None and has_kernel(rule.weight, rule.input)
