"""Quantizers as functions of tensors: find a scale, encode to integer codes, decode back, and do both with a
straight-through gradient. `FakeQuant` holds a format and its scales, not how they were found.

Scales and arithmetic are float32 whatever the tensor's type; codes are exact integers. Every format decodes as
code * scale (+ offset), so that a packed file, which stores codes and scales, gives the simulated values bit for bit.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bittern import native
from bittern.errors import ModelError
from bittern.native import rounding
from bittern.recipe import Format

T = TypeVar("T")
TERNARY_THRESHOLD = 0.7  # times the mean of |w| (Ternary Weight Networks; TernaryBERT)


def stamp(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return what a cache of something made from these tensors depends on: it differs once one of them is another
    tensor, or was changed in place, but for changes that PyTorch does not count: through `tensor.data`, and of tensors
    made in `torch.inference_mode`."""
    return tuple(
        None if t is None else (t.data_ptr(), -1 if t.is_inference() else t._version, t.dtype) for t in tensors
    )


def code_range(fmt: Format) -> tuple[int, int]:
    """Smallest and largest integer code of a format."""
    if fmt.kind in ("ternary", "binary"):
        return -1, 1
    if fmt.scheme == "symmetric":
        return -(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1  # [VT] eq. 8
    return 0, 2**fmt.bits - 1


def _units(x: Tensor, fmt: Format) -> Tensor:
    """x viewed so that one scale serves the reduced dimensions of `_dims`."""
    if fmt.group_size is None:
        return x
    if x.shape[-1] % fmt.group_size:
        what = f"group_size {fmt.group_size} does not divide the {x.shape[-1]} inputs of a row"
        raise ModelError(f"{what}; use a divisor or granularity: row")
    groups: Tensor = x.unflatten(-1, (-1, fmt.group_size))
    return groups


def _dims(x: Tensor, fmt: Format) -> tuple[int, ...]:
    if fmt.granularity == "tensor":
        return tuple(range(x.dim()))
    if fmt.granularity == "head":  # (batch, head, tokens, dim): a static scale serves all samples
        return (0, -2, -1) if fmt.range == "static" else (-2, -1)
    return (-1,)


def _sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sum, on CPUs in float64: the order, which threads and kernels choose, leaves practically no trace there."""
    return x.sum(dims, keepdim=True, dtype=torch.float64 if x.is_cpu else None).float()


def _mean(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    total = _sum(x, dims)
    return total / (x.numel() // total.numel())


def _extremes(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each unit, after the clip."""
    dims = _dims(x, fmt)
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    return (low, high) if fmt.clip is None else (low.clamp(-fmt.clip, fmt.clip), high.clamp(-fmt.clip, fmt.clip))


def _scale(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor | None]:
    """`find_scale` without its checks; x is viewed in units, and clipped if it is binary."""
    if fmt.kind == "ternary":
        return _ternary(x, fmt)[1], None
    if fmt.kind == "binary":
        return _mean(x.abs(), _dims(x, fmt)), None
    low, high = _extremes(x, fmt)
    if fmt.scheme == "asymmetric":
        if fmt.range == "static":  # integer zero point, zero exactly representable: what integer runtimes need
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _nonzero((high - low) / (2**fmt.bits - 1))
        return scale, (low / scale).round_() * scale if fmt.range == "static" else low
    largest = high if fmt.scheme == "unsigned" else torch.maximum(low.neg(), high)
    return _nonzero(largest / code_range(fmt)[1]), None


def _ternary(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Codes and scale [KD, TWN]: the sign of what is above the threshold, and the mean magnitude of that. The mask is
    of floats, since products with boolean ones are far slower."""
    dims, size = _dims(x, fmt), x.abs()
    if fmt.clip is not None:
        size.clamp_(max=fmt.clip)
    kept = (size - TERNARY_THRESHOLD * _mean(size, dims)).clamp_(min=0).sign_()
    scale = _sum(size.mul_(kept), dims) / _sum(kept, dims).clamp_(min=1)
    return kept.copysign_(x).add_(0.0), scale  # adding 0 leaves no negative zeros


def _nonzero(scale: Tensor) -> Tensor:
    """A tensor of one value has no range: any scale is right, 1 keeps its codes at zero. NaN stays NaN. Subnormal
    scales count as none: they are too coarse for codes to stay in range."""
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)


def _prepare(x: Tensor, fmt: Format) -> Tensor:
    x = x.detach().float()
    return _units(x if fmt.clip is None else x.clamp(-fmt.clip, fmt.clip), fmt)


def check_finite(x: Tensor, name: str) -> None:
    """Raise ModelError on NaN or infinity."""
    if not torch.isfinite(x).all():
        raise ModelError(f"{name} holds NaN or infinite values; repair the model or the data before quantizing")


def find_scale(x: Tensor, fmt: Format, name: str = "tensor") -> tuple[Tensor, Tensor | None]:
    """Scale and offset of `x` by its extremes (uniform) or mean magnitudes (ternary, binary).

    Shapes broadcast against x (against x split in groups, for groups). Raises ModelError on NaN or infinity.

    >>> find_scale(torch.tensor([[1.0, -127.0]]), Format(bits=8))[0].item()
    1.0
    """
    check_finite(x, name)
    scale, offset = _scale(_prepare(x, fmt), fmt)
    if fmt.granularity == "tensor":  # no dimensions: serves tensors of any rank
        scale, offset = scale.reshape(()), None if offset is None else offset.reshape(())
    return scale, offset


def _encode(x: Tensor, fmt: Format, scale: Tensor, offset: Tensor | None, own: bool = False) -> Tensor:
    """Codes of x as whole float32 numbers; x is clipped and viewed in units. Owns its result, reads x. own:
    the scale was found from x itself, so that it is NaN where x is."""
    low, high = code_range(fmt)
    if fmt.kind in ("ternary", "binary"):
        codes = _ternary(x, fmt)[0] if fmt.kind == "ternary" else torch.where(x < 0, -1.0, 1.0)
        return codes if own else codes.masked_fill_(x.isnan(), torch.nan)
    codes = x / scale if offset is None else (x - offset).div_(scale)
    codes.round_()
    # With a dynamic scale from the extremes of x itself only the clip can leave the range, which is then symmetric.
    extreme = own and fmt.range == "dynamic" and fmt.scheme != "unsigned"
    if extreme and fmt.clip is None:
        return codes
    return codes.clamp_(-high if extreme and fmt.scheme == "symmetric" else low, high)


def _decode(codes: Tensor, fmt: Format, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Values of codes, in place."""
    return codes.mul_(scale) if offset is None else codes.mul_(scale).add_(offset)


def encode(x: Tensor, fmt: Format, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Integer codes of x (int16, shape of x; binary: -1 and 1). Scale and offset as `find_scale` gives them."""
    return _encode(_prepare(x, fmt), fmt, scale, offset).to(torch.int16).view_as(x)


def decode(codes: Tensor, fmt: Format, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """float32 values of integer codes: exactly what `fake_quantize` gives for the tensor they came from."""
    return _decode(_units(codes.float(), fmt), fmt, scale, offset).view(codes.shape)


def has_kernel_coding(fmt: Format) -> bool:
    """True if the kernels round to this format."""
    return fmt.kind == "uniform" and fmt.bits <= 8 and fmt.granularity in ("tensor", "token")


def kernel_coding(fmt: Format, scale: Tensor | None, offset: Tensor | None) -> native.Coding | None:
    """Return the kernels' coding of a format, with its scale if that is static; None if they have none."""
    if not has_kernel_coding(fmt) or (scale is None and fmt.range == "static"):
        return None
    low, high = code_range(fmt)
    if scale is None:
        return native.Coding(low, high, fmt.scheme, clip=fmt.clip, by_row=fmt.granularity == "token")
    if scale.numel() != 1 or not (value := float(scale.detach())) >= torch.finfo(torch.float32).tiny:
        return None
    return native.Coding(low, high, fmt.scheme, value, 0.0 if offset is None else float(offset), fmt.clip)


def _fused(x: Tensor, fmt: Format, scale: Tensor | None, offset: Tensor | None) -> Tensor | None:
    """`_quantize` of float32 by the kernels: the same bits in fewer passes. None if they do not serve."""
    if not x.dim() or not native.serves(x):
        return None
    if fmt.kind == "ternary" and scale is None and fmt.granularity in ("tensor", "row", "group"):
        units = _units(x, fmt)
        values = rounding.ternary(units, TERNARY_THRESHOLD, fmt.clip, fmt.granularity != "tensor")
        return None if values is None else values.view(x.shape)
    coding = kernel_coding(fmt, scale, offset)
    return None if coding is None else rounding.uniform(x, coding)


def _quantize(x: Tensor, fmt: Format, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    if not x.numel():  # has no extremes
        return x.clone()
    values = x.detach().float()
    if (fused := _fused(values, fmt, scale, offset)) is not None:
        return fused.to(x.dtype)
    own = scale is None
    # Where extremes and codes, or magnitudes, are clipped in place, x needs no clipped copy.
    units = _units(values, fmt) if own and fmt.kind in ("uniform", "ternary") else _prepare(values, fmt)
    if own and fmt.kind == "ternary":
        codes, scale = _ternary(units, fmt)
        return codes.mul_(scale).view(x.shape).to(x.dtype)
    if scale is None:
        scale, offset = _scale(units, fmt)
    return _decode(_encode(units, fmt, scale, offset, own), fmt, scale, offset).view(x.shape).to(x.dtype)


def _in_range(x: Tensor, fmt: Format, scale: Tensor, offset: Tensor | None) -> Tensor:
    """1 where x is inside the range of a static scale, else 0."""
    low, high = code_range(fmt)
    units, base = _units(x.float(), fmt), 0.0 if offset is None else offset
    return ((units >= base + low * scale) & (units <= base + high * scale)).view(x.shape).to(x.dtype)


def _clips(x: Tensor, fmt: Format) -> bool:
    """True if the clip may cut something. Weights hardly ever reach it, so those are looked at, but not on a GPU, which
    would have to wait for the answer."""
    if fmt.clip is None or fmt.kind != "ternary" or x.device.type != "cpu" or not x.numel():
        return fmt.clip is not None
    return bool(torch.maximum(x.detach().amax(), -x.detach().amin()) > fmt.clip)


class _FakeQuantize(torch.autograd.Function):
    """Quantized values forward; backward straight through [KD], inside the clip and the range of a static scale."""

    @staticmethod
    def forward(ctx, x, fmt, scale, offset):  # type: ignore[no-untyped-def]
        ctx.clip, ctx.ranged = fmt.clip if _clips(x, fmt) else None, scale is not None and fmt.kind == "uniform"
        saved = [] if ctx.clip is None else [x]
        ctx.save_for_backward(*saved, *([_in_range(x, fmt, scale, offset)] if ctx.ranged else []))
        out = _quantize(x, fmt, scale, offset)
        # Not a view, which model code could not change in place, as some does with what an embedding gives.
        return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if ctx.clip is not None:
            x = ctx.saved_tensors[0]
            clip = torch.tensor(ctx.clip, dtype=x.dtype).item()  # as a comparison with x rounds it
            grad = torch.ops.aten.hardtanh_backward(grad.float(), x.float(), -clip, clip).to(grad.dtype)
        return grad * ctx.saved_tensors[-1] if ctx.ranged else grad, None, None, None


def fake_quantize(x: Tensor, fmt: Format, scale: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """x rounded to its format (same shape and type), differentiable by the straight-through estimator.

    Without `scale` it is found from x (dynamic). NaN stays NaN; `find_scale` is where it is refused.

    >>> fake_quantize(torch.tensor([0.9, -0.2, 0.1, -1.1]), Format(kind="ternary"))
    tensor([ 1.,  0.,  0., -1.])
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _quantize(x, fmt, scale, offset)
    out: Tensor = _FakeQuantize.apply(x, fmt, scale, offset)  # type: ignore[no-untyped-call]
    return out


class FakeQuant(nn.Module):
    """A format and, if it is static, its scale and offset (float32 buffers).

    While `bypass` is set x passes through (see `layers.as_float`); while `observed` is a list, x passes through and its
    (low, high) extremes are appended to it (see `ptq.calibrate`).
    """

    scale: Tensor | None
    offset: Tensor | None

    def __init__(self, fmt: Format, name: str = "tensor"):
        super().__init__()
        self.format, self.name, self.bypass = fmt, name, False
        self.observed: list[tuple[Tensor, Tensor]] | None = None
        self.register_buffer("scale", None)
        self.register_buffer("offset", None)

    def set_scale(self, scale: Tensor, offset: Tensor | None = None) -> None:
        """Copy a static scale. Raises ModelError unless it is finite and positive (ternary and binary: or zero)."""
        scale = scale.detach().float().clone()
        positive = scale >= 0 if self.format.kind in ("ternary", "binary") else scale > 0
        if not (torch.isfinite(scale) & positive).all():
            raise ModelError(f"{self.name}: a scale must be finite and positive, got {scale.flatten()[:3].tolist()}")
        self.scale = scale
        self.offset = None if offset is None else offset.detach().float().clone()

    @property
    def needs_scale(self) -> bool:
        """True if the format is static and its scale was not found yet."""
        return self.format.range == "static" and self.scale is None

    def check_scale(self) -> None:
        """Raise ModelError if there is no scale yet."""
        if self.needs_scale:
            raise ModelError(f"{self.name} has a static format and no scale yet; calibrate the model with data first")

    def forward(self, x: Tensor) -> Tensor:
        if self.bypass:
            return x
        if self.observed is not None:
            if x.numel():
                self.observed.append(self.extremes(x))
            return x
        self.check_scale()
        return fake_quantize(x, self.format, self.scale, self.offset)

    @property
    def by_row(self) -> bool:
        """True if each row of a weight is quantized by itself, so that some rows can be without the others."""
        return self.format.range == "dynamic" and self.format.granularity in ("row", "group")

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each unit of x that has a scale of its own."""
        x = _units(x.detach().float(), self.format)
        return _extremes(x.flatten() if self.format.granularity == "tensor" else x, self.format)

    def extra_repr(self) -> str:
        return str(self.format)


_last_input = threading.local()  # `kept`: what `quantize_once` quantized last in this thread, how, and the result


def quantize_once(x: Tensor, how: object, quantize: Callable[[Tensor], T]) -> T:
    """Return quantize(x), computed once while the same unchanged tensor is given with the same `how`, as Q, K and V do.

    The result is kept until another input comes or the attention is computed. In training only layers that feed an
    attention module may ask (`shares_input`): a result must not outlive the backward through its graph.
    """
    if x.is_inference():  # PyTorch does not count changes of such tensors
        return quantize(x)
    kept, key = getattr(_last_input, "kept", None), (x._version, how)
    if kept is not None and kept[0]() is x and kept[1] == key:
        return kept[2]  # type: ignore[no-any-return]
    made = quantize(x)
    _last_input.kept = weakref.ref(x), key, made
    return made


def forget_input() -> None:
    _last_input.kept = None
