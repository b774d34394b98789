"""A training run of a few steps that tests start in one process or in several: prints what came of it as JSON."""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from bittern import simulate
from bittern.options import Intervention, parse_distill
from bittern.progress import leave_processes
from bittern.qat.trainer import QATTrainer
from bittern.recipe import Format, Recipe, Rule
from families import SUPPORTED, TEXT, VISION

TOKEN = Format(bits=8, granularity="token")  # a scale per tensor would depend on the other samples of a batch
RECIPE = Recipe(
    name="ternary by token",
    rules=(
        Rule(roles=("qkv", "attention_output", "ffn"), weight=Format(kind="ternary", clip=2.5), input=TOKEN),
        Rule(roles=("attention",), query=TOKEN, key=TOKEN, value=TOKEN, map=TOKEN),
    ),
)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """64 padded texts or random images, the same in every process."""

    def __init__(self, family: str):
        draw = torch.Generator().manual_seed(0)
        self.labels = torch.randint(0, 3, (64,), generator=draw)
        if family == "vit":
            self.inputs = {"pixel_values": torch.randn(64, 3, 32, 32, generator=draw)}
        else:
            ids = torch.randint(5, 99, (64, 12), generator=draw)
            mask = torch.arange(12)[None] < torch.randint(4, 13, (64, 1), generator=draw)
            self.inputs = {"input_ids": ids * mask, "attention_mask": mask.long()}

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: x[i] for name, x in self.inputs.items()} | {"labels": self.labels[i]}


class Kill(hf.TrainerCallback):
    """kill -9 after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def build(family: str, dropout: bool) -> tuple[hf.PreTrainedModel, hf.PreTrainedModel]:
    """Student and teacher."""
    sizes: dict[str, Any] = dict(VISION if family == "vit" else TEXT) | ({} if dropout else NO_DROPOUT)
    sizes["num_labels"] = 3
    torch.manual_seed(0)
    teacher = (
        hf.ViTForImageClassification(hf.ViTConfig(**sizes))
        if family == "vit"
        else hf.BertForSequenceClassification(hf.BertConfig(**sizes))
    )
    student = copy.deepcopy(teacher)
    simulate(student, RECIPE, SUPPORTED[family]()[1])
    return student, teacher


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--family", default="bert")
    parser.add_argument("--out", required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--balance", default="auto")
    parser.add_argument("--dropout", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--intervene", help="schedule of three steps with the teacher's signals")
    parser.add_argument("--kill", type=int)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    student, teacher = build(options.family, options.dropout)
    trainer = QATTrainer(
        student,
        hf.TrainingArguments(
            options.out,
            max_steps=6,
            per_device_train_batch_size=options.batch,
            learning_rate=1e-3,
            logging_steps=1,
            save_steps=2,
            gradient_accumulation_steps=options.accumulate,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=3,
            dataloader_pin_memory=False,
            gradient_checkpointing=options.checkpointing,
        ),
        train_dataset=Samples(options.family),
        teacher=teacher,
        distill=parse_distill("prediction,hidden,map=0.5,output,score=0.1", balance=options.balance),
        intervention=Intervention(options.intervene, steps=3) if options.intervene else None,
        callbacks=[Kill(options.kill)] if options.kill else [],
    )
    trainer.train(resume_from_checkpoint=True if options.resume else None)
    if trainer.is_world_process_zero():
        weights = torch.cat([p.detach().flatten().double() for p in student.parameters()])
        logs = [
            {k: v for k, v in entry.items() if k.startswith("loss") or k == "grad_norm"}
            for entry in trainer.state.log_history
        ]
        print(
            json.dumps(
                {
                    "world": trainer.args.world_size,
                    "losses": [entry for entry in logs if entry],
                    "norm": weights.norm().item(),
                    "digest": weights.sum().item(),
                }
            )
        )
    leave_processes()


if __name__ == "__main__":
    main()
