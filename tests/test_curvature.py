"""Hessians against ones that are formed in full, on a quadratic, a small network and quantized models."""

import copy

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.func import functional_call

from bittern import calibrate, pack, simulate
from bittern.analysis.curvature import (
    Hessian,
    Loss,
    filter_normalised,
    parameters_of,
    prediction_loss_of,
    surface_row,
    top_eigenvalues,
    trace,
    trainable,
)
from bittern.attention import attach
from bittern.deploy.files import digest
from bittern.dry_run import read_anatomy
from bittern.errors import InputError
from bittern.recipe import Recipe
from families import SUPPORTED
from helpers import refused, teacher_and_student

WEIGHTS_ONLY = Recipe.from_yaml(
    "name: w\nrules:\n  - roles: [qkv, attention_output, ffn]\n    weight: {kind: ternary}\n"
)


def quadratic(size: int = 12) -> tuple[Loss, dict[str, Tensor], np.ndarray]:
    """½xᵀAx of two tensors that make up x, its parameters, and the eigenvalues of A."""
    a = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = a + a.T

    def loss(parameters: object) -> Tensor:
        x = torch.cat([p.flatten() for p in parameters.values()])  # type: ignore[attr-defined]
        return x @ a @ x / 2

    parameters = {"a": torch.ones(2, 3, dtype=torch.float64), "b": torch.zeros(size - 6, dtype=torch.float64)}
    return loss, parameters, np.linalg.eigvalsh(a.numpy())


def in_full(hessian: Hessian) -> np.ndarray:
    """The Hessian as a matrix, a product for each column."""
    return torch.stack([hessian.product(row) for row in torch.eye(hessian.size)]).double().numpy()


def test_quadratic() -> None:
    """Of a quadratic the eigenvalues of largest magnitude, negative ones too, and the trace are those of its matrix."""
    loss, parameters, expected = quadratic()
    hessian = Hessian(loss, parameters)
    largest = sorted(sorted(expected, key=abs)[-4:], reverse=True)
    assert top_eigenvalues(hessian, 4, tolerance=1e-10) == pytest.approx(largest, rel=1e-6)
    estimate, error = trace(hessian, probes=400)
    assert abs(estimate - expected.sum()) < 4 * error
    assert 0 < error < 2 * np.abs(expected).sum()


def test_small_network() -> None:
    """Of a small network products are those with torch's own full Hessian."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    parameters = parameters_of(model)

    def of_flat(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in parameters.values()])
        named = {n: part.view(p.shape) for (n, p), part in zip(parameters.items(), parts, strict=True)}
        return (functional_call(model, named, (x,)) - y).square().mean()

    full = torch.autograd.functional.hessian(of_flat, torch.cat([p.flatten() for p in parameters.values()]))
    hessian = Hessian(lambda named: (functional_call(model, dict(named), (x,)) - y).square().mean(), parameters)
    np.testing.assert_allclose(in_full(hessian), full.numpy(), rtol=1e-4, atol=1e-6)
    expected = np.linalg.eigvalsh(full.double().numpy())
    largest = sorted(sorted(expected, key=abs)[-3:], reverse=True)
    assert top_eigenvalues(hessian, 3, tolerance=1e-6) == pytest.approx(largest, rel=1e-3)


@pytest.fixture
def tiny() -> tuple[hf.PreTrainedModel, dict[str, Tensor]]:
    """A BERT of few parameters, and a batch."""
    torch.manual_seed(0)
    config = hf.BertConfig(
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=6,
        vocab_size=9,
        max_position_embeddings=16,
        num_labels=3,
    )
    model = hf.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model, {
        "input_ids": torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }


def test_attention_is_twice_differentiable(tiny: tuple[hf.PreTrainedModel, dict[str, Tensor]]) -> None:
    """Through attention and GELU, H·v is the difference of gradients on both sides of the point."""
    model, batch = tiny
    double = model.double()
    attach(double, read_anatomy(double))
    teacher = copy.deepcopy(double)
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(0.8)
    loss, parameters = prediction_loss_of(double, teacher, batch), parameters_of(double)
    hessian = Hessian(loss, parameters)
    step, v = 1e-3, torch.randn(hessian.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parts = v.split([p.numel() for p in hessian.used])
    moves = {id(p): part.view(p.shape) for p, part in zip(hessian.used, parts, strict=True)}
    names = {n: moves.get(id(p), torch.zeros_like(p)) for n, p in hessian.parameters.items()}
    sides = [Hessian(loss, {n: p + sign * step * names[n] for n, p in parameters.items()}).gradient for sign in (1, -1)]
    expected = (sides[0] - sides[1]) / (2 * step)
    torch.testing.assert_close(
        hessian.product(v), expected.detach(), rtol=1e-3, atol=1e-4 * expected.abs().max().item()
    )


@pytest.mark.parametrize("recipe", ["ternary-2-2-8", "w8a8"])
def test_quantized(tiny: tuple[hf.PreTrainedModel, dict[str, Tensor]], recipe: str) -> None:
    """Straight-through quantizers are twice differentiable, and the Hessian is symmetric."""
    teacher, batch = tiny
    student = copy.deepcopy(teacher)
    simulate(student, recipe, batch)
    calibrate(student, [batch])
    attach(teacher, read_anatomy(teacher))
    hessian = Hessian(prediction_loss_of(student, teacher, batch), parameters_of(student))
    full = in_full(hessian)
    assert np.abs(full).max() > 1e-3
    np.testing.assert_allclose(full, full.T, atol=1e-4 * np.abs(full).max())


def test_straight_through_is_the_float_hessian(tiny: tuple[hf.PreTrainedModel, dict[str, Tensor]]) -> None:
    """With quantized weights alone it is the Hessian of the float model whose weights have the quantized values."""
    teacher, batch = tiny
    student = copy.deepcopy(teacher)
    simulate(student, WEIGHTS_ONLY, batch)
    decoded = trainable(pack(copy.deepcopy(student)))
    for model in (teacher, student, decoded):
        attach(model, read_anatomy(teacher))
    mine, floats = (Hessian(prediction_loss_of(m, teacher, batch), parameters_of(m)) for m in (student, decoded))
    assert mine.size == floats.size
    own, other = (np.linalg.eigvalsh(in_full(h)) for h in (mine, floats))  # the order of parameters may differ
    np.testing.assert_allclose(own, other, atol=1e-5 * np.abs(own).max())


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "bart"])
def test_trainable(name: str) -> None:
    """The copy of a packed model gives the same outputs from float weights, ties kept; the model stays packed."""
    pair, batch = teacher_and_student(name)
    before = digest(sorted(pair.student.state_dict().items()))
    copied = trainable(pair.student)
    with torch.no_grad():
        assert torch.equal(copied(**batch)[0], pair.student(**batch)[0])
    assert sum(p.numel() for p in copied.parameters()) == sum(p.numel() for p in pair.teacher.parameters())
    assert digest(sorted(pair.student.state_dict().items())) == before


def test_directions() -> None:
    """Each filter of a direction is as long as the weight's; biases and norms do not move."""
    parameters = {"conv": torch.randn(4, 3, 2, 2), "linear": torch.randn(5, 6) * 10, "bias": torch.randn(5)}
    direction = filter_normalised(parameters, seed=3)
    for name in ("conv", "linear"):
        lengths = [x.flatten(1).norm(dim=1) for x in (direction[name], parameters[name])]
        torch.testing.assert_close(*lengths)
        assert not torch.allclose(direction[name], parameters[name])
    assert not direction["bias"].any()


