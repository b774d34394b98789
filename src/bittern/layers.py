"""Layers that hold weights, simulated: the same parameters, names and ties, quantized on the way through.

`simulate(model, recipe)` turns a loaded float model into a simulated one in place; `restore(model)` turns it back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bittern import attention
from bittern.anatomy import Anatomy, read_anatomy
from bittern.errors import ModelError
from bittern.quantizers import FakeQuant, find_scale
from bittern.recipe import Format, Recipe, Role, Rule, load_recipe


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weight as (rows, columns), a row for each output channel (each token, for an embedding)."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.t() if isinstance(layer, Conv1D) else weight.flatten(1)


class QuantLayer(nn.Module):
    """What the four simulated layers share: quantizers of weight and input, and the quantized weight kept in eval."""

    weight_quantizer: FakeQuant | None
    input_quantizer: FakeQuant | None
    _kept: tuple[tuple[Any, ...], Tensor] | None = None

    def quantized_weight(self) -> Tensor:
        """The weight's values after quantization, as (rows, columns).

        Without gradients the result is kept until weight or scale change: a second copy of the weight in memory.
        A change in place of `weight.data`, which PyTorch does not count, goes unseen.
        """
        weight: Tensor = self.weight  # type: ignore[assignment]
        quantizer = self.weight_quantizer
        if quantizer is None:
            return weight_matrix(self)
        if torch.is_grad_enabled() or weight.grad is not None:  # fused optimizers change weights uncounted
            self._kept = None
            return quantizer(weight_matrix(self).contiguous())  # type: ignore[no-any-return]
        values = [(t.data_ptr(), t._version, t.dtype) for t in (weight, quantizer.scale) if t is not None]
        state = (quantizer.format, *values)
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, quantizer(weight_matrix(self).contiguous()))
        return self._kept[1]

    def quantized_input(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x)


class QuantLinear(QuantLayer, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantConv1D(QuantLayer, Conv1D):  # type: ignore[misc]
    """GPT-2's linear layer, whose weight is stored (in, out)."""

    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.quantized_input(x), self.quantized_weight(), self.bias)


class QuantConv2d(QuantLayer, nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.quantized_weight().view(self.weight.shape)
        return self._conv_forward(self.quantized_input(input), weight, self.bias)  # type: ignore[no-any-return]


class QuantEmbedding(QuantLayer, nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.quantized_weight(), self.padding_idx)


class ScaledEmbedding(nn.Module):
    """What the `*ScaledWordEmbedding` of BART, Gemma and others adds to an embedding: all rows times one number."""

    embed_scale: float | Tensor
    scalar_embed_scale: float  # what the tensor holds; as a non-persistent buffer it does not survive loading

    def forward(self, input: Tensor) -> Tensor:
        rows: Tensor = super().forward(input)
        if isinstance(self.embed_scale, Tensor):
            return rows * rows.new_tensor(self.scalar_embed_scale)
        return rows * self.embed_scale


class QuantScaledEmbedding(ScaledEmbedding, QuantEmbedding):
    pass


SIMULATED: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv2d: QuantConv2d,
    nn.Embedding: QuantEmbedding,
    Conv1D: QuantConv1D,
}
WEIGHTED = tuple(SIMULATED)


def simulated_type(layer: nn.Module) -> type[QuantLayer] | None:
    """The class that simulates a float layer; None if its forward may differ from all that are known."""
    if type(layer).__name__.endswith("ScaledWordEmbedding") and len(list(layer.parameters())) == 1:
        return QuantScaledEmbedding
    return SIMULATED.get(type(layer))


@dataclass(frozen=True)
class LayerReport:
    """One module and what it got; formats are texts, empty where it stayed float."""

    name: str
    type: str
    role: Role
    weights: int
    weight: str = ""
    input: str = ""
    attention: str = ""

    @property
    def is_float(self) -> bool:
        return not (self.weight or self.input or self.attention)


