"""Clip ranges against numpy, scipy and the published constants, and channel splitting against its halves."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.optimize import minimize_scalar
from torch import Tensor

from bittern.errors import ModelError, RecipeError
from bittern.ptq import clips
from bittern.ptq.clips import aciq_correct, aciq_scale, ocs, omse_scale, percentile_scale
from bittern.quantizers import code_range, decode, encode, fake_quantize, find_scale
from bittern.recipe import Format

SCHEMES = ("symmetric", "unsigned", "asymmetric")
SCALES: dict[str, Callable[..., clips.Scale]] = {
    "percentile": percentile_scale,
    "omse": omse_scale,
    "aciq": aciq_scale,
}
UNITS = [
    Format(bits=4, scheme=scheme, granularity=unit, group_size=4 if unit == "group" else None, range="static")
    for scheme in SCHEMES
    for unit in ("tensor", "row", "group")
]
KINDS = [
    Format(bits=2),
    Format(bits=3, scheme="unsigned"),
    Format(bits=4, scheme="asymmetric"),
    Format(bits=8),
    Format(bits=8, scheme="asymmetric"),
    Format(bits=12),
    Format(bits=6, scheme="unsigned"),
]
property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def random(shape: tuple[int, ...] = (6, 40), seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def static(fmt: Format) -> Format:
    return fmt.model_copy(update={"range": "static"})


def error(x: Tensor, fmt: Format, scale: Tensor, offset: Tensor | None) -> Tensor:
    return (fake_quantize(x, fmt, scale, offset) - x).double().square()


def exact_least_error(w: np.ndarray, bits: int) -> float:
    """The least squared error of symmetric codes over all scales: its pieces, between the scales where a code changes,
    are parabolas."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    turns = [abs(v) / (k + 0.5) for v in w for k in range(high if v > 0 else -low)]
    edges = np.sort(np.array([*turns, 2 * max(turns)]))
    best = float(w @ w)
    for scale in (edges[1:] + edges[:-1]) / 2:
        q = np.clip(np.rint(w / scale), low, high)
        if q.any():
            best = min(best, float(w @ w - (w @ q) ** 2 / (q @ q)))
    return best


# All of them


@pytest.mark.parametrize("method", SCALES)
@pytest.mark.parametrize("fmt", UNITS, ids=str)
def test_shapes_are_those_of_find_scale(method: str, fmt: Format) -> None:
    """Scale and offset have the shapes and types of `find_scale`, are positive, and hold zero exactly."""
    x = random((6, 8))
    for got, like in zip(SCALES[method](x, fmt), find_scale(x, fmt), strict=True):
        if like is None:
            assert got is None
        else:
            assert (got.shape, got.dtype) == (like.shape, like.dtype)
    scale, offset = SCALES[method](x, fmt)
    assert (scale > 0).all()
    x[:, ::2] = 0
    assert (fake_quantize(x, fmt, scale, offset)[:, ::2] == 0).all()


@pytest.mark.parametrize("method", SCALES)
@pytest.mark.parametrize("unit", ["row", "group", "head"])
def test_units_are_separate(method: str, unit: str) -> None:
    """The scale of a unit is the scale of that unit alone."""
    fmt = Format(bits=4, scheme="asymmetric", granularity=unit, group_size=8 if unit == "group" else None)
    whole = fmt.model_copy(update={"granularity": "tensor", "group_size": None})
    if unit == "head":
        x = random((2, 3, 4, 8))
        parts = [x[:, i] for i in range(3)]
    else:
        x = random((5, 16))
        parts = [row for rows in x for row in (rows.split(8) if unit == "group" else [rows])]
    alone = [SCALES[method](part, whole) for part in parts]
    for got, expected in zip(SCALES[method](x, static(fmt)), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(got.flatten(), torch.stack(expected))


@pytest.mark.parametrize("method", SCALES)
@pytest.mark.parametrize("fmt", UNITS, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.3, -1000.0, 1e-44])
def test_constant_rows(method: str, fmt: Format, value: float) -> None:
    """Rows of one value, zero among them, get a usable scale beside rows that vary."""
    x = random((4, 8))
    x[1] = value
    scale, offset = SCALES[method](x, fmt)
    out = fake_quantize(x, fmt, scale, offset)
    assert (scale > 0).all()
    assert torch.isfinite(out).all()
    if value == 0:
        assert (out[1] == 0).all()


@property_test
@given(
    x=arrays(np.float32, array_shapes(min_dims=2, max_dims=3, max_side=6), elements=st.floats(-1e6, 1e6, width=32)),
    bits=st.integers(2, 12),
    scheme=st.sampled_from(SCHEMES),
    method=st.sampled_from(sorted(SCALES)),
)
def test_any_tensor(x: np.ndarray, bits: int, scheme: str, method: str) -> None:
    """Whatever the shape and values, the scale is finite and positive, and codes decode to what they encode."""
    fmt = Format(bits=bits, scheme=scheme, granularity="row", range="static")
    scale, offset = SCALES[method](torch.from_numpy(x), fmt)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    codes = encode(torch.from_numpy(x), fmt, scale, offset)
    assert torch.equal(encode(decode(codes, fmt, scale, offset), fmt, scale, offset), codes)


