"""Mixed precision: a width for each attention and each FFN, least sensitivity for a given size [VT eq. 17-18].

The sum of sensitivities and the size are both sums over parts, so the best choice is a multiple-choice knapsack. It is
solved exactly, for all sizes at once: states that are larger and no better than another are dropped part by part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bittern.errors import InputError


@dataclass(frozen=True)
class Choice:
    """A point of the Pareto frontier. size: bits of all weights; bits: of each part."""

    size: int
    sensitivity: float
    bits: dict[str, int]


def nuclear_norm(matrices: Tensor) -> Tensor:
    """Sum of the singular values of each matrix (…, rows, columns), through the smaller Gram matrix in float64."""
    x = matrices.double()
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
    norms: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum(-1)
    return norms


def paper_sensitivity(out: Tensor, changed: Tensor) -> float:
    """[VT eq. 18]: ‖Y‖_* · ‖Ŷ - Y‖², each summed over the heads of a sample, mean over samples.

    out, changed: (samples, …, rows, columns): attention maps, or outputs of the FFN.
    """
    norms = nuclear_norm(out).flatten(1).sum(1) if out.dim() > 3 else nuclear_norm(out)
    return float((norms * (changed - out).double().square().flatten(1).sum(1)).mean())


def relative_sensitivity(out: Tensor, changed: Tensor) -> float:
    """‖Ŷ - Y‖²/‖Y‖² of a block's output (samples, …), mean over samples: the same units for attention and FFN."""
    power = out.double().square().flatten(1).sum(1).clamp(min=1e-30)
    return float(((changed - out).double().square().flatten(1).sum(1) / power).mean())


def frontier(sensitivity: Mapping[str, Mapping[int, float]], weights: Mapping[str, int]) -> list[Choice]:
    """All choices of bits that no other beats in both size and sensitivity, by size.

    sensitivity: part → bits → Ω. weights: part → how many.
    """
    states: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for part, options in sensitivity.items():
        grown = sorted(
            (size + weights[part] * bits, total + omega, (*chosen, bits))
            for size, total, chosen in states
            for bits, omega in options.items()
        )
        states, best = [], float("inf")
        for state in grown:
            if state[1] < best:
                best = state[1]
                states.append(state)
    return [Choice(size, total, dict(zip(sensitivity, chosen, strict=True))) for size, total, chosen in states]


def choose_bits(points: Sequence[Choice], weights: Mapping[str, int], target: float) -> Choice:
    """The least sensitive point of at most `target` bits a weight on average. Raises InputError if none is so small."""
    total = sum(weights.values())
    fitting = [point for point in points if point.size <= target * total]
    if not fitting:
        raise InputError(
            f"no choice of bits has {target:g} bits a weight or fewer; the smallest has {points[0].size / total:.2f}"
        )
    return fitting[-1]
