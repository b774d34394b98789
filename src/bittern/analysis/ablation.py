"""Where the loss comes from: one block quantized at a time, one class of tensors after another."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bittern.analysis.findings import CLASSES
from bittern.analysis.pair import Pair
from bittern.analysis.recovery import relative_error
from bittern.data import task_of
from bittern.data.evaluate import predict
from bittern.layers import as_float, fake_quants
from bittern.progress import Track, silent


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
    return out[..., 0] if task_of(model) in ("next", "masked") else out


def _error(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], reference: Tensor) -> float:
    return float(f"{relative_error(outputs(model, batches)[None], reference[None], None).item():.6g}")


@torch.no_grad()
def class_errors(pair: Pair, batches: Sequence[Mapping[str, Any]], track: Track = silent) -> list[dict[str, Any]]:
    """Measure the student with its quantized weights alone, these with one class of activations, and with all."""
    reference, quantizers = outputs(pair.teacher, batches), list(fake_quants(pair.student))
    there = {_field(name) for name, _ in quantizers}
    steps = {name: ("weight", *fields) for name, fields in CLASSES.items() if name == "weights" or there & {*fields}}
    found = []
    for step, fields in track([*steps.items(), ("all", there)], "one class of tensors at a time"):
        with as_float(pair.student):
            for name, quantizer in quantizers:
                quantizer.bypass = _field(name) not in fields
            found.append({"name": step, "error": _error(pair.student, batches, reference)})
    return found


def _field(quantizer: str) -> str:
    """Name the field of a rule that gives a quantizer, known by its name in the model, its format."""
    return quantizer.rpartition(".")[2].removeprefix("quantize_").removesuffix("_quantizer")
