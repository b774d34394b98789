"""Other roundings, to find tests that hold only for those of one machine.

BITTERN_TEST_NOISE=SEED moves each result of a float32 product, softmax, norm and the like by up to 2 units in the last
place, up or down by a hash of its bits. The same numbers are always moved in the same way, so that what must be equal
bit for bit stays so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MOVED = {
    *("mm", "addmm", "bmm", "baddbmm", "convolution", "mkldnn_linear", "_softmax", "native_layer_norm", "gelu", "tanh"),
    *("sigmoid", "silu", "exp", "log", "mean", "_scaled_dot_product_flash_attention_for_cpu", "rsqrt", "pow"),
    *("linear", "matmul", "conv2d", "softmax", "layer_norm", "scaled_dot_product_attention"),  # whole in inference mode
}


class Noise(TorchDispatchMode):
    """Inside this context results are rounded in another way for each seed."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in MOVED:
            return out
        return (self.move(out[0]), *out[1:]) if isinstance(out, tuple) else self.move(out)

    def move(self, x: Tensor) -> Tensor:
        if type(x) is not Tensor or x.dtype != torch.float32 or x.device.type != "cpu":
            return x
        bits = x.contiguous().view(torch.int32)
        hashed = (bits ^ self.seed * 0x9E3779B) * -1640531527  # Knuth's multiplier; int32 wraps around
        return torch.where(x.isfinite() & (x != 0), x * (1 + ((hashed >> 16) % 5 - 2) * 2.0**-23), x)
