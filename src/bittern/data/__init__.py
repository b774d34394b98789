"""Data: batches of texts, images and scenes for calibration, training and evaluation."""

from bittern.data.batches import Data
from bittern.data.load import digits, load_any_split, load_data, load_splits
from bittern.data.tasks import check_same_inputs, has_boxes, has_classes, is_language_model, is_regression, task_of

__all__ = ["Data", "check_same_inputs", "digits", "has_boxes", "has_classes", "is_language_model", "is_regression"]
__all__ += ["load_any_split", "load_data", "load_splits", "task_of"]
