"""Trains the float model of the demo: a small ViT on scikit-learn's handwritten digits (1,797 real 8×8 images).

python scripts/train_digits_vit.py            # under two minutes on one core; writes src/bittern/assets/digits-vit
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from transformers import ViTConfig, ViTForImageClassification

from bittern import save
from bittern.data import digits

OUT = Path(__file__).parents[1] / "src" / "bittern" / "assets" / "digits-vit"


def shifted(images: torch.Tensor) -> torch.Tensor:
    """The images, half of them moved by up to one pixel in either direction."""
    offsets = torch.randint(0, 3, (2, len(images)))
    offsets[:, torch.rand(len(images)) < 0.5] = 1
    y, x = offsets
    windows = F.pad(images, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)  # (n, 1, 3, 3, 8, 8)
    return windows[torch.arange(len(images)), :, y, x]


def main(epochs: int, layers: int, width: int, rate: float, seed: int, out: Path) -> None:
    torch.set_num_threads(1)  # a model this small only loses by more; one gives the same bits each time
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        num_labels=10,
        hidden_dropout_prob=0.1,
        id2label={i: str(i) for i in range(10)},
        label2id={str(i): i for i in range(10)},
    )
    model = ViTForImageClassification(config)
    (images, labels), (test_images, test_labels) = digits("train"), digits("test")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    batches = -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches)
    for _ in track(range(epochs), "training"):
        for index in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(model(shifted(images[index])).logits, labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(test_images).logits.argmax(-1) == test_labels).float().mean()
    print(f"test accuracy {accuracy:.4f}")
    save(model, out, force=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--rate", type=float, default=2e-3, help="of learning; deep ones may need less")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    main(**vars(parser.parse_args()))
