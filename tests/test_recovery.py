"""Attention recovery against the golden values and against loops over rows and pairs in plain numpy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bittern.analysis import recovery
from bittern.qat.losses import map_loss

GOLDEN = load_file(Path(__file__).parent / "data" / "golden.safetensors")
STUDENT, TEACHER = (GOLDEN[f"map_loss.{who}_scores"].softmax(-1) for who in ("student", "teacher"))
ROWS = torch.arange(9)[None] < GOLDEN["map_loss.lengths"][:, None]
SEEN = ROWS[:, None, :, None] & ROWS[:, None, None, :]


def random_maps(samples: int = 2, heads: int = 3, tokens: int = 7, seed: int = 0) -> Tensor:
    scores = torch.randn(samples, heads, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    return scores.softmax(-1)


def causal(tokens: int = 7, padding: int = 2) -> Tensor:
    """What may be attended in two texts of a decoder, the second padded: rows of every length."""
    seen = torch.ones(2, 1, tokens, tokens, dtype=torch.bool).tril()
    seen[1, :, tokens - padding :] = False
    return seen


def rows_of(sample: int, head: int, seen: Tensor, *maps: Tensor) -> list[list[np.ndarray]]:
    """For each real query the values of each map that it sees."""
    where = seen[sample, 0]
    return [[m[sample, head, q, where[q]].double().numpy() for m in maps] for q in range(len(where)) if where[q].any()]


def test_golden_cover() -> None:
    """The cover length ratio is that of the golden file, head by head."""
    found = recovery.cover_length_ratio(STUDENT, TEACHER, SEEN, int(GOLDEN["cover_length_ratio.top_k"]))
    torch.testing.assert_close(found, GOLDEN["cover_length_ratio.value"], rtol=1e-6, atol=1e-7)


def test_golden_ranking() -> None:
    """The ranking loss is that of the golden file, head by head, and counts each pair once."""
    total, pairs = recovery.map_ranking_loss(STUDENT, TEACHER, SEEN)
    torch.testing.assert_close(total.float(), GOLDEN["ranking_loss.sum"], rtol=1e-6, atol=1e-7)
    lengths = GOLDEN["map_loss.lengths"]
    assert torch.equal(pairs, (lengths * lengths * (lengths - 1) // 2)[:, None].expand(3, 4))


def test_golden_norms() -> None:
    """Norms of f(x), αf(x) and Σ αf(x) over heads are those of the golden file."""
    value, w_o, maps = GOLDEN["norms.value"], GOLDEN["norms.w_o"], GOLDEN["norms.map"]
    f = recovery.transformed_norms(value, w_o)
    torch.testing.assert_close(f.float(), GOLDEN["norms.f"], rtol=1e-6, atol=0)
    torch.testing.assert_close((maps * f.unsqueeze(2)).float(), GOLDEN["norms.alpha_f"], rtol=1e-6, atol=0)
    torch.testing.assert_close(
        recovery.summed_norms(maps, value, w_o).float(), GOLDEN["norms.summed"], rtol=1e-6, atol=0
    )


def test_divergence_is_the_map_loss() -> None:
    """Averaged over heads and samples the divergence is the map loss of training."""
    found = recovery.divergence(STUDENT, TEACHER, SEEN).mean().float()
    torch.testing.assert_close(found, map_loss(STUDENT, TEACHER, ROWS))
    torch.testing.assert_close(found, GOLDEN["map_loss.value"], rtol=1e-6, atol=0)


def test_causal_rows() -> None:
    """With rows of every length cover, ranking and ranking ratio are what loops over each row's own keys give."""
    student, teacher, seen = random_maps(), random_maps(seed=1), causal()
    cover = recovery.cover_length_ratio(student, teacher, seen, top=3)
    total, pairs = recovery.map_ranking_loss(student, teacher, seen)
    ratio = recovery.ranking_ratio(student, seen, token=1)
    for i in range(2):
        for h in range(3):
            covers, losses, count, ratios = [], 0.0, 0, []
            for s, t in rows_of(i, h, seen, student, teacher):
                wanted, order = np.argsort(-t)[:3], np.argsort(-s)
                covers.append(max(int(np.flatnonzero(order == k)[0]) for k in wanted) / len(s))
                for a in range(len(s)):
                    for b in range(a + 1, len(s)):
                        losses += max(0.0, -(s[a] - s[b]) * np.sign(t[a] - t[b]))
                        count += 1
                if len(s) > 1:
                    ratios.append((s < s[1]).sum() / (len(s) - 1))
            assert cover[i, h].item() == pytest.approx(np.mean(covers), rel=1e-6)
            assert total[i, h].item() == pytest.approx(losses, rel=1e-6)
            assert pairs[i, 0].item() == count
            assert ratio[i, h].item() == pytest.approx(np.mean(ratios), rel=1e-6)


