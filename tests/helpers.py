"""What the tests of several modules share: quantized models, their outputs, and refusals in one line."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import transformers as hf
from torch import Tensor

from bittern import calibrate, pack, simulate
from bittern.analysis.pair import Pair
from bittern.errors import BitternError
from bittern.layers import fake_quants
from bittern.qat.trainer import QATTrainer
from bittern.quantizers import FakeQuant, find_scale
from bittern.recipe import Recipe
from families import SUPPORTED, Batch


def quantized(
    name: str, recipe: str | Recipe = "w8a8", packed: bool = True, seed: int = 0
) -> tuple[hf.PreTrainedModel, Batch]:
    """A model of a family, simulated and calibrated on its own batch, then packed if so asked."""
    model, batch = SUPPORTED[name](seed)
    simulate(model, recipe, batch)
    calibrate(model, [batch])
    return pack(model) if packed else model, batch


def teacher_and_student(
    name: str, recipe: str | Recipe = "ternary-2-2-8", packed: bool = True, seed: int = 0
) -> tuple[Pair, Batch]:
    """A model of a family beside its own quantized copy, and their batch."""
    student, batch = quantized(name, recipe, packed, seed)
    return Pair(student, SUPPORTED[name](seed)[0]), batch


def student_and_teacher(
    family: str, recipe: str | Recipe | None = None, apart: float = 0.0
) -> tuple[hf.PreTrainedModel, hf.PreTrainedModel, Batch]:
    """A student whose weights are `apart` from its teacher's, simulated if a recipe is given, the teacher, a batch."""
    teacher, batch = SUPPORTED[family]()
    student = copy.deepcopy(teacher)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters() if apart else ():
            parameter.add_(torch.randn_like(parameter), alpha=apart)
    if recipe:
        simulate(student, recipe, batch)
    return student, teacher, batch


def small_trainer(
    folder: Path, pair: tuple[hf.PreTrainedModel, hf.PreTrainedModel, Batch], arguments: dict[str, Any], **options: Any
) -> QATTrainer:
    """A trainer of a student (see `student_and_teacher`) on eight rows with labels."""
    student, teacher, batch = pair
    rows = [{k: v[i % 2] for k, v in batch.items()} | {"labels": torch.tensor(i % 3)} for i in range(8)]
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "learning_rate": 1e-3,
    }
    chosen = hf.TrainingArguments(str(folder), **settings | arguments)
    return QATTrainer(student, chosen, train_dataset=rows, eval_dataset=rows, teacher=teacher, **options)


T = TypeVar("T")


def first_clear(make: Callable[[int], T], margin: Callable[[T], float], least: float) -> T:
    """What `make` gives for the first seed that keeps `margin` from all ties, so that no rounding tips a value over."""
    for seed in range(200):
        made = make(seed)
        if margin(made) > least:
            return made
    raise AssertionError(f"no seed keeps {least} from all ties")


@torch.no_grad()
def code_margin(model: torch.nn.Module, batch: Batch) -> float:
    """Distance from the middle between two codes, in steps, of the activation that lies nearest to one.

    Rounding moves values of few bits by about 1e-6 of a step, those of 8 bits by 1e-5 to 1e-4.
    """
    found: list[float] = []

    def measure(quantizer: FakeQuant, args: tuple[Tensor]) -> None:
        x, fmt = args[0].float(), quantizer.format
        scale, offset = (quantizer.scale, quantizer.offset) if fmt.range == "static" else find_scale(x, fmt)
        steps = ((x if fmt.clip is None else x.clamp(-fmt.clip, fmt.clip)) - (0 if offset is None else offset)) / scale
        found.append((steps - steps.floor() - 0.5).abs().min().item())

    hooks = [q.register_forward_pre_hook(measure) for n, q in fake_quants(model) if not n.endswith("weight_quantizer")]
    try:
        model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    assert found
    return min(found)


@torch.no_grad()
def outputs(model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
    """All tensors that a model gives."""
    return {name: value for name, value in model(**batch).items() if isinstance(value, Tensor)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two models gave the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextmanager
def refused(kind: type[BitternError], *parts: str) -> Iterator[None]:
    """The block must raise exactly this error, in one line that holds all the parts."""
    with pytest.raises(kind) as error:
        yield
    message = str(error.value)
    assert error.type is kind
    assert len(message.splitlines()) == 1
    assert all(part in message for part in parts), message
