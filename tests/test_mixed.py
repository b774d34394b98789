"""Mixed precision against exhaustive enumeration, numpy and figures by hand."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from bittern import simulate
from bittern.attention import recording, sites
from bittern.errors import InputError
from bittern.layers import as_float
from bittern.ptq.mixed import (
    choose_bits,
    frontier,
    nuclear_norm,
    paper_sensitivity,
    relative_sensitivity,
    sensitivities,
)
from bittern.ptq.stream import stream
from families import SUPPORTED
from helpers import refused

GOLDEN = load_file(Path(__file__).parent / "data" / "golden.safetensors")
BITS = (4, 6, 8)
omega = st.integers(0, 20).map(lambda i: i / 4)  # ties too, and widths that are worse than narrower ones
problem = st.lists(st.tuples(st.integers(1, 9), *[omega] * len(BITS)), min_size=1, max_size=5)


def everything(
    sensitivity: dict[str, dict[int, float]], weights: dict[str, int]
) -> list[tuple[int, float, tuple[int, ...]]]:
    """Size, sensitivity and bits of every choice there is."""
    return [
        (
            sum(weights[part] * bits for part, bits in zip(weights, chosen, strict=True)),
            sum(sensitivity[part][bits] for part, bits in zip(weights, chosen, strict=True)),
            chosen,
        )
        for chosen in product(*(sensitivity[part] for part in weights))
    ]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(problem=problem, target=st.floats(4, 8))
def test_frontier(problem: list[tuple[float, ...]], target: float) -> None:
    """The frontier is what enumeration finds, and what is chosen is the best of all that fit the target."""
    sensitivity = {f"p{i}": dict(zip(BITS, part[1:], strict=True)) for i, part in enumerate(problem)}
    weights = {f"p{i}": int(part[0]) for i, part in enumerate(problem)}
    every = everything(sensitivity, weights)
    beaten = {
        (size, total)
        for size, total, _ in every
        if any(s <= size and t <= total and (s, t) != (size, total) for s, t, _ in every)
    }
    points = frontier(sensitivity, weights)
    assert [(p.size, p.sensitivity) for p in points] == sorted({(s, t) for s, t, _ in every} - beaten)
    for point in points:
        assert (point.size, point.sensitivity, tuple(point.bits.values())) in every
    chosen = choose_bits(points, weights, target)
    assert chosen.size <= target * sum(weights.values())
    assert chosen.sensitivity == min(t for s, t, _ in every if s <= target * sum(weights.values()))


def test_impossible_target() -> None:
    """A target below the smallest choice is refused in one line that says what the smallest is."""
    points = frontier({"a": {4: 1.0, 6: 0.5}, "b": {5: 1.0}}, {"a": 30, "b": 10})
    with refused(InputError, "4.2 bits a weight or fewer", "the smallest has 4.25"):
        choose_bits(points, {"a": 30, "b": 10}, 4.2)
    assert choose_bits(points, {"a": 30, "b": 10}, 4.25).bits == {"a": 4, "b": 5}


@pytest.mark.parametrize("shape", [(3, 4, 6, 16), (2, 16, 6), (5, 5), (2, 3, 1, 7)])
def test_nuclear_norm(shape: tuple[int, ...]) -> None:
    """The norm is the sum of the singular values, of wide and of tall matrices."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = np.linalg.svd(x.double().numpy(), compute_uv=False).sum(-1)
    np.testing.assert_allclose(nuclear_norm(x).numpy(), expected, rtol=1e-7)


def test_golden_nuclear_norm() -> None:
    """The norm is that of the golden file; of a matrix of rank 1 it is the Frobenius norm."""
    got = nuclear_norm(GOLDEN["vt.nuclear_norm.matrix"]).item()
    assert got == pytest.approx(GOLDEN["vt.nuclear_norm.value"].item(), rel=1e-6)
    assert nuclear_norm(torch.ones(3, 12)).item() == pytest.approx(6, rel=1e-6)


def test_paper_sensitivity() -> None:
    """[VT eq. 18] by hand: heads of a sample are summed in both factors, samples are averaged."""
    diagonal = torch.diag(torch.tensor([3.0, 4.0]))  # of nuclear norm 7
    maps = torch.stack([torch.stack([diagonal, diagonal]), torch.stack([diagonal, 2 * diagonal])])
    changed = maps.clone()
    changed[0, 0, 0, 1] += 2  # 4
    changed[1, 0, 0, 0] += 1
    changed[1, 1, 1, 1] -= 3  # 1 + 9
    assert paper_sensitivity(maps, changed) == pytest.approx((14 * 4 + 21 * 10) / 2)
    features = torch.stack([diagonal, 3 * diagonal])
    changed = features + torch.tensor([[[1.0, 0], [0, 0]], [[0, 0], [0, 2.0]]])
    assert paper_sensitivity(features, changed) == pytest.approx((7 * 1 + 21 * 4) / 2)


def test_relative_sensitivity() -> None:
    """‖Ŷ - Y‖²/‖Y‖² by hand, the mean over samples; zero outputs do no harm."""
    out = torch.tensor([[[3.0, 4.0]], [[6.0, 8.0]]])
    assert relative_sensitivity(out, out + 1) == pytest.approx((2 / 25 + 2 / 100) / 2)
    assert relative_sensitivity(0 * out, 0 * out) == 0


def test_errors_leave_nothing_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a block fails while its parts are tried, nothing of it is recorded any more; a recording around it goes on."""

    def fails() -> None:
        raise RuntimeError("broken")

    model, batch = SUPPORTED["vit"]()
    simulate(model, "w8a8", batch)
    with as_float(model), torch.no_grad():
        for _, calls in stream(model, ["vit.layers.0"], [batch]):
            with recording(model, "query") as taps, monkeypatch.context() as patch:
                patch.setattr(calls[0], "run", fails)
                with pytest.raises(RuntimeError, match="broken"):
                    sensitivities(calls, [2], {"vit.layers.0.attention": "attention"}, "relative")
                assert all(site.taps is taps for site in sites(model))
            calls[0].output = calls[0].run()
    assert all(site.taps is None for site in sites(model))
