"""Experts of a mixture, whose weights transformers holds as parameters of three dimensions, as layers.

`open_experts` moves each of these parameters into a layer of its own, for all that serves layers to serve it too.
transformers' ExpertsInterface then calls `run_experts`, which runs the layers expert by expert.
"""

from __future__ import annotations

from collections.abc import Container
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bittern.compat import ALL_EXPERTS_FUNCTIONS

FUNCTION_NAME = "bittern"


class ExpertsLinear(nn.Module):
    """A linear layer of each expert. weight: (experts, outputs, inputs), the last two exchanged if transposed."""

    _is_hf_initialized = True  # for transformers, which looks for a parameter here

    def __init__(self, weight: nn.Parameter, transposed: bool):
        super().__init__()
        self.weight, self.transposed = weight, transposed

    def expert_weight(self, expert: int) -> Tensor:
        """The weight of one expert (outputs, inputs)."""
        return self.weight[expert].mT if self.transposed else self.weight[expert]

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """The product of rows (rows, inputs) and one expert's weight: (rows, outputs)."""
        return F.linear(x, self.expert_weight(expert))


def _products(module: nn.Module) -> list[str]:
    """Names of what holds the weights of experts, in the order of their products; empty for other modules."""
    if not hasattr(module, "is_transposed") or not hasattr(module, "has_gate"):
        return []  # not what transformers' `use_experts_implementation` makes
    return ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]


def open_experts(model: nn.Module) -> None:
    """Make layers of the weights of experts, in place."""
    for _, module in list(model.named_modules()):
        parts = _products(module)
        if parts and all(part in module._parameters for part in parts):
            for part in parts:
                module.add_module(part, ExpertsLinear(module._parameters.pop(part), module.is_transposed))
            module._config_was, module.config = module.config, copy(module.config)
            module.config._experts_implementation_internal = FUNCTION_NAME


def close_experts(model: nn.Module, keep: Container[str] = ()) -> None:
    """Undo `open_experts`, but for experts of which a layer is to be kept, by its name."""
    for name, module in list(model.named_modules()):
        if "_config_was" in vars(module) and not any(f"{name}.{part}" in keep for part in _products(module)):
            module.config = module.__dict__.pop("_config_was")
            for part in _products(module):
                layer: Any = module._modules.pop(part)
                setattr(module, part, layer.weight)


def run_experts(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return, for tokens (tokens, hidden), the weighted sum of the experts chosen for each (tokens, chosen)."""
    out = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        token, place = torch.where(top_k_index == expert)
        x = hidden_states[token]  # (rows, hidden)
        for part in _products(experts):
            x = getattr(experts, part)(x, expert)  # (rows, inner) or gate and up (rows, 2 · inner); then (rows, hidden)
            x = x + getattr(experts, f"{part}_bias")[expert] if experts.has_bias else x
            if part != "down_proj":
                x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)  # (rows, inner)
        if getattr(experts, "has_post_expert_norm", False):
            x = experts.post_expert_norm(x)
        out.index_add_(0, token, (x * top_k_weights[token, place, None]).to(out.dtype))
    return out


ALL_EXPERTS_FUNCTIONS.register(FUNCTION_NAME, run_experts)
