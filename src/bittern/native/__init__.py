"""Kernels for CPUs: packed weights times quantized activations, attention, what stands between them, and rounding.

The C++ beside this file is compiled when the package is built. Without it, or on another CPU, packed layers unpack
their weights and multiply in float, which is right but slow; `engine()` says so. Functions check type, shape and
contiguity of all they pass on, and raise ValueError; tensors stay referenced while a call runs.
"""

from bittern.native.codes import MOST_INPUTS, Coding, Quantized, quantize_rows
from bittern.native.library import SWITCHED_OFF, available, disabled, engine, kinds, one_step, recorder, serves, use
from bittern.native.objects import Objects
from bittern.native.products import SCHEMES, Activation, Panels, Table, activate, attention, linear, norm, padded_bias

__all__ = ["MOST_INPUTS", "Coding", "Quantized", "quantize_rows"]
__all__ += ["SWITCHED_OFF", "available", "disabled", "engine", "kinds", "one_step", "recorder", "serves", "use"]
__all__ += ["SCHEMES", "Activation", "Objects", "Panels", "Table"]
__all__ += ["activate", "attention", "linear", "norm", "padded_bias"]
