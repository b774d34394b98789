"""Data: batches of texts, images and scenes for calibration, training and evaluation."""

from bittern.data.batches import Data
from bittern.data.load import digits, load_any_split, load_data, load_splits
from bittern.data.tasks import check_same_inputs, task_of

__all__ = ["Data", "check_same_inputs", "digits", "load_any_split", "load_data", "load_splits", "task_of"]
