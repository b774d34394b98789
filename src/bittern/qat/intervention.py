"""Teacher Intervention [TI]: in the first steps of a training the teacher's signals stand in for the student's.

An `Intervention` is data (see `bittern.options`), and says what happens in a step as a pure function of its number, so
that resuming needs no state; an `Intervener` binds one to a student.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bittern.anatomy import Anatomy, Batch
from bittern.attention import NAME, Point, Site, Taps, recording, replace, stand_in
from bittern.dry_run import evaluating, two_samples
from bittern.errors import ModelError
from bittern.layers import QuantLayer
from bittern.options import Act
from bittern.quantizers import FakeQuant
from bittern.recorded import by_module


class _Gate:
    """Keeps gradients from what a layer of Q, K or V, or of all of them, reads while the teacher acts; but for V under
    map [TI]."""

    def __init__(self, layer: nn.Module, columns: Tensor):
        self.columns = columns  # of the layer's output: which reach V
        self.gives_value, self.only_value = bool(columns.any()), bool(columns.all())
        self.act: Act | None = None
        layer.register_forward_pre_hook(self.before)
        layer.register_forward_hook(self.after)

    def before(self, layer: nn.Module, args: Any) -> Any:
        if self.act is None or (self.act.point == "map" and self.gives_value):
            return None
        return (stand_in(args[0], args[0].detach(), self.act.share), *args[1:])

    def after(self, layer: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        if self.act is None or self.act.point != "map" or not self.gives_value or self.only_value:
            return None
        x = stand_in(args[0], args[0].detach(), self.act.share)
        return torch.where(self.columns.to(out.device), out, layer.forward(x))  # one layer for Q, K and V


class Intervener:
    """Puts the teacher's signals into a student that has attention sites. mapping: block of the student → block of the
    teacher; blocks that are not in it are left alone. Raises ModelError if the two do not fit."""

    def __init__(self, student: PreTrainedModel, anatomy: Anatomy, teacher: Anatomy, mapping: Mapping[int, int] | None):
        self.student, self.anatomy = student, anatomy
        self.source: dict[str, str] = {}  # attention of the student → of the teacher
        for i, block in enumerate(anatomy.blocks):
            if (other := i if mapping is None else mapping.get(i)) is None:
                continue
            theirs = teacher.blocks[other].attentions if other < len(teacher.blocks) else ()
            if len(theirs) != len(block.attentions):
                raise ModelError(f"the teacher's block {other} has no attention to stand in for that of {block.name}")
            self.source |= {a.name: b.name for a, b in zip(block.attentions, theirs, strict=True)}
        self.gates: dict[str, _Gate] = {}
        self.outputs = [a.output for a in anatomy.attentions if a.name in self.source and a.output]

    def begin(self, act: Act, shown: Taps, scope: str, batch: Batch) -> None:
        """Until `end`, the student's forward of the batch has the teacher's signals. shown: what was recorded of it."""
        self.gates = self.gates or dict(self._find_gates(batch))
        theirs = by_module(shown.names[act.point], shown[act.point])  # of ALBERT, which has no checkpointing, several
        replace(self.student, {(mine, act.point): theirs[name] for mine, name in self.source.items()}, act.share)
        for gate in self.gates.values():
            gate.act = act
        if scope == "part":
            for quantizer in self._untrained(act.point):
                quantizer.bypass = True

    def end(self) -> None:
        """The student is alone again. Call it after the backward: activation checkpointing runs the forward again."""
        replace(self.student, {})
        for gate in self.gates.values():
            gate.act = None
        for quantizer in self._untrained("output"):
            quantizer.bypass = False

    def _find_gates(self, batch: Batch) -> Iterator[tuple[str, _Gate]]:
        """Yield a gate for each layer of Q, K or V of a chosen attention; a gradient tells which outputs reach V."""
        student, attentions = self.student, [a for a in self.anatomy.attentions if a.name in self.source]
        outputs: dict[str, Tensor] = {}
        # Of a layer that runs again (ALBERT) the first output stands for those after it: the last value depends on it.
        with torch.enable_grad(), evaluating(student), recording(student, "value") as taps, ExitStack() as hooks:
            for layer in (name for a in attentions for name in a.inputs):
                keep = partial(lambda name, _, __, out: outputs.setdefault(name, out.requires_grad_()), layer)
                hooks.enter_context(student.get_submodule(layer).register_forward_hook(keep))
            student(**two_samples(batch))
        values = dict(zip(taps.names["value"], taps["value"], strict=True))
        for a in attentions:
            value = values[a.name]
            draw = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
            given = [outputs[name] for name in a.inputs]
            found = torch.autograd.grad(value, given, draw, retain_graph=True, materialize_grads=True)
            for name, grad in zip(a.inputs, found, strict=True):
                yield name, _Gate(student.get_submodule(name), (grad != 0).flatten(0, -2).any(0))

    def _untrained(self, point: Point) -> Iterator[FakeQuant]:
        """Yield quantizers of what the paper does not train under an intervention; `output` includes all others."""
        trains_value = point == "map"
        layers = [name for name, gate in self.gates.items() if not (trains_value and gate.only_value)]
        for layer in map(self.student.get_submodule, layers + (self.outputs if point == "output" else [])):
            if isinstance(layer, QuantLayer):
                yield from filter(None, (layer.weight_quantizer, layer.input_quantizer))
        for name in self.source:
            site: Site = self.student.get_submodule(name)._modules[NAME]
            for operand in ("query", "key") if trains_value else ("query", "key", "map", "value"):
                if quantizer := site.quantizer(operand):
                    yield quantizer
