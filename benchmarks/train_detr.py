"""Train a small DETR from scratch on scenes of Fashion-MNIST objects, to have a float detector to quantize.

    ASSETS=assets nice -n 10 python benchmarks/train_detr.py --out runs/detr-fashion --scenes runs/fashion-scenes

Every step sees new scenes of the 60,000 training images, the same ones whether resumed or not. SCENES gets 1,000 others
and 500 scenes of the 10,000 test images as a folder in COCO format. One thread, float32. Every ten minutes a checkpoint
is written beside OUT, from which the same command goes on, and the averaged model to OUT, which is a plain transformers
checkpoint at any time. At the end its mAP on the test scenes is printed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from assets import FASHION, fashion, scene
from torch import Tensor, nn
from training import load_state, publish, save_state
from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ResNetConfig
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

from bittern.jobs import evaluate

SIZE, BATCH, WARMUP, DECAY = 96, 16, 500, 0.999
LOGGED = ("loss", "dense", "loss_ce", "loss_bbox", "loss_giou")
MEAN, STD = 0.08, 0.22  # of the scenes, in [0, 1]


def config() -> DetrConfig:
    backbone = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 96], depths=[1, 3], layer_type="basic", out_features=["stage2"]
    )  # a grid of 12×12
    return DetrConfig(
        backbone_config=backbone,
        num_queries=12,
        d_model=128,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        dropout=0.0,
        auxiliary_loss=True,
        id2label=dict(enumerate(FASHION)),
        label2id={c: i for i, c in enumerate(FASHION)},
    )


def trainable() -> DetrForObjectDetection:
    """A DETR to be trained from scratch: transformers' one is made for fine-tuning.

    It has real batch norms for the frozen ones, which suit a pretrained backbone only, the initial values of the
    paper's code (queries that differ, Xavier's weights) for a normal distribution of 0.02, and no frozen backbone.
    """
    model = DetrForObjectDetection(config())
    for name, module in list(model.named_modules()):
        if isinstance(module, DetrFrozenBatchNorm2d):
            model.set_submodule(name, nn.BatchNorm2d(len(module.weight)))
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    return model.requires_grad_(True)


def dense_loss(tokens: Tensor, head: nn.Linear, targets: list[dict[str, Tensor]]) -> Tensor:
    """Loss of classes and boxes read from each token of the encoder by a linear layer that is not part of the model.

    A token's target is the object whose box holds its place, the nearest of several. It teaches the encoder what
    objects are long before the decoder, which learns slowly, asks for them.
    """
    grid = math.isqrt(tokens.shape[1])
    at = (torch.arange(grid) + 0.5) / grid
    places = torch.stack([at.repeat(grid), at.repeat_interleave(grid)], 1)  # x, y of tokens, row by row
    classes, boxes = [], []
    for target in targets:
        away = (places[:, None] - target["boxes"][None, :, :2]).abs()
        outside = (away > target["boxes"][None, :, 2:] / 2).any(-1)
        distance, nearest = away.pow(2).sum(-1).masked_fill(outside, math.inf).min(1)
        classes.append(torch.where(distance.isinf(), len(FASHION), target["class_labels"][nearest]))
        boxes.append(target["boxes"][nearest] - torch.cat([places, torch.zeros_like(places)], 1))
    output, label, box = head(tokens), torch.stack(classes), torch.stack(boxes)
    held = label < len(FASHION)
    class_loss = nn.functional.cross_entropy(output[..., 4:].flatten(0, 1), label.flatten())
    return class_loss + 5 * (output[..., :4] - box).abs().sum(-1)[held].mean()


def freeze(model: nn.Module) -> DetrForObjectDetection:
    """The plain DETR with the statistics that the batch norms have gathered."""
    frozen = DetrForObjectDetection(config())
    frozen.load_state_dict(model.state_dict())
    return frozen.eval()


def batch_at(step: int, images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Pixel values (BATCH, 3, SIZE, SIZE) and targets, boxes as center and size relative to the image."""
    random = np.random.default_rng((1, step))
    scenes = [scene(images, labels, random) for _ in range(BATCH)]
    pixels = (torch.from_numpy(np.stack([s[0] for s in scenes])).float() / 255 - MEAN) / STD
    targets = []
    for _, boxes, classes in scenes:
        xyxy = torch.from_numpy(boxes).float() / SIZE
        middle_size = torch.cat([(xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]], 1)
        targets.append({"class_labels": torch.from_numpy(classes), "boxes": middle_size})
    return pixels[:, None].expand(-1, 3, -1, -1), targets


def write_scenes(folder: Path, split: str, count: int) -> None:
    """`count` scenes as PNG files and annotations.json in COCO's format; category ids are the model's labels."""
    from PIL import Image

    source = "t10k" if split == "test" else "train"
    arrays, random = fashion(source), np.random.default_rng((0, count))
    folder = folder / split
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(count):
        pixels, boxes, labels = scene(*arrays, random)
        images.append({"id": i, "file_name": f"{i:04}.png", "height": SIZE, "width": SIZE})
        Image.fromarray(pixels).save(folder / images[-1]["file_name"])
        for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            box = [x0, y0, x1 - x0, y1 - y0]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(FASHION)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=14000)
    parser.add_argument("--stop", type=int, help="end after so many steps of the schedule, to try settings")
    parser.add_argument("--rate", type=float, default=5e-4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    write_scenes(options.scenes, "train", 1000)
    write_scenes(options.scenes, "test", 500)
    arrays = fashion("train")
    model = trainable()
    head = nn.Linear(model.config.d_model, 4 + len(FASHION) + 1)
    averaged = copy.deepcopy(model).eval()
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, weight_decay=1e-4, fused=True)
    size = {"height": SIZE, "width": SIZE}
    processor = DetrImageProcessor(size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3, do_pad=False)
    checkpoint, modules = options.out.with_suffix(".checkpoint"), {"model": model, "head": head, "averaged": averaged}
    step = load_state(checkpoint, modules, optimizer)
    model.train()
    saved = started = time.monotonic()
    first, losses = step, []
    while step < min(options.steps, options.stop or options.steps):
        pixels, targets = batch_at(step, *arrays)
        factor = min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.rate * factor
        output = model(pixels, labels=targets)
        dense = dense_loss(output.encoder_last_hidden_state, head, targets)
        loss = output.loss + dense
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        step += 1
        with torch.no_grad():
            weight = 1 - min(DECAY, (1 + step) / (10 + step))
            new, old = model.state_dict(), averaged.state_dict()
            for name, value in old.items():
                value.copy_(value.lerp(new[name], weight) if value.is_floating_point() else new[name])
        parts = {"loss": loss, "dense": dense} | output.loss_dict
        losses.append([parts[name].item() for name in LOGGED])
        if step % 100 == 0:
            means = " ".join(f"{n} {x:.3f}" for n, x in zip(LOGGED, np.mean(losses, 0), strict=True))
            rate = (step - first) * BATCH / (time.monotonic() - started)
            print(f"step {step} {means} images/s {rate:.1f}", flush=True)
            losses.clear()
        if time.monotonic() - saved > 600 and not options.stop:
            publish(freeze(averaged), processor, options.out)
            save_state(checkpoint, step, modules, optimizer)
            saved = time.monotonic()
    if not options.stop:
        publish(freeze(averaged), processor, options.out)
        print(json.dumps(evaluate(options.out, str(options.scenes))), flush=True)


if __name__ == "__main__":
    main()
