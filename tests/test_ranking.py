"""The ranking loss against three plain loops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file
from torch import Tensor

from bittern.ptq.product import Product, ranking_loss, ranking_penalty

GOLDEN = load_file(Path(__file__).parent / "data" / "golden.safetensors")


def by_hand(scores: np.ndarray, changed: np.ndarray, margin: float) -> float:
    """[VT eq. 13], pair by pair, as a mean over pairs that are no ties."""
    total, pairs = 0.0, 0
    for a, b in zip(scores, changed, strict=True):
        for i in range(len(a)):
            for j in range(i + 1, len(a)):
                if a[i] != a[j]:
                    total += max(0.0, margin - (float(b[i]) - float(b[j])) * np.sign(a[i] - a[j]))
                    pairs += 1
    return total / max(pairs, 1)


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_golden() -> None:
    """The mean is that of the golden file, and so is the sum, over its 7 rows of 21 pairs."""
    got = ranking_loss(GOLDEN["vt.ranking.reference"], GOLDEN["vt.ranking.quantized"], 0.2).item()
    assert got == pytest.approx(GOLDEN["vt.ranking.mean"].item(), rel=1e-6)
    assert got * 7 * 21 == pytest.approx(GOLDEN["vt.ranking.sum"].item(), rel=1e-6)


rows_of_few_values = arrays(np.float32, (4, 6), elements=st.integers(-4, 4).map(lambda i: i / 4))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(scores=rows_of_few_values, changed=rows_of_few_values, margin=st.sampled_from([0.0, 0.2, 1.0]))
def test_ties(scores: np.ndarray, changed: np.ndarray, margin: float) -> None:
    """Whatever the order and however many scores are equal, the loss is that of the three loops."""
    got = ranking_loss(torch.from_numpy(scores), torch.from_numpy(changed), margin).item()
    assert got == pytest.approx(by_hand(scores, changed, margin), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("error", [0.0, 0.01, 0.3, 3.0])
@pytest.mark.parametrize("spread", [0.1, 1.0, 100.0])
def test_far_pairs(error: float, spread: float) -> None:
    """Pairs so far apart that no error can bridge them are left out, and the mean is that over all pairs."""
    scores = spread * random(5, 40)
    changed = scores + error * random(5, 40, 1)
    got = ranking_loss(scores, changed, 0.2).item()
    assert got == pytest.approx(by_hand(scores.numpy(), changed.numpy(), 0.2), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("columns", [1, 2])
def test_rows_without_order(columns: int) -> None:
    """Rows of one score have no pairs, rows of equal scores only ties: no loss."""
    same = torch.ones(3, columns)
    assert ranking_loss(same, same + 1, 0.2).item() == 0


def test_padding() -> None:
    """Padded columns and rows change nothing: pairs with padding do not count."""
    scores, near = random(12, 9), random(12, 9) + 0.3 * random(12, 9, 1)
    groups = scores.view(3, 4, 9)
    keys, rows = torch.ones(3, 9, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
    keys[1, 6:] = rows[1, 3:] = False
    own = [groups[g][rows[g]][:, keys[g]].numpy() for g in range(3)]
    changed = [near.view(3, 4, 9)[g][rows[g]][:, keys[g]].numpy() for g in range(3)]
    pairs = [len(a) * a.shape[1] * (a.shape[1] - 1) // 2 for a in own]
    expected = sum(by_hand(a, b, 0.2) * n for a, b, n in zip(own, changed, pairs, strict=True)) / sum(pairs)
    mask = rows[:, :, None] & keys[:, None]
    sample = torch.arange(3)[:, None].expand(3, 4)
    for extra in (0, 5):
        left = torch.nn.functional.pad(groups * mask, (0, extra))
        product = Product(left, torch.eye(9 + extra).expand(3, -1, -1), sample, "pearson")
        penalty = ranking_penalty(product, rows, torch.nn.functional.pad(keys, (0, extra)), 0.1, 0.2)
        error = torch.nn.functional.pad((near.view(3, 4, 9) - groups) * mask, (0, extra))
        assert penalty(error) == pytest.approx(0.1 * expected, rel=1e-5)
