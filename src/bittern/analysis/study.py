"""The whole analysis of one or two students: resumable part by part, with an estimate of its time before it starts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from timeit import timeit
from typing import Any

import torch
from torch import Tensor

from bittern.analysis.ablation import block_errors, class_errors
from bittern.analysis.compare import compare, nuclear_norms
from bittern.analysis.curvature import estimate_curvature, measure_curvature
from bittern.analysis.findings import add_findings
from bittern.analysis.maps import shown_samples
from bittern.analysis.pair import Pair
from bittern.analysis.report import write_report
from bittern.analysis.tokens import token_kinds
from bittern.data import check_same_inputs, load_any_split, task_of
from bittern.data.evaluate import check_metric, metrics, predict
from bittern.deploy.bench import alternate
from bittern.deploy.companions import REPORT as RUN
from bittern.deploy.files import atomic_folder, check_output, digest, read_json, reserved
from bittern.deploy.journal import Journal
from bittern.deploy.store import inspect, load
from bittern.deploy.store import measure as size_on_disk
from bittern.errors import ModelError
from bittern.layers import describe, formats
from bittern.options import Curvature
from bittern.progress import OnEstimate, Track, silent
from bittern.ptq.capture import size_of

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


@dataclass
class _Study:
    """Models, data and options of one analysis, all checked, and its parts."""

    paths: list[str | Path]
    teacher_path: str | Path
    source: str
    out: str | Path
    samples: int
    subset_size: int
    seed: int
    curvature: Curvature | None
    track: Track
    columns: dict[str, Any]

    def __post_init__(self) -> None:
        self.teacher = load(self.teacher_path)
        data = load_any_split(self.source, self.teacher, self.teacher_path, **self.columns)
        check_metric(self.teacher, data)
        self.data = data.subset(self.samples, self.seed)
        self.subset = list(data.subset(min(self.subset_size, self.samples), self.seed))
        self.mini = list(replace(self.data, batch_size=min(MINI_BATCH, self.data.batch_size)))
        self.pairs = [self._pair(path) for path in self.paths]
        self.kinds = token_kinds(self.teacher, self.teacher_path)
        models = [self.teacher, *(pair.student for pair in self.pairs)]
        job: dict[str, Any] = {f"model {i}": digest(sorted(m.state_dict().items())) for i, m in enumerate(models)}
        job |= {"data": self.data.fingerprint(), "batch size": self.data.batch_size, "samples": self.samples}
        job |= {"few": self.subset_size, "seed": self.seed, "curvature": self.curvature and vars(self.curvature)}
        self.journal = Journal(f"{Path(self.out)}.work", job)

    def _pair(self, path: str | Path) -> Pair:
        model, teacher = load(path), self.teacher
        if formats(teacher):
            swapped = "" if formats(model) else f", and {path} is not: they are swapped"
            raise ModelError(f"the teacher {self.teacher_path} is quantized{swapped}; give the float model: --teacher")
        if not formats(model):
            raise ModelError(f"{path} is not quantized; give a folder that bittern quantize, ptq or qat wrote")
        if type(model).__name__ != type(teacher).__name__:
            own, other = type(model).__name__, type(teacher).__name__
            raise ModelError(f"{path} is a {own}, its teacher {self.teacher_path} a {other}; they must be the same")
        check_same_inputs(model, path, teacher, self.teacher_path)
        return Pair(model, teacher)

    def estimate(self) -> dict[str, float]:
        """Seconds that each part will take, about, from one batch; parts that are done count still."""
        batch, pair = next(iter(self.data)), self.pairs[0]
        pair.record(batch, "map")  # the first run is slower
        one = timeit(lambda: compare(pair, [batch], self.kinds), number=1)
        forward = timeit(lambda: predict(pair.student, [batch]), number=1)
        norms = timeit(lambda: nuclear_norms(pair, self.subset[:1]), number=1)
        batches, passes = -(-len(self.data) // self.data.batch_size), len(pair.anatomy.blocks) + 12
        found = {"comparing": (one + 2 * forward) * batches}
        found["sensitivity"] = (forward * passes + norms) * len(self.subset)
        if self.curvature is not None:
            found["curvature"] = estimate_curvature(self.curvature, pair, self.mini[0])
        return {name: once * len(self.pairs) for name, once in found.items()}

    def result(self) -> dict[str, Any]:
        """Do all parts that are not there yet, and return what the report shows."""
        reference = predict(self.teacher, self.track(self.data, "teacher"))
        predicted = [predict(pair.student, self.track(self.data, "student")) for pair in self.pairs]
        order = list(range(len(self.data)))
        if task_of(self.teacher) == "classes":  # up to three on which they disagree come first
            differ = [i for i in order if any(p[i].argmax() != reference[i].argmax() for p in predicted)][:3]
            order = [*differ, *(i for i in order if i not in differ)]
        found = {
            "bittern": version("bittern"),
            "teacher": {
                "path": str(self.teacher_path),
                "model": type(self.teacher).__name__,
                "file": size_on_disk(self.teacher, self.teacher_path).file,
                "metrics": metrics(self.teacher, self.data, reference, reference),
            },
            "data": self.data.name,
            "samples": len(self.data),
            "few": sum(map(size_of, self.subset)),
            "students": [self._student(i, output, reference) for i, output in enumerate(predicted)],
            "shown": self.journal.part("shown", lambda: shown_samples(self.pairs, self.data, self.teacher_path, order)),
        }
        add_findings(found, [formats(pair.student) for pair in self.pairs])
        return found

    def _student(self, i: int, predicted: Tensor, reference: Tensor) -> dict[str, Any]:
        path, pair, track = Path(self.paths[i]), self.pairs[i], self.track
        run = read_json(path / RUN) if (path / RUN).is_file() else {}  # what made the student, if Bittern did
        same_data = (run.get("calibration") or {}).get("data") == self.source
        qat, ptq = run.get("qat", {}), run.get("ptq", {})
        kept = ("float_bytes", *(("float", "packed", "samples") if same_data else ()))

        def part(name: str, make: Callable[[], Any]) -> Any:
            return self.journal.part(f"{i}-{name}", make)

        found: dict[str, Any] = {
            "path": str(self.paths[i]),
            "name": path.name,
            "how": run.get("how") or next((how for how in ("qat", "ptq") if how in run), "quantize" if run else ""),
            "learned": list(run.get("distill", {}).get("terms", ())),
            "metrics": metrics(pair.student, self.data, predicted, reference),
            "run": {key: run[key] for key in kept if key in run},
            "holds": inspect(path),
            "notes": list(describe(pair.student).notes),
            "history": qat.get("history", []),
            "phases": qat.get("phases", []),
            "metric": qat.get("metric"),
            "frontier": ptq.get("frontier", []),
            "bits": ptq.get("bits", {}),
            "speed": self.journal.part("speed", lambda: speed(self.pairs, next(iter(self.data))))[i],
            "compare": part("compare", lambda: compare(pair, self.data, self.kinds, track=track)),
            "blocks": part("blocks", lambda: block_errors(pair, self.subset, track)),
            "classes": part("classes", lambda: class_errors(pair, self.subset, track)),
            "nuclear": part("nuclear", lambda: nuclear_norms(pair, self.subset, track)),
        }
        if self.curvature is not None:
            found["curvature"] = measure_curvature(self.curvature, pair, self.mini, self.seed, part, track)
        return found


@torch.no_grad()
def speed(pairs: Sequence[Pair], batch: Mapping[str, Any], rounds: int = 5) -> list[dict[str, Any]]:
    """Seconds of a batch on this machine, for each student and its teacher: medians of all models in turns."""
    calls = [partial(model, **batch) for model in (pairs[0].teacher, *(pair.student for pair in pairs))]
    times = alternate({str(i): call for i, call in enumerate(calls)}, rounds)
    teacher, *students = map(median, times.values())
    known = {"teacher": teacher, "threads": torch.get_num_threads(), "batch": size_of(batch)}
    return [known | {"student": seconds} for seconds in students]
