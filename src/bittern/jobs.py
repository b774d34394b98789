"""The main job from end to end: load, simulate, find scales or train, measure, pack, save, and evaluate the result."""

import copy
import platform
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from bittern import native
from bittern.analysis.findings import verdict
from bittern.data import Data, check_same_inputs, load_any_split, load_splits, task_of
from bittern.data.evaluate import check_classes, check_comparable, check_metric, headline, measurable, metrics, predict
from bittern.data.tasks import check_served
from bittern.deploy.checkpoint import is_packed, pack
from bittern.deploy.files import check_output, digest, reserved
from bittern.deploy.journal import Journal
from bittern.deploy.store import float_bytes, load, measure, save
from bittern.errors import InputError, ModelError
from bittern.layers import fake_quants, formats, is_simulated, restore, simulate
from bittern.options import Distill, Intervention, Mixed, Training, refuse_unused
from bittern.progress import OnStep, Track, ignore, is_main_process, peak_memory, silent
from bittern.ptq import check_mixed, find_method
from bittern.ptq import quantize as post_training
from bittern.ptq.calibrate import calibrate
from bittern.qat.training import check_arguments, first_step, last_checkpoint, read_baseline, train
from bittern.recipe import Recipe, load_recipe
from bittern.simulation import Simulation


def quantize(
    source: str | Path,
    recipe: str | Recipe,
    out: str | Path,
    *,
    data: str | None = None,
    samples: int = 128,
    seed: int = 0,
    simulated: str | Path | None = None,
    force: bool = False,
    track: Track = silent,
    **columns: Any,
) -> dict[str, Any]:
    """Quantize the model in folder `source` by `recipe`, write it packed to `out`, and return what was measured.

    Static scales come from extremes; `ptq` searches for better ones. data: where calibration samples come from, and
    evaluation samples if it has a test or validation split (see `load_data`); it may be left out if no scale of the
    recipe is static. simulated: a folder for the model before it is packed. The result is also in `out`/bittern.json.
    """
    if data is None:
        refuse_unused(quantize, "without --data", samples=samples, seed=seed, **columns)
    job = _Job(source, recipe, out, data, samples, seed, force, track, columns, simulated)
    return job.run(lambda: (job.simulate(), {}))


def ptq(
    source: str | Path,
    recipe: str | Recipe,
    out: str | Path,
    *,
    data: str,
    method: str = "bittern",
    mixed: Mixed | None = None,
    samples: int = 128,
    seed: int = 0,
    force: bool = False,
    track: Track = silent,
    **columns: Any,
) -> dict[str, Any]:
    """Quantize as `quantize` does, with scales, biases and weights that a post-training method finds on the samples.

    mixed: a width of its own for each attention and FFN. Finished units are kept in the folder `out`.work until `out`
    is written: the same call after a crash goes on there, to the same bits.
    """
    chosen = find_method(method)
    if mixed is not None:
        check_mixed(chosen)
    job = _Job(source, recipe, out, data, samples, seed, force, track, columns)
    find = partial(post_training, method=method, mixed=mixed, seed=seed, track=track)

    def search() -> Outcome:
        assert job.calibration is not None
        found = find(job.model, job.recipe, job.calibration, folder=job.folder)
        return found.simulation, {"ptq": found.to_dict()}

    return job.run(search)


