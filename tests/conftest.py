"""What every test runs under: transformers quiet and offline, packed models without integer kernels, one thread unless
BITTERN_TEST_THREADS says otherwise."""

import os
from collections.abc import Iterator
from contextlib import nullcontext

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers.utils import logging

from bittern import native
from noise import Noise
from test_budget import summary

torch.set_num_threads(int(os.environ.get("BITTERN_TEST_THREADS", "1")))
logging.disable_progress_bar()  # its lock is shared with forked processes, and a killed one would keep it


@pytest.fixture(autouse=True)
def _noise() -> Iterator[None]:
    """Other roundings, if BITTERN_TEST_NOISE asks for them."""
    seed = os.environ.get("BITTERN_TEST_NOISE")
    with Noise(int(seed)) if seed else nullcontext():
        yield


@pytest.fixture(autouse=True)
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Only tests marked `kernels` use them, of the kind that BITTERN_KERNELS names; the others compare packed with
    simulated models bit for bit."""
    if request.node.get_closest_marker("kernels"):
        if os.environ.get("BITTERN_KERNELS") == "none":
            pytest.skip("BITTERN_KERNELS=none")
        yield
    else:
        with native.disabled():
            yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The size of the source beside its budget, at the end of each run."""
    terminalreporter.write_line(summary())
