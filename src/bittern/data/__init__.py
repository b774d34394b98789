"""Data: batches of texts, images and scenes for calibration, training and evaluation."""

from bittern.data.load import (
    Data,
    check_same_inputs,
    digits,
    has_classes,
    is_language_model,
    is_regression,
    load_data,
)

__all__ = ["Data", "check_same_inputs", "digits", "has_classes", "is_language_model", "is_regression", "load_data"]
