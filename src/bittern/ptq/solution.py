"""Solutions of a unit, at one width or at several: to keep on disk, and to put into the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bittern.layers import QuantLayer
from bittern.ptq.mixed import Part, part_of
from bittern.ptq.solve import Solved
from bittern.quantizers import FakeQuant
from bittern.recipe import Format


@dataclass
class Found:
    """A unit solved at one width: what changed of its tensors, the formats of its quantizers, and what to report."""

    tensors: dict[str, Tensor]
    formats: dict[str, dict[str, Any]]
    solved: list[dict[str, Any]]
    sensitivity: dict[str, float]  # of each part of a block, with mixed precision

    def names(self) -> set[str]:
        """Return the names of all quantizers and parameters that are set."""
        return {*self.formats, *self.tensors}


@dataclass
class Solution:
    """A unit's solutions by width (0: the recipe's own), and the parts of the unit that choose a width."""

    unit: str
    found: dict[int, Found]
    parts: dict[str, Part]

    def settle(self, model: nn.Module, bits: Mapping[str, int]) -> list[Solved]:
        """Put what was chosen into the model, where that is not done already, and report it."""
        if not self.parts:
            return [Solved(**solved) for solved in self.found[0].solved]
        report = []
        for part in dict.fromkeys(self.parts.values()):
            chosen = self.found[bits[f"{self.unit}.{part}"]]
            own = {name for name in chosen.names() if part_of(f"{self.unit}.{name}", self.parts) == part}
            put(model.get_submodule(self.unit), chosen, own)
            report += [Solved(**s) for s in chosen.solved if part_of(s["name"], self.parts) == part]
        return report


def to_tensors(solution: Solution) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A solution as tensors and JSON."""
    tensors = {f"{bits}:{n}": t for bits, found in solution.found.items() for n, t in found.tensors.items()}
    found = {
        str(bits): {"formats": f.formats, "solved": f.solved, "sensitivity": f.sensitivity}
        for bits, f in solution.found.items()
    }
    return tensors, {"parts": solution.parts, "found": found}


def from_tensors(unit: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> Solution:
    found = {}
    for bits, rest in notes["found"].items():
        own = {n.removeprefix(f"{bits}:"): t for n, t in tensors.items() if n.startswith(f"{bits}:")}
        found[int(bits)] = Found(own, **rest)
    return Solution(unit, found, notes["parts"])


def put(module: nn.Module, found: Found, chosen: set[str]) -> None:
    """Give a unit the chosen ones, by name, of the quantizers and parameters that were found."""
    device = next(module.parameters()).device
    for name, quantizer in named_quantizers(module):
        if name in chosen:
            quantizer.format = Format.model_validate(found.formats[name])
            scale, offset = found.tensors.get(f"{name}.scale"), found.tensors.get(f"{name}.offset")
            if scale is not None:
                quantizer.set_scale(scale.to(device), None if offset is None else offset.to(device))
    for name, parameter in module.named_parameters():
        if name in found.tensors and name in chosen:
            parameter.detach().copy_(found.tensors[name])
    for layer in module.modules():
        if isinstance(layer, QuantLayer):
            layer._kept = None


def named_quantizers(module: nn.Module) -> Iterator[tuple[str, FakeQuant]]:
    return ((n, q) for n, q in module.named_modules() if isinstance(q, FakeQuant))
