"""What every test runs under: transformers quiet and offline, one thread."""

import os

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)
