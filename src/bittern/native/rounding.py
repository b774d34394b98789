"""Tensors rounded to a format and back to floats, in one call: `quantizers.fake_quantize` with the same bits; and what
that loses, for many scales at once."""

import torch
from torch import Tensor

from bittern.native import structures as c
from bittern.native.codes import Coding
from bittern.native.library import address, one_step, required, run


@one_step
def uniform(x: Tensor, coding: Coding) -> Tensor | None:
    """Round x to what its codes stand for, in its shape. None if x holds NaN or infinity."""
    x, out = _dense(x, coding.by_row)
    columns, threads = x.shape[-1] if coding.by_row else 1, torch.get_num_threads()
    return out if run("round", _address(x), x.numel(), columns, coding.structure, threads, out.data_ptr()) else None


@one_step
def ternary(x: Tensor, factor: float, clip: float | None, by_row: bool) -> Tensor | None:
    """-scale, 0 or scale for each value, with one scale or one for each row. None if x, clipped, is not finite."""
    x, out = _dense(x, by_row)
    sizes, limit = (x.numel(), x.shape[-1] if by_row else x.numel()), torch.inf if clip is None else clip
    sizes_and_limits = *sizes, factor, limit, torch.get_num_threads()
    return out if run("round_ternary", _address(x), *sizes_and_limits, out.data_ptr()) else None


def losses(
    x: Tensor,
    codes: tuple[int, int],
    scales: Tensor,
    offsets: Tensor | None,
    factor: Tensor,
    rest: Tensor,
    linear: Tensor | None = None,
) -> Tensor:
    """‖e·factor‖² + Σ (linear + rest·e)·e for the rounding errors e of each row of x, by each candidate.

    x, linear: (rows, columns). codes: the least and the largest. scales, offsets: (candidates, rows). factor: (columns,
    rank), rest: (columns). Returns (candidates, rows), near to what PyTorch computes: sums are made in another order.
    """
    rows, columns = x.shape
    factors = torch.nn.functional.pad(factor.T, (0, 0, 0, -factor.shape[1] % 4)).contiguous()
    x, scales, rest = x.contiguous(), scales.contiguous(), rest.contiguous()
    offsets, linear = (None if t is None else t.contiguous() for t in (offsets, linear))
    out = torch.empty_like(scales)
    found = c.Losses(
        address(x, "x", (rows, columns)),
        address(scales, "scales", (len(scales), rows)),
        offsets if offsets is None else address(offsets, "offsets", scales.shape),
        address(factors, "factor", (len(factors), columns)),
        address(rest, "rest", (columns,)),
        linear if linear is None else address(linear, "linear", (rows, columns)),
        out.data_ptr(),
        *(rows, columns, len(scales), len(factors), *codes),
    )
    required().bittern_losses(found, torch.get_num_threads())
    return out


def _dense(x: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    """x and a tensor like it, both without gaps in memory; its rows in order if that matters."""
    x = x.contiguous() if by_row else x
    out = torch.empty_like(x)
    return x if out.stride() == x.stride() else x.clone(), out


def _address(x: Tensor) -> int:
    """Return the address of a tensor without gaps. Raises ValueError."""
    if not x.numel():
        raise ValueError("x is empty; it has no scale")
    return address(x.as_strided((x.numel(),), (1,)), "x", (x.numel(),))
