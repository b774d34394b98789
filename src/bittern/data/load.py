"""Batches for calibration and evaluation from tables, image folders, COCO folders, `datasets` names and the digits.

Everything is checked before long work starts: the path, the columns, that there are rows, that labels fit the model.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bittern.data.detection import Scene, has_boxes, pycocotools, read_scenes
from bittern.data.images import image_collate, image_processor
from bittern.data.texts import Collate, blocks, load_tokenizer, longest, sentences, stack_blocks, text_collate
from bittern.errors import InputError, first_line

Split = Literal["train", "test"]
TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels")
SPLIT_FOLDERS = {"train": ("train",), "test": ("val", "validation", "valid", "dev", "test")}
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class Data:
    """Model inputs in batches, with labels if the source has them.

    rows: raw samples (texts, pairs of texts, images, image paths, scenes with boxes); `collate` makes tensors of a few
    of them. processor: for scenes, the image processor that makes boxes of a detector's outputs.
    """

    name: str
    rows: Sequence[Any]
    labels: Tensor | None
    collate: Collate
    batch_size: int
    processor: Any = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.rows), self.batch_size):
            yield self.collate([self.rows[i] for i in range(start, min(start + self.batch_size, len(self.rows)))])

    def subset(self, samples: int, seed: int = 0) -> Data:
        """A random part of at most `samples` rows; the same for the same seed."""
        order = np.random.default_rng(seed).permutation(len(self.rows))[:samples].tolist()
        labels = None if self.labels is None else self.labels[order]
        return replace(self, rows=[self.rows[i] for i in order], labels=labels)

    def split(self, samples: int, seed: int = 0) -> tuple[Data, Data]:
        """All but `samples` random rows, in their order, and these. Raises InputError if there are too few of them."""
        if not 0 < samples < len(self.rows):
            raise InputError(f"{self.name} has {len(self.rows)} samples, too few to hold some out; add a test split")
        chosen = set(np.random.default_rng(seed).permutation(len(self.rows))[:samples].tolist())
        parts = ([i for i in range(len(self.rows)) if (i in chosen) is out] for out in (False, True))
        rest, held_out = (
            replace(self, rows=[self.rows[i] for i in part], labels=None if self.labels is None else self.labels[part])
            for part in parts
        )
        return rest, held_out

    def fingerprint(self) -> str:
        """SHA-256 of all inputs and labels, to tell whether two results come from the same data, however batched."""
        sha = hashlib.sha256(b"" if self.labels is None else self.labels.numpy().tobytes())
        for row in self.rows:
            batch = self.collate([row])
            for name in sorted(batch):
                sha.update(name.encode() + batch[name].numpy().tobytes())
            if isinstance(row, Scene):
                sha.update(repr(row[1:]).encode())  # not where it lies
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

    source: `digits` or `sentences`, which come with scikit-learn; a .parquet, .csv, .json, .jsonl or .txt file; a
    folder with files named after their split (train, validation, test), or with a folder of images per class, in
    folders of that name if it has splits; for detectors a folder in COCO format (see `read_scenes`); else a name for
    `datasets.load_dataset`, such as `glue/cola`. A source of one part only is its own train split. The tokenizer or
    image processor is read from `processor_path`. For a language model the texts are cut into blocks of max_length
    tokens; else each text is one sample, of at most so many.
    Raises InputError, in one line, for whatever does not fit.
    """
    if has_boxes(model):
        scenes = read_scenes(source, split, model)
        if split == "test":
            pycocotools()  # missing, it is told before the model runs
        if scenes is None:
            return None
        processor = image_processor(processor_path)
        if not hasattr(processor, "post_process_object_detection"):
            kind = type(processor).__name__
            raise InputError(f"{processor_path}: its {kind} makes no boxes; expected the one of {type(model).__name__}")
        return Data(source, scenes, None, image_collate(processor_path, model), batch_size, processor)
    if source == "digits":
        images, labels = digits(split)
        wanted = {"input": model.main_input_name, "channels": getattr(model.config, "num_channels", 3)}
        size = getattr(model.config, "image_size", None)
        if wanted != {"input": "pixel_values", "channels": 1} or size not in (8, [8, 8], (8, 8)):
            raise InputError(f"digits are 8×8 images of one channel; {type(model).__name__} expects {_expects(model)}")
        _check_labels("digits", labels, model)
        return Data("digits", list(images), labels, lambda rows: {"pixel_values": torch.stack(list(rows))}, batch_size)
    if model.main_input_name not in ("input_ids", "pixel_values"):
        raise InputError(f"{type(model).__name__} takes {model.main_input_name}; data of texts or images was expected")
    is_text = model.main_input_name == "input_ids"
    if source == "sentences":
        if not is_text:
            raise InputError(f"sentences are texts; {type(model).__name__} expects {_expects(model)}")
        halves = [(s,) for s in sentences()[split == "test" :: 2]]
        return _texts(source, halves, None, model, processor_path, batch_size, max_length)
    path = Path(source)
    if os.path.isdir(source) and not _split_files(path):
        return _image_folder(path, split, model, processor_path, batch_size)
    table = _table(source, split)
    if table is None:
        return None
    if len(table) == 0:
        raise InputError(f"{source} has no rows; expected at least one sample")
    if is_text:
        column = _pick(source, table.column_names, columns, TEXT_COLUMNS, most=2)
        texts: list[tuple[str, ...]] = list(zip(*(table[c] for c in column), strict=True))
        bad = next((i for i, row in enumerate(texts) if not all(isinstance(t, str) for t in row)), None)
        if bad is not None:
            raise InputError(f"{source}: row {bad} of {', '.join(column)} is {texts[bad]!r}; expected text")
        targets = None if is_language_model(model) else _labels(source, table, label_column, model)
        return _texts(source, texts, targets, model, processor_path, batch_size, max_length)
    (column,) = _pick(source, table.column_names, columns, [(c,) for c in IMAGE_COLUMNS], most=1)
    images = _undecoded(source, table, column)
    collate = image_collate(processor_path, model)
    return Data(source, images, _labels(source, table, label_column, model), collate, batch_size)


