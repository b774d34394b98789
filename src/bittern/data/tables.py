"""Tables of samples: files, folders of them and names for `datasets`; their columns of inputs and labels."""

import atexit
import csv
import glob
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bittern.data.labels import label_numbers
from bittern.data.splits import Split, extension, pick_name, split_files, visible_files
from bittern.data.tasks import task_of
from bittern.errors import InputError, listed, need, one_line
from bittern.options import Labels, Reading

Columns = Sequence[str]  # their names
TEXT_COLUMNS = (
    *(("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("question", "sentence")),
    *(("sentence",), ("text", "text_pair"), ("text1", "text2"), ("text",)),
)
WORD_COLUMNS = (("tokens",), ("words",), *TEXT_COLUMNS)
ANSWER_COLUMNS = (("question", "context"), *TEXT_COLUMNS)
IMAGE_COLUMNS = (("image",), ("img",), ("jpg",), ("png",))
LABEL_COLUMNS = {"tags": ("ner_tags", "tags", "labels", "label"), "answers": ("answers",)}
CSV = {"keep_default_na": False, "na_values": [""], "index_col": False}  # "null" and "None" are words
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", CSV),
    ".tsv": ("csv", CSV | {"sep": "\t", "quoting": 3}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {"encoding": "utf-8-sig"}),
}


def read_table(source: str, split: Split) -> tuple[str, Any] | None:
    """Read a `datasets.Dataset` with at least one row, and what it is called; None if the source has no such split."""
    datasets = need("datasets")
    datasets.disable_progress_bars()
    known = f"digits, sentences, a folder, a file with rows ({', '.join(READERS)}), or a dataset name on the hub"
    with one_line(InputError, f"cannot read data from {source!r}", f"; expected {known}"):
        if os.path.exists(source):
            found = _read_local(Path(source), split)
        elif extension(Path(source)) in READERS:
            raise FileNotFoundError("no such file")
        else:
            where = ("nyu-mll/glue", source.removeprefix("glue/")) if source.startswith("glue/") else (source,)
            name = pick_name(datasets.get_dataset_split_names(*where), split)
            found = None if name is None else (name, datasets.load_dataset(*where, split=name))
    if found is not None and len(found[1]) == 0:
        raise InputError(f"{source} has no rows; expected at least one sample in {found[0]}")
    return found


def holds_tables(folder: Path) -> bool:
    """True for a folder of tables named after splits, or one that `datasets` wrote with save_to_disk."""
    return _is_saved(folder) or bool(split_files(folder, visible_files(folder, READERS)))


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _read_local(path: Path, split: Split) -> tuple[str, Any] | None:
    datasets = need("datasets")
    if path.is_dir() and _is_saved(path):
        saved = datasets.load_from_disk(path)
        parts = saved if isinstance(saved, dict) else {"train": saved}
        return None if (name := pick_name(parts, split)) is None else (name, parts[name])
    if path.is_file() and extension(path) not in READERS:
        raise InputError(f"{path} is a {path.suffix or 'nameless'} file; expected one of {', '.join(READERS)}")
    parts = {"train": [path]} if path.is_file() else split_files(path, visible_files(path, READERS))
    if split not in parts:
        return None
    reader, options = READERS[extension(parts[split][0])]
    files, name = [glob.escape(str(file)) for file in parts[split]], listed([file.name for file in parts[split]], 1)
    if reader == "csv":
        for file in parts[split]:
            _check_fields(file, options)
    given = {"data_files": files, "split": "train", "cache_dir": _cache_folder(), **options}
    try:
        return name, datasets.load_dataset(reader, **given)
    except (ValueError, StopIteration) as error:  # what `datasets` says of a table without rows
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            return name, ()
        raise


def _check_fields(file: Path, options: Mapping[str, Any]) -> None:
    """Raise InputError for a row with more fields than the header, of which pandas drops the last or the first."""
    csv.field_size_limit(2**31 - 1)
    how = {"delimiter": options.get("sep", ","), "quoting": options.get("quoting", csv.QUOTE_MINIMAL)}
    with need("fsspec").open(str(file), "rt", errors="replace", newline="", compression="infer") as text:
        rows = csv.reader(text, **how)
        filled = filter(None, rows)
        header = next(filled, [])
        for i, row in enumerate(filled):
            if any(row[len(header) :]):
                told = f"{file}: row {i} (line {rows.line_num}) has {len(row)} fields, the header {len(header)}"
                raise InputError(f"{told}; quote fields that hold {how['delimiter']!r}, or name all columns")


@cache
def _cache_folder() -> str | None:
    """Return where `datasets` may keep what it reads: None for its own folder, a temporary one if that is read-only."""
    own = Path(need("datasets").config.HF_DATASETS_CACHE)
    try:
        own.mkdir(parents=True, exist_ok=True)
        if os.access(own, os.W_OK):
            return None
    except OSError:  # a home that is not there, as in many containers
        pass
    folder = tempfile.mkdtemp(prefix="bittern-data-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def pick_columns(source: str, table: Any, asked: Columns, known: Sequence[Columns], most: int) -> Columns:
    """Return the columns of inputs: those asked for, else the first of the known ones that are there."""
    have, asked = table.column_names, (asked,) if isinstance(asked, str) else asked
    if len(asked) > most:
        raise InputError(f"{source}: the model takes at most {most} columns of inputs, got {', '.join(asked)}")
    options = [asked] if asked else known
    if (found := next((option for option in options if set(option) <= set(have)), None)) is not None:
        return found
    wanted = " or ".join("+".join(option) for option in options)
    raise InputError(f"{source} has the columns {', '.join(have)}; expected {wanted} (choose with --columns)")


def usable(source: str, bad: Mapping[int, str], count: int, skip_bad: bool) -> list[int]:
    """Return which of `count` rows can be used, all but the bad ones, and warn of these. bad: row → what is wrong.
    Raises InputError for the first bad one unless they may be skipped, or if none is left."""
    if bad and (not skip_bad or len(bad) == count):
        raise InputError(f"{source}: {next(iter(bad.values()))}")
    if bad:
        warnings.warn(f"{source}: skipped {len(bad)} of {count}: {'; '.join(bad.values())}", stacklevel=2)
    return [i for i in range(count) if i not in bad]


def bad_texts(table: Any, columns: Columns, words: bool) -> dict[int, str]:
    """Return what is wrong with rows that hold no text, by row. words: lists of words are texts too."""
    bad: dict[int, str] = {}
    for i, row in enumerate(zip(*(table[c] for c in columns), strict=True)):
        parts = row[0] if words and isinstance(row[0], list) else row
        if not all(isinstance(part, str) for part in parts):
            bad[i] = f"row {i} of {', '.join(columns)} is {row!r}; expected text"
    return bad


def read_images(source: str, table: Any, column: str) -> list[dict[str, Any]]:
    """Read a column of images as they are stored, so that each is decoded where an error can be told. A path is one in
    the folder of the table, or else in the present one."""
    datasets = need("datasets")
    try:
        cells = list(table.cast_column(column, datasets.Image(decode=False))[column])
    except Exception as error:  # pyarrow has many for what it cannot cast
        raise InputError(f"{source}: column {column} holds {table.features[column]}; expected images") from error
    folder = Path(source) if os.path.isdir(source) else Path(source).parent
    for cell in cells:
        if cell and not cell["bytes"] and cell["path"] and (folder / cell["path"]).is_file():
            cell["path"] = str(folder / cell["path"])
    return cells


def label_column(source: str, table: Any, reading: Reading, task: str | None) -> str | None:
    """Return the column of labels: the one asked for, a known one, or the only one whose classes have names."""
    known = LABEL_COLUMNS.get(str(task), ("label", "labels"))
    have, asked = table.column_names, reading.label_column
    if asked and asked not in have:
        raise InputError(f"{source} has no column {asked!r}; it has {', '.join(have)}")
    with_names = [name for name in have if getattr(table.features[name], "names", None)]
    found = [name for name in known if name in have] or (with_names if len(with_names) == 1 else [])
    return asked or next(iter(found), None)


def read_labels(source: str, table: Any, model: PreTrainedModel, reading: Reading) -> Tensor | None:
    """Read labels as the model's loss takes them: classes (n), float32 numbers (n) or (n, outputs), labels on or off
    (n, labels); None if there are none, or nothing to compare with."""
    column = label_column(source, table, reading, task := task_of(model))
    if column is None or task not in ("classes", "labels", "number"):
        return None
    values, feature = list(table[column]), table.features[column]
    if task == "classes":
        return torch.tensor(label_numbers(source, column, feature, values, model, reading.labels))
    if task == "number":
        try:
            found = torch.tensor([[float(x) for x in v] if isinstance(v, list) else float(v) for v in values])
        except (TypeError, ValueError):
            found = torch.tensor(math.nan)
        if not found.isfinite().all():
            raise InputError(f"{source}: {column} holds {values[:3]!r}, …; expected numbers")
        return found
    return _several(source, column, feature, values, model, reading.labels)


def _several(
    source: str, column: str, feature: Any, values: list[Any], model: PreTrainedModel, labels: Labels | None
) -> Tensor:
    """Read lists of labels: names or numbers of those that are on, or 0 and 1 for each class."""
    if (i := next((i for i, v in enumerate(values) if not isinstance(v, list)), None)) is not None:
        raise InputError(f"{source}: row {i} of {column} is {values[i]!r}; expected a list of labels")
    count, inner = model.config.num_labels, getattr(feature, "feature", None)
    if not getattr(inner, "names", None) and all(len(v) == count and set(v) <= {0, 1} for v in values):
        return torch.tensor(values, dtype=torch.float32)
    flat = label_numbers(source, column, inner, [label for row in values for label in row], model, labels)
    rows = [i for i, row in enumerate(values) for _ in row]
    found = torch.zeros(len(values), count)
    found[rows, flat] = 1
    return found


def read_tags(source: str, table: Any, words: str, model: PreTrainedModel, reading: Reading) -> list[list[int]] | None:
    """Read the class of each word in the column of words; None if there are none."""
    if (column := label_column(source, table, reading, "tags")) is None:
        return None
    rows = list(table[column])
    for i, (own, row) in enumerate(zip(table[words], rows, strict=True)):
        if not isinstance(row, list) or len(row) != len(own):
            raise InputError(f"{source}: row {i} of {column} is {row!r}; expected a tag for each of {len(own)} words")
    flat = [tag for row in rows for tag in row]
    numbers = iter(label_numbers(source, column, table.features[column].feature, flat, model, reading.labels))
    return [[next(numbers) for _ in row] for row in rows]


def read_answers(source: str, table: Any, reading: Reading) -> list[Any] | None:
    """Read the right answers, texts and where they start, as in SQuAD; None if there are none."""
    if (column := label_column(source, table, reading, "answers")) is None:
        return None
    values = list(table[column])
    for i, value in enumerate(values):
        lists = [value.get(key) for key in ("text", "answer_start")] if isinstance(value, dict) else [None]
        if None in lists or len({len(part) for part in lists if isinstance(part, list)}) != 1:
            raise InputError(f"{source}: row {i} of {column} is {value!r}; expected text and answer_start, as in SQuAD")
    return values
