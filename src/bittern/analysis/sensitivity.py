"""Where the loss comes from: one block at a time, one class of tensors after another, and nuclear norms [VT]."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bittern.analysis.compare import Means
from bittern.analysis.pair import Pair
from bittern.analysis.recovery import relative_error
from bittern.data import is_language_model
from bittern.data.evaluate import predict
from bittern.layers import fake_quants
from bittern.progress import Track, silent
from bittern.ptq.mixed import nuclear_norm

CLASSES = {  # of activations, by the name of their quantizers
    "inputs of layers": ("input_quantizer",),
    "query and key": ("quantize_query", "quantize_key"),
    "map and value": ("quantize_map", "quantize_value"),
}


@torch.no_grad()
def block_errors(pair: Pair, batches: Sequence[Mapping[str, Any]], track: Track = silent) -> list[dict[str, Any]]:
    """For each block, the teacher with this one block of the student: how far its output is from the teacher's own.

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
    """What `predict` gives, of language models the negative log likelihood of each token."""
    out = predict(model, batches)
    return out[..., 0] if is_language_model(model) else out


def _error(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], reference: Tensor) -> float:
    return float(f"{relative_error(outputs(model, batches)[None], reference[None], None).item():.6g}")


@torch.no_grad()
def class_errors(pair: Pair, batches: Sequence[Mapping[str, Any]], track: Track = silent) -> list[dict[str, Any]]:
    """The student with its quantized weights alone, these with one class of activations, and with all of them."""
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
    """Of the activations, only those whose quantizers' names end so are quantized inside the block; all weights are."""
    off = [q for name, q in fake_quants(model) if not name.endswith(("weight_quantizer", *ends)) and not q.bypass]
    try:
        for quantizer in off:
            quantizer.bypass = True
        yield
    finally:
        for quantizer in off:
            quantizer.bypass = False


def nuclear_norm_of_scores(query: Tensor, key: Tensor) -> Tensor:
    """Nuclear norm of QKᵀ (…, queries, keys), of rank at most the head dim: from the triangles of QR of both."""
    r_query, r_key = (torch.linalg.qr(x.double(), mode="r").R for x in (query, key))
    return nuclear_norm(r_query @ r_key.mT)


@torch.no_grad()
def nuclear_norms(pair: Pair, batches: Sequence[Mapping[str, Any]], track: Track = silent) -> dict[str, Any]:
    """Per attention module nuclear norms of the map and of QKᵀ (sums over heads), and of the FFN's output by block, of
    student and teacher; padding adds nothing. Means over samples."""
    means = Means()
    for batch in track(batches, "nuclear norms"):
        both = pair.record(batch, "map", "query", "key", "ffn")
        calls = pair.calls(both[0])
        rows = {call.name: call.rows for call in calls}
        for who, taps in zip(("student", "teacher"), both, strict=True):
            for i, call in enumerate(calls):
                real, keys = call.rows[:, None, :, None], call.seen.any(2)[:, :1, :, None]
                query, key = taps["query"][i], taps["key"][i]
                scale = query.shape[-1] ** -0.5
                key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
                means.add(f"map/{who}/{i}", nuclear_norm(taps["map"][i] * real).sum(1))
                means.add(f"scores/{who}/{i}", nuclear_norm_of_scores(query * real * scale, key * keys).sum(1))
            for i, (name, x) in enumerate(zip(taps.names["ffn"], taps["ffn"], strict=True)):
                x = x.unflatten(0, (len(rows[name]), -1)).flatten(1, -2) if x.dim() != 3 else x
                real = rows[name] if rows[name].shape == x.shape[:2] else torch.ones_like(x[..., 0])
                means.add(f"ffn/{who}/{i}", nuclear_norm(x * real[..., None]))
    return {
        what: {who: list(means.take(what, who).values()) for who in ("student", "teacher")}
        for what in ("map", "scores", "ffn")
    }
