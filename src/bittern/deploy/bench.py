"""Measure how fast and how large a packed model is, beside its float model in PyTorch.

Every contender has its turn, round after round, so that a drift of the machine hits all alike.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bittern import native
from bittern.deploy.checkpoint import is_packed
from bittern.deploy.companions import REPORT
from bittern.deploy.files import read_json
from bittern.deploy.packed import weight_bytes
from bittern.deploy.store import float_bytes, load, measure
from bittern.dry_run import dummy_batch
from bittern.errors import CheckpointError, InputError, ModelError
from bittern.kernels import convolves, has_kernel
from bittern.layers import formats
from bittern.options import refuse_unused
from bittern.recipe import Rule

OURS, FLOAT = "bittern", "torch float32"

Work = Callable[[], object]
Engines = Callable[[PreTrainedModel, Mapping[str, Tensor]], Mapping[str, Work]]


def bench(
    path: str | Path,
    *,
    against: str | Path | None = None,
    batch_size: int = 1,
    length: int = 128,
    threads: int | None = None,
    rounds: int = 15,
    engines: Engines | None = None,
) -> dict[str, Any]:
    """Time the packed model in `path` and its float model in turn; return times, sizes and what has no fast path.

    against: the float model; by default the one that the report in `path` names. engines: makes calls by name of the
    float model and the batch, which are timed too (benchmarks/engines.py has some). Raises ModelError if `path` holds
    no packed model and InputError if there is no float model to compare with.
    """
    model = load(path)
    if not is_packed(model):
        raise ModelError(f"{path} holds no packed model; make one with bittern quantize, ptq or qat")
    other = load(_source(Path(path)) if against is None else against)
    batch = sample_batch(other, batch_size, length)
    if "input_ids" not in batch:
        refuse_unused(bench, "of a model that reads no texts", length=length)
    with using_threads(threads), torch.no_grad():
        contenders: dict[str, Work] = {OURS: lambda: model(**batch), FLOAT: lambda: other(**batch)}
        contenders |= engines(other, batch) if engines else {}
        times = alternate(contenders, rounds)
        out, with_kernels = model(**batch), native.available()
        with native.disabled():
            expected = model(**batch)
    found = ratios(times, OURS)
    pairs = [(out[k], expected[k]) for k in expected if isinstance(expected[k], Tensor)]
    apart = max((((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs), default=0.0)
    model(**batch)  # puts the codes in the kernels' order again
    memory = {OURS: weight_bytes(model), FLOAT: weight_bytes(other)}
    sizes = {OURS: measure(model, path).file, FLOAT: float_bytes(other)}
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "model": str(path),
        "kernels": native.engine()[0] if with_kernels else "",
        "why_none": native.engine()[1],
        "batch_size": batch_size,
        "inputs": {name: list(batch[name].shape) for name in batch if name != "attention_mask"},
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
        "difference_kernels_simulated": apart,  # of the output that differs most, relative to its norm
        "without_kernel": without_kernel(model),
    }


def alternate(contenders: Mapping[str, Work], rounds: int) -> dict[str, list[float]]:
    """Call contenders in turn and return the seconds of each in each round, after one call that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for i in range(rounds):
        for name in list(contenders)[:: 1 if i % 2 == 0 else -1]:
            start = time.perf_counter()
            contenders[name]()
            times[name].append(time.perf_counter() - start)
    return times


def ratios(times: Mapping[str, list[float]], base: str) -> dict[str, float]:
    """Return the median over rounds of each contender's time divided by the base's in the same round."""
    return {
        name: statistics.median(t / b for t, b in zip(seconds, times[base], strict=True))
        for name, seconds in times.items()
    }


def _source(path: Path) -> str:
    try:
        return str(read_json(path / REPORT)["source"])
    except (CheckpointError, KeyError):
        raise InputError(f"{path} has no {REPORT} that names its float model; give it with --against") from None


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
    """Made-up inputs of `size` samples: texts of `length` tokens, if the model takes so many, or images of its size."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length + 2
    batch = dummy_batch(model, size, min(length, longest - 2))
    if "input_ids" in batch and "pixel_values" not in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch


def without_kernel(model: nn.Module) -> dict[str, str]:
    """Layers and attentions whose formats the kernels lack: they compute in float, slower than the float model."""
    return {
        name: ", ".join(f"{field} {fmt}" for field, fmt in rule.formats.items())
        for name, rule in formats(model).items()
        if not _has_fast_path(rule, model.get_submodule(name))
    }


def _has_fast_path(rule: Rule, module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        return True  # rows are looked up, not multiplied
    if isinstance(module, nn.Conv2d) and (rule.input is None or not convolves(module, rule.input)):
        return False  # the weight is unpacked in each forward
    if not rule.for_attention:
        return rule.weight is not None and rule.input is not None and has_kernel(rule.weight, rule.input)
    return rule.operands.keys() == native.SCHEMES.keys() and all(
        fmt.granularity == "tensor" and fmt.scheme in native.SCHEMES[operand] and has_kernel(input_format=fmt)
        for operand, fmt in rule.operands.items()
    )
