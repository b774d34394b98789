"""Distillation losses against the golden values, numpy by hand, and their own promises about padding."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from bittern.qat import losses

GOLDEN = load_file(Path(__file__).parent / "data" / "golden.safetensors")
SCORES = GOLDEN["map_loss.student_scores"], GOLDEN["map_loss.teacher_scores"]
ROWS = torch.arange(9)[None] < GOLDEN["map_loss.lengths"][:, None]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_golden_map() -> None:
    """The map loss of padded maps is the published code's, from the maps and from their scores."""
    maps = [F.softmax(scores, -1) for scores in SCORES]
    torch.testing.assert_close(losses.map_loss(*maps, ROWS), GOLDEN["map_loss.value"], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.map_loss_of_scores(*SCORES, 1.0, ROWS), GOLDEN["map_loss.value"])


def test_golden_score() -> None:
    """TernaryBERT's score loss is the published code's, which counts what the mask hides as errors of zero."""
    seen = (SCORES[0] > -100).float().mean((1, 2, 3))
    alone = [losses.score_loss(s[None], t[None]) for s, t in zip(*SCORES, strict=True)]
    torch.testing.assert_close((torch.stack(alone) * seen).mean(), GOLDEN["score_loss.value"], rtol=1e-6, atol=0)


def test_masked_by_addition() -> None:
    """Where a mask adds -100, as Swin's does, a score that falls on the other side of -100 than its teacher's counts
    for nothing, and no gradient comes from there."""
    student = torch.tensor([[[[0.0, -99.5, -101.0, -torch.inf]]]], requires_grad=True)
    loss = losses.score_loss(student, torch.tensor([[[[1.0, -100.5, -99.0, -torch.inf]]]]))
    loss.backward()
    assert loss.item() == 1
    assert student.grad is not None
    assert student.grad.flatten().tolist() == [-2, 0, 0, 0]


def test_sharp_temperature() -> None:
    """Below a temperature of 1 masked keys, whose scores are the least numbers, still count for nothing."""
    masked = torch.finfo(torch.float32).min
    maps = [torch.tensor([[[[a, b, masked], [masked, masked, masked]]]]) for a, b in ((0.0, 1.0), (0.5, 0.0))]
    rows = torch.tensor([[True, False]])
    expected = 0.25 * losses.map_loss(*(torch.softmax(x[..., :1, :2] / 0.5, -1) for x in maps))
    torch.testing.assert_close(losses.map_loss_of_scores(*maps, 0.5, rows), expected)


def test_padded_score() -> None:
    """Over padding too it is the published code's at once: a sum by sample, of the keys that the mask leaves, over all
    heads · n · n entries, padded queries among them."""
    found = losses.score_loss(*SCORES, ROWS, padded=9)
    torch.testing.assert_close(losses.score_loss(*SCORES, ROWS, padded=18), found / 2)
    torch.testing.assert_close(found, GOLDEN["score_loss.value"], rtol=1e-6, atol=0)
    sums = []
    for s, t, length in zip(*(x.double().numpy() for x in SCORES), GOLDEN["map_loss.lengths"].tolist(), strict=True):
        sums.append(((s - t)[:, :, :length] ** 2).sum() / s.size)
    assert found.item() == pytest.approx(np.mean(sums), rel=1e-5)


def test_golden_prediction() -> None:
    """Soft cross-entropy is the published code's."""
    found = losses.prediction_loss(GOLDEN["prediction_loss.student_logits"], GOLDEN["prediction_loss.teacher_logits"])
    torch.testing.assert_close(found, GOLDEN["prediction_loss.value"], rtol=1e-6, atol=0)


def test_score_loss() -> None:
    """The score loss of real tokens: squared errors of what the mask lets through, by numpy sample by sample."""
    student, teacher = (s.double().numpy() for s in SCORES)
    by_sample = []
    for s, t, length in zip(student, teacher, GOLDEN["map_loss.lengths"].tolist(), strict=True):
        by_sample.append(((s - t)[:, :length, :length] ** 2).mean())
    assert losses.score_loss(*SCORES, ROWS).item() == pytest.approx(np.mean(by_sample), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature(temperature: float) -> None:
    """Both softmaxes are divided by the temperature, and the loss is multiplied by its square."""
    s, t = random(4, 5).double().numpy(), random(4, 5, seed=1).double().numpy()

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x / temperature)
        return e / e.sum(-1, keepdims=True)

    expected = -(softmax(t) * np.log(softmax(s))).sum(-1).mean() * temperature**2
    assert losses.prediction_loss(*map(torch.from_numpy, (s, t)), temperature).item() == pytest.approx(expected)


