"""Fine-tune the ViT-S/14 of `assets.vit_s14` on CIFAR-10 at 56×56 pixels (17 tokens): a float model to quantize.

    ASSETS=assets nice -n 10 python benchmarks/train_cifar_vit.py CIFAR10 --out runs/cifar-vit-s14

CIFAR10 is a folder with train.parquet and test.parquet. One thread, bfloat16 autocast where layers multiply, float32
weights. Every ten minutes a checkpoint is written beside OUT, from which the same command goes on, and the averaged
weights to OUT, a plain transformers checkpoint at any time. Each step sees the same images whether resumed or not.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from assets import vit_s14
from torch import Tensor
from training import load_state, publish, save_state
from transformers import Dinov2ForImageClassification, ViTImageProcessor

SIZE, BATCH, WARMUP, DECAY = 56, 64, 200, 0.999
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def cifar(folder: Path, split: str, cache: Path) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) and labels, both uint8; decoded once."""
    file = cache / f"cifar10-{split}.npz"
    if not file.exists():
        import pyarrow.parquet as pq
        from PIL import Image

        table = pq.read_table(folder / f"{split}.parquet")
        images = [np.asarray(Image.open(BytesIO(row["bytes"])).convert("RGB")) for row in table["image"].to_pylist()]
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(file, images=np.stack(images).transpose(0, 3, 1, 2), labels=np.array(table["label"], np.uint8))
    arrays = np.load(file)
    return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])


def prepare(images: Tensor) -> Tensor:
    """What the saved image processor does: bicubic to SIZE, normalised; antialias=True gives Pillow's kernel."""
    x = F.interpolate(images.float(), (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 255) / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def augment(images: Tensor, random: torch.Generator) -> Tensor:
    """Crops of the images padded by 4 pixels, every second one mirrored."""
    n, padded = len(images), F.pad(images.float(), (4, 4, 4, 4), mode="reflect")
    rows, columns = (torch.randint(0, 9, (n, 1), generator=random) + torch.arange(32) for _ in range(2))
    mirrored = torch.rand(n, 1, generator=random) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def batch_at(step: int, count: int) -> Tensor:
    """Indices of the images of a step: a permutation per epoch."""
    per_epoch = count // BATCH
    order = torch.randperm(count, generator=torch.Generator().manual_seed(step // per_epoch))
    return order[step % per_epoch * BATCH :][:BATCH]


def build() -> Dinov2ForImageClassification:
    """The backbone with a new head and its position embeddings resized to SIZE."""
    backbone = vit_s14()
    with torch.no_grad():
        tokens = (SIZE // 14) ** 2 + 1
        positions = backbone.embeddings.interpolate_pos_encoding(torch.empty(1, tokens, 384), SIZE, SIZE)
    config = copy.deepcopy(backbone.config)
    config.update(
        {"image_size": SIZE, "id2label": dict(enumerate(CLASSES)), "label2id": {c: i for i, c in enumerate(CLASSES)}}
    )
    config._attn_implementation = "eager"  # faster than sdpa for 17 tokens on a CPU
    torch.manual_seed(0)
    model = Dinov2ForImageClassification(config)
    model.dinov2.load_state_dict(backbone.state_dict() | {"embeddings.position_embeddings": positions})
    torch.nn.init.zeros_(model.classifier.weight)
    return model


def groups(model: Dinov2ForImageClassification, rate: float, layer_decay: float) -> list[dict[str, object]]:
    """Parameters with learning rates that fall by `layer_decay` per layer from the head down; the head's is 1e-3."""
    found: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        depth = (
            0 if "embeddings" in name else int(name.split("layer.")[1].split(".")[0]) + 1 if "layer." in name else 13
        )
        scaled = 1e-3 if name.startswith("classifier") else rate * layer_decay ** (13 - depth)
        found.setdefault((scaled, 0.05 if parameter.dim() == 2 else 0.0), []).append(parameter)
    return [{"params": p, "lr": lr, "base": lr, "weight_decay": wd} for (lr, wd), p in found.items()]


@torch.no_grad()
def accuracy(model: Dinov2ForImageClassification, images: Tensor, labels: Tensor) -> float:
    """Top-1 in float32."""
    hits = [
        (model(prepare(x)).logits.argmax(-1) == y).sum().item()
        for x, y in zip(images.split(250), labels.split(250), strict=True)
    ]
    return sum(hits) / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--stop", type=int, help="end after so many steps of the schedule, to try settings")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--layer-decay", type=float, default=0.92)
    parser.add_argument("--float32", action="store_true", help="no autocast: three times as fast on CPUs without bf16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = cifar(options.data, "train", options.out.parent)
    model = build()
    averaged = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(groups(model, options.rate, options.layer_decay), fused=True)
    size = {"height": SIZE, "width": SIZE}
    processor = ViTImageProcessor(size=size, resample=3, image_mean=MEAN, image_std=STD)
    checkpoint, modules = options.out.with_suffix(".checkpoint"), {"model": model, "averaged": averaged}
    step = load_state(checkpoint, modules, optimizer)
    model.train()
    saved = started = time.monotonic()
    first, losses = step, []
    while step < min(options.steps, options.stop or options.steps):
        index, random = batch_at(step, len(images)), torch.Generator().manual_seed(step)
        factor = min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * factor
        with torch.autocast("cpu", torch.bfloat16, enabled=not options.float32):
            logits = model(prepare(augment(images[index], random))).logits
        loss = F.cross_entropy(logits.float(), labels[index].long(), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            weight = 1 - min(DECAY, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), weight)
        losses.append(loss.item())
        if step % 50 == 0:
            rate = (step - first) * BATCH / (time.monotonic() - started)
            print(f"step {step} loss {np.mean(losses):.4f} images/s {rate:.1f}", flush=True)
            losses.clear()
        if time.monotonic() - saved > 600 and not options.stop:
            publish(averaged, processor, options.out)
            save_state(checkpoint, step, modules, optimizer)
            saved = time.monotonic()
    if options.stop:
        return
    publish(averaged, processor, options.out)
    result = {"steps": step, "accuracy": accuracy(averaged, *cifar(options.data, "test", options.out.parent))}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
