"""What every test runs under: transformers quiet and offline, packed models without integer kernels, one thread unless
BITTERN_TEST_THREADS says otherwise."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers.utils import logging

from bittern import native
from families import FLOAT_ATTENTION, SUPPORTED
from noise import Noise
from test_budget import summary

torch.set_num_threads(int(os.environ.setdefault("BITTERN_TEST_THREADS", "1")))
os.environ["OMP_NUM_THREADS"] = os.environ["BITTERN_TEST_THREADS"]  # so that processes give the same bits
# What `make quick` leaves out: whole jobs, processes, a browser, long searches and training; and all families but BERT.
SLOW_FILES = {
    f"test_{name}"
    for name in (
        *("benchmarks", "cli", "curvature", "demo", "detection", "docs", "jobs", "onnx", "package", "ptq", "qat"),
        *("report", "search", "store", "study", "trainer"),
    )
}
SLOW_TESTS = {"test_fuzz_under_sanitizers", "test_switch_is_read_at_first_use", "test_training"}
assert all(Path(__file__).with_name(f"{name}.py").exists() for name in SLOW_FILES)
OTHER_FAMILIES = {*SUPPORTED, *FLOAT_ATTENTION} - {"bert"}

logging.disable_progress_bar()  # its lock is shared with forked processes, and a killed one would keep it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests."""
    for item in items:
        parameters = (
            item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
        )
        in_census = item.path.parent.name == "census"
        other_family = any(isinstance(value, str) and value in OTHER_FAMILIES for value in parameters)
        if in_census or other_family or item.path.stem in SLOW_FILES or item.name.partition("[")[0] in SLOW_TESTS:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def _noise(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other roundings, if BITTERN_TEST_NOISE asks for them: in every thread, since such a mode holds in one only."""
    seed, run = os.environ.get("BITTERN_TEST_NOISE"), threading.Thread.run
    if not seed or request.node.get_closest_marker("own_rounding"):
        yield
        return

    def noisy(thread: threading.Thread) -> None:
        with Noise(int(seed)):
            run(thread)

    monkeypatch.setattr(threading.Thread, "run", noisy)
    with Noise(int(seed)):
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
