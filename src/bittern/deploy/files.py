"""Files: written so that a crash leaves no half of one, read so that damage is told in one line.

`Journal` keeps the finished parts of a long job, so that one that was killed goes on where it was and ends with the
same bits. Its folder holds `job.json`, which says what the job is (model, data, recipe, …), and a safetensors file for
each finished part; a training run keeps its own checkpoints there.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bittern.errors import CheckpointError, InputError, first_line

JOB = "job.json"


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over name, type, shape and bytes of tensors, which come sorted by name."""
    sha = sha256()
    for name, tensor in tensors:
        sha.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


# ---- reading


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError that says what is wrong with the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; expected a folder that save_pretrained wrote"
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, expected a JSON object")
    return data


def open_tensors(file: Path) -> tuple[Any, dict[str, str]]:
    """Open a safetensors file: a handle that reads a tensor when asked to, and the metadata. Raises CheckpointError."""
    try:
        handle: Any = safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file.name} is missing, truncated or damaged: {first_line(error)}") from None
    return handle, handle.metadata() or {}


# ---- writing


@contextmanager
def _telling(where: object) -> Iterator[None]:
    """Make one line of a full disk, or of whatever else forbids to write."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {where}: {getattr(error, 'strerror', None) or first_line(error)}") from error


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A temporary name beside `file` to write to, renamed to it if the block ends well, removed if not."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with _telling(f"to {file.parent}"):
        try:
            yield temporary
            _sync(temporary)
            temporary.rename(file)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(out: str | Path, *, force: bool = False, holds: str = "config.json") -> Iterator[Path]:
    """A new folder under a temporary name beside `out`, renamed to it if the block ends well, removed if not."""
    out = Path(out).absolute()
    check_output(out, force, holds)
    with _telling(f"to {out.parent}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    with _telling(out):
        try:
            yield folder
            for file in folder.rglob("*"):
                if file.is_file():
                    file.chmod(0o644)
                    _sync(file)
            folder.chmod(0o755)
            _replace(out, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _replace(out: Path, folder: Path) -> None:
    """Rename `folder` to `out`; if that fails, what was there before is there again."""
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent)) / out.name
    try:
        if out.exists():
            out.rename(old)
        folder.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(old.parent, ignore_errors=True)


def check_output(out: str | Path, force: bool, holds: str = "config.json") -> None:
    """Refuse an output that exists (unless forced) or cannot be written, before long work starts.

    holds: the file by which an output of ours is known; nothing else is overwritten.
    """
    out = Path(out)
    if os.path.isfile(out):
        raise InputError(f"{out} is a file; give a folder to write to")
    if os.path.exists(out) and any(out.iterdir()):
        if not force:
            raise InputError(f"{out} exists; choose another output or overwrite it with --force")
        if not (out / holds).exists():
            what = "a model" if holds == "config.json" else "a report"
            raise InputError(f"{out} holds something other than {what}; choose another output")
    parent = next(p for p in out.absolute().parents if os.path.exists(p))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"cannot write to {parent}; choose another output")


# ---- long jobs


class Journal:
    """The folder of one job. Raises InputError if it holds another job, naming what differs."""

    def __init__(self, folder: str | Path, job: Mapping[str, Any]):
        self.folder = Path(folder)
        job = json.loads(json.dumps(job))
        with _telling(f"to {folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
        if not any(self.folder.rglob("*.safetensors")):  # nothing is finished that could be lost
            with atomic_file(self.folder / JOB) as file:
                file.write_text(json.dumps(job, indent=1) + "\n")
            return
        if not (self.folder / JOB).exists():
            raise InputError(f"{self.folder} holds files but no {JOB}; delete it or choose another output")
        try:
            known = read_json(self.folder / JOB)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; delete {self.folder} to start anew") from None
        for name in sorted({*job, *known}):
            if known.get(name) != job.get(name):
                raise InputError(
                    f"{folder} holds an unfinished run with another {name} ({_short(known.get(name))}, now "
                    f"{_short(job.get(name))}); finish it with its own options, delete that folder, or choose another "
                    "output"
                )

    def save(self, part: str, tensors: Mapping[str, Tensor], notes: Any) -> None:
        """Keep a finished part: its tensors and whatever JSON can hold."""
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        text = json.dumps(notes)
        with atomic_file(self.folder / f"{part}.safetensors") as file:
            save_file(own, file, {"notes": text, "sha256": _checksum(own, text)})

    def load(self, part: str) -> tuple[dict[str, Tensor], Any] | None:
        """A part as it was saved; None if it is not finished. Raises CheckpointError if it is damaged."""
        path = self.folder / f"{part}.safetensors"
        if not path.exists():
            return None
        try:
            handle, metadata = open_tensors(path)
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            if _checksum(tensors, metadata["notes"]) != metadata["sha256"]:
                raise ValueError("its checksum differs")
            return tensors, json.loads(metadata["notes"])
        except (CheckpointError, SafetensorError, ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete it and run the same command again") from None

    @staticmethod
    def delete(folder: Path) -> None:
        """Remove a job's folder once its result is written elsewhere; job.json last, so that it stays known as one."""
        for file in sorted(folder.iterdir(), key=lambda file: file.name == JOB):
            if file.name == JOB or file.suffix == ".safetensors" or file.name.startswith("."):
                file.unlink()
        if not any(folder.iterdir()):  # else something else lies there, such as TensorBoard's logs
            folder.rmdir()


def _checksum(tensors: Mapping[str, Tensor], notes: str) -> str:
    return sha256((digest(sorted(tensors.items())) + notes).encode()).hexdigest()


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
