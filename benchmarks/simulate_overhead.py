"""What simulation and our attention cost in a forward pass, against the float model, in one alternating run.

    python benchmarks/simulate_overhead.py --threads 2 --rounds 9 --json benchmarks/results/simulate_overhead.json

Shapes are BERT-base (8 × 128 tokens) and ViT-B/16 (4 × 197 tokens) with random weights: time does not depend on them.
`sdpa` is the float model as transformers runs it; `eager` its explicit attention; `sites` the float model with our
attention and nothing recorded or quantized; the others are recipes, static (calibrated once) or dynamic.
Roofline: simulation adds no multiplication to the matrix products, so its limit is 1.0 × eager.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, PreTrainedModel, ViTConfig, ViTModel

from bittern import Format, calibrate, fake_quantize, read_anatomy, simulate
from bittern.attention import attach
from bittern.deploy.bench import alternate, ratios


def models() -> dict[str, tuple[PreTrainedModel, dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    text = {"input_ids": torch.randint(0, 30522, (8, 128)), "attention_mask": torch.ones(8, 128, dtype=torch.long)}
    return {
        "BERT-base, 8 × 128": (BertModel(BertConfig()).eval(), text),
        "ViT-B/16, 4 × 197": (ViTModel(ViTConfig()).eval(), {"pixel_values": torch.randn(4, 3, 224, 224)}),
    }


def measure(model: PreTrainedModel, batch: dict[str, torch.Tensor], rounds: int) -> dict[str, float]:
    variants = {"sdpa": model, "eager": copy.deepcopy(model), "sites": copy.deepcopy(model)}
    variants["eager"].set_attn_implementation("eager")
    attach(variants["sites"], read_anatomy(model, batch))
    for recipe in ("w8a8", "w4a8", "ternary-2-2-8"):
        variants[recipe] = copy.deepcopy(model)
        simulate(variants[recipe], recipe, batch)
        calibrate(variants[recipe], [batch])

    def forward(name: str) -> object:
        with torch.no_grad():
            return variants[name](**batch)

    times = alternate({name: lambda n=name: forward(n) for name in variants}, rounds)
    print("   seconds, sdpa:", f"{min(times['sdpa']):.3f} best")
    return {name: round(ratio, 3) for name, ratio in ratios(times, "sdpa").items()} | {
        "sites / eager": round(ratios(times, "eager")["sites"], 3),
        "w8a8 / eager": round(ratios(times, "eager")["w8a8"], 3),
    }


def rounding(rounds: int) -> dict[str, float]:
    """torch's fused fake quantization divided by ours, on a hidden state and on attention maps."""
    fmt, scale = Format(bits=8, range="static"), torch.tensor(0.03)
    result = {}
    for shape in ((8, 128, 768), (8, 12, 128, 128)):
        x = torch.randn(shape)
        contenders = {
            "ours": lambda x=x: fake_quantize(x, fmt, scale),
            "torch": lambda x=x: torch.fake_quantize_per_tensor_affine(x, 0.03, 0, -128, 127),
        }
        result[f"torch / ours {shape}"] = round(ratios(alternate(contenders, 10 * rounds), "ours")["torch"], 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {"rounding": rounding(options.rounds)}
    print("rounding", results["rounding"])
    for name, (model, batch) in models().items():
        print(name, f"({options.threads} threads)")
        results[name] = measure(model, batch, options.rounds)
        for variant, ratio in results[name].items():
            print(f"   {variant:15} {ratio:.3f}" + ("" if "/" in variant else " × float (sdpa)"))
    if options.json:
        settings = {"threads": options.threads, "rounds": options.rounds}
        options.json.write_text(json.dumps(settings | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
