"""Batches for calibration and evaluation from tables, image folders, `datasets` names and the built-in digits.

Everything is checked before long work starts: the path, the columns, that there are rows, that labels fit the model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel

from bittern.errors import InputError

Split = Literal["train", "test"]
TEXT_COLUMNS = (
    ("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("question", "sentence"),
    ("sentence",), ("text",),
)  # fmt: skip
IMAGE_COLUMNS = ("image", "img", "pixel_values")
LABEL_COLUMNS = ("label", "labels")
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class Data:
    """Model inputs in batches, with labels if the source has them.

    rows: raw samples (texts, pairs of texts, images or image paths); `collate` makes tensors of a few of them.
    """

    name: str
    rows: Sequence[Any]
    labels: Tensor | None
    collate: Any
    batch_size: int

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.rows), self.batch_size):
            yield self.collate([self.rows[i] for i in range(start, min(start + self.batch_size, len(self.rows)))])

    def subset(self, samples: int, seed: int = 0) -> Data:
        """A random part of at most `samples` rows; the same for the same seed."""
        order = np.random.default_rng(seed).permutation(len(self.rows))[:samples].tolist()
        labels = None if self.labels is None else self.labels[order]
        return Data(self.name, [self.rows[i] for i in order], labels, self.collate, self.batch_size)

    def fingerprint(self) -> str:
        """SHA-256 of all inputs and labels, to tell whether two results come from the same data."""
        sha = hashlib.sha256(b"" if self.labels is None else self.labels.numpy().tobytes())
        for batch in self:
            for name in sorted(batch):
                sha.update(name.encode() + batch[name].numpy().tobytes())
        return sha.hexdigest()


@cache
def digits(split: Split) -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits: images (n, 1, 8, 8) in [0, 1] and labels; 1,437 to train, 360 to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    x, y = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    return torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y)


@cache
def sentences() -> list[str]:
    """English sentences from the descriptions of scikit-learn's data sets."""
    from importlib.resources import files

    found: list[str] = []
    for file in sorted((files("sklearn") / "datasets" / "descr").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".rst"):
            for paragraph in re.split(r"\n\s*\n", file.read_text(encoding="utf-8")):
                text = re.sub(r"[`*]|:\w+:", "", " ".join(paragraph.split()))
                found += re.findall(r"(?<![\w.])[A-Z][A-Za-z][A-Za-z0-9 ,;:'()\-]{38,260}[a-z)]\.(?=\s|$)", text)
    return list(dict.fromkeys(found))


def load_data(
    source: str,
    model: PreTrainedModel,
    processor_path: str | Path,
    *,
    split: Split,
    columns: Sequence[str] = (),
    label_column: str | None = None,
    batch_size: int = 32,
    max_length: int = 128,
) -> Data | None:
    """Data for `model` from a source; None if the source has no such split.

    source: `digits` or `sentences`, which come with scikit-learn; a .parquet, .csv, .json or .jsonl file; a folder with files named after their split
    (train, validation, test) or with one folder of images per class; else a name for `datasets.load_dataset`.
    A source of one part only is its own train split. The tokenizer or image processor is read from `processor_path`.
    Raises InputError, in one line, for whatever does not fit.
    """
    if source == "digits":
        images, labels = digits(split)
        wanted = {"input": model.main_input_name, "channels": getattr(model.config, "num_channels", 3)}
        if wanted != {"input": "pixel_values", "channels": 1} or model.config.image_size not in (8, [8, 8], (8, 8)):
            raise InputError(f"digits are 8×8 images of one channel; {type(model).__name__} expects {_expects(model)}")
        _check_labels("digits", labels, model)
        return Data("digits", list(images), labels, lambda rows: {"pixel_values": torch.stack(rows)}, batch_size)
    if model.main_input_name not in ("input_ids", "pixel_values"):
        raise InputError(f"{type(model).__name__} takes {model.main_input_name}; data of texts or images was expected")
    is_text = model.main_input_name == "input_ids"
    if source == "sentences":
        if not is_text:
            raise InputError(f"sentences are texts; {type(model).__name__} expects {_expects(model)}")
        rows = [(s,) for s in sentences()[split == "test" :: 2]]
        return Data(source, rows, None, _text_collate(processor_path, model, max_length), batch_size)
    path = Path(source)
    if path.is_dir() and not _split_files(path):
        return None if split == "test" else _image_folder(path, model, processor_path, batch_size)
    table = _table(source, split)
    if table is None:
        return None
    if len(table) == 0:
        raise InputError(f"{source} has no rows; expected at least one sample")
    column = _pick(source, table.column_names, columns, TEXT_COLUMNS if is_text else [(c,) for c in IMAGE_COLUMNS])
    parts = [table[c] for c in column]
    rows = list(zip(*parts, strict=True)) if is_text else parts[0]
    if (
        is_text
        and (bad := next((i for i, row in enumerate(rows) if not all(isinstance(t, str) for t in row)), None))
        is not None
    ):
        raise InputError(f"{source}: row {bad} of {', '.join(column)} is {rows[bad]!r}; expected text")
    labels = _labels(source, table, label_column, model)
    collate = _text_collate(processor_path, model, max_length) if is_text else _image_collate(processor_path)
    return Data(source, rows, labels, collate, batch_size)


def _expects(model: PreTrainedModel) -> str:
    if model.main_input_name == "pixel_values":
        return (
            f"{getattr(model.config, 'num_channels', 3)} channels of {getattr(model.config, 'image_size', '?')} pixels"
        )
    return str(model.main_input_name)