def qat(
    source: str | Path,
    recipe: str | Recipe,
    out: str | Path,
    *,
    data: str,
    distill: Distill,
    training: Training,
    intervention: Intervention | None = None,
    baseline_run: str | Path | None = None,
    student: str | Path | None = None,
    samples: int = 128,
    resume: bool = False,
    simulated: str | Path | None = None,
    force: bool = False,
    on_step: OnStep = ignore,
    track: Track = silent,
    **columns: Any,
) -> dict[str, Any]:
    """Train a quantized student of the float model in folder `source`, its teacher, and write it packed to `out`.

    intervention: steps at the beginning in which the teacher's signals replace the student's. baseline_run: folder of
    a finished run without it, to compare with how many steps its best metric took.
    student: folder of the float model that the student starts from; the teacher itself by default. samples: for static
    scales of activations, if the recipe has any. Checkpoints are kept in the folder `out`.work until `out` is written.
    resume: go on from the last of them, with the same options, to the same bits; force: drop them.
    Data without labels serves all terms but truth; the student is then measured by how it agrees with the teacher. Of
    data with one part only, a tenth (at most 2,000 samples) is held out to measure. on_step: see `train`. Of several
    processes the first one writes; the others return what they measured last.
    """
    if baseline_run and intervention is None:
        raise InputError("steps are counted against a plain run where the teacher intervenes; give --intervene")
    baseline = read_baseline(baseline_run) if baseline_run else None
    check_arguments(training)
    columns = {"metric": training.metric} | columns | {"batch_size": training.batch_size}
    job = _Job(source, recipe, out, data, samples, training.seed, force, track, columns, simulated, student, True)
    folder, is_main = job.folder, is_main_process()
    if checkpoint := last_checkpoint(folder) if is_main else None:
        Journal.check_ours(folder)
        if not (resume or force):
            unfinished = f"{folder} holds an unfinished run, up to {checkpoint.name}"
            raise InputError(f"{unfinished}; go on with --resume, or drop it with --force")

    def teach() -> Outcome:
        assert job.train is not None
        assert job.test is not None
        teacher = job.float_model if student else copy.deepcopy(job.model)
        simulation, measured = job.simulate(), job.measure()
        options = replace(training, metric=headline(data, measured | {"loss": 0.0}, training.metric or job.test.metric))
        if baseline and baseline["metric"] != options.metric:
            other = f"{baseline_run} was chosen by {baseline['metric']}"
            raise InputError(f"{other}, this run by {options.metric}; set --metric")
        found: dict[str, Any] = {"distill": asdict(distill), "training": asdict(options)}
        found |= {"intervention": asdict(intervention)} if intervention else {}
        if is_main:
            if checkpoint and not resume:  # forced, and nothing was found that stops the new run
                Journal.delete(folder)
            models = {"teacher": teacher, "student": job.model}
            known: dict[str, Any] = {name: digest(sorted(model.state_dict().items())) for name, model in models.items()}
            known |= {"data": job.train.subset(256).fingerprint(), "samples": len(job.train)}
            Journal(folder, known | {"recipe": job.recipe.model_dump()} | found)
        run = partial(train, test=job.test, intervention=intervention, resume=resume, on_step=on_step)
        needed = teacher if distill.needs_teacher or intervention else None
        trained = run(job.model, needed, job.train, job.measure, distill, options, folder)
        found |= {"qat": asdict(trained), "peak_memory": peak_memory()}
        if baseline:
            found["plain"] = baseline | {"reached": first_step(trained.history, trained.metric, baseline["best"])}
        return simulation, found

    return job.run(teach)


Outcome = tuple[Simulation, dict[str, Any]]  # what was simulated, and what there is to tell of how


@dataclass
class _Job:
    """The steps that all jobs share: check, load, measure, find scales or train, pack, measure again, save."""

    source: str | Path
    recipe_name: str | Recipe
    out: str | Path
    source_of_data: str | None
    samples: int
    seed: int
    force: bool
    track: Track
    columns: dict[str, Any]
    simulated: str | Path | None = None
    student: str | Path | None = None  # another model to quantize than `source`
    hold_out: bool = False  # measure on a part of the training data, if there is no other

    @property
    def folder(self) -> Path:
        """The folder of what is finished of a long job, until `out` is written."""
        return Path(f"{Path(self.out)}.work")

    def run(self, find: Callable[[], Outcome]) -> dict[str, Any]:
        """Do the whole job; `find` gives the simulated model its scales or trains it. Of several processes the first
        one writes, the others return what was found."""
        self.recipe = load_recipe(self.recipe_name)
        if not is_main_process():
            self.prepare()
            return find()[1]
        check_output(self.out, self.force, self.source, self.student)
        with reserved(self.out):
            self.prepare()
            simulation, found = find()
            result = self.finish(simulation, found)
            if found:
                Journal.delete(self.folder)
            return result

    def prepare(self) -> None:
        """Load and check everything, and run the float model."""
        self.float_model = load_float(self.source)
        self.model = load_float(self.student) if self.student else self.float_model
        if self.student:
            check_same_inputs(self.model, self.student, self.float_model, self.source)
        if self.hold_out:
            check_served(self.model)
        data, self.train, self.test = self.source_of_data, None, None
        if data is not None:
            seed = self.seed if self.hold_out else None
            self.train, self.test = load_parts(data, self.model, self.source, seed, **self.columns)
        self.calibration = self.train.subset(self.samples, self.seed) if self.train else None
        if self.test:  # a head or recipe that does not fit is refused here, before the model runs on all of the data
            check_served(self.model)
            simulate(self.model, self.recipe, next(iter(self.calibration)) if self.calibration else None)
            restore(self.model)
            check_metric(self.float_model, self.test, ["loss"] if self.hold_out else [])
        self.reference = self._predict(self.float_model, "float")
        if self.test and self.reference is not None:
            check_classes(self.float_model, self.test, self.reference)
        self.float_bytes = float_bytes(self.float_model)

    def _predict(self, model: PreTrainedModel, description: str) -> Tensor | None:
        return predict(model, self.track(self.test, description)) if self.test else None

    def measure(self) -> dict[str, float]:
        """Measure the model as it is now."""
        assert self.test is not None
        return metrics(self.model, self.test, predict(self.model, self.test), self.reference)

    def simulate(self) -> Simulation:
        """Simulate the model, with scales from extremes."""
        calibration = self.calibration
        simulation = simulate(self.model, self.recipe, next(iter(calibration)) if calibration else None)
        if any(q.needs_scale for _, q in fake_quants(self.model)):
            if calibration is None:
                raise InputError(f"recipe {self.recipe.name} has static activation scales, which need data: add --data")
            calibrate(self.model, self.track(calibration, "calibrating"))
        return simulation

    def finish(self, simulation: Simulation, found: dict[str, Any]) -> dict[str, Any]:
        """Measure, pack, measure again, save; return what was measured."""
        simulated = self._predict(self.model, "simulated")
        if self.simulated:
            save(self.model, self.simulated, processors_from=self.source)
        pack(self.model)
        result: dict[str, Any] = {
            "source": str(self.source),
            "recipe": self.recipe.name,
            "data": self.source_of_data,
            "quantized": len(simulation.quantized),
            "kept_float": [{"name": layer.name, "type": layer.type} for layer in simulation.kept_float],
            "notes": list(simulation.notes),
            "float_bytes": self.float_bytes,
            **found,
        }
        if self.test is not None and self.reference is not None and simulated is not None:
            result |= {"samples": len(self.test), "origin": self.test.origin}
            result |= self._compare(self.test, self.reference, simulated)
            how, learned = next((h for h in ("qat", "ptq") if h in found), "quantize"), found.get("distill", {})
            result["verdict"] = verdict(
                result["float"], result["packed"], formats(self.model).values(), how, learned=learned.get("terms", ())
            )
        used, packages = self.calibration, ("bittern", "torch", "transformers")
        provenance = {
            "recipe": self.recipe.model_dump(mode="json", exclude_defaults=True),
            "seed": self.seed,
            "calibration": used and {"data": self.source_of_data, "samples": len(used), "sha256": used.fingerprint()},
            "versions": {p: version(p) for p in packages} | {"python": platform.python_version()},
            "layers": [asdict(layer) for layer in simulation.layers],
        }
        save(self.model, self.out, processors_from=self.source, report=result | provenance, force=self.force)
        summary = {"what": str(simulation)} if found else {}
        return result | summary | {"out": str(self.out), **asdict(measure(self.model, self.out))}

    def _compare(self, test: Data, reference: Tensor, simulated: Tensor) -> dict[str, Any]:
        """Return metrics of the float and of the packed model as its users run it, which kernels those are, and the
        largest difference between simulated and packed without kernels: 0, or the codes are wrong."""
        with native.disabled():
            packed = exact = predict(self.model, self.track(test, "checking"))
        if kernels := (native.engine()[0] if self.model.device.type == "cpu" else ""):
            packed = predict(self.model, self.track(test, "packed"))
        return {
            "float": metrics(self.float_model, test, reference, reference),
            "packed": metrics(self.model, test, packed, reference),
            "kernels": kernels or "none",
            "max_error_simulated_packed": (exact - simulated).abs().max().item(),
        }


