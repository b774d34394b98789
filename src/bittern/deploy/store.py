"""Folders that hold models: loading with clear errors, saving, and their sizes."""

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from transformers import AutoConfig, PreTrainedModel

from bittern import native
from bittern.deploy import probe
from bittern.deploy.checkpoint import METHOD, BitternConfig, is_packed, mark, open_checked, packed_layers
from bittern.deploy.companions import REPORT, copy_companions, folder_of, source_of, warn_of_missing, write_card
from bittern.deploy.files import atomic_folder, open_tensors, read_json, sort_metadata, tensor_files
from bittern.dry_run import check_merged, check_model
from bittern.errors import CheckpointError, InputError, ModelError, first_line, listed, one_line
from bittern.layers import formats, is_simulated
from bittern.quantizers import FakeQuant


def load(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A float, simulated or packed model from a folder (or a float one from the hub) in float32 and eval mode.

    The class is that of config.json, or its body where sentence-transformers kept no head. Raises InputError (path),
    ModelError (not a Transformer, NaN weights) or CheckpointError (damaged, foreign or newer file), in one line.
    """
    if os.path.isfile(path):
        raise InputError(f"{path} is a file; expected the folder that holds its config.json")
    local = os.path.isdir(path)  # False, and no error, for what cannot be a path
    bounded = _check_folder(Path(path)) if local else nullcontext()
    options = {"trust_remote_code": trust_remote_code, "local_files_only": local or _is_only_cached(str(path))}
    foreign = InputError, f"no such folder: {path}; nor can the hub give it"
    with one_line(*((CheckpointError, f"cannot load {path}") if local else foreign)):
        config = AutoConfig.from_pretrained(path, **options)
        name = (config.architectures or ["AutoModel"])[0]
        classes = [getattr(transformers, name, None) or transformers.AutoModel]
        headed = "For" in name and not hasattr(config, "quantization_config")
        there = folder_of(path, ["modules.json"]) if headed else None
        if there and (there / "modules.json").exists():
            classes.insert(0, transformers.AutoModel)  # as sentence-transformers do, which may keep no head
        options |= {"use_safetensors": True, "output_loading_info": True}
        with bounded:
            for cls in classes:
                found = cls.from_pretrained(path, dtype=torch.float32, **options)
                model, report = found if isinstance(found, tuple) else (found, {})  # a class that is none of a model
                if not report.get("missing_keys") and not report.get("unexpected_keys"):
                    break
    check_model(model)
    missing = sorted(report["missing_keys"])
    if any("pooler" not in name for name in missing):  # which many models do without
        raise CheckpointError(f"{path} holds no weights {listed(missing)}: they would be random; save the model again")
    if missing:
        warnings.warn(f"{path} holds no weights {listed(missing)}: they are random", stacklevel=2)
    return model.eval()


def _is_only_cached(name: str) -> bool:
    """True for a hub name that the cache holds and the hub cannot give. Raises InputError, after one try, if neither
    can: transformers would try five times to find a folder whose name is mistyped."""
    try:
        validate_repo_id(name)  # model, or owner/model
    except HFValidationError:
        raise InputError(f"no such folder: {name}") from None
    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # the hub has no one error
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            why = "it has no such model" if isinstance(error, RepositoryNotFoundError) else first_line(error)
            raise InputError(f"no such folder: {name}; nor can the hub give it: {why}") from error
        return True
    return False


def _check_folder(folder: Path) -> AbstractContextManager[object]:
    """Refuse a folder that holds no model, and one that was written by Bittern and changed since.

    Returns a context to load it in, which bounds the model's size; that of a quantized one is verified, as are its
    tensors when they are loaded (see `BitternQuantizer`).
    """
    if not any(folder.iterdir()):
        raise InputError(f"{folder} is empty; expected a folder with config.json and model.safetensors")
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} holds an adapter; merge it into its model (PEFT's merge_and_unload) and save that")
    if "model_type" not in (config := read_json(folder / "config.json")):
        raise ModelError(f"{folder}/config.json names no model_type; expected a Transformer of transformers")
    if not (files := tensor_files(folder)):
        raise CheckpointError(f"{folder} holds no .safetensors file; Bittern loads nothing else")
    quantization = config.get("quantization_config")
    by_config = isinstance(quantization, dict) and quantization.get("quant_method") == METHOD
    if by_config or any(METHOD in open_tensors(file)[1] for file in files):
        open_checked(files)
        return nullcontext()
    if many := re.search(r'"\w*(layers?|labels)": \d{6,}', json.dumps(config)):  # of which it makes lists
        raise CheckpointError(f"{folder}/config.json asks for {many[0]}")
    return _bounded(8 * sum(file.stat().st_size for file in files) + (64 << 20), folder)


@contextmanager
def _bounded(most: int, folder: Path) -> Iterator[None]:
    """Stop a model that would take more bytes than so many, while transformers builds it without memory."""
    taken, thread = 0, get_ident()

    def add(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal taken
        if tensor is not None and tensor.is_meta and get_ident() == thread:
            taken += tensor.nbytes
            if taken > most:
                raise CheckpointError(f"{folder}/config.json asks for a far larger model than the files beside it hold")

    on_parameter = hooks.register_module_parameter_registration_hook
    with on_parameter(add), hooks.register_module_buffer_registration_hook(add):
        yield


def save(
    model: PreTrainedModel,
    out: str | Path,
    *,
    processors_from: str | Path | None = None,
    report: Mapping[str, Any] | None = None,
    force: bool = False,
    max_shard_size: str = "50GB",
) -> None:
    """Write a float, simulated or packed model to a folder, all of it or nothing, and a model card if it is quantized.

    What else it needs (tokenizer, processors, pooling, generation settings) comes along from `processors_from`, by
    default the folder or hub name that the model was loaded from; a warning says what could not be found.
    report: saved as bittern.json. Raises InputError if `out` exists (unless `force`) or cannot be written.
    """
    check_merged(model)
    source = source_of(model) if processors_from is None else processors_from
    if is_simulated(model) and not is_packed(model):
        mark(model, "simulated")
    with atomic_folder(out, force=force) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        sort_metadata(folder)
        copy_companions(source, folder)
        warn_of_missing(model, source, folder, out)
        if is_simulated(model) or is_packed(model):
            write_card(model, source, folder, report)
        if report is not None:
            (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")


@dataclass(frozen=True)
class Size:
    """file: bytes of all .safetensors; float32: bytes of the same model in float32; bits: per quantized weight, with
    scales; if nothing is quantized 32, or 16 in such files."""

    file: int
    float32: int
    bits: float


def measure(model: PreTrainedModel, folder: str | Path) -> Size:
    """Sizes of a saved model. Packed layers count codes and scales; layers tied to them count once."""
    packed = [layer for layer in packed_layers(model).values() if not layer.owner]
    weights = sum(prod(m.weight_shape) for m in packed)
    file, float32 = sum(f.stat().st_size for f in tensor_files(folder)), 4 * model.num_parameters()
    bits = 8 * sum(m.weight_bytes() for m in packed) / weights if weights else 16.0 if file < 0.75 * float32 else 32.0
    return Size(file, float32, bits)


def float_bytes(model: PreTrainedModel) -> int:
    """Return the size of a float model: of the files it was loaded from, or as float32 if there are none."""
    folder = folder_of(source_of(model))
    files = tensor_files(folder) if folder else []
    return sum(file.stat().st_size for file in files) or 4 * model.num_parameters()


def compare_outputs(model: PreTrainedModel, path: str | Path) -> float:
    """Compare outputs of a model loaded from a folder with those kept in it; return the largest relative difference.

    Raises InputError if none are kept, CheckpointError if an output is another one.
    """
    kept = open_checked(tensor_files(path))[1].get("probe")
    if kept is None or kept["class"] != type(model).__name__:
        why = f"they are of {kept['class']}" if kept else "it is older, or the model takes unusual inputs"
        raise InputError(f"{path} holds no outputs of {type(model).__name__} to compare with: {why}")
    return probe.check(model, kept)


def inspect(path: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """List what a folder holds: model class, sizes, each quantized module with its formats, and what stayed float.

    verify: run the model too, and compare its outputs with those of the model that was saved.
    """
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
    return {
        "model": str(path),
        "architecture": type(model).__name__,
        "state": config.state if config else "float",
        "recipe": config.recipe if config else "",
        "format_version": config.format_version if config else None,
        **asdict(measure(model, path)),
        "tensors": sum(len(open_tensors(file)[0].keys()) for file in tensor_files(path)),
        "kernels": native.engine()[0],
        **({"verified": compare_outputs(model, path)} if verify else {}),
        "modules": modules,
        "kept_float": kept,
    }
