"""Layers that hold weights, simulated: the same parameters, names and ties, quantized on the way through."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bittern import attention
from bittern.anatomy import Anatomy, Batch, holding, record_of
from bittern.dry_run import check_model, read_anatomy
from bittern.errors import ModelError
from bittern.experts import ExpertsLinear, close_experts, open_experts
from bittern.quantizers import FakeQuant, find_scale, quantize_once, stamp
from bittern.reader import LAYERS, WEIGHTS
from bittern.recipe import Format, Recipe, Role, Rule, load_recipe
from bittern.simulation import LayerReport, Simulation


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weight as (rows, columns), a row for each output channel (each token, for an embedding; of all experts)."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if isinstance(layer, ExpertsLinear):
        return layer.matrices().flatten(0, 1)
    return (weight.mT if isinstance(layer, Conv1D) else weight).flatten(1)


class QuantizedLayer(nn.Module):
    """A layer with a quantized weight or input: simulated (`QuantLayer`) or packed (`deploy.packed.PackedLayer`)."""

    weight_format: Format | None
    input_quantizer: FakeQuant | None

    def quantized_input(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x)


class QuantLayer(QuantizedLayer):
    """Base of simulated layers: quantizers of weight and input, and the quantized weight kept in eval."""

    weight_quantizer: FakeQuant | None
    shares_input = False  # set by `attention.attach` in projections that feed an attention module
    _kept: tuple[tuple[Any, ...], Tensor] | None = None

    @property
    def weight_format(self) -> Format | None:  # type: ignore[override]
        return None if self.weight_quantizer is None else self.weight_quantizer.format

    def quantized_weight(self) -> Tensor:
        """The weight's values after quantization, as (rows, columns).

        Without gradients the result is kept until weight or scale change: a second copy of the weight in memory.
        Changes of `weight.data`, such as PEFT's merging, are not counted by PyTorch; some values of the weight tell.
        """
        weight: Tensor = self.weight  # type: ignore[assignment]
        if (quantizer := self.weight_quantizer) is None or quantizer.bypass:
            return weight_matrix(self)
        if torch.is_grad_enabled() or weight.grad is not None:  # fused optimizers change weights uncounted
            self._kept = None
            return quantizer(weight_matrix(self).contiguous())  # type: ignore[no-any-return]
        some = weight.detach().flatten()[:: 1 + weight.numel() // 64].tolist()
        state = quantizer.format, stamp(weight, quantizer.scale), some
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, quantizer(weight_matrix(self).contiguous()))
        return self._kept[1]

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return x after quantization: in training done once for all of Q, K and V that read it."""
        quantizer, shares = self.input_quantizer, self.shares_input and torch.is_grad_enabled()
        if not shares or quantizer is None or quantizer.bypass or quantizer.format.range == "static":
            return super().quantized_input(x)
        return quantize_once(x, quantizer.format, quantizer)  # type: ignore[no-any-return]


