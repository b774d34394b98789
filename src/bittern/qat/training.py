"""One training run of a student: its options, its batches, its checkpoints, and going on after a crash."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from bittern.data import Data, task_of
from bittern.data.evaluate import LOWER_IS_BETTER
from bittern.deploy.files import read_json, telling
from bittern.deploy.journal import is_sealed
from bittern.errors import CheckpointError, InputError, first_line, need
from bittern.layers import anatomy_of
from bittern.options import Distill, Intervention, Training
from bittern.progress import OnStep, ignore, is_main_process
from bittern.qat.optimizer import BertAdam
from bittern.qat.trainer import QATTrainer

Measure = Callable[[], dict[str, float]]


@dataclass
class Trained:
    """The course of a run. history: what was logged, by step: losses, and metrics as `eval_…`. best_step: whose weights
    the student has now; 0 if they are the last ones. phases: what the teacher did from which step to which, if it did.
    floors: of each term of the loss, what quantized activations alone make it, and its value before the first step (see
    `Distiller.floors`).
    """

    steps: int
    best_step: int
    metric: str
    best: float
    history: list[dict[str, float]]
    seconds: float
    phases: list[dict[str, Any]] = field(default_factory=list)
    floors: dict[str, dict[str, float]] = field(default_factory=dict)


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    data: Data,
    measure: Measure,
    distill: Distill,
    training: Training,
    folder: str | Path,
    *,
    test: Data | None = None,
    intervention: Intervention | None = None,
    resume: bool = False,
    on_step: OnStep = ignore,
) -> Trained:
    """Train a simulated student on `data`, and leave it with the weights of its best evaluation.

    teacher: None if neither `distill` nor `intervention` needs one. measure: metrics of the student as it is.
    test: what the metric `loss`, the sum of the terms by their weights, is measured on; by default the data itself.
    folder: for checkpoints. resume: go on from the last complete one, to the bits of a run that was never
    interrupted; without one, start. on_step: called after each step and for what is logged; at the end with the same
    number twice; at step 0 for `floor_…` and `start_…` of the terms. Warns of layer-wise terms that are mostly floor.
    Raises InputError or ModelError before the first step for data, a teacher or options that do not fit.
    """
    if training.batch_size > len(data):
        raise InputError(f"a batch of {training.batch_size} is larger than the data, {len(data)} samples; lower it")
    if "truth" in distill.terms and not data.has_labels and task_of(student) != "next":
        raise InputError(f"{data.name} has no labels, which the term truth needs; choose other terms with --distill")
    arguments, checkpoint = _arguments(training, Path(folder)), last_checkpoint(folder) if resume else None
    arguments.eval_on_start = checkpoint is None  # it is told already
    own: dict[str, Any] = {"teacher": teacher, "distill": distill, "intervention": intervention}
    own["callbacks"] = [_Schedule(training, intervention.steps if intervention else 0, on_step)]
    if training.optimizer == "bertadam":
        own["optimizer_cls_and_kwargs"] = BertAdam, {"lr": arguments.learning_rate}
    trainer = _MeasuredTrainer(student, arguments, data=data, test=test or data, measure=measure, **own)
    if floors := trainer.check_first_batch():
        told = {f"{kind}_{name}": value for name, term in floors.items() for kind, value in term.items()}
        on_step(0, training.steps or 0, told)
    high = {n: term for n, term in floors.items() if n in distill.layerwise and term["floor"] > term["start"] / 2}
    if high and is_main_process():
        terms = ", ".join(f"{name} ({term['floor']:.3g} of {term['start']:.3g})" for name, term in high.items())
        warnings.warn(
            f"quantized activations alone make most of the first loss: {terms}. The weights of the teacher do not mend "
            "that: take a recipe without a clip on activations, or with more bits for them, or other terms",
            stacklevel=2,
        )
    start = time.perf_counter()
    try:
        with telling(f"to {folder}"):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except RuntimeError as error:
        if not any(name in str(error) for name in ("inline_container", "iostream")):
            raise  # all but what torch.save says
        raise InputError(f"cannot write to {folder}: a file was not written whole; the disk may be full") from error
    student.eval()
    state, key = trainer.state, str(trainer.args.metric_for_best_model)
    last = next((entry[key] for entry in reversed(state.log_history) if key in entry), math.nan)
    return Trained(
        steps=state.global_step,
        best_step=(trainer.args.load_best_model_at_end and state.best_global_step) or 0,
        metric=key.removeprefix("eval_"),
        best=float(last if state.best_metric is None else state.best_metric),
        history=state.log_history,
        seconds=time.perf_counter() - start,
        phases=intervention.phases(state.max_steps) if intervention else [],
        floors=floors,
    )


def read_baseline(folder: str | Path) -> dict[str, Any]:
    """Return how a finished run of `bittern qat` went: its metric, the best value, at which of all steps it was."""
    try:
        run = read_json(Path(folder) / "bittern.json")["qat"]
        found = {key: run[key] for key in ("metric", "best", "steps")}
        found["best_step"] = first_step(run["history"], found["metric"], found["best"]) or found["steps"]
    except (CheckpointError, KeyError, TypeError):
        raise InputError(f"{folder} holds no finished run of bittern qat; give the folder that one wrote") from None
    return found | {"folder": str(folder)}


def first_step(history: Sequence[Mapping[str, float]], metric: str, value: float) -> int | None:
    """Return the step of the first evaluation that was at least as good as `value`; None if none was."""
    key, sign = f"eval_{metric}", -1 if metric in LOWER_IS_BETTER else 1
    return next((int(e["step"]) for e in history if key in e and sign * e[key] >= sign * value), None)


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest checkpoint that is as it was when it was written to its end, and so is the best one by then."""
    found = {int(path.name.rpartition("-")[2]): path for path in Path(folder).glob("checkpoint-*") if is_sealed(path)}
    whole = (s for s in found if read_json(found[s] / "trainer_state.json").get("best_global_step") in (None, *found))
    return found.get(max(whole, default=-1))


