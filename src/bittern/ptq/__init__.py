"""Post-training quantization: scales, biases and rounded weights from a few samples, without training."""

from bittern.options import Mixed
from bittern.ptq.methods import METHODS, Method, find_method
from bittern.ptq.mixed import check_mixed
from bittern.ptq.model import Result, quantize

__all__ = ["METHODS", "Method", "Mixed", "Result", "check_mixed", "find_method", "quantize"]