class QuantLinear(QuantLayer, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantConv1D(QuantLayer, Conv1D):
    """GPT-2's linear layer, whose weight is stored (in, out)."""

    forward = QuantLinear.forward


class QuantConv2d(QuantLayer, nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.quantized_weight().view(self.weight.shape)
        return self._conv_forward(self.quantized_input(input), weight, self.bias)  # type: ignore[no-any-return]


class QuantEmbedding(QuantLayer, nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        quantizer = self.weight_quantizer
        if torch.is_grad_enabled() and quantizer is not None and quantizer.by_row:
            self._kept = None
            return quantizer(F.embedding(input, self.weight, self.padding_idx))  # type: ignore[no-any-return]
        return F.embedding(input, self.quantized_weight(), self.padding_idx)


class QuantExpertsLinear(QuantLayer, ExpertsLinear):
    def expert_weight(self, expert: int | None) -> Tensor:
        quantizer = self.weight_quantizer
        if torch.is_grad_enabled() and quantizer is not None and quantizer.by_row and expert is not None:
            self._kept = None
            return quantizer(super().expert_weight(expert).contiguous())  # type: ignore[no-any-return]
        stack: Tensor = self.quantized_weight().unflatten(0, (self.layout.experts, -1))  # (experts, outputs, inputs)
        return stack if expert is None else stack[expert]


class ScaledEmbedding(nn.Module):
    """Addition of the `*ScaledWordEmbedding` of BART, Gemma and others to an embedding: all rows times one number."""

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
    ExpertsLinear: QuantExpertsLinear,
}


def is_known(layer: nn.Module, name: str, anatomy: Anatomy) -> bool:
    """True unless the forward of a subclass may differ from all that are known."""
    if type(layer).__name__.endswith("ScaledWordEmbedding"):
        return len(list(layer.parameters())) == 1
    return type(layer) in SIMULATED or name in anatomy.like_base


def simulate(model: PreTrainedModel, recipe: str | Recipe, batch: Batch | None = None) -> Simulation:
    """Quantize a loaded model in simulation, in place.

    recipe: a name (`w8a8`), a path to YAML, or a Recipe. batch: inputs of one dry run, made up if not given.
    Static scales of weights are set here from their extremes; those of activations by `calibrate`.
    A weight that layers share is quantized once, as the embedding's rule says. Layers that the dry run did not reach
    stay float, and so do those of unknown subclasses, unless a rule names them, and attention that is not found; the
    report's `notes` tell. Raises ModelError and RecipeError before it changes anything.

    >>> from transformers import ViTConfig, ViTModel
    >>> model = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    ...                            image_size=8, patch_size=4)).eval()
    >>> print(simulate(model, "w8a8").quantized[0].weight)
    uniform 8-bit per row, static
    """
    recipe = load_recipe(recipe)
    check_model(model)
    if is_simulated(model):
        raise ModelError("the model is simulated already; call restore(model) first")
    if any(isinstance(m, QuantizedLayer) for m in model.modules()):
        raise ModelError("the model is packed already; simulate the float model that it was made from")
    with ExitStack() as undo:  # where the model or the recipe is refused
        undo.callback(close_experts, model)
        open_experts(model, anatomy_of(model, batch).experts)
        anatomy = anatomy_of(model, batch)  # with these as layers
        recipe.check_globs(anatomy.roles | dict.fromkeys((a.name for a in anatomy.attentions), "attention"))
        chosen = _choose_formats(model, recipe, anatomy)
        sites = {a.name: given for a in anatomy.attentions if (given := recipe.rule_for(a.name, "attention").operands)}
        if not chosen and not sites:
            raise ModelError(f"recipe {recipe.name} selects nothing that {type(model).__name__} runs")
        undo.pop_all()
    close_experts(model, chosen)
    for name, rule in chosen.items():
        layer = model.get_submodule(name)
        swap(layer, name, rule.weight, rule.input)
        if rule.weight is not None and rule.weight.range == "static":
            layer.weight_quantizer.set_scale(*find_scale(weight_matrix(layer), rule.weight, f"{name}.weight"))
    if sites:
        attention.attach(model, anatomy, sites)
    record_of(model).recipe = recipe
    return describe(model)


def anatomy_of(model: PreTrainedModel, batch: Batch | None = None) -> Anatomy:
    """Return the anatomy kept with the model; read it, in float, if there is none or it no longer holds.

    It holds while the model has the same layers, and for batches with the inputs that it was read with: others may
    reach other layers. Raises ModelError as `read_anatomy` does.
    """
    check_model(model)
    if (kept := record_of(model).anatomy) is not None:
        layers = [name for name, module in model.named_modules() if isinstance(module, WEIGHTS)]
        if list(kept.roles) == layers and (batch is None or kept.inputs == batch.keys() - {"labels"}):
            return kept
    with as_float(model):
        found = read_anatomy(model, batch)
    record_of(model).anatomy = found
    return found


def formats(model: nn.Module) -> dict[str, Rule]:
    """Return the formats that the layers and attention modules of a simulated or packed model have now, by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            fmt_input = None if module.input_quantizer is None else module.input_quantizer.format
            found[name] = Rule(weight=module.weight_format, input=fmt_input)
        elif isinstance(module, attention.Site) and module.formats:
            found[name.removesuffix(f".{attention.NAME}")] = Rule.model_validate(module.formats)
    return found


def describe(model: PreTrainedModel) -> Simulation:
    """Return the report of a simulated model: each module with parameters, and each attention, with its formats."""
    anatomy, recipe, given = anatomy_of(model), record_of(model).recipe, formats(model)
    tied, reports = tied_layers(model, anatomy.roles), []
    read = {tied.get(name, name) for name in anatomy.read}
    roles = anatomy.roles | dict.fromkeys((a.name for a in anatomy.attentions), "attention")
    for name, module in model.named_modules():
        parameters = [module.weight] if name in anatomy.roles else list(module.parameters(recurse=False))
        weights = 0 if name in tied else sum(p.numel() for p in parameters)
        if name in roles or (parameters and not isinstance(module, FakeQuant)):
            rule, kind = given.get(name, Rule()), type(module).__name__.removeprefix("Quant")
            weight, fmt_input = (str(fmt or "") for fmt in (rule.weight, rule.input))
            operands = ", ".join(f"{operand} {fmt}" for operand, fmt in rule.operands.items())
            asked = Rule() if recipe is None or name not in anatomy.roles else recipe.rule_for(name, roles[name])
            unknown = not asked.is_float and name not in given and (name in read or not is_known(module, name, anatomy))
            reports.append(LayerReport(name, kind, roles.get(name, ""), weights, weight, fmt_input, operands, unknown))
    return Simulation("" if recipe is None else recipe.name, tuple(reports), anatomy)


def _choose_formats(model: PreTrainedModel, recipe: Recipe, anatomy: Anatomy) -> dict[str, Rule]:
    """Formats of every layer that gets one; refuses what cannot be quantized as asked."""
    chosen, tied = {}, tied_layers(model, anatomy.roles)
    owners = {name: tied.get(name, name) for name in anatomy.roles}
    ran = {owner for name, owner in owners.items() if name not in anatomy.idle}
    by_name = {name for name, role in anatomy.roles.items() if recipe.rule_for(name, role).modules != "*"}
    strange = {name for name in anatomy.roles if not is_known(model.get_submodule(name), name, anatomy)}
    unknown = {owners[name] for name in anatomy.read | (strange - by_name)}  # asked for by name, they are refused
    for name, role in anatomy.roles.items():
        owner = owners[name]
        fmt_input = recipe.rule_for(name, role).input if name not in anatomy.idle else None  # tied to one that ran
        rule = Rule(weight=recipe.rule_for(owner, anatomy.roles[owner]).weight, input=fmt_input)
        if owner in ran - unknown and not rule.is_float:
            _check_layer(name, model.get_submodule(name), anatomy, rule)
            chosen[name] = rule
    return chosen


def restore(model: PreTrainedModel) -> None:
    """Undo `simulate`: the float model again, with its own attention; weights keep their present float values."""
    for layer in model.modules():
        if isinstance(layer, QuantLayer):
            layer.__class__ = layer.__dict__.pop("_float_type")
            del layer.weight_quantizer, layer.input_quantizer
            layer.__dict__.pop("_kept", None)
    attention.detach(model)
    close_experts(model)
    record_of(model).recipe = None


def is_simulated(model: nn.Module) -> bool:
    """True if the model has simulated layers or attention."""
    return any(isinstance(m, QuantLayer | attention.Site) for m in model.modules())


def fake_quants(model: nn.Module) -> Iterator[tuple[str, FakeQuant]]:
    """Every quantizer of a simulated model by its name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, FakeQuant))


