"""Static scales of activations from the extremes that calibration batches show."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from bittern.anatomy import holding
from bittern.dry_run import evaluating
from bittern.errors import InputError, ModelError
from bittern.layers import fake_quants
from bittern.quantizers import find_scale


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    """Run the model on `batches` with activations in float and set every missing static scale from their extremes.

    Memory: two numbers per scale. Raises InputError without batches, ModelError if a quantizer never ran or saw NaN,
    before it sets any scale.
    """
    if not (waiting := [q for _, q in fake_quants(model) if q.needs_scale]):
        return
    count = 0
    with holding(waiting, "observed", None), evaluating(model):
        for quantizer in waiting:
            quantizer.observed = []
        for batch in batches:
            model(**batch)
            count += 1
            for quantizer in waiting:  # keep one pair: the extremes so far
                if seen := quantizer.observed:
                    lows, highs = zip(*seen, strict=True)
                    quantizer.observed = [(torch.stack(lows).amin(0), torch.stack(highs).amax(0))]
        if not count:
            raise InputError("calibration got no batches; give at least one")
        scales = []
        for quantizer in waiting:
            if not quantizer.observed:
                message = "never ran during calibration; use batches that reach it, or keep it float"
                raise ModelError(f"{quantizer.name} {message}")
            low, high = quantizer.observed[0]
            extremes = torch.cat([low, high], -1)  # the scale of two values is the scale of all between them
            scales.append(find_scale(extremes, quantizer.format, quantizer.name))
        for quantizer, scale in zip(waiting, scales, strict=True):
            quantizer.set_scale(*scale)