def collator(data: Data, model: PreTrainedModel) -> Callable[[Sequence[int]], dict[str, Tensor]]:
    """Return a function that makes a batch of the rows with the given numbers, with labels if there are any. Labels of
    a language model are the tokens themselves, -100 where there is padding."""

    def collate(numbers: Sequence[int]) -> dict[str, Tensor]:
        batch = data.collate([data.rows[i] for i in numbers])
        if task_of(model) == "next":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        elif data.labels is not None:
            batch["labels"] = data.labels[list(numbers)]
        return batch

    return collate


class ByLength(LengthGroupedSampler):
    """Puts texts of like lengths in the same batch, for less padding; batches come in any order. Only `seed()` decides,
    asked in each epoch: resuming needs no state. (Accelerate tells samplers of several processes no epoch.)"""

    def __init__(self, lengths: list[int], batch_size: int, seed: Callable[[], int]):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed())
        batches = torch.tensor([*super().__iter__()]).split(self.batch_size)  # by 50, from long to short
        mixed = torch.randperm(len(batches[1:-1]), generator=self.generator).tolist()
        return iter(torch.cat([batches[0], *(batches[1 + i] for i in mixed), *batches[1:][-1:]]).tolist())


class _MeasuredTrainer(QATTrainer):
    """A QATTrainer that is measured by our own metrics, the same ones as the final model."""

    control: TrainerControl

    def __init__(self, student: PreTrainedModel, *args: Any, data: Data, test: Data, measure: Measure, **options: Any):
        self.data, self.test, self.measure = data, test, measure
        rows = range(len(data))
        options["data_collator"] = collate = collator(data, student)
        if teacher := options["teacher"]:  # its anatomy, by real inputs: made-up ones do not fit all models
            anatomy_of(teacher, {k: v.to(teacher.device) for k, v in collate(rows[:2]).items() if k != "labels"})
        super().__init__(student, *args, train_dataset=rows, eval_dataset=[], **options)
        self.remove_callback(PrinterCallback)

    def check_first_batch(self) -> dict[str, dict[str, float]]:
        """A few forwards on the first samples, which tell what does not fit before long work. Returns the floors."""
        batch = self._prepare_inputs(self.data_collator(range(self.args.train_batch_size)))
        try:
            with torch.no_grad():
                self.distiller.forward(self.model, batch)
        finally:
            self.distiller.release()
        return self.distiller.floors(batch)

    def _run_epoch(self, **options: Any) -> None:  # which takes a step before it asks
        if not self.control.should_training_stop:
            self.epoch = options["epoch"]
            super()._run_epoch(**options)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        found = {f"eval_{name}": value for name, value in self.measure().items()}
        if self.args.metric_for_best_model == "eval_loss":
            found["eval_loss"] = self._loss()
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    @torch.no_grad()
    def _loss(self) -> float:
        """Return the mean loss of the samples that the student is measured on."""
        total, collate, count = 0.0, collator(self.test, self.model), len(self.test)
        self.model.eval()
        for start in range(0, count, self.test.batch_size):
            rows = range(start, min(start + self.test.batch_size, count))
            total += len(rows) * float(self.compute_loss(self.model, self._prepare_inputs(collate(rows))))
        return total / count

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.data.rows
        are_texts = isinstance(rows[0], tuple) and all(isinstance(part, str) for part in rows[0])
        lengths = [sum(map(len, row)) for row in rows] if are_texts else []  # in letters
        if len(set(lengths)) < 2 or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ByLength(lengths, size, lambda: seed * 100_003 + self.epoch)