def _split_files(folder: Path) -> dict[Split, Path]:
    """Files of a folder by the split they are named after."""
    found: dict[Split, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in _READERS:
            stem = file.stem.lower()
            if stem.startswith("train"):
                found.setdefault("train", file)
            elif stem.startswith(("validation", "valid", "dev", "test")):
                if "test" not in found or stem.startswith(("validation", "valid", "dev")):  # GLUE's test has no labels
                    found["test"] = file
    return found


_READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


def _table(source: str, split: Split) -> Any:
    import datasets

    datasets.disable_progress_bars()
    path = Path(source)
    try:
        if path.is_file():
            if path.suffix not in _READERS:
                raise InputError(
                    f"{source} is a {path.suffix or 'nameless'} file; expected one of {', '.join(_READERS)}"
                )
            return _read(path) if split == "train" else None
        if path.is_dir():
            file = _split_files(path).get(split)
            return _read(file) if file else None
        names = ["train"] if split == "train" else ["validation", "test", "validation_matched"]
        available = datasets.get_dataset_split_names(source)
        name = next((n for n in names if n in available), None)
        return datasets.load_dataset(source, split=name) if name else None
    except InputError:
        raise
    except Exception as error:  # datasets, pyarrow and huggingface_hub have no common error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        known = "digits, a folder, a .parquet, .csv or .json file, or a dataset name on the hub"
        raise InputError(f"cannot read data from {source!r}: {reason}; expected {known}") from error


def _read(path: Path) -> Any:
    import datasets

    return datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train")


def _pick(source: str, have: Sequence[str], asked: Sequence[str], known: Sequence[Sequence[str]]) -> Sequence[str]:
    options = [asked] if asked else known
    for option in options:
        if all(c in have for c in option):
            return option
    wanted = " or ".join("+".join(o) for o in options)
    raise InputError(f"{source} has the columns {', '.join(have)}; expected {wanted} (choose with --columns)")


def _labels(source: str, table: Any, label_column: str | None, model: PreTrainedModel) -> Tensor | None:
    if label_column and label_column not in table.column_names:
        raise InputError(f"{source} has no column {label_column!r}; it has {', '.join(table.column_names)}")
    column = label_column or next((c for c in LABEL_COLUMNS if c in table.column_names), None)
    if column is None:
        return None
    values = list(table[column])
    if values and isinstance(values[0], str):
        known = {str(k).lower(): v for k, v in (model.config.label2id or {}).items()}
        unknown = next((v for v in values if str(v).lower() not in known), None)
        if unknown is not None:
            raise InputError(f"{source}: label {unknown!r} is not among the model's: {', '.join(list(known)[:10])}")
        values = [known[str(v).lower()] for v in values]
    missing = next((i for i, v in enumerate(values) if v is None or v != v), None)
    if missing is not None:
        raise InputError(f"{source}: row {missing} has no {column}; remove it or choose another column")
    labels = torch.tensor(values)
    _check_labels(source, labels, model)
    return labels


def _check_labels(source: str, labels: Tensor, model: PreTrainedModel) -> None:
    count = getattr(model.config, "num_labels", 0)
    if not has_classes(model):
        return
    if labels.is_floating_point():
        raise InputError(f"{source}: labels are fractions such as {labels[0]:.3g}, but the model has {count} classes")
    if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < count):
        raise InputError(
            f"{source}: labels go from {int(labels.min())} to {int(labels.max())}, but the model has {count} classes "
            f"(0 to {count - 1}); is this the data that the model was trained for?"
        )


def has_classes(model: PreTrainedModel) -> bool:
    """Whether the model is a classifier: its outputs are logits of num_labels classes."""
    return type(model).__name__.endswith("Classification") and model.config.num_labels > 1


def _image_folder(path: Path, model: PreTrainedModel, processor_path: str | Path, batch_size: int) -> Data:
    if model.main_input_name != "pixel_values":
        raise InputError(
            f"{path} is a folder without tables; {type(model).__name__} needs texts in .parquet, .csv or .json"
        )
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_TYPES)
    if not files:
        raise InputError(
            f"{path} holds no images ({', '.join(IMAGE_TYPES)}) and no tables; expected a folder per class"
        )
    classes = sorted({f.parent.name for f in files if f.parent != path})
    labels = None
    if classes and all(f.parent != path for f in files):
        known = {str(k).lower(): v for k, v in (model.config.label2id or {}).items()}
        by_name = all(c.lower() in known for c in classes)
        index = {c: known[c.lower()] if by_name else i for i, c in enumerate(classes)}
        labels = torch.tensor([index[f.parent.name] for f in files])
        _check_labels(str(path), labels, model)
    return Data(str(path), files, labels, _image_collate(processor_path), batch_size)


def _text_collate(processor_path: str | Path, model: PreTrainedModel, max_length: int) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(processor_path)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more for a missing tokenizer
        raise InputError(f"{processor_path} has no tokenizer: {str(error).splitlines()[0]}") from error
    positions = getattr(model.config, "max_position_embeddings", max_length)
    length = min(max_length, tokenizer.model_max_length, positions)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def collate(rows: list[tuple[str, ...]]) -> dict[str, Tensor]:
        texts = [list(part) for part in zip(*rows, strict=True)]
        return dict(tokenizer(*texts, padding=True, truncation=True, max_length=length, return_tensors="pt"))

    return collate


def _image_collate(processor_path: str | Path) -> Any:
    try:
        processor = AutoImageProcessor.from_pretrained(processor_path)
    except Exception as error:  # as above
        raise InputError(f"{processor_path} has no image processor: {str(error).splitlines()[0]}") from error

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        return dict(processor(images=[_image(row) for row in rows], return_tensors="pt"))

    return collate


def _image(row: Any) -> Any:
    from PIL import Image, UnidentifiedImageError

    if not isinstance(row, Path):
        return row.convert("RGB") if isinstance(row, Image.Image) else row
    try:
        with Image.open(row) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{row} is not a readable image: {error}") from error
