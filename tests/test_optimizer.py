"""The published optimizer against its recurrence in plain numbers."""

import copy
import math

import pytest
import torch

from bittern.qat.optimizer import BertAdam

SHAPES = ((2, 3), (4,))
RATES = (0.0, 0.01, 0.02, 0.015, 0.01, 0.005)


def gradients(step: int) -> list[torch.Tensor]:
    """Of the first parameter far longer than 1, so that it is clipped; of the second never."""
    draw = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=draw).double() * size for shape, size in zip(SHAPES, (30, 0.1), strict=True)]


def parameters() -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(99)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw).double()) for shape in SHAPES]


def make(weights: list[torch.nn.Parameter]) -> BertAdam:
    return BertAdam([{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0.0}], lr=1.0)


def run(optimizer: BertAdam, weights: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        for weight, grad in zip(weights, gradients(step), strict=True):
            weight.grad = grad
        optimizer.step()


def test_recurrence() -> None:
    """Each number follows m = 0.9 m + 0.1 g, v = 0.999 v + 0.001 g², w = w - rate (m / (√v + 1e-6) + decay w), with g
    clipped to a norm of 1 within its parameter and no correction of the first steps."""
    weights = parameters()
    optimizer = make(weights)
    expected = [w.flatten().tolist() for w in weights]
    moments = [[[0.0, 0.0] for _ in numbers] for numbers in expected]
    run(optimizer, weights, range(len(RATES)))
    for step, rate in enumerate(RATES):
        for numbers, kept, grad, decay in zip(expected, moments, gradients(step), (0.01, 0.0), strict=True):
            values = grad.flatten().tolist()
            factor = min(1.0, 1 / (math.sqrt(sum(g * g for g in values)) + 1e-6))
            for i, g in enumerate(values):
                m, v = kept[i]
                m, v = kept[i] = [0.9 * m + 0.1 * factor * g, 0.999 * v + 0.001 * (factor * g) ** 2]
                numbers[i] -= rate * (m / (math.sqrt(v) + 1e-6) + decay * numbers[i])
    for weight, numbers in zip(weights, expected, strict=True):
        assert weight.flatten().tolist() == pytest.approx(numbers, rel=1e-12)


def test_first_step_is_longer() -> None:
    """Without correction the first step is 0.1 / √0.001 = 3.16 times that of Adam."""
    lengths = []
    for kind in (BertAdam, torch.optim.AdamW):
        weight = torch.nn.Parameter(torch.zeros(1))
        weight.grad = torch.tensor([0.5])
        kind([weight], lr=1e-3, weight_decay=0.0).step()
        lengths.append(abs(weight.item()))
    assert lengths[0] / lengths[1] == pytest.approx(0.1 / math.sqrt(0.001), rel=1e-3)


def test_resume() -> None:
    """Saved and loaded, it goes on to the same bits; a parameter without gradient stays as it is."""
    whole = parameters()
    run(make(whole), whole, range(6))
    weights = parameters()
    first = make(weights)
    run(first, weights, range(3))
    second = make(weights)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, weights, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, weights, strict=True))
    weights[0].grad = None
    before = weights[0].clone()
    second.step()
    assert torch.equal(weights[0], before)
