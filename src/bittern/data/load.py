"""Data for a model from tables, image folders, COCO folders, `datasets` names and what scikit-learn brings.

Everything is checked before long work starts: the path, the columns, that there are rows, that labels fit the model.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bittern.data import tables, texts
from bittern.data.batches import Data
from bittern.data.detection import pycocotools, read_scenes
from bittern.data.images import bad_images, image_collate, image_mode, image_processor
from bittern.data.labels import class_names, match_classes
from bittern.data.pooling import read_pooling
from bittern.data.splits import Split, split_files, split_folder, visible_files
from bittern.data.tasks import expected_inputs, task_of
from bittern.data.texts import Collate
from bittern.data.tokens import answer_rows, masked_rows, tag_rows, token_collate
from bittern.errors import InputError, listed, need, one_line
from bittern.options import Reading

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
BLOCK_TOKENS = 512  # tokens of a language model's block, by default


@cache
def digits(split: Split) -> tuple[Tensor, Tensor]:
    """Load scikit-learn's handwritten digits: images (n, 1, 8, 8) in [0, 1] and labels; 1,437 to train, 360 to test."""
    images, labels = need("sklearn.datasets").load_digits(return_X_y=True)
    cut = need("sklearn.model_selection").train_test_split
    x, y = cut(images, labels, test_size=360, stratify=labels, random_state=0)[split == "test" :: 2]
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
    source: str, model: PreTrainedModel, processor_path: str | Path, *, split: Split, **options: Any
) -> Data | None:
    """Return data for `model` from a source; None if the source has no such split.

    source: `digits` or `sentences`, which come with scikit-learn; a table (.parquet, .csv, .tsv, .json, .jsonl, .arrow,
    .txt, also compressed); a folder with files named after their split (see `split_files`), or with a folder of images
    per class, or what `datasets` saved; for detectors a folder in COCO format (see `read_scenes`); else a name for
    `datasets.load_dataset`, such as `glue/cola`. A source of one part only is its own train split. The tokenizer or
    image processor is read from `processor_path`. options: see `bittern.options.Reading`.
    Raises InputError, in one line, for whatever does not fit.
    """
    ask = _Request(source, split, model, processor_path, Reading(**options))
    if task_of(model) == "boxes":
        return _scenes(ask)
    if source == "digits":
        return _digits(ask)
    if model.main_input_name not in ("input_ids", "pixel_values"):
        raise InputError(f"{type(model).__name__} takes {model.main_input_name}; data of texts or images was expected")
    is_text = model.main_input_name == "input_ids"
    if source == "sentences":
        if not is_text:
            raise InputError(f"sentences are texts; {type(model).__name__} expects {expected_inputs(model)}")
        table = need("datasets").Dataset.from_dict({"text": texts.sentences()[split == "test" :: 2]})
        return _texts(ask, table, ("text",))
    if os.path.isdir(source) and not tables.holds_tables(Path(source)):
        if is_text:
            kinds = f"{type(model).__name__} needs texts in one of {', '.join(tables.READERS)}"
            raise InputError(f"{source} holds no table named train, validation or test; {kinds}")
        return _image_folder(ask)
    if (found := tables.read_table(source, split)) is None:
        return None
    (part, table), task, reading = found, task_of(model), ask.reading
    known = {"tags": tables.WORD_COLUMNS, "answers": tables.ANSWER_COLUMNS}.get(str(task), tables.TEXT_COLUMNS)
    known, most = (known, 1 if task == "tags" else 2) if is_text else (tables.IMAGE_COLUMNS, 1)
    columns = tables.pick_columns(source, table, reading.columns, known, most)
    if is_text:
        with one_line(InputError, f"{processor_path}: its tokenizer or config.json cannot be used"):
            data = _texts(ask, table, columns)
    else:
        images, good = _good_images(ask, tables.read_images(source, table, columns[0]))
        data = ask.data(images, tables.read_labels(source, table.select(good), model, reading))
    labelled = task in ("classes", "labels", "number", "tags", "answers")
    labels = tables.label_column(source, table, reading, task) if labelled else None
    others = [column for column in table.column_names if column not in columns]
    if labelled and others and labels is None:
        told = f"{source}: no column of labels was found; there is {listed(others)} (choose with --label-column)"
        warnings.warn(told, stacklevel=2)
    origin = f"{part}: {', '.join(columns)}" + (f", labels of {labels}" if labels and data.has_labels else "")
    return replace(data, origin=origin)


class _Request(NamedTuple):
    """A call of `load_data`."""

    source: str
    split: Split
    model: PreTrainedModel
    processor_path: str | Path
    reading: Reading

    def data(
        self, rows: Sequence[Any], labels: Tensor | None = None, collate: Collate | None = None, processor: Any = None
    ) -> Data:
        """Return these rows as data; by default they are images."""
        collate = collate or image_collate(self.processor_path, self.model)
        size, metric, part = self.reading.batch_size, self.reading.metric, f"{self.split} part"
        return Data(self.source, rows, labels, collate, size, processor, metric, part)