@pytest.mark.parametrize("call", [*SCALES.values(), ocs], ids=lambda f: f.__name__)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_nan(call: Callable[..., object], value: float) -> None:
    """NaN and infinity are refused in one line."""
    x = random()
    x[1, 2] = value
    with pytest.raises(ModelError, match=r"^a (tensor|weight) holds NaN or infinite values;[^\n]*$"):
        call(x, Format(bits=4, granularity="row"))


def test_impossible_formats() -> None:
    """Formats without a range to clip, scales per token, empty tensors and senseless options are refused."""
    x = random()
    for kind in ("ternary", "binary"):
        with pytest.raises(RecipeError, match="no range to clip; use uniform"):
            omse_scale(x, Format(kind=kind))
    with pytest.raises(RecipeError, match="per token"):
        percentile_scale(x, Format(granularity="token"))
    with pytest.raises(ModelError, match="empty"):
        omse_scale(x[:0], Format())
    with pytest.raises(RecipeError, match=r"above 0\.5"):
        percentile_scale(x, Format(), p=0.5)
    with pytest.raises(RecipeError, match="symmetric uniform"):
        ocs(x, Format(scheme="asymmetric"))
    with pytest.raises(RecipeError, match="0 to 1"):
        ocs(x, Format(), ratio=2)


def test_clip_of_the_format_comes_first() -> None:
    """A format that clips has the scale of the clipped tensor."""
    x = random() * 3
    for method in SCALES.values():
        got = method(x, Format(bits=4, clip=1.0))[0]
        assert torch.equal(got, method(x.clamp(-1, 1), Format(bits=4))[0])


# Percentile


