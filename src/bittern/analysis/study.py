"""The whole analysis of one or two students: resumable part by part, with an estimate of its time before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bittern.analysis.ablation import block_errors, class_errors
from bittern.analysis.compare import compare, nuclear_norms
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
from bittern.analysis.report import write_report
from bittern.analysis.tokens import token_kinds
from bittern.data import check_same_inputs, has_classes, load_any_split
from bittern.data.evaluate import metrics, predict
from bittern.deploy.bench import alternate
from bittern.deploy.files import Journal, atomic_folder, check_output, digest, read_json, reserved
from bittern.deploy.store import REPORT as RUN
from bittern.deploy.store import inspect, load
from bittern.errors import ModelError
from bittern.options import Curvature
from bittern.progress import OnEstimate, Track, silent

PRODUCTS = 30  # with the Hessian that Lanczos takes, about
SURFACE = 2  # mini-batches whose mean loss makes the surface
MINI_BATCH = 16  # samples whose Hessian is looked at


def analyze(
    student: str | Path,
    teacher: str | Path,
    data: str,
    out: str | Path,
    *,
    against: str | Path | None = None,
    samples: int = 128,
    subset: int = 32,
    seed: int = 0,
    curvature: Curvature | None = None,
    force: bool = False,
    on_estimate: OnEstimate | None = None,
    track: Track = silent,
    **columns: Any,
) -> dict[str, Any]:
    """Compare the student in a folder with its float teacher, and write a report to `out`; return what it shows.

    against: another student of the same teacher, shown beside it. samples: drawn from the test part of the data, or the
    only one; of them `subset` serve what runs the model many times. curvature: Hessian and loss surface, which take
    long. on_estimate: gets the seconds that each part will take, about, before it starts. Finished parts are kept in
    the folder `out`.work until `out` is written. Raises InputError, ModelError and CheckpointError.
    """
    check_output(out, force, student, teacher, against)
    students = [student] if against is None else [student, against]
    with reserved(out):
        study = _Study(students, teacher, data, out, samples, subset, seed, curvature, track, columns)
        if on_estimate is not None:
            on_estimate(study.estimate())
        result = study.result()
        with atomic_folder(out, force=force) as folder:
            write_report(result, folder)
        Journal.delete(study.journal.folder)
    return result | {"out": str(out)}


class _Study:
    """Models, data and options of one analysis, all checked, and its parts."""

    def __init__(
        self,
        students: list[str | Path],
        teacher: str | Path,
        data: str,
        out: str | Path,
        samples: int,
        subset: int,
        seed: int,
        curvature: Curvature | None,
        track: Track,
        columns: dict[str, Any],
    ):
        self.paths, self.teacher_path, self.track = students, teacher, track
        self.seed, self.curvature = seed, curvature
        self.teacher = load(teacher)
        found = load_any_split(data, self.teacher, teacher, **columns)
        self.data = found.subset(samples, seed)
        self.subset = list(found.subset(min(subset, samples), seed))
        self.mini = list(replace(self.data, batch_size=min(MINI_BATCH, self.data.batch_size)))
        self.pairs = [self._pair(path) for path in students]
        self.kinds = token_kinds(self.teacher, teacher)
        models = [self.teacher, *(pair.student for pair in self.pairs)]
        job: dict[str, Any] = {
            f"model {i}": digest(sorted(model.state_dict().items())) for i, model in enumerate(models)
        }
        job |= {"data": self.data.fingerprint(), "batch size": self.data.batch_size, "samples": samples}
        job |= {"few": subset, "seed": seed, "curvature": None if curvature is None else vars(curvature)}
        self.journal = Journal(f"{Path(out)}.work", job)

    def _pair(self, path: str | Path) -> Pair:
        model = load(path)
        if type(model) is not type(self.teacher):
            kinds = type(model).__name__, type(self.teacher).__name__
            raise ModelError(
                f"{path} is a {kinds[0]}, its teacher {self.teacher_path} a {kinds[1]}; they must be the same"
            )
        check_same_inputs(model, path, self.teacher, self.teacher_path)
        return Pair(model, self.teacher)

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a part of the result: as a run before this kept it, or made and kept now."""
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
        forward = _seconds(lambda: predict(pair.student, [batch]))
        norms = _seconds(lambda: nuclear_norms(pair, self.subset[:1])) * len(self.subset)
        passes = len(pair.anatomy.blocks) + 12
        batches = -(-len(self.data) // self.data.batch_size)
        found = {"comparing": (one + 2 * forward) * batches}
        found["sensitivity"] = forward * passes * len(self.subset) + norms
        if self.curvature is not None:
            hessian, loss = self._hessian(pair, 0)
            product = _seconds(lambda: hessian.product(torch.ones(hessian.size)))
            with torch.no_grad():
                value = _seconds(lambda: loss(hessian.parameters))
            products = self.curvature.batches * PRODUCTS + self.curvature.probes
            found["curvature"] = product * products + value * self.curvature.grid**2 * SURFACE
        return {name: seconds * len(self.pairs) for name, seconds in found.items()}

    def result(self) -> dict[str, Any]:
        """Do all parts that are not there yet, and return what the report shows."""
        reference = predict(self.teacher, self.track(self.data, "teacher"))
        predicted = [predict(pair.student, self.track(self.data, "student")) for pair in self.pairs]
        students = [self._student(i, output, reference) for i, output in enumerate(predicted)]
        order = list(range(len(self.data)))
        if has_classes(self.teacher):  # up to three on which they disagree come first
            differ = [i for i in order if any(p[i].argmax() != reference[i].argmax() for p in predicted)][:3]
            order = [*differ, *(i for i in order if i not in differ)]
        return {
            "bittern": version("bittern"),
            "teacher": {
                "path": str(self.teacher_path),
                "model": type(self.teacher).__name__,
                "metrics": metrics(self.teacher, self.data, reference),
            },
            "data": self.data.name,
            "samples": len(self.data),
            "few": sum(map(_size, self.subset)),
            "students": students,
            "shown": self.part("shown", lambda: shown_samples(self.pairs, self.data, self.teacher_path, order)),
        }

    def _student(self, i: int, predicted: Tensor, reference: Tensor) -> dict[str, Any]:
        path, pair, track = Path(self.paths[i]), self.pairs[i], self.track
        run = read_json(path / RUN) if (path / RUN).is_file() else {}  # what made the student, if Bittern did
        qat, ptq = run.get("qat", {}), run.get("ptq", {})
        found: dict[str, Any] = {
            "path": str(self.paths[i]),
            "name": path.name,
            "how": next((how for how in ("qat", "ptq") if how in run), "quantize" if run else ""),
            "learned": list(run.get("distill", {}).get("terms", ())),
            "metrics": metrics(pair.student, self.data, predicted, reference),
            "run": {key: run[key] for key in ("float", "packed", "samples", "float_bytes") if key in run},
            "holds": inspect(path),
            "speed": self.part(f"{i}-speed", lambda: speed(pair, next(iter(self.data)))),
            "history": qat.get("history", []),
            "phases": qat.get("phases", []),
            "metric": qat.get("metric"),
            "frontier": ptq.get("frontier", []),
            "bits": ptq.get("bits", {}),
            "compare": self.part(f"{i}-compare", lambda: compare(pair, self.data, self.kinds, track=track)),
            "blocks": self.part(f"{i}-blocks", lambda: block_errors(pair, self.subset, track)),
            "classes": self.part(f"{i}-classes", lambda: class_errors(pair, self.subset, track)),
            "nuclear": self.part(f"{i}-nuclear", lambda: nuclear_norms(pair, self.subset, track)),
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


@torch.no_grad()
def speed(pair: Pair, batch: Mapping[str, Any], rounds: int = 5) -> dict[str, Any]:
    """Seconds of a batch, teacher and student in turns, medians, on this machine."""
    times = alternate({"teacher": partial(pair.teacher, **batch), "student": partial(pair.student, **batch)}, rounds)
    medians = {name: median(seconds) for name, seconds in times.items()}
    return medians | {"threads": torch.get_num_threads(), "batch": _size(batch)}


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _size(batch: Mapping[str, Any]) -> int:
    return len(next(v for v in batch.values() if isinstance(v, Tensor)))