def as_float(module: nn.Module) -> AbstractContextManager[None]:
    """A simulated module computes in float inside the block; its formats and scales stay."""
    return holding([quantizer for _, quantizer in fake_quants(module)], "bypass", True)


def tied_layers(model: nn.Module, roles: Mapping[str, Role]) -> dict[str, str]:
    """Layers that share another's weight → the layer that decides its format: the embedding, else the first."""
    owners: dict[object, str] = {}
    first = sorted(roles, key=lambda n: roles[n] != "embedding")
    found = {name: owners.setdefault(model.get_submodule(name).weight, name) for name in first}
    return {name: owner for name, owner in found.items() if owner != name}


def _check_layer(name: str, layer: nn.Module, anatomy: Anatomy, rule: Rule) -> None:
    if not is_known(layer, name, anatomy):
        base = next(t.__name__ for t in LAYERS if isinstance(layer, t))
        raise ModelError(
            f"{name} is a {type(layer).__name__}, a subclass of {base} that Bittern does not know and whose forward "
            f"may differ; keep it float with a first rule `modules: {name!r}`"
        )
    if isinstance(layer, nn.Embedding) and rule.input is not None:
        raise ModelError(f"{name} is an embedding: its input are token ids, which have no format; give `weight` only")
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None):
        raise ModelError(f"{name} is an embedding with max_norm, which changes its weight on use; keep it float")
    if isinstance(layer, nn.Conv2d) and rule.input is not None and rule.input.granularity == "token":
        raise ModelError(f"{name} is a convolution: its input has no tokens; use granularity: tensor for it")
    columns, size = weight_matrix(layer).shape[1], rule.weight and rule.weight.group_size
    if size and columns % size:
        use = "use a divisor or granularity: row"
        raise ModelError(f"{name}: group_size {size} does not divide its {columns} inputs per row; {use}")


def swap(layer: nn.Module, name: str, weight: Format | None, fmt_input: Format | None) -> None:
    """Make a float layer a simulated one: same parameter objects, same names, hooks and ties."""
    layer._float_type = type(layer)  # type: ignore[assignment]
    known = next(simulated for kind, simulated in SIMULATED.items() if isinstance(layer, kind))
    layer.__class__ = QuantScaledEmbedding if type(layer).__name__.endswith("ScaledWordEmbedding") else known
    layer.weight_quantizer = None if weight is None else FakeQuant(weight, f"{name}.weight")  # type: ignore[assignment]
    layer.input_quantizer = None if fmt_input is None else FakeQuant(fmt_input, f"{name}.input")  # type: ignore[assignment]