@pytest.mark.parametrize("p", [0.9, 0.999, 0.99999, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (4, 1000), (2, 60_000)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_percentile_is_numpys(p: float, shape: tuple[int, int], scheme: str) -> None:
    """The range ends at numpy's interpolated quantiles, of the side or sides that the scheme uses."""
    x, fmt = random(shape) + 0.1, Format(bits=8, scheme=scheme, granularity="row", range="static")
    low, high = np.quantile(x.double().numpy(), [1 - p, p], axis=1)
    top = {
        "symmetric": np.maximum(abs(low), abs(high)) / 127,
        "unsigned": np.where(high > 0, high / 255, 1),
        "asymmetric": (high.clip(0) - low.clip(max=0)) / 255,
    }[scheme]
    scale = percentile_scale(x, fmt, p)[0]
    np.testing.assert_allclose(scale[:, 0].numpy(), top, rtol=2e-6)


def test_percentile_of_very_large_tensors() -> None:
    """Tensors beyond the 16 million values of torch.quantile have a percentile too."""
    x = torch.arange(2**24 + 2, dtype=torch.float32) / 2**24
    scale, _ = percentile_scale(x, Format(bits=8, scheme="unsigned"), 0.99)
    assert scale.item() == pytest.approx(0.99 / 255, rel=1e-6)


# OMSE


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("heavy", [1, 3], ids=["normal", "heavy tails"])
def test_omse_finds_the_least_error(bits: int, heavy: int) -> None:
    """No scale at all is more than 1 % better in a row, by the exact minimum over all pieces of the error."""
    x, fmt = random((6, 30)) ** heavy, Format(bits=bits, granularity="row")
    got = error(x, fmt, *omse_scale(x, fmt)).sum(1)
    least = torch.tensor([exact_least_error(row, bits) for row in x.double().numpy()])
    assert (got <= least * 1.01 + 1e-9).all()
    assert (got >= least * (1 - 1e-5)).all()


@pytest.mark.parametrize("fmt", KINDS, ids=str)
@pytest.mark.parametrize("size", [50, 3000, 300_000])
def test_omse_against_scipy(fmt: Format, size: int) -> None:
    """scipy, restarted in 20 intervals of the scale, finds no error that is more than 1 % lower."""
    x = random((size,)) ** 3
    if fmt.scheme == "unsigned":
        x = torch.softmax(x.view(-1, 50), -1).flatten()
    start, offset = find_scale(x, static(fmt))

    def loss(log_scale: float) -> float:
        scale = torch.tensor(math.exp(log_scale), dtype=torch.float32)
        zero = None if offset is None else (offset / start).round() * scale
        return error(x, fmt, scale, zero).sum().item()

    edges = np.linspace(math.log(start.item() * 0.01), math.log(start.item() * 1.5), 6 if size > 3000 else 21)
    options = {"maxiter": 15}
    least = min(minimize_scalar(loss, bounds=(a, b), method="bounded", options=options).fun for a, b in pairwise(edges))
    assert error(x, fmt, *omse_scale(x, fmt)).sum().item() <= least * 1.01


@pytest.mark.parametrize("fmt", KINDS, ids=str)
def test_omse_never_worse_than_extremes(fmt: Format) -> None:
    """No unit gets a larger error than from its extremes."""
    fmt = fmt.model_copy(update={"granularity": "row", "range": "static"})
    x = random((64, 16)) ** 3
    before, after = (error(x, fmt, *find(x, fmt)).sum(1) for find in (find_scale, omse_scale))
    assert (after <= before * (1 + 1e-6)).all()


@pytest.mark.parametrize("fmt", [fmt for fmt in KINDS if fmt.bits <= 8], ids=str)
def test_omse_by_histogram(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """On large tensors the histogram leads to an error within 0.1 % of the search on all values."""
    x = torch.nn.functional.gelu(random((300_000,)) ** 3)
    by_histogram = error(x, fmt, *omse_scale(x, fmt)).sum()
    monkeypatch.setattr(clips, "HISTOGRAM_BINS", 2**20)
    assert by_histogram <= error(x, fmt, *omse_scale(x, fmt)).sum() * 1.001


def test_omse_of_a_one_sided_outlier() -> None:
    """An asymmetric range is cut on the side of the outlier alone."""
    x = random((4000,))
    x[0] = 80
    fmt = Format(bits=4, scheme="asymmetric", range="static")
    got, symmetric = (error(x[1:], f, *omse_scale(x, f)).mean() for f in (fmt, Format(bits=4)))
    assert got < symmetric * 1.3


# ACIQ


def test_aciq_constants() -> None:
    """The optimal clips are the published ones to the printed digits, and what scipy finds for the error itself."""
    normal = {1: 1.24, 2: 1.71, 3: 2.15, 4: 2.55, 5: 2.93, 6: 3.28, 7: 3.61, 8: 3.92}
    laplace = {1: 1.86, 2: 2.83, 3: 3.89, 4: 5.03, 5: 6.2, 6: 7.41, 7: 8.64, 8: 9.89}
    for bits in range(1, 9):
        assert clips._optimal_clips(bits) == pytest.approx((normal[bits], laplace[bits]), abs=0.01)

    def normal_error(a: float, bits: int) -> float:
        clipped = (1 + a * a) * math.erfc(a / math.sqrt(2)) - math.sqrt(2 / math.pi) * a * math.exp(-a * a / 2)
        return clipped + a * a / (3 * 4**bits)

    def laplace_error(a: float, bits: int) -> float:
        return 2 * math.exp(-a) + a * a / (3 * 4**bits)

    for bits in (2, 5, 8, 9, 12):
        for got, loss in zip(clips._optimal_clips(bits), (normal_error, laplace_error), strict=True):
            found = minimize_scalar(loss, bounds=(0.5, 40), args=(bits,), method="bounded", options={"xatol": 1e-9})
            assert got == pytest.approx(found.x, rel=1e-3)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("prior", ["normal", "laplace"])
def test_aciq_by_hand(bits: int, scheme: str, prior: str) -> None:
    """The range is mean ± α by the published table of the better distribution, or the extremes if those are better."""
    normal = {2: 1.71, 3: 2.15, 4: 2.55, 5: 2.93, 8: 3.92, 9: 4.2}
    laplace = {2: 2.83, 3: 3.89, 4: 5.03, 5: 6.2, 8: 9.89, 9: 11.16}
    x = getattr(np.random.default_rng(0), prior)(0.1, 1, 200_000)
    if scheme == "unsigned":
        x = x.clip(0)
    mean, errors = x.mean(), {}
    entry = bits + (scheme == "unsigned")
    for alpha in (normal[entry] * x.std(), laplace[entry] * abs(x - mean).mean(), math.inf):
        if scheme == "unsigned":
            scale, zero, top = min(mean + alpha, x.max()) / (2**bits - 1), 0, 2**bits - 1
        elif scheme == "symmetric":
            top = 2 ** (bits - 1) - 1
            scale, zero = min(abs(mean) + alpha, abs(x).max()) / top, -top - 1
        else:
            low, high, top = max(mean - alpha, x.min()), min(mean + alpha, x.max()), 2**bits - 1
            scale = (high - low) / top
            zero = np.rint(low / scale)
            top += zero
        errors[scale] = np.square(np.clip(np.rint(x / scale), zero, top) * scale - x).mean()
    got = aciq_scale(torch.from_numpy(x).float(), Format(bits=bits, scheme=scheme))[0].item()
    assert got == pytest.approx(min(errors, key=errors.__getitem__), rel=0.01)


def test_aciq_near_the_least_error() -> None:
    """For a normal tensor the analytic clip costs at most 5 % more than the searched one."""
    x = random((50_000,))
    for bits in (3, 4, 6, 8):
        fmt = Format(bits=bits, scheme="asymmetric", range="static")
        analytic, searched = (error(x, fmt, *find(x, fmt)).mean() for find in (aciq_scale, omse_scale))
        assert analytic <= searched * 1.05


def test_aciq_range_stays_within_the_tensor() -> None:
    """A clip beyond the extremes would waste codes: those of a uniform tensor are its extremes."""
    x = torch.linspace(-1, 1, 1000)
    assert torch.equal(aciq_scale(x, Format())[0], find_scale(x, Format())[0])


def test_aciq_correct_by_the_paper() -> None:
    """Corrected rows are ξ (Ŵ + μ), with the weight's deviation, and are the codes with another scale and offset."""
    x, fmt = random() + 0.2, Format(bits=2, granularity="row")
    x[0] = 0
    scale, _ = find_scale(x, fmt)
    got, gain, shift = aciq_correct(x, fake_quantize(x, fmt, scale))
    w, q = x.double().numpy(), fake_quantize(x, fmt, scale).double().numpy()
    mu = w.mean(1) - q.mean(1)
    xi = [a.std() / b.std() if b.std() else 1 for a, b in zip(w, q, strict=True)]
    np.testing.assert_allclose(got.numpy(), np.array(xi)[:, None] * (q + mu[:, None]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.std(1), x.std(1))
    torch.testing.assert_close(got, decode(encode(x, fmt, scale), fmt, gain * scale, gain * shift))


# OCS


def halves(x: np.ndarray, scale: np.ndarray, bits: int, split: list[int]) -> np.ndarray:
    """The paper's network: split columns twice, each half rounded on its own, and both given the same input."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    out = np.clip(np.rint(x / scale), low, high) * scale
    for c in split:
        parts = [(x[:, [c]] + sign * scale / 2) / 2 for sign in (-1, 1)]
        out[:, [c]] = sum(np.clip(np.rint(part / scale), low, high) * scale for part in parts)
    return out


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
@pytest.mark.parametrize("unit", ["tensor", "row"])
def test_ocs_is_the_sum_of_the_halves(bits: int, unit: str) -> None:
    """The weight is what the two rounded halves of every split channel sum to."""
    x = random((16, 40)) ** 3
    got, scale, split = ocs(x, Format(bits=bits, granularity=unit), 0.1)
    expected = halves(x.double().numpy(), np.atleast_2d(scale.double().numpy()), bits, split)
    assert 1 <= len(split) <= 4
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("unit", ["tensor", "row", "group"])
def test_ocs_codes_need_one_bit_more_where_split(unit: str) -> None:
    """The result encodes exactly with bits + 1, and all but the split columns with the bits of the format."""
    x, fmt = random((16, 40)) ** 3, Format(bits=4, granularity=unit, group_size=8 if unit == "group" else None)
    got, scale, split = ocs(x, fmt, 0.05)
    wider = fmt.model_copy(update={"bits": 5})
    codes = encode(got, wider, scale)
    assert torch.equal(decode(codes, wider, scale), got)
    kept = [c for c in range(40) if c not in split]
    low, high = code_range(fmt)
    assert low <= codes[:, kept].min() <= codes[:, kept].max() <= high
    assert codes[:, split].abs().max() > high


def test_ocs_splits_outliers_first() -> None:
    """Channels go in the order of their largest weight, and stop when a half would be next."""
    x = torch.full((4, 100), 0.1)
    x[1, 7], x[2, 5], x[0, 3], x[3, 9] = -8, 6, 5, 3.9
    fmt = Format(bits=4)
    assert ocs(x, fmt, 0.02)[2] == [7, 5]
    _, scale, split = ocs(x, fmt, 0.5)
    assert split == [7, 5, 3]
    assert scale.item() == pytest.approx(4 / 7)


def test_ocs_without_splits_is_rounding() -> None:
    """With ratio 0 nothing is split and the weight is that of its extremes."""
    x, fmt = random(), Format(bits=4, granularity="row")
    got, scale, split = ocs(x, fmt, 0)
    assert split == []
    assert torch.equal(scale, find_scale(x, fmt)[0])
    assert torch.equal(got, fake_quantize(x, fmt, scale))


def test_ocs_lowers_the_error_of_outliers() -> None:
    """A few outlier channels cost a tensor-wide scale precision; splitting them gives it back."""
    x, fmt = random((64, 100)), Format(bits=4)
    x[:, :2] *= 6
    assert (ocs(x, fmt)[0] - x).square().sum() < 0.5 * error(x, fmt, *find_scale(x, fmt)).sum()