@pytest.mark.parametrize("packed", [True, False])
def test_surface(packed: bool) -> None:
    """The middle of the surface is the loss, other points are those of models moved by hand, and the model stays."""
    pair, batch = teacher_and_student("vit", packed=packed)
    model = trainable(pair.student)
    loss, parameters = prediction_loss_of(model, pair.teacher, batch), parameters_of(model)
    before = digest(sorted(model.state_dict().items()))
    row = surface_row([loss], parameters, 0.5, [0.0, 0.25], seed=1)
    assert surface_row([loss], parameters, 0.0, [0.0], seed=1)[0] == pytest.approx(float(loss(parameters).detach()))
    directions = [filter_normalised(parameters, seed) for seed in (1, 2)]
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in by_hand.named_parameters():
            p.add_(0.25 * directions[0][name] + 0.5 * directions[1][name])
        out, expected = (m(**batch).logits for m in (by_hand, pair.teacher))
    assert row[1] == pytest.approx(float(-(expected.softmax(-1) * out.log_softmax(-1)).sum(-1).mean()), rel=1e-4)
    assert digest(sorted(model.state_dict().items())) == before


def test_refusal() -> None:
    """More eigenvalues than there are parameters are refused in one line."""
    loss, parameters, _ = quadratic()
    with refused(InputError, "12", "fewer"):
        top_eigenvalues(Hessian(loss, parameters), 12)


@pytest.mark.parametrize("labels", [True, False])
def test_padding_of_a_target(labels: bool) -> None:
    """Padding of a decoder's own tokens counts for nothing, with labels and without, though the source be as long."""
    model, batch = SUPPORTED["t5"]()
    attach(model, read_anatomy(model))
    batch["decoder_input_ids"] = 5 + torch.arange(24).view(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, -4:] = 0
    more = {"labels": torch.where(mask == 1, batch["decoder_input_ids"], -100)} if labels else {}
    other = copy.deepcopy(model)
    values = []
    for filler in (5, 7):
        changed = {"decoder_input_ids": batch["decoder_input_ids"].masked_fill(mask == 0, filler)}
        given = batch | changed | {"decoder_attention_mask": mask} | more
        values.append(float(prediction_loss_of(model, other, given)(parameters_of(model))))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_families_have_losses() -> None:
    """Language models and encoders without a head have a loss too."""
    for name in ("gpt2", "detr"):
        model, batch = SUPPORTED[name]()
        attach(model, read_anatomy(model))
        hessian = Hessian(prediction_loss_of(model, copy.deepcopy(model), batch), parameters_of(model))
        assert torch.isfinite(hessian.product(torch.ones(hessian.size))).all()
