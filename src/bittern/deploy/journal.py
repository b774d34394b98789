"""Finished parts of a long job on disk, so that a job that was killed goes on where it was and ends with the same bits.

A folder holds `job.json`, which says what the job is (model, data, recipe, …), and a safetensors file for each finished
part; a training run keeps its own checkpoints there. A part is complete or not there: it is written under a temporary
name and renamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bittern.deploy.checksum import digest
from bittern.errors import CheckpointError, InputError

JOB = "job.json"


class Journal:
    """The folder of one job. Raises InputError if it holds another job, naming what differs."""

    def __init__(self, folder: str | Path, job: Mapping[str, Any]):
        self.folder = Path(folder)
        job = json.loads(json.dumps(job))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            known = self._read()
            if known != job and not any(self.folder.rglob("*.safetensors")):
                known = None  # nothing is finished that could be lost
            if known is None:
                self._replace(JOB, lambda path: path.write_text(json.dumps(job, indent=1) + "\n"))
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror}") from error
        for name in () if known is None else sorted({*job, *known}):
            was, now = (known or {}).get(name), job.get(name)
            if was != now:
                raise InputError(
                    f"{folder} holds an unfinished run with another {name} ({_short(was)}, now {_short(now)}); "
                    "finish it with its own options, delete that folder, or choose another output"
                )

    def _read(self) -> dict[str, Any] | None:
        path = self.folder / JOB
        if not path.exists():
            if any(self.folder.rglob("*.safetensors")):
                raise InputError(f"{self.folder} holds files but no {JOB}; delete it or choose another output")
            return None
        try:
            known = json.loads(path.read_text())
            if not isinstance(known, dict):
                raise ValueError("expected an object")
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}; delete {self.folder} to start anew") from None
        return known

    def _replace(self, name: str, write: Any) -> None:
        temporary = self.folder / f".{name}.{os.getpid()}"
        try:
            write(temporary)
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.rename(self.folder / name)
        finally:
            temporary.unlink(missing_ok=True)

    def save(self, part: str, tensors: Mapping[str, Tensor], notes: Any) -> None:
        """Keep a finished part: its tensors and whatever JSON can hold."""
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        text = json.dumps(notes)
        metadata = {"notes": text, "sha256": _checksum(own, text)}
        try:
            self._replace(f"{part}.safetensors", lambda path: save_file(own, path, metadata))
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write to {self.folder}: {error}") from error

    def load(self, part: str) -> tuple[dict[str, Tensor], Any] | None:
        """A part as it was saved; None if it is not finished. Raises CheckpointError if it is damaged."""
        path = self.folder / f"{part}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as handle:
                metadata = handle.metadata() or {}
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            if _checksum(tensors, metadata["notes"]) != metadata["sha256"]:
                raise ValueError("its checksum differs")
            return tensors, json.loads(metadata["notes"])
        except (SafetensorError, ValueError, KeyError, OSError) as error:
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
