"""Tables of samples: files, folders of them and names for `datasets`; their columns of inputs and labels."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bittern.data.tasks import has_classes, is_regression
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
IMAGE_COLUMNS = (("image",), ("img",))
LABEL_COLUMNS = ("label", "labels")
READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}


def split_files(folder: Path) -> dict[Split, Path]:
    """Return files of a folder by the split they are named after."""
    found: dict[Split, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in READERS:
            stem = file.stem.lower()
            if stem.startswith("train"):
                found.setdefault("train", file)
            elif stem.startswith(("valid", "dev")):
                found["test"] = file
            elif stem.startswith("test"):
                found.setdefault("test", file)  # GLUE's has no labels
    return found


def read_table(source: str, split: Split) -> Any:
    """Read a `datasets.Dataset` with at least one row; None if the source has no such split."""
    import datasets

    datasets.disable_progress_bars()
    path = Path(source)
    try:
        if os.path.isfile(source) or os.path.isdir(source):
            if os.path.isfile(source) and path.suffix not in READERS:
                kind = path.suffix or "nameless"
                raise InputError(f"{source} is a {kind} file; expected one of {', '.join(READERS)}")
            files: dict[Split, Path] = {"train": path} if os.path.isfile(source) else split_files(path)
            if (file := files.get(split)) is None:
                return None
            table = datasets.load_dataset(READERS[file.suffix], data_files=str(file), split="train")
        else:
            if path.suffix in READERS:
                raise FileNotFoundError("no such file")
            names = ["train"] if split == "train" else ["validation", "validation_matched", "test"]
            where = ("nyu-mll/glue", source.removeprefix("glue/")) if source.startswith("glue/") else (source,)
            available = datasets.get_dataset_split_names(*where)
            if (name := next((n for n in names if n in available), None)) is None:
                return None
            table = datasets.load_dataset(*where, split=name)
    except InputError:
        raise
    except Exception as error:  # datasets, pyarrow and huggingface_hub have no common error
        known = f"digits, sentences, a folder, a file with rows ({', '.join(READERS)}), or a dataset name on the hub"
        raise InputError(f"cannot read data from {source!r}: {first_line(error)}; expected {known}") from error
    if len(table) == 0:
        raise InputError(f"{source} has no rows; expected at least one sample")
    return table


def pick_columns(
    source: str, table: Any, asked: Sequence[str], known: Sequence[Sequence[str]], most: int
) -> Sequence[str]:
    """Return the columns of inputs: those asked for, else the first of the known ones that are there."""
    have = table.column_names
    if len(asked) > most:
        raise InputError(f"{source}: the model takes at most {most} columns of inputs, got {', '.join(asked)}")
    options = [asked] if asked else known
    if (found := next((option for option in options if set(option) <= set(have)), None)) is not None:
        return found
    wanted = " or ".join("+".join(option) for option in options)
    raise InputError(f"{source} has the columns {', '.join(have)}; expected {wanted} (choose with --columns)")


def read_texts(source: str, table: Any, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Read texts, or pairs of texts, by row."""
    texts: list[tuple[str, ...]] = list(zip(*(table[c] for c in columns), strict=True))
    bad = next((i for i, row in enumerate(texts) if not all(isinstance(t, str) for t in row)), None)
    if bad is not None:
        raise InputError(f"{source}: row {bad} of {', '.join(columns)} is {texts[bad]!r}; expected text")
    return texts


def read_images(source: str, table: Any, column: str) -> Any:
    """Read a column of images as they are stored, so that each is decoded where an error can be told."""
    import datasets

    try:
        return table.cast_column(column, datasets.Image(decode=False))[column]
    except Exception as error:  # pyarrow has many for what it cannot cast
        raise InputError(f"{source}: column {column} holds {table.features[column]}; expected images") from error


def read_labels(source: str, table: Any, label_column: str | None, model: PreTrainedModel) -> Tensor | None:
    """Read labels by names or numbers of the model's classes; None if there are none, or nothing to compare with."""
    if label_column and label_column not in table.column_names:
        raise InputError(f"{source} has no column {label_column!r}; it has {', '.join(table.column_names)}")
    column = label_column or next((c for c in LABEL_COLUMNS if c in table.column_names), None)
    if column is None:
        return None
    known = class_numbers(model)
    values = [known.get(v.lower(), v) if isinstance(v, str) else v for v in table[column]]
    bad = next((i for i, v in enumerate(values) if not isinstance(v, int | float) or math.isnan(v)), None)
    if bad is not None:
        if not (has_classes(model) or is_regression(model)):
            return None
        classes = f"a class of the model by number or name: {', '.join(list(known)[:10])}"
        wanted = classes if has_classes(model) else "a number"
        raise InputError(f"{source}: row {bad} of {column} is {values[bad]!r}; expected {wanted}")
    return check_labels(source, torch.tensor(values, dtype=torch.float32 if is_regression(model) else None), model)


def class_numbers(model: PreTrainedModel) -> dict[str, int]:
    """Return the numbers of the model's classes by their names in lower case."""
    return {str(name).lower(): number for name, number in (model.config.label2id or {}).items()}


def check_labels(source: str, labels: Tensor, model: PreTrainedModel) -> Tensor:
    """Return the labels. Raises InputError unless they are classes of the model, or it has none."""
    count = getattr(model.config, "num_labels", 0)
    if not has_classes(model):
        return labels
    if labels.is_floating_point():
        raise InputError(f"{source}: labels are fractions such as {labels[0]:.3g}, but the model has {count} classes")
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= count):
        raise InputError(
            f"{source}: labels go from {int(labels.min())} to {int(labels.max())}, but the model has {count} classes "
            f"(0 to {count - 1}); is this the data that the model was trained for?"
        )
    return labels