def _texts(
    source: str,
    texts: Sequence[tuple[str, ...]],
    labels: Tensor | None,
    model: PreTrainedModel,
    processor_path: str | Path,
    batch_size: int,
    max_length: int,
) -> Data:
    if is_language_model(model):
        tokens = blocks([" ".join(row) for row in texts], processor_path, longest(model, max_length))
        return Data(source, tokens, None, stack_blocks, batch_size)
    return Data(source, texts, labels, text_collate(processor_path, model, max_length), batch_size)


def _expects(model: PreTrainedModel) -> str:
    if model.main_input_name != "pixel_values":
        return "texts" if model.main_input_name == "input_ids" else str(model.main_input_name)
    channels, size = getattr(model.config, "num_channels", 3), getattr(model.config, "image_size", None)
    return f"images of {channels} channel{'s' if channels > 1 else ''}" + (f" and {size} pixels" if size else "")


def _split_files(folder: Path) -> dict[Split, Path]:
    """Files of a folder by the split they are named after."""
    found: dict[Split, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in _READERS:
            stem = file.stem.lower()
            if stem.startswith("train"):
                found.setdefault("train", file)
            elif stem.startswith(("valid", "dev")):
                found["test"] = file
            elif stem.startswith("test"):
                found.setdefault("test", file)  # GLUE's has no labels
    return found


_READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}


def _table(source: str, split: Split) -> Any:
    import datasets

    datasets.disable_progress_bars()
    path = Path(source)
    try:
        if os.path.isfile(source):
            if path.suffix not in _READERS:
                raise InputError(
                    f"{source} is a {path.suffix or 'nameless'} file; expected one of {', '.join(_READERS)}"
                )
            return _read(path) if split == "train" else None
        if os.path.isdir(source):
            file = _split_files(path).get(split)
            return _read(file) if file else None
        if path.suffix in _READERS:
            raise FileNotFoundError("no such file")
        names = ["train"] if split == "train" else ["validation", "validation_matched", "test"]
        where = ("nyu-mll/glue", source.removeprefix("glue/")) if source.startswith("glue/") else (source,)
        available = datasets.get_dataset_split_names(*where)
        name = next((n for n in names if n in available), None)
        return datasets.load_dataset(*where, split=name) if name else None
    except InputError:
        raise
    except Exception as error:  # datasets, pyarrow and huggingface_hub have no common error
        known = f"digits, sentences, a folder, a file with rows ({', '.join(_READERS)}), or a dataset name on the hub"
        raise InputError(f"cannot read data from {source!r}: {first_line(error)}; expected {known}") from error


def _read(path: Path) -> Any:
    import datasets

    return datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train")


def _pick(
    source: str, have: Sequence[str], asked: Sequence[str], known: Sequence[Sequence[str]], most: int
) -> Sequence[str]:
    if len(asked) > most:
        raise InputError(f"{source}: the model takes at most {most} columns of inputs, got {', '.join(asked)}")
    options = [asked] if asked else known
    for option in options:
        if all(c in have for c in option):
            return option
    wanted = " or ".join("+".join(o) for o in options)
    raise InputError(f"{source} has the columns {', '.join(have)}; expected {wanted} (choose with --columns)")


def _undecoded(source: str, table: Any, column: str) -> Any:
    """A column of images as they are stored, so that each is decoded where an error can be told."""
    import datasets

    try:
        return table.cast_column(column, datasets.Image(decode=False))[column]
    except Exception as error:  # pyarrow has many for what it cannot cast
        raise InputError(f"{source}: column {column} holds {table.features[column]}; expected images") from error


