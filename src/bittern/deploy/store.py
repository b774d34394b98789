"""Folders that hold models: loading with clear errors, saving, and their sizes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel

from bittern import native
from bittern.data.texts import load_tokenizer
from bittern.deploy.checkpoint import (
    METHOD,
    BitternConfig,
    is_packed,
    mark,
    open_checked,
)
from bittern.deploy.files import atomic_folder, open_tensors, read_json
from bittern.deploy.packed import PackedLayer
from bittern.dry_run import check_model
from bittern.errors import BitternError, CheckpointError, InputError, ModelError, first_line
from bittern.layers import formats, is_simulated
from bittern.quantizers import FakeQuant

REPORT = "bittern.json"


def load(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A float, simulated or packed model from a folder (or a float one from the hub) in float32 and eval mode.

    The class is the one named in config.json. Raises InputError (path), ModelError (not a Transformer, NaN weights) or
    CheckpointError (damaged, foreign or newer file), in one line.
    """
    if os.path.isfile(path):
        raise InputError(f"{path} is a file; expected the folder that holds its config.json")
    local = os.path.isdir(path)  # False, and no error, for what cannot be a path
    if local:
        _check_folder(Path(path))
    elif not re.fullmatch(r"[^/.~][^/]*/[^/]+", str(path)):  # a name of the hub: owner/model
        raise InputError(f"no such folder: {path}")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        name = (config.architectures or ["AutoModel"])[0]
        cls = getattr(transformers, name, None) or transformers.AutoModel
        model = cls.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except BitternError:
        raise
    except Exception as error:  # transformers and safetensors raise whatever their parsers meet
        if local:
            raise CheckpointError(f"cannot load {path}: {first_line(error)}") from error
        raise InputError(f"no such folder: {path}; nor can the hub give it: {first_line(error)}") from error
    check_model(model)
    model.eval()
    return model


def _check_folder(folder: Path) -> None:
    """Refuse a folder that holds no model, and one that was written by Bittern and changed since.

    The tensors of a quantized model are verified when they are loaded; see `BitternQuantizer`.
    """
    if not any(folder.iterdir()):
        raise InputError(f"{folder} is empty; expected a folder with config.json and model.safetensors")
    config = read_json(folder / "config.json")
    if "model_type" not in config:
        raise ModelError(f"{folder}/config.json names no model_type; expected a Transformer of transformers")
    files = tensor_files(folder)
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors file; Bittern loads nothing else")
    quantization = config.get("quantization_config")
    by_config = isinstance(quantization, dict) and quantization.get("quant_method") == METHOD
    if by_config or any(METHOD in open_tensors(file)[1] for file in files):
        open_checked(files)


def tensor_files(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def save(
    model: PreTrainedModel,
    out: str | Path,
    *,
    processors_from: str | Path | None = None,
    report: Mapping[str, Any] | None = None,
    force: bool = False,
    max_shard_size: str = "50GB",
) -> None:
    """Write a float, simulated or packed model to a folder, all of it or nothing.

    processors_from: a model folder whose tokenizer and image processor are kept beside. report: saved as bittern.json.
    Raises InputError if `out` exists (unless `force`) or cannot be written.
    """
    if is_simulated(model) and not is_packed(model):
        mark(model, "simulated")
    with atomic_folder(out, force=force) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        for file in tensor_files(folder):
            _order_metadata(file)
        if processors_from is not None:
            copy_processors(processors_from, folder)
        if report is not None:
            (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")


def _order_metadata(file: Path) -> None:
    """Sort the metadata in the header of a safetensors file, which safetensors writes in random order: the same model
    gives the same bytes."""
    with file.open("r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        metadata = dict(sorted(header.pop("__metadata__", {}).items()))
        text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            handle.seek(8)
            handle.write(text.ljust(length))


def copy_processors(source: str | Path, folder: Path) -> None:
    """Write the tokenizer and the image processor of a model folder, if it has them, to another folder."""
    for read in (load_tokenizer, AutoImageProcessor.from_pretrained):
        try:
            read(source).save_pretrained(folder)
        except Exception:  # a text model has no image processor and says so in many ways
            continue


@dataclass(frozen=True)
class Size:
    """file: bytes of all .safetensors; float32: bytes of the same model in float32; bits: per quantized weight, with
    scales, 32 if nothing is quantized."""

    file: int
    float32: int
    bits: float


def measure(model: PreTrainedModel, folder: str | Path) -> Size:
    """Sizes of a saved model. Packed layers count codes and scales; layers tied to them count once."""
    packed = [m for m in model.modules() if isinstance(m, PackedLayer) and not m.owner]
    weights = sum(prod(m.weight_shape) for m in packed)
    file = sum(f.stat().st_size for f in tensor_files(folder))
    bits = 8 * sum(m.weight_bytes() for m in packed) / weights if weights else 32.0
    return Size(file, 4 * model.num_parameters(), bits)


def inspect(path: str | Path) -> dict[str, Any]:
    """List what a folder holds: model class, sizes, each quantized module with its formats, and what stayed float."""
    model = load(path)
    quantized = formats(model)
    modules = [
        {"name": name, **{field: str(fmt) for field, fmt in rule.formats.items()}} for name, rule in quantized.items()
    ]
    kept = [
        {"name": name, "type": type(m).__name__, "parameters": sum(p.numel() for p in m.parameters(recurse=False))}
        for name, m in model.named_modules()
        if name not in quantized and not isinstance(m, FakeQuant) and any(True for _ in m.parameters(recurse=False))
    ]
    config: BitternConfig | None = getattr(model.config, "quantization_config", None)
    size = measure(model, path)
    return {
        "path": str(path),
        "model": type(model).__name__,
        "state": config.state if config else "float",
        "recipe": config.recipe if config else "",
        "format_version": config.format_version if config else None,
        **asdict(size),
        "tensors": sum(len(open_tensors(file)[0].keys()) for file in tensor_files(path)),
        "kernels": native.engine()[0],
        "modules": modules,
        "kept_float": kept,
    }
