"""Checksums of a checkpoint: of all its tensors and of its configuration, in the metadata of each safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bittern.errors import CheckpointError, first_line

METHOD = "bittern"
FORMAT_VERSION = 1


def check_version(given: Any, written_by: Any) -> None:
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise CheckpointError(f"config.json: format_version {given!r} is no version; the file is damaged or foreign")
    if given > FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint has format version {given} (written by Bittern {written_by}); this Bittern reads up to "
            f"{FORMAT_VERSION}: pip install -U bittern"
        )


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over name, type, shape and bytes of tensors, which come sorted by name."""
    sha = hashlib.sha256()
    for name, tensor in tensors:
        sha.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def config_digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def verify(files: list[Path]) -> None:
    """Check the checksums of a checkpoint's safetensors files and of config.json beside them.

    Raises CheckpointError naming what is truncated, damaged, foreign or newer.
    """
    checks: dict[str, Any] = {}
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for file in files:
            handle = stack.enter_context(_open(file))
            checks = _read_checks((handle.metadata() or {}).get(METHOD), file)
            tensors |= dict.fromkeys(handle.keys(), handle)
        if digest((name, tensors[name].get_tensor(name)) for name in sorted(tensors)) not in checks["tensors"]:
            raise CheckpointError(
                f"{files[0].parent}: tensors do not match their checksum; the file is damaged or incomplete"
            )
    config = read_json(files[0].parent / "config.json")
    if config_digest(config) != checks["config"]:
        raise CheckpointError(
            f"{files[0].parent}/config.json was changed since the weights were packed; restore it, or load with the "
            "original, change model.config and save again"
        )


def _read_checks(text: str | None, file: Path) -> dict[str, Any]:
    if text is None:
        raise CheckpointError(f"{file.name} has no Bittern checksums; it was not written by Bittern, or is damaged")
    try:
        checks = json.loads(text)
        check_version(checks["format_version"], "a newer version")
        return {"tensors": list(checks["tensors"]), "config": str(checks["config"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{file.name} has damaged checksums") from None


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file, or a CheckpointError."""
    with _open(file) as handle:
        return handle.metadata() or {}


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file.name} is truncated or damaged: {first_line(error)}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a CheckpointError that says what is wrong with it."""
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