def test_ranking_of_ties() -> None:
    """Keys that the teacher likes equally have no order to lose; the student's ties lose nothing."""
    teacher = torch.tensor([[[[0.3, 0.3, 0.3, 0.1]]]])
    student = torch.tensor([[[[0.1, 0.5, 0.2, 0.2]]]])
    seen = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    total, _ = recovery.map_ranking_loss(student, teacher, seen)
    assert total.item() == pytest.approx(0.1)  # only the first key fell behind the last
    assert recovery.map_ranking_loss(student, student, seen)[0].item() == 0
    assert recovery.ranking_ratio(student, seen, token=2).item() == pytest.approx((1 + 0.5) / 3)


def test_floor() -> None:
    """A teacher against itself covers its top K in K - 1 positions, or in all that a short row has."""
    maps, seen = random_maps(), causal(padding=0)
    found = recovery.cover_length_ratio(maps, maps, seen, top=3)
    expected = np.mean([(min(3, n) - 1) / n for n in range(1, 8)])
    torch.testing.assert_close(found, torch.full((2, 3), float(expected)))


@pytest.mark.parametrize("name", ["cover", "ranking", "divergence", "ratio", "distance"])
def test_padding(name: str) -> None:
    """Padding, whatever it holds, changes no diagnostic of any sample."""
    student, teacher = random_maps(), random_maps(seed=1)
    seen, kinds = torch.ones(2, 1, 7, 7, dtype=torch.bool), torch.arange(7).expand(2, 7) % 2

    def run(s: Tensor, t: Tensor, seen: Tensor, kinds: Tensor) -> Tensor:
        match name:
            case "cover":
                return recovery.cover_length_ratio(s, t, seen, 3)
            case "ranking":
                return torch.stack(recovery.map_ranking_loss(s, t, seen))
            case "divergence":
                return recovery.divergence(s, t, seen)
            case "ratio":
                return recovery.ranking_ratio(s, seen)
        return recovery.distance(s, t, seen, kinds, 2)

    padded = [torch.full((2, 3, 10, 10), value) for value in (0.7, 0.1)]
    for big, small in zip(padded, (student, teacher), strict=True):
        big[:, :, :7, :7] = small
    more = torch.zeros(2, 1, 10, 10, dtype=torch.bool)
    more[:, :, :7, :7] = True
    longer = torch.cat([kinds, torch.zeros(2, 3, dtype=torch.long)], 1)
    torch.testing.assert_close(run(*padded, more, longer), run(student, teacher, seen, kinds))


def test_distance() -> None:
    """Distances of a class are means over real queries and its keys; a class that is not there is NaN."""
    student, teacher, seen = random_maps(), random_maps(seed=1), causal()
    kinds = torch.tensor([[0, 1, 1, 1, 2, 1, 1], [0, 1, 1, 1, 1, 1, 1]])
    everywhere, *of_kinds = recovery.distance(student, teacher, seen, kinds, 3).unbind(-1)
    torch.testing.assert_close(everywhere, recovery.distance(student, teacher, seen)[..., 0])
    found = torch.stack(of_kinds, -1)
    for i in range(2):
        for kind in range(3):
            pairs = [(q, k) for q in range(7) for k in range(7) if seen[i, 0, q, k] and kinds[i, k] == kind]
            errors = [abs(student[i, 1, q, k] - teacher[i, 1, q, k]).item() for q, k in pairs]
            if errors:
                assert found[i, 1, kind].item() == pytest.approx(np.mean(errors), rel=1e-6)
            else:
                assert found[i, 1, kind].isnan()


def test_relative_error() -> None:
    """Relative errors leave padding out."""
    x, y = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    rows = torch.tensor([[True] * 4, [True, True, False, False]])
    error = recovery.relative_error(x, y, rows)
    expected = (x[1, :2] - y[1, :2]).norm() ** 2 / y[1, :2].norm() ** 2
    assert error[1].item() == pytest.approx(expected.item(), rel=1e-5)
