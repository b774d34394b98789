"""Rounding by the kernels has the bits of the quantizers' own arithmetic, and steps aside where it does not serve.

What candidates for scales lose is what their errors say.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bittern import native
from bittern.deploy.bench import using_threads
from bittern.native import rounding
from bittern.ptq.search import _row_losses
from bittern.quantizers import TERNARY_THRESHOLD, _fused, code_range, fake_quantize, find_scale
from bittern.recipe import Format

pytestmark = pytest.mark.kernels
FORMATS = {
    "8 bits": Format(),
    "clipped": Format(clip=2.5),
    "3 bits": Format(bits=3),
    "token": Format(granularity="token"),
    "asymmetric": Format(scheme="asymmetric"),
    "asymmetric token": Format(scheme="asymmetric", granularity="token", clip=1.0),
    "unsigned": Format(scheme="unsigned"),
    "static": Format(range="static", clip=1.5),
    "static asymmetric": Format(bits=6, scheme="asymmetric", range="static"),
    "ternary": Format(kind="ternary"),
    "ternary, clipped": Format(kind="ternary", clip=0.5),
    "ternary rows": Format(kind="ternary", granularity="row", clip=2.5),
    "ternary groups": Format(kind="ternary", granularity="group", group_size=16),
}


@pytest.fixture(params=native.kinds())
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    native.use(request.param)
    yield request.param
    native.use()


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    large = torch.randn(70, 33, 48)
    return {
        "large": large,
        "one row": large[0, :1],
        "views": large.transpose(0, 1),
        "with gaps": large[:, ::2],
        "heads": large.view(70, 33, 3, 16).transpose(1, 2),
        "wide": large * torch.logspace(-20, 3, 48),
        "zeros": torch.zeros(5, 16),
        "no negative codes": torch.linspace(-1e-3, 1, 4000).view(-1, 16),
        "small": torch.randn(3, 16) * 1e-39,
        "bfloat16": large.bfloat16(),
    }


def bits(x: Tensor) -> Tensor:
    """Also tells zeros of different sign apart."""
    return x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("threads", [1, 3])
def test_same_bits(kind: str, name: str, threads: int) -> None:
    fmt = FORMATS[name]
    odd = {} if fmt.granularity == "group" else {"tails": torch.randn(7, 33), "one": torch.randn(1)}
    for what, x in (tensors() | odd).items():
        scale, offset = find_scale(x, fmt) if fmt.range == "static" else (None, None)
        with native.disabled():
            expected = fake_quantize(x, fmt, scale, offset)
        with using_threads(threads):
            found = _fused(x.float(), fmt, scale, offset)
        assert found is not None, what
        assert torch.equal(bits(found.to(x.dtype)), bits(expected)), what
        assert torch.equal(fake_quantize(x, fmt, scale, offset), expected), what


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite(kind: str, name: str, value: float) -> None:
    """What is not finite is left to the quantizers."""
    fmt, x = FORMATS[name], torch.randn(40, 960)
    scale, offset = find_scale(x, fmt) if fmt.range == "static" else (None, None)
    for at in (0, 20_000, -1):
        y = x.clone()
        y.view(-1)[at] = value
        with native.disabled():
            expected = fake_quantize(y, fmt, scale, offset)
        assert torch.equal(fake_quantize(y, fmt, scale, offset).nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_do_not_change_sums(kind: str, threads: int) -> None:
    """Whoever adds what, the sums are those of PyTorch on one thread."""
    x = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0)) ** 3
    with native.disabled():
        expected = fake_quantize(x, Format(kind="ternary"))
    with using_threads(threads):
        found = rounding.ternary(x, TERNARY_THRESHOLD, None, False)
    assert found is not None
    assert torch.equal(found, expected)


def test_does_not_serve() -> None:
    """More bits, scales of their own for channels or heads, scalars, NaN for a scale: left to the quantizers."""
    x = torch.randn(2, 3, 4, 5)
    for fmt in (Format(bits=10), Format(granularity="head"), Format(kind="binary")):
        assert _fused(x, fmt, None, None) is None
        assert fake_quantize(x, fmt).shape == x.shape
    for fmt in (Format(granularity="token"), Format(kind="ternary", granularity="row")):
        assert fake_quantize(torch.tensor(3.0), fmt) == 3
    assert fake_quantize(x, Format(range="static"), torch.tensor(torch.nan)).isnan().all()
    wrapped = torch.func.vmap(lambda row: fake_quantize(row, Format(granularity="token")))(x)
    assert torch.equal(wrapped, fake_quantize(x, Format(granularity="token")))
    assert _fused(x, Format(range="static", granularity="row"), torch.ones(2, 1, 1, 1), None) is None
    with pytest.raises(ValueError, match="x is empty"):
        rounding.ternary(x[:0], 0.7, None, False)
    with pytest.raises(ValueError, match="float64"):
        rounding.uniform(x.double(), native.Coding(-1, 1))


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize(("columns", "rank", "threads"), [(33, 16, 3), (384, 5, 1), (3, 3, 1)])
def test_losses(kind: str, scheme: str, columns: int, rank: int, threads: int) -> None:
    """Losses of candidates are those of the errors that `fake_quantize` makes, summed in double precision."""
    torch.manual_seed(0)
    fmt = Format(bits=4, scheme=scheme, range="static", granularity="row")
    x, linear = torch.randn(2, 37, columns)
    rest, factor = torch.rand(columns), torch.randn(columns, rank)
    scale, offset = find_scale(x, fmt)
    options = [(scale * f, None if offset is None else offset * f) for f in (0.3, 0.8, 1.0)]
    scales = torch.stack([s[:, 0] for s, _ in options])
    offsets = None if offset is None else torch.stack([o[:, 0] for _, o in options if o is not None])
    for slope in (linear, None):
        with using_threads(threads):
            found = rounding.losses(x, code_range(fmt), scales, offsets, factor, rest, slope)
        with native.disabled():
            without = _row_losses(x, fmt, options, factor, rest, slope)
        torch.testing.assert_close(found, without, rtol=1e-4, atol=1e-4)
        for got, (s, o) in zip(found, options, strict=True):
            e = fake_quantize(x, fmt, s, o).double() - x
            expected = (e @ factor.double()).square().sum(-1) + (rest * e * e).sum(-1)
            expected += 0 if slope is None else (slope * e).sum(-1)
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
