"""Analysis of what quantization did to a model: diagnostics that read two models side by side, and a report of them."""
