"""Activations for the kernels: how values become codes of at most 8 bits, and rows of them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from bittern.native import structures as c
from bittern.native.library import address, buffer, run

PANEL, ALIGN = 16, 64  # outputs of a panel; rows of inputs are padded to a multiple of ALIGN
MOST_INPUTS = 32768  # of one output, so that sums of products of bytes stay in 32 bits


@dataclass(frozen=True)
class Coding:
    """A rule that makes codes of values: what `quantizers.encode` does for a uniform format. scale: None for a dynamic
    one, found for the tensor or, if `by_row`, for each row."""

    low: int
    high: int
    scheme: Literal["symmetric", "unsigned", "asymmetric"] = "symmetric"
    scale: float | None = None
    offset: float = 0.0
    clip: float | None = None
    by_row: bool = False

    def __post_init__(self) -> None:
        if not -128 <= self.low <= 0 < self.high <= 255 or self.high - self.low > 255:
            raise ValueError(f"codes from {self.low} to {self.high} do not fit a byte")
        if self.scale is not None and not self.scale >= torch.finfo(torch.float32).tiny:
            raise ValueError(f"a scale must be a positive normal number, got {self.scale}")

    @property
    def shift(self) -> int:
        """Number that is taken from codes so that they fit a signed byte."""
        return 128 if self.high > 127 else 0

    @cached_property
    def structure(self) -> c.Format:
        return c.Format(
            self.scale or 1.0,
            self.offset,
            torch.finfo(torch.float32).max if self.clip is None else self.clip,
            self.low,
            self.high,
            self.shift,
            ("symmetric", "unsigned", "asymmetric").index(self.scheme),
            0 if self.scale is not None else 2 if self.by_row else 1,
        )


@dataclass(frozen=True)
class Quantized:
    """Rows of codes from `quantize_rows`, padded, less `coding.shift`.

    codes: int8 (padded rows, padded columns). numbers: int32 (3, padded rows): the bits of each row's scale and offset,
    which are float32, and the sum of its codes.
    """

    codes: Tensor
    numbers: Tensor
    rows: int
    columns: int
    coding: Coding

    def structure(self) -> c.Codes:
        start, size = self.numbers.data_ptr(), 4 * self.numbers.shape[1]
        return c.Codes(self.codes.data_ptr(), start, start + size, start + 2 * size, self.rows)


def quantize_rows(x: Tensor, coding: Coding) -> Quantized | None:
    """Quantize x (rows, columns). None if x holds NaN or infinity, or its scale would be infinite."""
    if x.dim() != 2 or x.numel() >= 2**31:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected rows and columns, fewer than 2**31 values")
    rows, columns = x.shape
    if columns > MOST_INPUTS:
        raise ValueError(f"rows of {columns} values; the kernels take up to {MOST_INPUTS}")
    data, padded = address(x, "x", (rows, columns)), -(-rows // PANEL) * PANEL
    codes = buffer(padded, -(-columns // ALIGN) * ALIGN, dtype=torch.int8)
    made = Quantized(codes, buffer(3, padded, dtype=torch.int32), rows, columns, coding)
    return made if run("quantize", data, columns, coding.structure, torch.get_num_threads(), made.structure()) else None
