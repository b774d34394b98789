"""What a training step with a teacher costs, against plain fine-tuning of the float model, in one alternating run.

    python benchmarks/qat_step.py --json benchmarks/results/qat_step.json
    python benchmarks/qat_step.py --quick --json
    python benchmarks/qat_step.py --shapes BERT-base --sets none prediction unified --batch-size 16 --rounds 3

Shapes are MiniLM-L6 and BERT-base with random weights (time does not depend on them), 32 × 64 tokens with padding. A
step is forward, backward and fused AdamW; plain fine-tuning runs transformers' own attention (sdpa). `step_ratio` is
the median over rounds of (ours / plain). The limit counts multiplications: plain is a forward and two backwards of the
same size, a teacher adds one forward: 4/3; without a teacher 1. `--quick`: MiniLM-L6 only, 16 × 64 tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from bittern import simulate
from bittern.deploy.bench import alternate, ratios
from bittern.options import parse_distill
from bittern.qat.distill import Distiller, balanced

SHAPES = {
    "MiniLM-L6": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "BERT-base": {},
}
SETS = ["none", "prediction", "ternarybert", "map", "output", "unified"]


def step(model: PreTrainedModel, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return run


def measure(shape: str, batch_size: int, rounds: int, sets: list[str]) -> dict[str, float]:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SHAPES[shape])).train()
    lengths = torch.randint(24, 65, (batch_size, 1))
    lengths[0] = 64
    batch = {
        "input_ids": torch.randint(1000, 30522, (batch_size, 64)),
        "attention_mask": (torch.arange(64) < lengths).long(),
        "labels": torch.randint(0, 2, (batch_size,)),
    }
    teacher, float_model = copy.deepcopy(model), copy.deepcopy(model)
    student = copy.deepcopy(model)
    simulate(student, "ternary-2-2-8")
    steps = {"plain": step(float_model, lambda: float_model(**batch).loss)}

    def taught(terms: str) -> Callable[[], None]:
        distill = parse_distill(terms)
        distiller = Distiller(distill, student, copy.deepcopy(teacher) if distill.needs_teacher else None)
        return step(student, lambda: balanced(distiller.forward(student, batch)[1], distill, distiller.compared))

    steps |= {terms: taught(terms) for terms in sets}
    student.train()
    times = alternate(steps, rounds)
    print(f"{shape}: plain step {min(times['plain']):.2f} s at best, {torch.get_num_threads()} threads")
    found = {name: round(ratio, 3) for name, ratio in ratios(times, "plain").items() if name != "plain"}
    for name, ratio in found.items():
        print(f"  {name:12} {ratio:.2f} × plain; limit {1 if name == 'none' else 4 / 3:.2f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", nargs="?", const="-", help="file to write, or the last line of the output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        found = {"step_ratio": measure("MiniLM-L6", 16, 5, SETS)}
    else:
        found = {
            "step_ratio": {
                shape: measure(shape, options.batch_size, options.rounds, options.sets) for shape in options.shapes
            }
        }
    result = found | {"goal": 1.6, "limit": 1.333, "threads": options.threads}
    if options.json == "-":
        print(json.dumps(result))
    elif options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
