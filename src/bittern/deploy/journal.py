"""Long jobs that were killed go on where they were, and end with the same bits.

A `Journal` is the folder of one job: `job.json`, which says what the job is (model, data, recipe, …), and a safetensors
file for each finished part. A training run keeps its own checkpoints there, which are sealed.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import file_digest, sha256
from operator import attrgetter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bittern.deploy.files import atomic_file, digest, open_tensors, read_json, sync, telling
from bittern.errors import CheckpointError, InputError

JOB = "job.json"
SEAL = "sealed.json"  # checksums of all files of a training run's checkpoint, written last


def seal(folder: Path) -> None:
    """Make the files of a finished folder last, and note their checksums: see `is_sealed`."""
    sums = _sums(folder)
    for path in (*map(folder.joinpath, sums), folder, folder.parent):
        sync(path)
    with atomic_file(folder / SEAL) as file:
        file.write_text(json.dumps(sums, indent=1) + "\n")


def is_sealed(folder: Path) -> bool:
    """True if a folder holds just what it held when it was sealed."""
    try:
        return bool(read_json(folder / SEAL) == _sums(folder))
    except (CheckpointError, OSError):
        return False


def _sums(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SEAL:
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = file_digest(file, "sha256").hexdigest()
    return found


class Journal:
    """The folder of one job. Raises InputError if it holds another job, naming what differs."""

    def __init__(self, folder: str | Path, job: Mapping[str, Any]):
        self.folder = Path(folder)
        self.job = job = json.loads(json.dumps(job, default=attrgetter("__qualname__")))  # functions by their names
        with telling(f"to {folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.check_ours(self.folder)
        for half in self.folder.glob(".*.[0-9]*"):  # of a run that was killed while it wrote
            if half.is_file():
                half.unlink()
        if not any(self.folder.rglob("*.safetensors")):  # nothing is finished that could be lost
            self._write_job()
            return
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

    def _write_job(self) -> None:
        with atomic_file(self.folder / JOB) as file:
            file.write_text(json.dumps(self.job, indent=1) + "\n")

    def save(self, part: str, tensors: Mapping[str, Tensor], notes: Any) -> None:
        """Keep a finished part: its tensors and whatever JSON can hold."""
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        text = json.dumps(notes)
        if self.folder.exists() and not (self.folder / JOB).exists():  # deleted meanwhile, and made anew by a part
            self._write_job()
        with atomic_file(self.folder / f"{part}.safetensors") as file:
            save_file(own, file, {"notes": text, "sha256": _checksum(own, text)})

    def load(self, part: str) -> tuple[dict[str, Tensor], Any] | None:
        """A part as it was saved; None if it is not finished. Raises CheckpointError if it is damaged."""
        if not (path := self.folder / f"{part}.safetensors").exists():
            return None
        try:
            handle, metadata = open_tensors(path)
            tensors = {name: handle.get_tensor(name) for name in sorted(handle.keys())}
            if _checksum(tensors, metadata["notes"]) != metadata["sha256"]:
                raise ValueError("its checksum differs")
            return tensors, json.loads(metadata["notes"])
        except (CheckpointError, SafetensorError, ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete it and run the same command again") from None

    def kept(self, name: str, made_of: Any = None) -> list[Any]:
        """Return what a run before this kept of a part, of the same things: a list of one thing, or nothing."""
        known = self.load(name)
        head, *notes = known[1] if known and isinstance(known[1], list) else [None]
        return notes if head == json.loads(json.dumps(made_of)) else []

    def part(self, name: str, make: Callable[[], Any], made_of: Any = None) -> Any:
        """Return the notes of a part: as a run before this kept them, of the same things, or made and kept now."""
        if not (notes := self.kept(name, made_of)):
            notes = [make()]
            self.save(name, {}, [made_of, *notes])
        return notes[0]

    @staticmethod
    def check_ours(folder: Path) -> None:
        """Refuse a folder of other things than a job, or than one that was killed while it wrote its first file."""
        if any(not f.name.startswith(f".{JOB}.") for f in folder.glob("*")) and not (folder / JOB).exists():
            raise InputError(f"{folder} holds files but no {JOB}; move it away or choose another output")

    @staticmethod
    def delete(folder: Path) -> None:
        """Remove a job's folder once its result is written elsewhere, or dropped. job.json comes last, so that it stays
        known as one, and stays if other things lie there, such as TensorBoard's logs."""
        Journal.check_ours(folder)
        with suppress(FileNotFoundError):  # somebody else deletes it too
            for file in folder.glob("*"):
                if file.name.startswith("checkpoint-") and file.is_dir() and not file.is_symlink():
                    shutil.rmtree(file)
                elif file.suffix == ".safetensors" or file.name.startswith("."):
                    file.unlink()
            if [file.name for file in folder.glob("*")] == [JOB]:
                (folder / JOB).unlink()
                folder.rmdir()


def _checksum(tensors: Mapping[str, Tensor], notes: str) -> str:
    return sha256((digest(sorted(tensors.items())) + notes).encode()).hexdigest()


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
