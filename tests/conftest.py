"""What every test runs under: transformers quiet and offline, one thread, packed models without integer kernels."""

import os
from collections.abc import Iterator

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers.utils import logging

from bittern import native
from test_budget import summary

torch.set_num_threads(1)
logging.disable_progress_bar()  # its lock is shared with forked processes, and a killed one would keep it


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
