"""Where packed models meet the integer kernels of `native`.

Functions return None where the kernels do not serve: a format that they lack, gradients, another device or type, values
that are not finite. The caller then computes as the simulated model does.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import cache, reduce, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation

from bittern import native
from bittern.derived import derive
from bittern.native.library import Function
from bittern.quantizers import FakeQuant, has_kernel_coding, kernel_coding, stamp
from bittern.recipe import OPERANDS, Format

SIXTEEN_BITS = (torch.bfloat16, torch.float16)  # what is computed in them goes through the kernels as float32

# Told, in this context, of each packed layer, norm and activation that runs, and of each attention that kernels
# compute, what they are given. Hooks would be seen by other threads, and by those that copy the modules.
watcher: ContextVar[Callable[..., None] | None] = ContextVar("watcher", default=None)

DirectCall = tuple[Callable[..., Tensor | None], tuple[Any, ...]]  # a function, and what it is to be given

NO_GRAPH = "packed layers compute in calls that no graph of PyTorch can hold; export the model to ONNX by bittern"


def outside_graphs(forward: Function) -> Function:
    """Let torch.compile leave its graph for each call of a function, and a tape hold that."""
    forward = native.one_step(forward)
    left = torch.compiler.disable(forward, reason=NO_GRAPH)  # slower to call than a look whether it is needed

    @wraps(forward)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (left if is_compiling() else forward)(*args, **kwargs)

    return either  # type: ignore[return-value]


def input_coding(quantizer: FakeQuant | None) -> native.Coding | None:
    """A quantizer of activations for the kernels; None if they have no such format, or it is not to quantize now."""
    if quantizer is None or quantizer.bypass or quantizer.observed is not None:
        return None
    buffers = quantizer._buffers  # as attributes they take a long way
    fmt, scale, offset = quantizer.format, buffers["scale"], buffers["offset"]
    state = fmt, stamp(scale, offset)
    kept: tuple[object, native.Coding | None] | None = quantizer.__dict__.get("_coding")
    if kept is None or kept[0] != state:  # reading a scale and checking it takes longer than a small product
        kept = quantizer.__dict__["_coding"] = (state, kernel_coding(fmt, scale, offset))
    return kept[1]


def has_kernel(weight: Format | None = None, input_format: Format | None = None) -> bool:
    """True if the kernels know these formats of a layer, or of the two operands of a product in attention."""
    known = input_format is None or has_kernel_coding(input_format)
    if weight is not None:
        known &= weight.bits <= 8 and weight.scheme != "asymmetric" and weight.granularity in ("tensor", "row")
    return known


def convolves(layer: nn.Conv2d, fmt: Format) -> bool:
    """True if the kernels gather a convolution's patches: no groups, and no padding but by zeros that have a code."""
    zeros = layer.padding_mode == "zeros" and (fmt.scheme != "asymmetric" or fmt.range == "static")
    padded = any(layer._reversed_padding_repeated_twice)
    return layer.groups == 1 and fmt.granularity == "tensor" and (zeros or not padded)


def warn_if_slow(x: Tensor, *parameters: Tensor | None) -> None:
    """Say, once, that the kernels here do not serve x, and why: a packed model is then slower than a float one."""
    if not native.available() or not x.is_cpu or is_compiling():
        return
    if x.dtype != torch.float32 and x.dtype not in SIXTEEN_BITS:
        why = f"they take float32, bfloat16 and float16, and this input is {x.dtype}"
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters)):
        why = "gradients are asked for; call the model under torch.no_grad(), or model.requires_grad_(False) first"
    else:
        return
    text = "a packed layer leaves the integer kernels and unpacks its weights in each call"
    warnings.warn(f"{text}: {why}", stacklevel=2)


def added(masks: Sequence[Tensor]) -> Tensor | None:
    """The sum of additive masks and biases of positions."""
    return reduce(torch.add, masks) if masks else None


@outside_graphs
def attend(
    quantizers: Mapping[str, FakeQuant | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: tuple[Tensor, ...],
    scaling: float,
) -> tuple[Tensor, Tensor] | None:
    """Context (batch, queries, heads, dim) and map of attention whose operands are all quantized for each tensor."""
    dtype = query.dtype
    if dtype in SIXTEEN_BITS:
        query, key, value, *masks = (t.float() for t in (query, key, value, *masks))  # type: ignore[assignment]
    if not native.serves(query, key, value, *masks) or not query.numel() or not key.numel():
        return None
    if max(key.shape[2:]) > native.MOST_INPUTS or query.numel() >= 2**31:  # the slower way has no such limits
        return None
    codings = {point: input_coding(quantizer) for point, quantizer in quantizers.items()}
    known = {point: coding for point, coding in codings.items() if coding is not None and not coding.by_row}
    if known.keys() != set(OPERANDS) or any(coding.scheme not in native.SCHEMES[o] for o, coding in known.items()):
        return None
    if (watch := watcher.get()) is not None:
        watch(query, key, value, masks, scaling)
    found = native.attention(query, key, value, added(masks), scaling, known)
    return found and (found[0].to(dtype), found[1].to(dtype))


def tell_of(module: nn.Module) -> None:
    """Tell of a packed layer, norm or activation that runs, if somebody wants to know."""
    if (watch := watcher.get()) is not None:
        watch(module)


class LayerNorm(nn.LayerNorm):
    """LayerNorm of a packed model."""

    @outside_graphs
    def forward(self, input: Tensor) -> Tensor:
        tell_of(self)
        weight, bias = self.weight, self.bias
        if native.serves(input, weight, bias) and input.shape[-1:] == self.normalized_shape:
            return native.norm(input, weight, bias, self.eps)
        return super().forward(input)

    def direct(self, x: Tensor) -> DirectCall | None:
        weight, bias = self.weight, self.bias
        return (native.norm, (x, weight, bias, self.eps)) if native.serves(x, weight, bias) else None


_ACTIVATIONS: dict[type[nn.Module], native.Activation] = {
    **dict.fromkeys((GELUActivation, nn.GELU), "gelu"),
    **dict.fromkeys((NewGELUActivation, GELUTanh), "gelu_tanh"),
    **dict.fromkeys((SiLUActivation, nn.SiLU), "silu"),
    nn.ReLU: "relu",
}


@cache
def _served(kind: type[nn.Module]) -> type[nn.Module]:
    """A class for activations of this kind in packed models, of the same name."""
    activation = _ACTIVATIONS[kind]

    @outside_graphs
    def forward(self: nn.Module, input: Tensor) -> Tensor:
        tell_of(self)
        if native.serves(input):
            return native.activate(input, activation)
        out: Tensor = kind.forward(self, input)
        return out

    return derive(_served, kind, forward=forward, activation=activation)


SERVED = {kind: _served(kind) for kind in _ACTIVATIONS}  # type: ignore[arg-type]