def _texts(ask: _Request, table: Any, columns: Sequence[str]) -> Data:
    task, source, model = str(task_of(ask.model)), ask.source, ask.model
    bad = tables.bad_texts(table, columns, words=task == "tags")
    table = table.select(tables.usable(source, bad, len(table), ask.reading.skip_bad))
    cells: list[tuple[Any, ...]] = list(zip(*(list(table[c]) for c in columns), strict=True))
    words = isinstance(cells[0][0], list)
    tokenizer = texts.padding_tokenizer(ask.processor_path, model, words)
    limit = texts.text_limit(model, tokenizer, ask.reading.max_length)
    if task == "next":
        length = limit if ask.reading.max_length else min(limit, BLOCK_TOKENS)
        return ask.data(texts.blocks([" ".join(row) for row in cells], tokenizer, length), collate=texts.stack_blocks)
    if task == "embedding" and (prompt := read_pooling(model).prompt):
        cells = [(prompt + first, *rest) for first, *rest in cells]
    texts.warn_of_cuts(source, tokenizer, limit, cells, is_split_into_words=words)
    if task not in ("masked", "tags", "answers"):
        labels = tables.read_labels(source, table, model, ask.reading)
        collate = texts.text_collate(tokenizer, limit, both=task == "None" and model.config.is_encoder_decoder)
        return ask.data(cells, labels, collate)
    if task == "masked":
        if tokenizer.mask_token_id is None:
            raise InputError(f"{ask.processor_path}: its tokenizer has no token to mask with; set mask_token")
        rows = masked_rows(cells, tokenizer, limit)
    elif task == "tags":
        tags = tables.read_tags(source, table, columns[0], model, ask.reading) if words else None
        rows = tag_rows([text for (text,) in cells], tags, tokenizer, limit, words)
    else:
        answers = tables.read_answers(source, table, ask.reading) if len(columns) == 2 else None
        rows = answer_rows(cells, answers, tokenizer, limit)
    return ask.data(rows, collate=token_collate(tokenizer))


def _good_images(ask: _Request, images: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """Return images and their numbers, all or those that can be read."""
    bad = bad_images(images, image_mode(ask.model)) if ask.reading.skip_bad else {}
    good = tables.usable(ask.source, bad, len(images), ask.reading.skip_bad)
    return [images[i] for i in good], good


def _scenes(ask: _Request) -> Data | None:
    scenes = read_scenes(ask.source, ask.split, ask.model, ask.reading.labels)
    if ask.split == "test":
        pycocotools()  # missing, it is told before the model runs
    if scenes is None:
        return None
    processor = image_processor(ask.processor_path)
    if not hasattr(processor, "post_process_object_detection"):
        found, wanted = type(processor).__name__, type(ask.model).__name__
        raise InputError(f"{ask.processor_path}: its {found} makes no boxes; expected the one of {wanted}")
    scenes, _ = _good_images(ask, scenes)
    return ask.data(scenes, processor=processor)


def _digits(ask: _Request) -> Data:
    config, task = ask.model.config, task_of(ask.model)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if ask.model.main_input_name != "pixel_values" or channels != 1 or size not in (8, [8, 8], (8, 8)):
        expected = f"{type(ask.model).__name__} expects {expected_inputs(ask.model)}"
        raise InputError(f"digits are 8×8 images of one channel; {expected}")
    images, labels = digits(ask.split)
    if task == "classes":
        names = {i: str(i) for i in range(10)}
        match_classes("digits", names, [*names.values()], ask.model, None)
    found = labels if task == "classes" else labels.float() if task == "number" else None
    return ask.data(list(images), found, lambda rows: {"pixel_values": torch.stack(list(rows))})


def _image_folder(ask: _Request) -> Data | None:
    path = Path(ask.source)
    if not (files := visible_files(path, IMAGE_TYPES)):
        neither = f"no images ({', '.join(IMAGE_TYPES)}) and no table named train, validation or test"
        raise InputError(f"{path} holds {neither}; expected a folder per class")
    roots = {path / file: path / (split_folder(file) or "") for file in files}  # where the folders of classes are
    parts = split_files(path, (file for file in files if split_folder(file))) or {"train": list(roots)}
    others = {file.parts[0] for file in files if len(file.parts) > 1 and not split_folder(file)}
    if others and set(roots.values()) > {path}:
        raise InputError(f"{path} has folders named after splits and others, {listed(sorted(others))}; move these away")
    if ask.split not in parts:
        return None
    rows, _ = _good_images(ask, parts[ask.split])
    if task_of(ask.model) != "classes" or any(file.parent == roots[file] for file in rows):
        return ask.data(rows)
    names = sorted({file.parent.name for part in parts.values() for file in part if file.parent != roots[file]})
    if ask.reading.labels != "order" and all(name.isdigit() and int(name) in class_names(ask.model) for name in names):
        names = []  # they are numbers, of which some may be missing
    used = [file.parent.name for file in rows]
    index = match_classes(ask.source, dict(enumerate(names)), [*dict.fromkeys(used)], ask.model, ask.reading.labels)
    return ask.data(rows, torch.tensor([index[name] for name in used]))
