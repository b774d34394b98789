"""Quantization-aware training: distillation losses, the trainer, and the whole job."""
