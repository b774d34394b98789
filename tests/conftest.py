"""What every test runs under: transformers quiet and offline, one thread."""

import os

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers.utils import logging

torch.set_num_threads(1)
logging.disable_progress_bar()  # its lock is shared with forked processes, and a killed one would keep it
