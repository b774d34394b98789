"""Data for a model from tables, image folders, COCO folders, `datasets` names and what scikit-learn brings.

Everything is checked before long work starts: the path, the columns, that there are rows, that labels fit the model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bittern.data.batches import Data
from bittern.data.detection import pycocotools, read_scenes
from bittern.data.images import image_collate, image_processor
from bittern.data.tables import (
    IMAGE_COLUMNS,
    READERS,
    TEXT_COLUMNS,
    Split,
    check_labels,
    class_numbers,
    pick_columns,
    read_images,
    read_labels,
    read_table,
    read_texts,
    split_files,
)
from bittern.data.tasks import expected_inputs, has_boxes, is_language_model
from bittern.data.texts import blocks, longest, sentences, stack_blocks, text_collate
from bittern.errors import InputError

SPLIT_FOLDERS = {"train": ("train",), "test": ("val", "validation", "valid", "dev", "test")}
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@cache
def digits(split: Split) -> tuple[Tensor, Tensor]:
    """Load scikit-learn's handwritten digits: images (n, 1, 8, 8) in [0, 1] and labels; 1,437 to train, 360 to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    x, y = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    return torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y)


def load_splits(
    source: str, model: PreTrainedModel, processor_path: str | Path, **options: Any
) -> tuple[Data | None, Data | None]:
    """Return the train and the test part of a source, None where there is none; options as for `load_data`."""
    train, test = (load_data(source, model, processor_path, split=s, **options) for s in ("train", "test"))
    return train, test


def load_any_split(source: str, model: PreTrainedModel, processor_path: str | Path, **options: Any) -> Data:
    """Return the test part of a source, or the train part if it has no other; options as for `load_data`."""
    for split in ("test", "train"):
        if (found := load_data(source, model, processor_path, split=split, **options)) is not None:
            return found
    raise InputError(f"{source} has no train, validation or test split; give one of its files such a name")


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
    """Return data for `model` from a source; None if the source has no such split.

    source: `digits` or `sentences`, which come with scikit-learn; a .parquet, .csv, .json, .jsonl or .txt file; a
    folder with files named after their split (train, validation, test), or with a folder of images per class, in
    folders of that name if it has splits; for detectors a folder in COCO format (see `read_scenes`); else a name for
    `datasets.load_dataset`, such as `glue/cola`. A source of one part only is its own train split. The tokenizer or
    image processor is read from `processor_path`. For a language model the texts are cut into blocks of max_length
    tokens; else each text is one sample, of at most so many.
    Raises InputError, in one line, for whatever does not fit.
    """
    if has_boxes(model):
        return _scenes(source, split, model, processor_path, batch_size)
    if source == "digits":
        return _digits(split, model, batch_size)
    if model.main_input_name not in ("input_ids", "pixel_values"):
        raise InputError(f"{type(model).__name__} takes {model.main_input_name}; data of texts or images was expected")
    is_text = model.main_input_name == "input_ids"
    labels = None
    if source == "sentences":
        if not is_text:
            raise InputError(f"sentences are texts; {type(model).__name__} expects {expected_inputs(model)}")
        texts: list[tuple[str, ...]] = [(s,) for s in sentences()[split == "test" :: 2]]
    elif os.path.isdir(source) and not split_files(Path(source)):
        return _image_folder(Path(source), split, model, processor_path, batch_size)
    elif (table := read_table(source, split)) is None:
        return None
    elif not is_text:
        (column,) = pick_columns(source, table, columns, IMAGE_COLUMNS, most=1)
        images = read_images(source, table, column)
        collate = image_collate(processor_path, model)
        return Data(source, images, read_labels(source, table, label_column, model), collate, batch_size)
    else:
        texts = read_texts(source, table, pick_columns(source, table, columns, TEXT_COLUMNS, most=2))
        labels = None if is_language_model(model) else read_labels(source, table, label_column, model)
    if is_language_model(model):
        tokens = blocks([" ".join(row) for row in texts], processor_path, longest(model, max_length))
        return Data(source, tokens, None, stack_blocks, batch_size)
    return Data(source, texts, labels, text_collate(processor_path, model, max_length), batch_size)


def _scenes(
    source: str, split: Split, model: PreTrainedModel, processor_path: str | Path, batch_size: int
) -> Data | None:
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


def _digits(split: Split, model: PreTrainedModel, batch_size: int) -> Data:
    size, channels = getattr(model.config, "image_size", None), getattr(model.config, "num_channels", 3)
    if model.main_input_name != "pixel_values" or channels != 1 or size not in (8, [8, 8], (8, 8)):
        expected = f"{type(model).__name__} expects {expected_inputs(model)}"
        raise InputError(f"digits are 8×8 images of one channel; {expected}")
    images, labels = digits(split)
    check_labels("digits", labels, model)
    return Data("digits", list(images), labels, lambda rows: {"pixel_values": torch.stack(list(rows))}, batch_size)


def _image_folder(
    path: Path, split: Split, model: PreTrainedModel, processor_path: str | Path, batch_size: int
) -> Data | None:
    if model.main_input_name != "pixel_values":
        raise InputError(
            f"{path} holds no table named train, validation or test; {type(model).__name__} needs texts in one of "
            f"{', '.join(READERS)}"
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
    labels = None
    if all(f.parent != path for f in files):
        classes, known = sorted({f.parent.name for f in files}), class_numbers(model)
        by_name = all(c.lower() in known for c in classes)
        index = {c: known[c.lower()] if by_name else i for i, c in enumerate(classes)}
        labels = check_labels(str(path), torch.tensor([index[f.parent.name] for f in files]), model)
    return Data(str(path), files, labels, image_collate(processor_path, model), batch_size)
