"""Which files of a folder are its train and its test part, by the hub's rules for names."""

import os
import re
from collections import defaultdict
from collections.abc import Container, Iterable
from itertools import product
from pathlib import Path
from typing import Literal

from bittern.errors import InputError

Split = Literal["train", "test"]
SPLITS: dict[Split, tuple[tuple[str, ...], ...]] = {  # the first that is there; GLUE's and COCO's test has no labels
    "train": (("train", "training"),),
    "test": (("validation", "valid", "dev", "val", "validation_matched"), ("test", "testing", "eval", "evaluation")),
}
EXACT = r"({words})([-._ ]?\d+([-._ ]of[-._ ]\d+)?)?"  # train, train-00000-of-00002, val2017
PART = r"(.*[-._ 0-9])?({words})([-._ 0-9].*)?"  # imdb_train, which counts if nothing is called so exactly
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def extension(path: Path) -> str:
    """Return what kind of file it is, in lower case, without its compression."""
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()


def pick_name(names: Container[str], split: Split) -> str | None:
    """Return the name of a split among those that a data set has; None if it has no such split."""
    return next((word for words in SPLITS[split] for word in words if word in names), None)


def visible_files(folder: Path, kinds: Iterable[str]) -> list[Path]:
    """Return all files of these kinds below a folder, relative to it, in links too; hidden ones and caches are left
    out, and so is a link to a folder that holds it."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        above = {(path := Path(place).resolve()), *path.parents}
        folders[:] = [name for name in folders if Path(place, name).resolve() not in above]
        found += [Path(place, name).relative_to(folder) for name in names if extension(Path(name)) in kinds]
    return [file for file in sorted(found) if not any(part.startswith((".", "__")) for part in file.parts)]


def split_files(folder: Path, files: Iterable[Path]) -> dict[Split, list[Path]]:
    """Return which of the files in a folder are its train and which its test part, shards in order.

    A file, or a folder that it is in, is called train, validation, dev, val or test. Raises InputError if several files
    could be meant, or some shards are missing.
    """
    files, found = list(files), dict[Split, list[Path]]()
    for split, choices in SPLITS.items():
        for words, pattern in product(choices, (EXACT, PART)):
            groups: dict[str, list[Path]] = defaultdict(list)
            for file in files:
                if name := _named(file, "|".join(words), pattern):
                    groups[name].append(folder / file)
            if len(groups) > 1:
                raise InputError(f"{folder} has several {split} parts: {', '.join(sorted(groups))}; keep one of them")
            for name, parts in groups.items():
                shards = re.search(r"of[-._ ](\d+)$", parts[0].name.partition(".")[0])
                if shards and int(shards[1]) != len(parts):
                    raise InputError(f"{folder} has {len(parts)} of {int(shards[1])} files {name}; some are missing")
                found[split] = parts
            if groups:
                break
    return found


def split_folder(file: Path) -> Path | None:
    """Return the outermost folder, of those that a file is in, that is named after a split; None if none is."""
    words = "|".join(word for choices in SPLITS.values() for words in choices for word in words)
    named = (f for f in reversed(file.parents) if re.fullmatch(EXACT.format(words=words), f.name, re.IGNORECASE))
    return next(named, None)


def _named(file: Path, words: str, pattern: str) -> str | None:
    """Return what gives a file its split: a folder, or its own name with # for the number of a shard; or None."""
    if folder := split_folder(file):
        return f"{folder}/" if re.fullmatch(EXACT.format(words=words), folder.name, re.IGNORECASE) else None
    stem = Path(file.stem if file.suffix.lower() in COMPRESSED else file.name).stem
    if not re.fullmatch(pattern.format(words=words), stem, re.IGNORECASE):
        return None
    shards = re.sub(r"\d+([-._ ]of[-._ ]\d+)?$", "#", stem)
    return str(file.with_name(shards + file.name.removeprefix(stem)))
