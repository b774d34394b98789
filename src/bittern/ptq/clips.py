"""Clip ranges, and the other ways to choose a scale without looking at outputs: the baselines of the papers.

Each `*_scale(x, fmt)` returns scale and offset in the shapes of `find_scale`, as static ones: zero is exactly
representable. x is a weight (rows = output channels) or an activation; values beyond the found range are clipped.
"""

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from bittern import quantizers
from bittern.errors import ModelError, RecipeError
from bittern.recipe import Format

Scale = tuple[Tensor, Tensor | None]
CHUNK_VALUES = 2**15  # values of a unit at a time: they stay in the cache, and no sum is shared between threads
HISTOGRAM_BINS = 2**16  # in one histogram of a large unit
SMALLEST_SHRINK = 0.01  # of the extremes, in the search for the least error


def _as_rows(x: Tensor, fmt: Format) -> tuple[Tensor, Format, tuple[int, ...]]:
    """x as (units, values), the format that has a static scale for each such row, and the shape of the scales."""
    if fmt.kind in ("ternary", "binary"):
        raise RecipeError(f"kind {fmt.kind} has no range to clip; use uniform")
    if fmt.granularity == "token":
        raise RecipeError("a static scale cannot be per token, since tokens change; use tensor or head")
    if not x.numel():
        raise ModelError("a tensor is empty, so it has no range; give at least one value")
    quantizers.check_finite(x, "a tensor")
    x = quantizers._prepare(x, fmt)
    row = fmt.model_copy(update={"granularity": "row", "group_size": None, "clip": None, "range": "static"})
    if fmt.granularity == "tensor":
        return x.reshape(1, -1), row, ()
    if fmt.granularity == "head":  # (batch, head, tokens, dim)
        return x.transpose(0, 1).flatten(1), row, (1, x.shape[1], 1, 1)
    return x.flatten(0, -2), row, (*x.shape[:-1], 1)


def _clip(low: Tensor, high: Tensor, row: Format) -> Scale:
    """Scale and offset of the range from low to high, (units, 1) each."""
    return quantizers._scale(torch.cat([low, high], -1), row)  # as of all values between these two


def _shaped(found: Scale, shape: tuple[int, ...]) -> Scale:
    return found[0].reshape(shape), None if found[1] is None else found[1].reshape(shape)


# Percentile


def percentile_scale(x: Tensor, fmt: Format, p: float = 0.99999) -> Scale:
    """Return the scale of the range between the quantiles 1-p and p of each unit (FQN, Li et al. 2019). Quantiles
    between two values are interpolated, as numpy's are. A symmetric format takes the larger magnitude."""
    if not 0.5 < p <= 1:
        raise RecipeError(f"p must be above 0.5 and at most 1, got {p:g}; 0.99999 is usual")
    rows, row, shape = _as_rows(x, fmt)
    ends = np.quantile(rows.double().cpu().numpy(), (1 - p, p), axis=1, keepdims=True)  # torch's has a limit of values
    low, high = torch.from_numpy(ends).to(rows)  # (units, 1) each
    return _shaped(_clip(low, high, row), shape)


# OMSE


