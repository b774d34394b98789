"""The report of a simulated model: which modules got which formats, and what stayed float."""

from dataclasses import dataclass
from typing import Literal

from bittern.anatomy import Anatomy
from bittern.errors import listed
from bittern.recipe import Role

LEAST_SHARE = 0.8  # of weights that a user expects to be quantized


@dataclass(frozen=True)
class LayerReport:
    """One module with parameters, or one attention, and what it got; formats are texts, empty where it stayed float.

    role: empty for modules without a weight matrix, such as norms. weights: a weight shared by layers counts once.
    unknown: a subclass whose forward may differ from those that Bittern knows, or its weight is read by other code.
    """

    name: str
    type: str
    role: Role | Literal[""]
    weights: int
    weight: str = ""
    input: str = ""
    attention: str = ""
    unknown: bool = False

    @property
    def is_float(self) -> bool:
        return not (self.weight or self.input or self.attention)


@dataclass(frozen=True)
class Simulation:
    """Report of a simulated model: the quantized modules, and those that stayed float."""

    recipe: str
    layers: tuple[LayerReport, ...]
    anatomy: Anatomy

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if not layer.is_float)

    @property
    def kept_float(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.is_float)

    @property
    def notes(self) -> tuple[str, ...]:
        """The share of all weights that is quantized, and what stays float though a rule may have meant it."""
        total, quantized = sum(x.weights for x in self.layers), sum(x.weights for x in self.layers if x.weight)
        notes = [f"{quantized / max(total, 1):.1%} of {total:,} weights are quantized"]
        if quantized < LEAST_SHARE * total:
            largest = sorted((x for x in self.layers if not x.weight), key=lambda x: -x.weights)[:3]
            named = ", ".join(f"{x.name} ({x.type}, {x.weights:,})" for x in largest)
            notes[0] += f", fewer than {LEAST_SHARE:.0%}; the largest that stay float: {named}"
        if products := [name or "the model itself" for name in self.anatomy.float_products]:
            notes.append(f"products of activations stay float in {listed(products, 3)}")
        if unknown := [x.name for x in self.kept_float if x.unknown]:
            why = "of classes that Bittern does not know, or with weights that other code reads,"
            notes.append(f"layers {why} stay float: {listed(unknown, 3)}")
        return tuple(notes)

    def __str__(self) -> str:
        groups: dict[tuple[str, str], list[LayerReport]] = {}
        for layer in self.layers:
            what = layer.attention or " × ".join(filter(None, (layer.weight, layer.input and f"input {layer.input}")))
            groups.setdefault((layer.role or layer.type, what or "float"), []).append(layer)
        rows = (
            f"{role:17} {len(group):4} modules {sum(x.weights for x in group):12,} weights  {what}"
            for (role, what), group in groups.items()
        )
        return "\n".join((*rows, *self.notes))
