"""The whole analysis of one or two students: resumable part by part, with an estimate of its time before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bittern.analysis.compare import compare
from bittern.analysis.curvature import (
    Hessian,
    Loss,
    parameters_of,
    prediction_loss_of,
    surface_row,
    top_eigenvalues,
    trace,
    trainable,
)
from bittern.analysis.findings import worst_blocks
from bittern.analysis.maps import shown_samples
from bittern.analysis.pair import Pair
from bittern.analysis.report import REPORT, write_report
from bittern.analysis.sensitivity import block_errors, class_errors, nuclear_norms
from bittern.analysis.tokens import token_kinds
from bittern.data import Data, check_same_inputs, has_classes, load_data
from bittern.data.evaluate import metrics, predict
from bittern.deploy.files import Journal, atomic_folder, check_output, digest, read_json
from bittern.deploy.store import REPORT as RUN
from bittern.deploy.store import inspect, load
from bittern.errors import InputError, ModelError
from bittern.progress import OnEstimate, Track, ignore, silent

PRODUCTS = 30  # with the Hessian that Lanczos takes, about
SURFACE = 2  # mini-batches whose mean loss makes the surface
MINI_BATCH = 16  # samples whose Hessian is looked at


@dataclass(frozen=True)
class Curvature:
    """batches: mini-batches, each with a spectrum of its own; eigenvalues: of each; probes: of the trace;
    grid: points along each side of the loss surface, which reaches from -span to span."""

    batches: int = 8
    eigenvalues: int = 5
    probes: int = 10
    grid: int = 15
    span: float = 1.0


def analyze(
    student: str | Path,
    teacher: str | Path,
    data: str,
    out: str | Path,
    *,
    against: str | Path | None = None,
    samples: int = 128,
    few: int = 32,
    seed: int = 0,
    curvature: Curvature | None = None,
    force: bool = False,
    on_estimate: OnEstimate = ignore,
    track: Track = silent,
    **columns: Any,
) -> dict[str, Any]:
    """Compare the student in a folder with its float teacher, and write a report to `out`; what it was drawn from.

    against: another student of the same teacher, shown beside it. samples: drawn from the test part of the data, or the
    only one; of them `few` serve what runs the model many times. curvature: Hessian and loss surface, which take long.
    on_estimate: told the seconds that each part will take, about, before it starts. Finished parts are kept in the
    folder `out`.work until `out` is written. Raises InputError, ModelError and CheckpointError.
    """
    check_output(out, force, REPORT)
    job = _Job(student, teacher, data, out, against, samples, few, seed, curvature, track, columns)
    on_estimate(job.estimate())
    result = job.run()
    with atomic_folder(out, force=force, holds=REPORT) as folder:
        write_report(result, folder)
    Journal.delete(job.journal.folder)
    return result


class _Job:
    """Models, data and options of one analysis, all checked."""

    def __init__(
        self,
        student: str | Path,
        teacher: str | Path,
        data: str,
        out: str | Path,
        against: str | Path | None,
        samples: int,
        few: int,
        seed: int,
        curvature: Curvature | None,
        track: Track,
        columns: dict[str, Any],
    ):
        self.teacher_path, self.track, self.seed, self.curvature = teacher, track, seed, curvature
        self.paths = [student, *([against] if against else [])]
        self.teacher = load(teacher)
        found = load_data(data, self.teacher, teacher, split="test", **columns)
        found = found or load_data(data, self.teacher, teacher, split="train", **columns)
        if found is None:
            raise InputError(f"{data} has no train, validation or test split; give one of its files such a name")
        self.data: Data = found.subset(samples, seed)
        self.few = list(found.subset(min(few, samples), seed))
        self.mini = list(replace(self.data, batch_size=min(MINI_BATCH, self.data.batch_size)))
        self.models = [load(path) for path in self.paths]
        for path, model in zip(self.paths, self.models, strict=True):
            if type(model) is not type(self.teacher):
                kinds = type(model).__name__, type(self.teacher).__name__
                raise ModelError(f"{path} is a {kinds[0]}, its teacher {teacher} a {kinds[1]}; they must be the same")
            check_same_inputs(model, path, self.teacher, teacher)
        self.pairs = [Pair(model, self.teacher) for model in self.models]
        self.kinds = token_kinds(self.teacher, teacher)
        models = {f"model {i}": m for i, m in enumerate((self.teacher, *self.models))}
        job = {name: digest(sorted(model.state_dict().items())) for name, model in models.items()}
        self.journal = Journal(
            f"{Path(out)}.work",
            job
            | {
                "data": self.data.fingerprint(),
                "batch size": self.data.batch_size,
                "samples": samples,
                "few": few,
                "seed": seed,
                "curvature": None if curvature is None else vars(curvature),
            },
        )

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """A part of the result: as it was kept by a run before this, or made and kept now."""
        known = self.journal.load(name)
        if known is not None:
            return known[1]
        made = make()
        self.journal.save(name, {"seed": torch.tensor(self.seed)}, made)
        return made

    def estimate(self) -> dict[str, float]:
        """Seconds that each part will take, about, from one batch; parts that are done count still."""
        batch, pair = next(iter(self.data)), self.pairs[0]
        pair.record(batch, "map")  # the first run is slower
        one = _seconds(lambda: compare(pair, [batch], self.kinds))
        plain = _seconds(lambda: predict(pair.student, [batch]))
        norms = _seconds(lambda: nuclear_norms(pair, self.few[:1])) * len(self.few)
        passes = len(pair.anatomy.blocks) + 12
        batches = -(-len(self.data) // self.data.batch_size)
        found = {"comparing": (one + 2 * plain) * batches, "sensitivity": plain * passes * len(self.few) + norms}
        if self.curvature is not None:
            hessian, loss = self._hessian(pair, 0)
            product = _seconds(lambda: hessian.product(torch.ones(hessian.size)))
            with torch.no_grad():
                value = _seconds(lambda: loss(hessian.parameters))
            options = self.curvature
            products = options.batches * PRODUCTS + options.probes
            found["curvature"] = product * products + value * options.grid**2 * SURFACE
        return {name: seconds * len(self.pairs) for name, seconds in found.items()}

    def run(self) -> dict[str, Any]:
        reference = predict(self.teacher, self.track(self.data, "teacher"))
        predicted = [predict(pair.student, self.track(self.data, "student")) for pair in self.pairs]
        students = [self._student(i, predicted[i], reference) for i in range(len(self.pairs))]
        order = list(range(len(self.data)))
        if has_classes(self.teacher):  # those first on which they disagree, and of the others a few too
            differ = [i for i in order if any(p[i].argmax() != reference[i].argmax() for p in predicted)]
            order = [*differ[:3], *(i for i in order if i not in differ[:3])]
        return {
            "bittern": version("bittern"),
            "teacher": {"path": str(self.teacher_path), "model": type(self.teacher).__name__}
            | {"metrics": metrics(self.teacher, self.data, reference)},
            "data": self.data.name,
            "samples": len(self.data),
            "few": sum(_size(b) for b in self.few),
            "students": students,
            "shown": self.part("shown", lambda: shown_samples(self.pairs, self.data, self.teacher_path, order)),
        }

    def _student(self, i: int, predicted: Tensor, reference: Tensor) -> dict[str, Any]:
        path, pair, track = self.paths[i], self.pairs[i], self.track
        run = read_run(path)
        found: dict[str, Any] = {
            "path": str(path),
            "name": Path(path).name,
            "how": next((how for how in ("qat", "ptq") if how in run), "quantize" if run else ""),
            "learned": list(run.get("distill", {}).get("terms", ())),
            "metrics": metrics(pair.student, self.data, predicted, reference),
            "run": {key: run[key] for key in ("float", "packed", "samples", "float_bytes") if key in run},
            "holds": inspect(path),
            "speed": self.part(f"{i}-speed", lambda: speed(pair, next(iter(self.data)))),
            "history": run.get("qat", {}).get("history", []),
            "phases": run.get("qat", {}).get("phases", []),
            "metric": run.get("qat", {}).get("metric"),
            "frontier": run.get("ptq", {}).get("frontier", []),
            "bits": run.get("ptq", {}).get("bits", {}),
            "compare": self.part(f"{i}-compare", lambda: compare(pair, self.data, self.kinds, track=track)),
            "blocks": self.part(f"{i}-blocks", lambda: block_errors(pair, self.few, track)),
            "classes": self.part(f"{i}-classes", lambda: class_errors(pair, self.few, track)),
            "nuclear": self.part(f"{i}-nuclear", lambda: nuclear_norms(pair, self.few, track)),
        }
        if self.curvature is not None:
            found["curvature"] = self._curvature(i, pair, self.curvature)
        return found | {"worst": worst_blocks(found)}

    def _hessian(self, pair: Pair, batch: int) -> tuple[Hessian, Loss]:
        model = trainable(pair.student)
        loss = prediction_loss_of(model, self.teacher, self.mini[batch])
        return Hessian(loss, parameters_of(model)), loss

    def _spectrum(self, pair: Pair, batch: int, options: Curvature) -> dict[str, Any]:
        hessian, _ = self._hessian(pair, batch)
        found: dict[str, Any] = {"eigenvalues": top_eigenvalues(hessian, options.eigenvalues, self.seed)}
        return found | ({"trace": trace(hessian, options.probes, self.seed)} if batch == 0 else {})

    def _curvature(self, i: int, pair: Pair, options: Curvature) -> dict[str, Any]:
        batches = range(min(options.batches, len(self.mini)))
        spectra = [
            self.part(f"{i}-spectrum-{b}", partial(self._spectrum, pair, b, options))
            for b in self.track(batches, "spectrum")
        ]
        steps = torch.linspace(-options.span, options.span, options.grid).tolist()
        model = trainable(pair.student)
        losses = [prediction_loss_of(model, self.teacher, b) for b in self.mini[:SURFACE]]
        rows = [
            self.part(f"{i}-surface-{n}", partial(surface_row, losses, parameters_of(model), b, steps, self.seed))
            for n, b in self.track(list(enumerate(steps)), "loss surface")
        ]
        return {
            "spectra": [s["eigenvalues"] for s in spectra],
            "trace": spectra[0]["trace"],
            "surface": {"steps": steps, "loss": rows},
        }


def read_run(path: str | Path) -> dict[str, Any]:
    """What the run that made a student wrote beside it; empty if there is nothing."""
    file = Path(path) / RUN
    return read_json(file) if file.is_file() else {}


@torch.no_grad()
def speed(pair: Pair, batch: Mapping[str, Any], rounds: int = 5) -> dict[str, Any]:
    """Seconds of a batch, teacher and student in turns, medians, on this machine."""
    seconds: dict[str, list[float]] = {"teacher": [], "student": []}
    for _ in range(rounds + 1):
        for name, model in (("teacher", pair.teacher), ("student", pair.student)):
            seconds[name].append(_seconds(partial(model, **batch)))
    medians = {name: median(times[1:]) for name, times in seconds.items()}
    return medians | {"threads": torch.get_num_threads(), "batch": _size(batch)}


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _size(batch: Mapping[str, Any]) -> int:
    return len(next(v for v in batch.values() if isinstance(v, Tensor)))