class _Schedule(TrainerCallback):
    """Evaluates and saves so many times in a run, the last time at its end, logs five times as often, and tells
    `on_step` where the run is. Whatever it decides by is part of each checkpoint."""

    def __init__(self, training: Training, intervened: int, on_step: OnStep):
        self.training, self.intervened, self.on_step = training, intervened, on_step

    def is_over(self, args: Any, state: Any) -> bool:
        """True after the last step, or if patience with the student by itself is at its end."""
        best, in_vain, sign, key = -math.inf, 0, 1 if args.greater_is_better else -1, args.metric_for_best_model
        for value in (sign * e[key] for e in state.log_history if e["step"] > self.intervened and key in e):
            best, in_vain = max(best, value), 0 if value > best else in_vain + 1
        return bool(state.global_step >= state.max_steps) or in_vain >= (self.training.patience or math.inf)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.eval_steps = state.save_steps = math.ceil(state.max_steps / self.training.evaluations)
        state.logging_steps = math.ceil(state.eval_steps / 5)
        if state.best_global_step:  # wherever this folder lay when it was written
            state.best_model_checkpoint = f"{args.output_dir}/checkpoint-{state.best_global_step}"
        control.should_training_stop = self.is_over(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_log = True
        else:
            control.should_log |= state.global_step % state.eval_steps == 0  # a checkpoint keeps no half of a mean
            self.on_step(state.global_step, state.max_steps, {})

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= self.is_over(args, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.on_step(state.global_step, state.max_steps, logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_step(state.global_step, state.global_step, {})


DECIDED = dict.fromkeys(("eval_steps", "save_steps", "logging_steps"), "evaluations")
DECIDED |= {"metric_for_best_model": "metric", "output_dir": "out", "label_smoothing_factor": "distill"}
DECIDED |= {"max_steps": "steps", "learning_rate": "learning_rate", "per_device_train_batch_size": "batch_size"}


def check_arguments(training: Training) -> dict[str, Any]:
    """Return the Trainer's arguments in the types that it expects. Raises InputError for one that it does not know."""
    types, found = get_type_hints(TrainingArguments), {}
    for name, value in training.arguments.items():
        if name in DECIDED:
            raise InputError(f"{name} cannot be set: the option {DECIDED[name]} decides it")
        if name == "optim" and training.optimizer == "bertadam":
            raise InputError(f"--optimizer bertadam and --set optim={value} are two optimizers; give one")
        if name not in types:
            near = "".join(f"; did you mean {n}?" for n in get_close_matches(name, types, 1))
            raise InputError(f"transformers.TrainingArguments has no {name!r}{near}")
        try:
            found[name] = TypeAdapter(types[name]).validate_python(value)
        except ValidationError as error:
            raise InputError(f"{name} cannot be {value!r}: {error.errors()[0]['msg']}") from None
    return found


def _arguments(training: Training, folder: Path) -> TrainingArguments:
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": training.epochs,
        "max_steps": training.steps or -1,
        "per_device_train_batch_size": training.batch_size,
        "learning_rate": training.learning_rate,
        "warmup_steps": training.warmup,
        "weight_decay": training.weight_decay,
        "max_grad_norm": 0.0 if training.optimizer == "bertadam" else 1.0,  # which clips by itself
        "seed": training.seed,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": f"eval_{training.metric}",
        "greater_is_better": training.metric not in LOWER_IS_BETTER,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": not torch.accelerator.is_available(),  # else several CPU processes do not know of each other
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    need("accelerate")
    try:
        return TrainingArguments(**chosen | check_arguments(training))
    except (TypeError, ValueError) as error:
        raise InputError(f"options of the Trainer: {first_line(error)}") from error
