"""Post-training quantization: scales, biases and rounded weights from a few samples, without training."""

from bittern.ptq.methods import METHODS, Method
from bittern.ptq.run import Result, quantize

__all__ = ["METHODS", "Method", "Result", "quantize"]
