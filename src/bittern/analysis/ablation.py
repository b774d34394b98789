"""Where the loss comes from: one block quantized at a time, one class of tensors after another."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bittern.analysis.pair import Pair
from bittern.analysis.recovery import relative_error
from bittern.data import is_language_model
from bittern.data.evaluate import predict
from bittern.layers import fake_quants
from bittern.progress import Track, silent

CLASSES = {  # of activations, by the name of their quantizers
    "inputs of layers": ("input_quantizer",),
    "query and key": ("quantize_query", "quantize_key"),
    "map and value": ("quantize_map", "quantize_value"),
}


@torch.no_grad()
def block_errors(pair: Pair, batches: Sequence[Mapping[str, Any]], track: Track = silent) -> list[dict[str, Any]]:
    """Measure for each block how far the teacher with this one block of the student is from itself.

    error: ‖out - teacher's‖² / ‖teacher's‖², logits or embeddings. Last comes the rest (embeddings, stem and head) and
    then the whole student. The teacher itself stays as it is: a copy of it gets the student's blocks.
    """
    reference = outputs(pair.teacher, batches)
    hybrid = copy.deepcopy(pair.teacher)
    names = [block.name for block in pair.anatomy.blocks]
    originals = {name: hybrid.get_submodule(name) for name in names}
    found = []
    for name in track(names, "one block at a time"):
        hybrid.set_submodule(name, pair.student.get_submodule(name))
        found.append({"name": name, "error": _error(hybrid, batches, reference)})
        hybrid.set_submodule(name, originals[name])
    del hybrid, originals
    rest = copy.deepcopy(pair.student)
    for name in names:
        rest.set_submodule(name, pair.teacher.get_submodule(name))
    found.append({"name": "embeddings, stem and head", "error": _error(rest, batches, reference)})
    return [*found, {"name": "all", "error": _error(pair.student, batches, reference)}]


def outputs(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """Return what `predict` gives, of language models the negative log likelihood of each token."""
    out = predict(model, batches)
    return out[..., 0] if is_language_model(model) else out


def _error(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], reference: Tensor) -> float:
    return float(f"{relative_error(outputs(model, batches)[None], reference[None], None).item():.6g}")


@torch.no_grad()
def class_errors(pair: Pair, batches: Sequence[Mapping[str, Any]], track: Track = silent) -> list[dict[str, Any]]:
    """Measure the student with its quantized weights alone, these with one class of activations, and with all."""
    reference = outputs(pair.teacher, batches)
    there = [c for c, ends in CLASSES.items() if any(n.endswith(ends) for n, _ in fake_quants(pair.student))]
    steps = [("weights", ()), *((c, CLASSES[c]) for c in there), ("all", sum(CLASSES.values(), ()))]
    found = []
    for name, ends in track(steps, "one class of tensors at a time"):
        with only_activations(pair.student, ends):
            found.append({"name": name, "error": _error(pair.student, batches, reference)})
    return found


@contextmanager
def only_activations(model: PreTrainedModel, ends: tuple[str, ...]) -> Iterator[None]:
    """Quantize, inside the block, all weights and of the activations only those whose quantizers' names end so."""
    off = [q for name, q in fake_quants(model) if not name.endswith(("weight_quantizer", *ends)) and not q.bypass]
    try:
        for quantizer in off:
            quantizer.bypass = True
        yield
    finally:
        for quantizer in off:
            quantizer.bypass = False