def _labels(source: str, table: Any, label_column: str | None, model: PreTrainedModel) -> Tensor | None:
    if label_column and label_column not in table.column_names:
        raise InputError(f"{source} has no column {label_column!r}; it has {', '.join(table.column_names)}")
    column = label_column or next((c for c in LABEL_COLUMNS if c in table.column_names), None)
    if column is None:
        return None
    known = {str(k).lower(): v for k, v in (model.config.label2id or {}).items()}
    values = [known.get(v.lower(), v) if isinstance(v, str) else v for v in table[column]]
    bad = next((i for i, v in enumerate(values) if not isinstance(v, int | float) or math.isnan(v)), None)
    if bad is not None:
        if not (has_classes(model) or is_regression(model)):  # nothing will be compared with them
            return None
        classes = f"a class of the model by number or name: {', '.join(list(known)[:10])}"
        raise InputError(
            f"{source}: row {bad} of {column} is {values[bad]!r}; expected "
            + (classes if has_classes(model) else "a number")
        )
    labels = torch.tensor(values, dtype=torch.float32 if is_regression(model) else None)
    _check_labels(source, labels, model)
    return labels


def _check_labels(source: str, labels: Tensor, model: PreTrainedModel) -> None:
    count = getattr(model.config, "num_labels", 0)
    if not has_classes(model):
        return
    if labels.is_floating_point():
        raise InputError(f"{source}: labels are fractions such as {labels[0]:.3g}, but the model has {count} classes")
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= count):
        raise InputError(
            f"{source}: labels go from {int(labels.min())} to {int(labels.max())}, but the model has {count} classes "
            f"(0 to {count - 1}); is this the data that the model was trained for?"
        )


def has_classes(model: PreTrainedModel) -> bool:
    """Whether the model is a classifier: its outputs are logits of num_labels classes."""
    return type(model).__name__.endswith("Classification") and model.config.num_labels > 1


def check_same_inputs(model: PreTrainedModel, path: str | Path, other: PreTrainedModel, other_path: str | Path) -> None:
    """Raises InputError unless two models read the same tokens or pixels and tell the same classes."""
    if model.main_input_name != other.main_input_name:
        raise InputError(f"{path} reads {model.main_input_name}, {other_path} reads {other.main_input_name}")
    for name in ("vocab_size", "num_channels", "image_size", "num_labels"):
        own, others = getattr(model.config, name, None), getattr(other.config, name, None)
        if own != others:
            raise InputError(f"{path} has {name} {own}, {other_path} has {others}; they must agree")
    if model.main_input_name == "input_ids":
        words, others = (load_tokenizer(p).get_vocab() for p in (path, other_path))
        if words != others:
            word = next(w for w in sorted(words | others) if words.get(w) != others.get(w))
            raise InputError(
                f"{path} and {other_path} have different tokenizers: {word!r} is token {words.get(word)} of one and "
                f"{others.get(word)} of the other"
            )


def is_regression(model: PreTrainedModel) -> bool:
    """Whether the model's output is one number."""
    return type(model).__name__.endswith("SequenceClassification") and model.config.num_labels == 1


def is_language_model(model: PreTrainedModel) -> bool:
    """Whether the model is a decoder that gives logits of the next token."""
    return bool(model.can_generate()) and not model.config.is_encoder_decoder and model.main_input_name == "input_ids"


def _image_folder(
    path: Path, split: Split, model: PreTrainedModel, processor_path: str | Path, batch_size: int
) -> Data | None:
    if model.main_input_name != "pixel_values":
        raise InputError(
            f"{path} holds no table named train, validation or test; {type(model).__name__} needs texts in one of "
            f"{', '.join(_READERS)}"
        )
    parts = {f.name.lower(): f for f in path.iterdir() if f.is_dir()}
    if "train" in parts:  # then the folders are splits, not classes
        found = [parts[name] for name in SPLIT_FOLDERS[split] if name in parts]
        if not found:
            return None
        path = found[0]
    elif split == "test":
        return None
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_TYPES)
    if not files:
        raise InputError(
            f"{path} holds no images ({', '.join(IMAGE_TYPES)}) and no table named train, validation or test; "
            "expected a folder per class"
        )
    classes = sorted({f.parent.name for f in files if f.parent != path})
    labels = None
    if classes and all(f.parent != path for f in files):
        known = {str(k).lower(): v for k, v in (model.config.label2id or {}).items()}
        by_name = all(c.lower() in known for c in classes)
        index = {c: known[c.lower()] if by_name else i for i, c in enumerate(classes)}
        labels = torch.tensor([index[f.parent.name] for f in files])
        _check_labels(str(path), labels, model)
    return Data(str(path), files, labels, image_collate(processor_path, model), batch_size)
