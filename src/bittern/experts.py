"""Weights of experts of a mixture, which transformers holds as parameters of three dimensions or stacked, as layers.

A module's own code multiplies with the matrices of such a parameter, one by one or all at once; `trace.Trace` sees
that in a dry run. `open_experts` puts a layer in the parameter's place, which stands for it in that code: what is
multiplied by the layer, or by one expert of it, runs the layer. So all that serves layers serves it too.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bittern.errors import ModelError

VIEWS = (Tensor.view, Tensor.reshape, Tensor.transpose, Tensor.float, Tensor.T.__get__)  # type: ignore[attr-defined]
MULTIPLY = (F.linear, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm)


class Layout(NamedTuple):
    """How a parameter holds matrices (outputs, inputs), one after the other: the two exchanged if transposed."""

    experts: int
    transposed: bool


def layout_of(weight: Tensor, part: Tensor, function: Any, args: Sequence[Any]) -> Layout | None:
    """The layout of a parameter if a call multiplies by one of its matrices, or by all of them; None if not."""
    if function not in MULTIPLY or len(args) != 2 or args[1] is not part or part.dim() not in (2, 3):
        return None
    experts, as_stored = weight.numel() // part.shape[-2:].numel(), part.is_contiguous()
    if experts < 2 or part.shape[:-2].numel() not in (1, experts) or not (as_stored or part.mT.is_contiguous()):
        return None
    return Layout(experts, as_stored != (function is F.linear))  # others sum over the last dimension but one


class _Operand:
    """Stands for a weight in a module's own code: a product with it calls it, and views of it are itself."""

    def view(self, *_: Any) -> Any:
        return self

    reshape = transpose = float = view
    T = property(view)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in MULTIPLY or len(args) != 2 or kwargs or not isinstance(args[1], _Operand):
            used = f"weights of experts are used in another way than in the dry run, {func.__name__}"
            raise ModelError(f"{used}; give simulate a batch like those that come")
        return args[1](args[0])  # type: ignore[operator]


class _Expert(_Operand):
    """The weight of one expert."""

    def __init__(self, layer: ExpertsLinear, expert: int):
        self.layer, self.expert, self.shape = layer, expert, layer.shape[-2:]

    def __call__(self, x: Tensor) -> Any:
        return self.layer(x, self.expert)


class ExpertsLinear(_Operand, nn.Module):
    """A linear layer of each expert. weight: as the model has it, see `Layout`."""

    _is_hf_initialized = True  # for transformers, which looks for a parameter here

    def __init__(self, weight: nn.Parameter, layout: Layout):
        super().__init__()
        self.weight, self.layout = weight, layout

    def __getitem__(self, expert: int | Tensor) -> _Expert:
        return _Expert(self, int(expert))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weight, name) if name in ("shape", "dtype", "device") else super().__getattr__(name)

    def matrices(self) -> Tensor:
        """The float weights (experts, outputs, inputs)."""
        stack = self.weight.view(self.layout.experts, -1, self.weight.shape[-1])
        return stack.mT if self.layout.transposed else stack

    def expert_weight(self, expert: int | None) -> Tensor:
        """The weight of one expert (outputs, inputs), or of all (experts, outputs, inputs)."""
        return self.matrices() if expert is None else self.matrices()[expert]

    def quantized_input(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, expert: int | None = None) -> Tensor:
        """The product of rows and one expert's weight, (…, inputs) to (…, outputs), or of rows for each expert."""
        return torch.matmul(self.quantized_input(x), self.expert_weight(expert).mT.to(x.dtype))


def open_experts(model: nn.Module, found: Mapping[str, Layout]) -> None:
    """Make layers of the parameters with these names, in place, and let transformers call their modules' own code."""
    for name, layout in found.items():
        owner, _, part = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        module.add_module(part, ExpertsLinear(module._parameters.pop(part), layout))
        if hasattr(getattr(module, "config", None), "_experts_implementation") and "_config_was" not in vars(module):
            module._config_was, module.config = module.config, copy(module.config)
            module.config._experts_implementation_internal = "eager"


def close_experts(model: nn.Module, keep: Container[str] = ()) -> None:
    """Undo `open_experts`, but for layers that are to be kept, by their names."""
    for owner, module in list(model.named_modules()):
        layers = {part: layer for part, layer in module.named_children() if isinstance(layer, ExpertsLinear)}
        closed = [part for part in layers if f"{owner}.{part}" not in keep]
        for part in closed:
            del module._modules[part]
            module.register_parameter(part, layers[part].weight)
        if len(closed) == len(layers) and "_config_was" in vars(module):
            module.config = module.__dict__.pop("_config_was")