def omse_scale(x: Tensor, fmt: Format) -> Scale:
    """Return the scale of each unit that minimises ‖x − x̂‖² (OMSE, Choukroun et al. 2019), for every kind with a range.

    A geometric grid of 64 shrunk ranges from 1 % to all of the extremes (asymmetric: of both ends, then of each), a
    linear one of 32 around the best, then alternation between codes and the scale that fits them best, from the three
    best. Large units are searched on a histogram; the last choice, also against the extremes, is made on all values.
    """
    rows, row, shape = _as_rows(x, fmt)
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    points, counts, stride = rows, None, 1
    if rows.shape[1] > 4 * HISTOGRAM_BINS:
        if row.bits <= 10:
            points, counts = _histogram(rows, low, high)
        else:  # steps are lost within a bin: try fewer scales on all values
            stride = 4

    def best(lows: Tensor, highs: Tensor, count: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield those of (candidates, units, 1) ends of ranges with the least errors, each as (units, 1)."""
        lows, highs = torch.broadcast_tensors(lows, highs)
        clips = (_clip(*ends, row) for ends in zip(lows, highs, strict=True))
        errors = torch.stack([_error(points, row, found, counts) for found in clips])
        places = errors.topk(count, 0, largest=False).indices
        return zip(lows.gather(0, places), highs.gather(0, places), strict=True)

    step = SMALLEST_SHRINK ** (stride / 63)
    coarse = (step ** torch.arange(64 // stride)).to(rows)[:, None, None]
    fine = torch.linspace(step, 1 / step, 32 // stride).to(rows)[:, None, None]
    ((start, end),) = best(low * coarse, high * coarse)
    if row.scheme == "asymmetric":  # then each end alone
        ((start, end),) = best(low * coarse, end[None])
        ((start, end),) = best(start[None], high * coarse)
    ends = best(start * fine, end * fine, 3)
    found = [_fit(points, row, _clip(*these, row), counts) for these in ends]
    return _shaped(_least(rows, row, [*found, _clip(low, high, row)]), shape)


def _histogram(rows: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Centers of equal bins of each row, and how many values lie in them."""
    width = quantizers._nonzero((high - low) / HISTOGRAM_BINS)
    first = torch.arange(len(rows), device=rows.device)[:, None] * HISTOGRAM_BINS
    counts = torch.zeros(first.shape[0] * HISTOGRAM_BINS, dtype=torch.long, device=rows.device)
    for part in rows.split(2**20, -1):
        bins = ((part - low) / width).long().clamp_(max=HISTOGRAM_BINS - 1) + first
        counts += bins.flatten().bincount(minlength=len(counts))
    centers = low + width * (torch.arange(HISTOGRAM_BINS, device=rows.device) + 0.5)
    return centers, counts.view(len(rows), -1).double()


def _parts(points: Tensor, counts: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    for i in range(0, points.shape[1], CHUNK_VALUES):
        yield points[:, i : i + CHUNK_VALUES], None if counts is None else counts[:, i : i + CHUNK_VALUES]


def _total(x: Tensor, counts: Tensor | None) -> Tensor:
    return (x if counts is None else x * counts).sum(-1, keepdim=True).double()


def _error(points: Tensor, row: Format, found: Scale, counts: Tensor | None = None) -> Tensor:
    """Squared error of each unit, (units, 1) in float64."""
    return sum(
        (_total((quantizers._quantize(part, row, *found) - part).square_(), n) for part, n in _parts(points, counts)),
        start=torch.zeros_like(found[0], dtype=torch.float64),
    )


def _fit(points: Tensor, row: Format, found: Scale, counts: Tensor | None) -> Scale:
    """Alternate codes and their best scale: every kind's values are linear in the scale, so that it is ⟨x,x̂⟩/⟨x̂,x̂⟩."""
    scale, offset = found
    for _ in range(8):
        along, size = torch.zeros_like(scale, dtype=torch.float64), torch.zeros_like(scale, dtype=torch.float64)
        for part, n in _parts(points, counts):
            values = quantizers._quantize(part, row, scale, offset)
            along += _total(values * part, n)
            size += _total(values.square_(), n)
        factor = torch.where((along > 0) & (size > 0), along / size, 1.0)
        zero = None if offset is None else (offset / scale).round_()  # the zero point stays
        scale = quantizers._nonzero((scale * factor).float())
        offset = None if zero is None else zero * scale
    return scale, offset


# ACIQ


@cache
def _optimal_clips(bits: int) -> tuple[float, float]:
    """The clips of least error for a normal (in σ) and a Laplace distribution (in b), as ACIQ tabulates them."""
    from scipy.optimize import brentq

    def normal(a: float) -> float:  # derivatives of the errors
        tail = 2 * math.sqrt(2 / math.pi) * math.exp(-a * a / 2)
        return 2 * a * math.erfc(a / math.sqrt(2)) - tail + 2 * a / (3 * 4.0**bits)

    return brentq(normal, 0, 64), brentq(lambda a: -2 * math.exp(-a) + 2 * a / (3 * 4.0**bits), 0, 64)


def aciq_scale(x: Tensor, fmt: Format) -> Scale:
    """Return the scale of the analytic clip (ACIQ, Banner et al. 2019): mean ± α, by the better of two distributions.

    They are the normal and the Laplace distribution; no clip is tried too. α is the optimum itself: to the printed
    digits 1.71σ ... 3.92σ (normal), 2.83b ... 9.89b (Laplace) for 2 to 8 bits. Of the three the one with the least
    error on x is taken, unit by unit, as in the published code: the expected errors would always favour the normal
    distribution. Units without negative values, and all of an unsigned format, get the
    α of one bit more and the range from 0 to mean⁺ + α; a symmetric format always has the range ±(|mean| + α).
    """
    rows, row, shape = _as_rows(x, fmt)
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    mean = rows.mean(-1, keepdim=True, dtype=torch.float64).float()
    variance, b = torch.zeros_like(mean, dtype=torch.float64), torch.zeros_like(mean, dtype=torch.float64)
    for part, _ in _parts(rows, None):
        variance += _total((part - mean).square_(), None)
        b += _total((part - mean).abs_(), None)
    spreads = (variance / rows.shape[1]).sqrt().float(), (b / rows.shape[1]).float()
    one_sided = (low >= 0) | (row.scheme == "unsigned")
    found = [_clip(low, high, row)]
    for spread, clip, wider in zip(spreads, _optimal_clips(fmt.bits), _optimal_clips(fmt.bits + 1), strict=True):
        start = torch.where(one_sided, 0.0, torch.maximum(low, mean - clip * spread))
        end = torch.minimum(high, torch.where(one_sided, mean.clamp(min=0) + wider * spread, mean + clip * spread))
        if row.scheme == "symmetric":
            end = torch.minimum(torch.maximum(high, -low), mean.abs() + clip * spread)
            start = -end
        found.append(_clip(start, end, row))
    return _shaped(_least(rows, row, found), shape)


def _least(rows: Tensor, row: Format, found: list[Scale]) -> Scale:
    """Return the scales and offsets with the least error, unit by unit."""
    choice = torch.stack([_error(rows, row, scale) for scale in found]).argmin(0, keepdim=True)
    scale = torch.stack([scale for scale, _ in found]).gather(0, choice)[0]
    offsets = [offset for _, offset in found if offset is not None]
    return scale, torch.stack(offsets).gather(0, choice)[0] if offsets else None


def aciq_correct(weight: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ACIQ's bias correction of each row, gain · (quantized + shift), with its gain and shift, (rows, 1) each.

    shift is what quantization took from the mean, gain restores the deviation around it. Codes stay: the scale becomes
    gain · scale, the offset gain · shift.
    """
    quantizers.check_finite(weight, "a weight")
    w, q = weight.double(), quantized.double()
    w_mean, q_mean = w.mean(-1, keepdim=True), q.mean(-1, keepdim=True)
    w_size, q_size = (w - w_mean).norm(dim=-1, keepdim=True), (q - q_mean).norm(dim=-1, keepdim=True)
    gain = torch.where((w_size > 0) & (q_size > 0), w_size / q_size, 1.0)
    shift = w_mean - q_mean
    return (gain * (q + shift)).float(), gain.float(), shift.float()


# OCS


def ocs(weight: Tensor, fmt: Format, ratio: float = 0.02) -> tuple[Tensor, Tensor, list[int]]:
    """Split outlier channels (OCS, Zhao et al. 2019); return the weight that results, its scale, and the split inputs.

    The input channel of the largest |w| is replaced by two, (w - scale/2)/2 and (w + scale/2)/2, whose codes sum to
    that of w; at most ceil(ratio * columns) times. Both halves see the same input, so they are returned summed: codes
    of split columns reach twice the range, and the result encodes exactly in a format of one bit more. A channel is
    split once: when the largest is already a half, a further split would need a second bit, and splitting stops.
    The scale is that of the weight with one half in place of each split column: by its extremes.
    """
    if fmt.kind != "uniform" or fmt.scheme != "symmetric":
        raise RecipeError(f"OCS needs a symmetric uniform format, got {fmt}; use kind: uniform, scheme: symmetric")
    if not 0 <= ratio <= 1:
        raise RecipeError(f"ratio must be 0 to 1, got {ratio:g}; 0.01 to 0.05 is usual")
    quantizers.check_finite(weight, "a weight")
    weight = weight.detach().float() if fmt.clip is None else weight.detach().float().clamp(-fmt.clip, fmt.clip)
    size = weight.abs().amax(0)
    split = size.argsort(descending=True, stable=True)[: math.ceil(ratio * len(size))]
    split = split[size[split] > size.max() / 2]
    pieces = torch.ones_like(size)
    pieces[split] = 2
    halved, plain = weight / pieces, fmt.model_copy(update={"clip": None})
    scale = quantizers.find_scale(halved, plain)[0]
    # round(a - 1/4) + round(a + 1/4) = round(2a): the halves of w = 2a * scale clip where twice the range ends.
    low, high = (quantizers._units(bound * pieces, plain) for bound in quantizers.code_range(fmt))
    codes = (quantizers._units(weight, plain) / scale).round_().clamp_(low, high).view(weight.shape)
    return quantizers.decode(codes, plain, scale), scale, split.tolist()