@dataclass(frozen=True)
class Simulation:
    """What `simulate` did: the quantized modules, and those that stayed float."""

    recipe: str
    layers: tuple[LayerReport, ...]
    anatomy: Anatomy

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if not layer.is_float)

    @property
    def kept_float(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.is_float)

    def to_dict(self) -> dict[str, Any]:
        return {"recipe": self.recipe, "layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        groups: dict[tuple[str, str], list[LayerReport]] = {}
        for layer in self.layers:
            what = layer.attention or " × ".join(filter(None, (layer.weight, layer.input and f"input {layer.input}")))
            groups.setdefault((layer.role, what or "float"), []).append(layer)
        return "\n".join(
            f"{role:17} {len(group):4} modules {sum(x.weights for x in group):12,} weights  {what}"
            for (role, what), group in groups.items()
        )


def simulate(model: PreTrainedModel, recipe: str | Recipe, batch: Mapping[str, Any] | None = None) -> Simulation:
    """Quantize a loaded model in simulation, in place.

    recipe: a name (`w8a8`), a path to YAML, or a Recipe. batch: inputs of one dry run, made up if not given.
    Static scales of weights are set here from their extremes; those of activations by `calibrate`.
    Raises ModelError (NaN weights, unknown layers, unsupported attention) and RecipeError, before it changes anything.

    >>> from transformers import ViTConfig, ViTModel
    >>> model = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    ...                            image_size=8, patch_size=4)).eval()
    >>> report = simulate(model, "w8a8")
    >>> len(report.quantized), [layer.role for layer in report.kept_float]
    (9, [])
    """
    recipe = load_recipe(recipe)
    if isinstance(model, nn.Module) and is_simulated(model):
        raise ModelError("the model is simulated already; call restore(model) first")
    anatomy = read_anatomy(model, batch)
    roles: dict[str, Role] = anatomy.roles | {a.name: "attention" for a in anatomy.attentions}
    recipe.check_globs(roles)
    rules = {name: recipe.rule_for(name, role) for name, role in roles.items()}
    modules = dict(model.named_modules())
    tied = _tied_layers(model, roles)
    plan: list[tuple[str, Format | None, Format | None]] = []
    for name in anatomy.roles:
        owner, rule = tied.get(name, name), rules[name]
        owner_rule = rules[owner]
        weight = owner_rule.weight if owner_rule else None
        fmt_input = rule.input if rule else None
        if weight is not None or fmt_input is not None:
            _check_layer(name, modules[name], weight, fmt_input)
            plan.append((name, weight, fmt_input))
    sites = {a.name: _attention_formats(rules[a.name]) for a in anatomy.attentions}
    for name, weight, fmt_input in plan:
        swap(modules[name], name, weight, fmt_input)
        quantizer = modules[name].weight_quantizer
        if isinstance(quantizer, FakeQuant) and quantizer.format.range == "static":
            quantizer.set_scale(*find_scale(weight_matrix(modules[name]), quantizer.format, quantizer.name))
    if any(sites.values()):
        attention.attach(model, anatomy, sites)
    quantized = {name: (weight, fmt_input) for name, weight, fmt_input in plan}
    reports = []
    for name, role in roles.items():
        size = modules[name].weight.numel() if role != "attention" else 0
        weight, fmt_input = quantized.get(name, (None, None))
        reports.append(
            LayerReport(
                name,
                type(modules[name]).__name__.removeprefix("Quant"),
                role,
                size,
                str(weight or ""),
                str(fmt_input or ""),
                ", ".join(f"{point} {fmt}" for point, fmt in sites.get(name, {}).items()),
            )
        )
    model._bittern_recipe = recipe
    return Simulation(recipe.name, tuple(reports), anatomy)


def restore(model: PreTrainedModel) -> None:
    """Undo `simulate`: the float model again, with its own attention; weights keep their present float values."""
    for layer in model.modules():
        if isinstance(layer, QuantLayer):
            layer.__class__ = layer.__dict__.pop("_float_type")
            for extra in ("weight_quantizer", "input_quantizer"):
                delattr(layer, extra)
            layer.__dict__.pop("_kept", None)
    attention.detach(model)
    model.__dict__.pop("_bittern_recipe", None)


def is_simulated(model: nn.Module) -> bool:
    return any(isinstance(m, QuantLayer | attention.Site) for m in model.modules())


def fake_quants(model: nn.Module) -> Iterator[tuple[str, FakeQuant]]:
    """Every quantizer of a simulated model by its name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, FakeQuant))


def _attention_formats(rule: Rule | None) -> dict[str, Format]:
    points = ("query", "key", "value", "map")
    return {} if rule is None else {p: fmt for p in points if (fmt := getattr(rule, p)) is not None}


def _tied_layers(model: nn.Module, roles: Mapping[str, Role]) -> dict[str, str]:
    """Layers that share another's weight → the layer that decides its format: the embedding, else the first."""
    modules = dict(model.named_modules())
    owners: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name in sorted(roles, key=lambda n: roles[n] != "embedding"):
        if roles[name] != "attention":
            owner = owners.setdefault(id(modules[name].weight), name)
            if owner != name:
                tied[name] = owner
    return tied


def _check_layer(name: str, layer: nn.Module, weight: Format | None, fmt_input: Format | None) -> None:
    if simulated_type(layer) is None:
        base = next(t.__name__ for t in WEIGHTED if isinstance(layer, t))
        raise ModelError(
            f"{name} is a {type(layer).__name__}, a subclass of {base} that Bittern does not know and whose forward "
            f"may differ; keep it float with a first rule `modules: {name!r}`"
        )
    if isinstance(layer, nn.Embedding) and fmt_input is not None:
        raise ModelError(f"{name} is an embedding: its input are token ids, which have no format; give `weight` only")
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None):
        raise ModelError(f"{name} is an embedding with max_norm, which changes its weight on use; keep it float")
    columns = weight_matrix(layer).shape[1]
    if weight is not None and weight.group_size is not None and columns % weight.group_size:
        raise ModelError(
            f"{name}: group_size {weight.group_size} does not divide its {columns} inputs per row; "
            "use a divisor or granularity: row"
        )


def swap(layer: nn.Module, name: str, weight: Format | None, fmt_input: Format | None) -> None:
    """Make a float layer a simulated one: same parameter objects, same names, hooks and ties."""
    layer._float_type = type(layer)  # type: ignore[assignment]
    layer.__class__ = simulated_type(layer)  # type: ignore[assignment]
    layer.weight_quantizer = None if weight is None else FakeQuant(weight, f"{name}.weight")  # type: ignore[assignment]
    layer.input_quantizer = None if fmt_input is None else FakeQuant(fmt_input, f"{name}.input")  # type: ignore[assignment]
