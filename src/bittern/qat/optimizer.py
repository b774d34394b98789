"""The optimizer of the published code of [KD] and [TI]."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

BETAS, EPSILON, MAX_NORM = (0.9, 0.999), 1e-6, 1.0
AT_ONCE = 1 << 16  # numbers of a parameter that are updated together, so that each operation finds them in the cache


class BertAdam(torch.optim.Optimizer):
    """Adam as BERT's own code has it: no correction of the moments' bias, which makes the first steps several times
    longer, and the gradient of each parameter clipped by itself.

    The weight decay is no part of the gradient: it goes into the update, times the learning rate.
    """

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                clip_grad_norm_(p, MAX_NORM)
                if not (state := self.state[p]):
                    state |= {"mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
                whole = [torch.atleast_1d(t) for t in (p, p.grad, state["mean"], state["square"])]
                rows = 1 + AT_ONCE * len(whole[0]) // max(1, p.numel())
                for weight, gradient, mean, square in zip(*(t.split(rows) for t in whole), strict=True):
                    mean.lerp_(gradient, 1 - BETAS[0])
                    square.lerp_(gradient.square(), 1 - BETAS[1])
                    update = mean / square.sqrt().add_(EPSILON)
                    weight.add_(update.add_(weight, alpha=group["weight_decay"]), alpha=-group["lr"])
        return loss
