"""Files: written so that a crash leaves no half of one, read so that damage is told in one line."""

import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bittern.errors import CheckpointError, InputError, first_line

P = ParamSpec("P")
T = TypeVar("T")
WRITTEN = ".bittern-files.json"  # names and sizes of what a run wrote beside it: nothing else is ever deleted


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
        raise CheckpointError(f"{path.parent} has no {path.name}; expected a folder of save_pretrained") from None
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


def tensor_files(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


# ---- writing


@contextmanager
def telling(where: object) -> Iterator[None]:
    """Make one line of a full disk, or of whatever else forbids to write."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {where}: {getattr(error, 'strerror', None) or first_line(error)}") from error


def sync(path: Path) -> None:
    """Make a file's content last, or the names in a folder, whatever happens to the machine."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sort_metadata(folder: Path) -> None:
    """Sort the metadata of safetensors files, which is written at random: a model then has the same bytes each time."""
    for file in tensor_files(folder):
        with file.open("r+b") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
            metadata = dict(sorted(header.pop("__metadata__", {}).items()))
            text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":"), ensure_ascii=False).encode()
            if len(text) <= length:
                handle.seek(8)
                handle.write(text.ljust(length))


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A temporary name beside `file` to write to, renamed to it if the block ends well, removed if not."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with telling(f"to {file.parent}"):
        try:
            yield temporary
            sync(temporary)
            temporary.rename(file)
            sync(file.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(out: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A new folder under a temporary name beside `out`, renamed to it if the block ends well, removed if not."""
    check_output(out, force)
    with folder_beside(out) as folder:
        yield folder
        sizes = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
        (folder / WRITTEN).write_text(json.dumps(sizes, indent=1) + "\n")
        for name in (*sizes, WRITTEN):
            (folder / name).chmod(0o644)
            sync(folder / name)
        for inner in (*(f for f in folder.rglob("*") if f.is_dir()), folder):
            inner.chmod(0o755)
            sync(inner)
        _replace(Path(out).resolve(), folder.parent)


@contextmanager
def folder_beside(out: str | Path) -> Iterator[Path]:
    """An empty folder beside `out`, removed at the end, and with it what runs that were killed left there."""
    place = Path(out).resolve()  # what a symbolic link names
    with reserved(out), ExitStack() as stack:
        with telling(f"to {place.parent}"):
            place.parent.mkdir(parents=True, exist_ok=True)
            for room in place.parent.glob(f".{glob.escape(place.name)}.bittern-*"):
                with suppress(OSError, ImportError), _hold(room):  # nobody's any more
                    _discard(place, room)
            room = Path(tempfile.mkdtemp(prefix=f".{place.name}.bittern-", dir=place.parent))
            stack.callback(_discard, place, room)
            with suppress(OSError, ImportError):
                stack.enter_context(_hold(room))
            (room / "new").mkdir()
        with telling(out):
            yield room / "new"


def _replace(place: Path, room: Path) -> None:
    if place.exists():
        place.rename(room / "old")
    (room / "new").rename(place)
    sync(place.parent)


def _discard(place: Path, room: Path) -> None:
    """Remove a temporary folder; if there is no output, what was there before is there again."""
    old = room / "old"
    if old.exists() and not place.exists():
        old.rename(place)
    shutil.rmtree(room / "new", ignore_errors=True)
    names = {*_written(old), WRITTEN}
    for path in (*sorted(old.rglob("*"), reverse=True), old, room):
        with suppress(OSError, ValueError):  # what came there since is nobody's to delete; or the room itself is gone
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif str(path.relative_to(old)) in names:
                path.unlink()


def _written(folder: Path) -> dict[str, int]:
    """Return names and sizes of the files that a run of ours wrote to a folder."""
    try:
        return read_json(folder / WRITTEN)
    except CheckpointError:
        return {}


def check_output(out: str | Path, force: bool, *sources: str | Path | None) -> None:
    """Refuse an output that exists (unless forced) or cannot be written, before long work starts.

    Forced, only what runs of ours wrote, and nobody changed since, is overwritten, and never one of the `sources`,
    which are read, nor a folder that holds one.
    """
    out = Path(out)
    folder, work = out.resolve(), Path(f"{out}.work").resolve()
    for source in sources:
        if source and os.path.exists(source) and any(Path(source).resolve().is_relative_to(p) for p in (folder, work)):
            raise InputError(f"{out} would overwrite {source}, which is read; choose another output")
    if os.path.isfile(out):
        raise InputError(f"{out} is a file; give a folder to write to")
    if os.path.exists(out) and any(out.iterdir()):
        if not force:
            raise InputError(f"{out} exists; choose another output or overwrite it with --force")
        sizes = _written(folder)
        for file in sorted(folder.rglob("*")):
            name = str(file.relative_to(folder))
            if name != WRITTEN and (file.is_symlink() or (file.is_file() and file.stat().st_size != sizes.get(name))):
                raise InputError(f"{out} holds {name}, which no run of Bittern wrote; choose another output")
    check_parent(out)


def check_parent(out: Path) -> None:
    """Refuse an output whose folder cannot be written to."""
    parent = next(p for p in out.absolute().parents if os.path.exists(p))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"cannot write to {parent}; choose another output")


_held: ContextVar[frozenset[Path]] = ContextVar("_held", default=frozenset())  # outputs that this run has reserved


@contextmanager
def reserved(out: str | Path) -> Iterator[None]:
    """Hold an output for one run, by a locked file. Raises InputError that names the process, if another one writes to
    it."""
    if (place := Path(out).resolve()) in _held.get():  # by whoever called
        yield
        return
    name = sha256(str(place).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"bittern-{name}.lock"
    with ExitStack() as stack:
        stack.callback(_held.reset, _held.set(_held.get() | {place}))
        try:
            lock = stack.enter_context(path.open("a+"))
            stack.enter_context(_hold(path))
        except BlockingIOError:
            lock.seek(0)
            raise InputError(f"{out} is being written by {lock.read()}; wait, or choose another output") from None
        except (ImportError, OSError):  # Windows; the file of another user: go on without
            pass
        else:
            stack.callback(path.unlink, missing_ok=True)
            lock.truncate(0)
            lock.write(f"process {os.getpid()}, since {time.strftime('%H:%M')}")
            lock.flush()
        yield


def holds_output(job: Callable[P, T]) -> Callable[P, T]:
    """Let a job hold its output, the argument `out`, from its start."""

    @wraps(job)
    def held(*args: P.args, **options: P.kwargs) -> T:
        with reserved(signature(job).bind(*args, **options).arguments["out"]):
            return job(*args, **options)

    return held


def _hold(path: Path) -> ExitStack:
    """Lock a file or folder until what is returned is closed. Raises BlockingIOError if another process has locked it
    or removed it in between, OSError or ImportError where nobody can."""
    import fcntl

    with ExitStack() as stack:
        number = os.open(path, os.O_RDONLY)
        stack.callback(os.close, number)
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(number)):
            raise BlockingIOError
        return stack.pop_all()