def test_labels_loss() -> None:
    """The loss of labels that are on or off is the soft cross-entropy of each, by numpy, least at the teacher."""
    s, t = (2 * random(5, 4, seed=seed).double().numpy() for seed in (0, 1))
    for temperature in (0.5, 1.0, 3.0):
        p, q = (1 / (1 + np.exp(-x / temperature)) for x in (t, s))
        expected = -(p * np.log(q) + (1 - p) * np.log(1 - q)).mean() * temperature**2
        assert losses.labels_loss(*map(torch.from_numpy, (s, t)), temperature).item() == pytest.approx(expected)
    never = torch.full((5, 4), -8.0)
    assert losses.labels_loss(torch.tensor(t), torch.tensor(t)) < losses.labels_loss(never, torch.tensor(t))


def test_map_loss_tends_to_score_loss() -> None:
    """For large τ the map loss is half the variance over keys of the difference of scores, divided by their number:
    the score loss, but for what is the same for all keys [KD, table 1]."""
    s, t = random(2, 3, 6, 6), random(2, 3, 6, 6, seed=1)
    expected = (s - t).var(-1, unbiased=False).mean() / 2
    torch.testing.assert_close(losses.map_loss_of_scores(s.double(), t.double(), 300.0), expected, rtol=2e-2, atol=0)


def padded(x: Tensor, dims: tuple[int, ...], value: float = 3.0) -> Tensor:
    """x with four more tokens of nonsense along the dimensions."""
    for dim in dims:
        shape = list(x.shape)
        shape[dim] = 4
        x = torch.cat([x, torch.full(shape, value)], dim)
    return x


MORE = torch.cat([torch.ones(2, 6, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)], 1)


def test_padding() -> None:
    """Padding adds nothing to any loss, whatever it holds."""
    x, y = random(2, 6, 8), random(2, 6, 8, seed=1)
    more = padded(x, (1,)), padded(y, (1,), -2.0)
    s, t = random(2, 3, 6, 6), random(2, 3, 6, 6, seed=1)
    hidden = [torch.cat([padded(a, (2,)), torch.full((2, 3, 10, 4), -1e4)], 3) for a in (s, t)]
    maps, hidden_maps = ([F.softmax(a, -1) for a in pair] for pair in ((s, t), hidden))
    for plain, with_padding in (
        (losses.squared_loss(x, y), losses.squared_loss(*more, MORE)),
        (losses.prediction_loss(x, y), losses.prediction_loss(*more, rows=MORE)),
        (losses.score_loss(s, t), losses.score_loss(*hidden, MORE)),
        (losses.map_loss(*maps), losses.map_loss(*hidden_maps, MORE)),
        (losses.relation_loss(s, t), losses.relation_loss(padded(s, (2,)), padded(t, (2,)), MORE)),
    ):
        torch.testing.assert_close(with_padding, plain, rtol=1e-5, atol=0)


def test_company() -> None:
    """The loss of a batch is the mean of its samples' losses, however long each is."""
    lengths = [6, 3]
    rows = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    x, y = random(2, 6, 8), random(2, 6, 8, seed=1)
    alone = [losses.squared_loss(x[i : i + 1, :n], y[i : i + 1, :n]) for i, n in enumerate(lengths)]
    torch.testing.assert_close(losses.squared_loss(x, y, rows), torch.stack(alone).mean())


def test_relations() -> None:
    """Relations are KL divergences of softmax(VVᵀ/√d), by numpy; heads and widths of the two may differ."""
    s, t = random(2, 2, 5, 6), random(2, 4, 5, 8, seed=1)  # widths 12 and 32, as 4 relations of 3 and of 8

    def relation(x: Tensor, heads: int) -> np.ndarray:
        joined = x.double().numpy().transpose(0, 2, 1, 3).reshape(2, 5, heads, -1).transpose(0, 2, 1, 3)
        scores = joined @ joined.transpose(0, 1, 3, 2) / np.sqrt(joined.shape[-1])
        e = np.exp(scores - scores.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    a, b = relation(s, 4), relation(t, 4)
    assert losses.relation_loss(s, t, relations=4).item() == pytest.approx((b * np.log(b / a)).sum(-1).mean(), rel=1e-5)


@pytest.mark.parametrize("kind", ["map", "score", "squared", "prediction"])
def test_same(kind: str) -> None:
    """A student that does as its teacher has nothing to learn, nor a gradient."""
    x = random(2, 3, 6, 6).requires_grad_()
    value = F.softmax(x, -1) if kind == "map" else x
    function = getattr(losses, f"{kind}_loss")
    if kind == "prediction":
        loss = function(x[:, 0, 0], x[:, 0, 0].detach())
    else:
        loss = function(value, value.detach())
        assert loss.item() == 0
    loss.backward()
    assert x.grad is not None
    assert x.grad.abs().max() < 1e-6