def load_parts(
    data: str, model: PreTrainedModel, source: str | Path, seed: int | None, **columns: Any
) -> tuple[Data, Data | None]:
    """Load the train and the test part of data; of data with one part only a tenth (at most 2,000 samples) is held out
    as the test part, drawn by `seed`, unless that is None. Raises InputError if there is no train part."""
    train, test = load_splits(data, model, source, **columns)
    if train is None:
        raise InputError(f"{data} has no train split to calibrate with; name one of its files train.parquet")
    return train.split(min(2000, len(train) // 10), seed) if test is None and seed is not None else (train, test)


def load_float(source: str | Path) -> PreTrainedModel:
    """Load a model that is to be quantized. Raises ModelError if it is already."""
    model = load(source)
    if is_packed(model) or is_simulated(model):
        raise ModelError(f"{source} is quantized already; give the float model that it was made from")
    return model


def evaluate(
    source: str | Path,
    data: str,
    *,
    against: str | Path | None = None,
    kernels: bool = True,
    track: Track = silent,
    **columns: Any,
) -> dict[str, Any]:
    """Measure the model in `source` on data, and how far it agrees with the model in `against`.

    A source of data with one part only is used whole. kernels: whether packed layers of both may multiply in integers.
    """
    check_served(model := load(source))
    loaded = load_any_split(data, model, source, **columns)
    if against is None and not measurable(model, loaded):
        no_classes = f"is for {type(model).__name__}, which has no classes"
        why = no_classes if task_of(model) == "embedding" else f"has no labels ({loaded.origin})"
        raise InputError(f"{data} {why}, so there is no accuracy; compare with another model: --against FLOAT_MODEL")
    other = None if against is None else load(against)
    if against is not None and other is not None:
        check_comparable(model, source, other, against, loaded)
        check_same_inputs(model, source, other, against)
    check_metric(model, loaded, compared=against is not None)
    with nullcontext() if kernels else native.disabled():
        output = predict(model, track(loaded, "evaluating"))
        reference = None if other is None else predict(other, track(loaded, "reference"))
    check_classes(model, loaded, output)
    result: dict[str, Any] = {"model": str(source), "data": data, "origin": loaded.origin, "samples": len(loaded)}
    result |= asdict(measure(model, source))
    result |= {} if against is None else {"against": str(against)}
    return result | metrics(model, loaded, output, reference)
