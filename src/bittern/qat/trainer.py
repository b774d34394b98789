"""A transformers Trainer whose loss is what a student learns from its teacher; everything else is the Trainer's own."""

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import get_last_checkpoint

from bittern.anatomy import holding
from bittern.deploy.checkpoint import mark
from bittern.deploy.journal import seal
from bittern.errors import InputError, ModelError
from bittern.layers import is_simulated
from bittern.options import Distill, Intervention
from bittern.qat.distill import Distiller, balanced, weighted


class QATTrainer(Trainer):
    """Trains a simulated model (see `simulate`) with a teacher.

    teacher: a float model, kept outside of the student and of everything that is saved; None for the labels alone.
    distill: what is learned from it. intervention: steps at the beginning in which the teacher's signals replace
    the student's. Everything else is as in `transformers.Trainer`; the terms of the loss are logged beside
    their sum by weights, which is the loss of evaluations too.
    Raises ModelError when a term is no longer finite: the checkpoints before it stay.
    """

    optimizer: Any
    lr_scheduler: Any
    loss_is_scaled_for_ga = False  # a batch's loss is a mean; the Trainer divides by the accumulation steps

    def __init__(
        self,
        model: PreTrainedModel,
        *args: Any,
        teacher: PreTrainedModel | None = None,
        distill: Distill | None = None,
        intervention: Intervention | None = None,
        **options: Any,
    ):
        if not is_simulated(model):
            raise ModelError("the student is not simulated; call simulate(model, recipe) before training")
        _check_processes(options.get("args", args[0] if args else None))
        self.distiller = Distiller(distill or Distill(), model, teacher, intervention)
        super().__init__(mark(model, "simulated"), *args, **options)
        if self.args.gradient_checkpointing and (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise InputError("reentrant activation checkpointing loses gradients of the terms; set use_reentrant=False")
        if self.args.n_gpu > 1:
            raise InputError("DataParallel cannot record inside its replicas; start one process per GPU with torchrun")
        if teacher is not None:
            teacher.to(self.args.device)
        self.can_return_loss = True  # where no labels are named
        self._sums, self._count = Counter[str](), 0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """With an intervention, the learning rate rises and falls twice: in its steps, and in those after it [TI]."""
        intervention = self.distiller.intervention
        if intervention is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        steps = intervention.steps
        if not steps < num_training_steps:
            share = f"{steps} steps of {num_training_steps}"
            raise InputError(f"the intervention takes {share}; give it fewer, or train for longer")
        factors = []
        for length in (steps, num_training_steps - steps):
            self.lr_scheduler = None
            if not isinstance(part := super().create_scheduler(length, optimizer), LambdaLR):
                kind = self.args.lr_scheduler_type.value
                raise InputError(f"no intervention with the learning rate's schedule {kind}; use linear or cosine")
            factors.append(part.lr_lambdas[0])
        first, second = factors
        self.lr_scheduler = LambdaLR(part.optimizer, lambda step: first(step) if step < steps else second(step - steps))
        return self.lr_scheduler

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        intervention = self.distiller.intervention
        if intervention is not None and self.state.global_step == intervention.steps:  # afresh, without the teacher
            getattr(self.optimizer, "optimizer", self.optimizer).state.clear()
        try:
            return super().training_step(*args, **options)  # type: ignore[no-any-return]
        finally:
            self.distiller.release()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        out, terms = self.distiller.forward(model, inputs, self.state.global_step if model.training else None)
        if not model.training:
            loss = weighted(terms, self.distiller.distill)
            return (loss, out) if return_outputs else loss
        values = torch.stack([term.detach().float() for term in terms.values()])
        means = dict(zip(terms, self.accelerator.reduce(values, "mean").tolist(), strict=True))
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise ModelError(f"step {self.state.global_step + 1}: {self._diverged(name)}")
        self._sums.update(means)
        self._count += 1
        loss = balanced(terms, self.distiller.distill, self.distiller.compared, means)
        return (loss, out) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> tuple[Any, Any, Any]:
        """Without labels too an evaluation has a loss, but where one is that of the labels."""
        given = "truth" in self.distiller.distill.terms or all(inputs.get(n) is not None for n in self.label_names)
        with holding([self], "label_names", self.label_names if given else []):
            loss, logits, labels = super().prediction_step(model, inputs, *args, **options)
        return loss, logits, labels if given else None

    def _diverged(self, term: str) -> str:
        damaged = next((n for n, p in self.model.named_parameters() if not torch.isfinite(p).all()), None)
        where = f"weight {damaged} holds NaN or infinite values" if damaged else "all weights are finite still"
        folder = Path(self.args.output_dir)
        last = get_last_checkpoint(folder) if folder.is_dir() else None
        kept = f"; the checkpoints up to {Path(last).name} are kept" if last else ""
        return f"the term {term} is not finite, and {where}; lower the learning rate or look at the data{kept}"

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        logs.pop("train_loss", None)  # the mean of what was descended, which tells nothing where it is balanced
        if self._count and "loss" in logs:
            means = {name: total / self._count for name, total in self._sums.items()}
            logs |= {f"loss_{name}": mean for name, mean in means.items()}
            logs["loss"] = weighted(means, self.distiller.distill)  # if balanced, it is always the same
            self._sums, self._count = Counter(), 0
        super().log(logs, *args, **options)

    # transformers 5.23 loads checkpoints by raw names and drops what it does not know (its issue 43701): the weights of
    # every model that is renamed on disk.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        _load_state(self.model if model is None else self.accelerator.unwrap_model(model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        _load_state(self.model, self.state.best_model_checkpoint)

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        super()._save_checkpoint(*args, **options)
        self.accelerator.wait_for_everyone()  # each process writes its own random state
        if self.args.should_save:
            seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")


def _check_processes(arguments: Any) -> None:
    """Raise InputError for ways to share work that Bittern cannot serve, or that do not share it."""
    fsdp = getattr(arguments, "fsdp", None) or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if fsdp or getattr(arguments, "deepspeed", None):
        raise InputError(
            "FSDP and DeepSpeed split weights, but scales are those of whole ones; start one process per GPU with "
            "torchrun, each of which holds the model"
        )
    if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        raise InputError("accelerate launch starts one process on CPUs, whatever --num_processes says; use torchrun")


def _load_state(model: PreTrainedModel, folder: str) -> None:
    """Weights and scales of a checkpoint, read as `from_pretrained` reads them."""
    model.load_state_dict(type(model).from_pretrained(folder, dtype=torch.float32).state_dict())
