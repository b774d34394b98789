"""The two kinds of sides that products have while a unit is solved, activations and weights, with their scales."""

from __future__ import annotations

import torch
from torch import Tensor

from bittern.layers import QuantLayer, weight_matrix
from bittern.ptq.clips import Scale
from bittern.ptq.methods import Method
from bittern.ptq.product import Product
from bittern.ptq.search import Search, Space, scales
from bittern.quantizers import FakeQuant, fake_quantize, find_scale
from bittern.recipe import Format

Fold = tuple[Tensor, Tensor] | None  # r and t of (x + t)/r, for each channel


def searchable(quantizer: FakeQuant | None) -> bool:
    """True if there is a static scale to choose; ternary and binary ones have closed forms."""
    if quantizer is None:
        return False
    return quantizer.format.range == "static" and quantizer.format.kind not in ("ternary", "binary")


def needs_search(side: Operand | Weight, *others: object) -> bool:
    """True if a side has to be searched: not if all it depends on is as it was when it was searched last."""
    new = side.searched_for != others
    side.searched_for = others
    return new


class Operand:
    """An element-wise operand of products: its values, present scale, and the candidates."""

    def __init__(self, x: Tensor, quantizer: FakeQuant | None, method: Method):
        self.x, self.quantizer = x, quantizer
        self.fixed = not searchable(quantizer)
        self.ends: tuple[int, int] | None = None  # the factors of both extremes, among the candidates
        self.searched_for: tuple[object, ...] = ()
        self.scale: Scale = (torch.ones(()), None)
        if not self.fixed:
            assert quantizer is not None
            # one scale per head is found head by head, where it serves a tensor
            self.format = quantizer.format.model_copy(update={"granularity": "tensor"})
            self.extremes = low, high = x.aminmax()
            self.largest = scales(*self.extremes, self.format, torch.ones(1, device=x.device))[0]
            self.scale = method.activation_clip(x, self.format)
            if method.space is not None:
                self.factors = method.space.factors(self.format).to(x.device)
                self.two_ended = method.space.ends and self.format.scheme == "asymmetric" and bool(low < 0 < high)

    def quantized(self, scale: Scale | None = None) -> Tensor:
        if self.quantizer is None:
            return self.x
        if self.fixed:
            return fake_quantize(self.x, self.quantizer.format)
        return fake_quantize(self.x, self.format, *(scale or self.scale))

    def search(self, best: Search) -> bool:
        """Take the best candidates for both extremes by one factor, then for each alone; whether any is another."""
        before, count = self.ends, len(self.factors)
        if self.ends is None or not self.two_ended:
            index = best(scales(*self.extremes, self.format, self.factors), self.ends and self.ends[0])
            self.ends = index, index
        for end in (1, 0) if self.two_ended else ():
            pairs = self.factors[torch.tensor([self.ends] * count, device=self.factors.device)]
            pairs[:, end] = self.factors
            index = best(scales(*self.extremes, self.format, pairs), self.ends[end])
            self.ends = (index, self.ends[1]) if end == 0 else (self.ends[0], index)
        self.scale = scales(*self.extremes, self.format, self.factors[list(self.ends)][None])[0]
        return self.ends != before

    @property
    def state(self) -> tuple[float, ...]:
        return tuple(float(t) for t in self.scale if t is not None)

    @property
    def ratio(self) -> float:
        return float(self.scale[0] / self.largest[0])


class Weight:
    """A layer's weight, what stands for it, and its product with the float inputs.

    fold: (r, t), if the layer reads (x + t)/r in place of x; its weight is then W·r and its bias b - W·t.
    """

    def __init__(self, name: str, layer: QuantLayer, tied: bool, x: Tensor, sample: Tensor, method: Method, fold: Fold):
        self.name, self.layer = name, layer
        weight = weight_matrix(layer).detach().float()
        self.float = (weight if fold is None else weight * fold[0]).contiguous()
        shift = weight @ fold[1] if fold is not None and layer.bias is not None else None
        space = method.space or Space()
        self.product = Product(x, self.float.T, sample, space.objective, shift=shift, slack=space.slack)
        self.mean = self.product.out.mean(0, dtype=torch.float64)
        self.factor: Tensor | None = None
        self.searched_for: tuple[object, ...] = ()
        self.rounded = False
        quantizer = layer.weight_quantizer
        self.fixed = tied or not searchable(quantizer)
        if quantizer is None:
            self.values = self.float
        elif self.fixed:
            self.values = fake_quantize(self.float, quantizer.format, quantizer.scale, quantizer.offset)
        else:
            self.format: Format = quantizer.format
            self.largest = find_scale(self.float, self.format, f"{name}.weight")
            self.scale = method.weight_clip(self.float, self.format)
            self.values = fake_quantize(self.float, self.format, *self.scale)

    def take(self, factor: Tensor) -> bool:
        # Of many rows a few may go to and fro for ever between candidates that are equally good.
        changed = self.factor is None or bool((factor != self.factor).float().mean() > 0.01)
        offset = self.largest[1]
        self.factor, self.scale = factor, (self.largest[0] * factor, None if offset is None else offset * factor)
        self.values = fake_quantize(self.float, self.format, *self.scale)
        return changed

    @property
    def state(self) -> tuple[float, float]:
        """Return what tells present scales and shift from others."""
        shift = self.product.shift
        scale = 0.0 if self.fixed else float(self.scale[0].double().sum())
        return scale, 0.0 if shift is None else float(shift.double().sum())

    @property
    def ratio(self) -> float:
        scale, largest = self.scale[0], self.largest[0]
        if largest.dim() == 3 and scale.dim() == 2:  # Bit-Split has one scale per row in place of its groups
            largest = largest.mean(1)
        return float((scale / largest).mean())

    def loss(self, inputs: Tensor, values: Tensor | None = None) -> float:
        return self.product.loss(inputs.__getitem__, (self.values if values is None else values).T)

    def correct(self, inputs: Tensor) -> None:
        """[VT eq. 16] in closed form: the mean output error, which the bias takes away, from mean inputs."""
        if self.layer.bias is not None:
            mean = inputs.mean(0, dtype=torch.float64)
            self.product.shift = (self.values.double() @ mean - self.mean).float()
