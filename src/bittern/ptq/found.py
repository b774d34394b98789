"""Solutions of a unit: to keep on disk, and to put into the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bittern.layers import QuantLayer, fake_quants
from bittern.ptq.mixed import Part, part_of
from bittern.ptq.solve import Solved
from bittern.recipe import Format


@dataclass
class Found:
    """A unit solved at one width: what changed of its tensors, the formats of its quantizers, and what to report.

    With mixed precision, parts: of a block, by module; sensitivity: of each part.
    """

    unit: str
    tensors: dict[str, Tensor]
    formats: dict[str, dict[str, Any]]
    solved: list[dict[str, Any]]
    unclear: list[str]
    parts: dict[str, Part]
    sensitivity: dict[Part, float]

    def put(self, model: nn.Module, *parts: Part | None) -> list[Solved]:
        """Give the unit, or some parts of it (None: what is in none), what was found; return what to report of it."""

        def is_own(name: str) -> bool:
            return not parts or part_of(name, self.parts) in parts

        module = model.get_submodule(self.unit)
        device = next(module.parameters()).device
        for name, quantizer in fake_quants(module):
            if is_own(f"{self.unit}.{name}"):
                quantizer.format = Format.model_validate(self.formats[name])
                scale, offset = (self.tensors.get(f"{name}.{kind}") for kind in ("scale", "offset"))
                if scale is None:
                    quantizer.scale = quantizer.offset = None
                else:
                    quantizer.set_scale(scale.to(device), None if offset is None else offset.to(device))
        for name, parameter in module.named_parameters():
            if name in self.tensors and is_own(f"{self.unit}.{name}"):
                parameter.detach().copy_(self.tensors[name])
        for layer in module.modules():
            if isinstance(layer, QuantLayer):
                layer._kept = None
        return [Solved(**solved) for solved in self.solved if is_own(solved["name"])]
