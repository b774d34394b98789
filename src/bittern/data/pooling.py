"""One vector of a text's hidden states, made as the model's own folder says, in the files of sentence-transformers."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from bittern.errors import InputError

WAYS = ("cls", "max", "mean", "lasttoken")  # in the order in which several are concatenated


class Pooling(NamedTuple):
    """A way to make an embedding: ways that are concatenated, folders of dense layers after them, whether its length is
    1 then. prompt: stands before each text."""

    ways: tuple[str, ...] = ("mean",)
    dense: tuple[str, ...] = ()
    normalize: bool = True
    prompt: str = ""


def read_pooling(model: PreTrainedModel) -> Pooling:
    """Read how the folder of a model pools, by default the mean, normalised. Raises InputError for what is unknown."""
    if (modules := _read(model, "modules.json")) is None:
        return Pooling()
    kinds = {module["path"]: module["type"].rpartition(".")[2] for module in modules}
    ways: set[str] = set()
    for folder in (path for path, kind in kinds.items() if kind == "Pooling"):
        settings = _read(model, f"{folder}/config.json") or {}
        on = [f"{key}_{value}" for key, value in settings.items() if key == "pooling_mode"]
        on = on or [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
        ways = {re.sub("^pooling_mode_|_tokens?$", "", key) for key in on}
    if unknown := ({*kinds.values()} - {"Transformer", "Pooling", "Dense", "Normalize", "Dropout"}) | (ways - {*WAYS}):
        raise InputError(f"{model.name_or_path} makes embeddings by {', '.join(sorted(unknown))}, which is not served")
    own = _read(model, "config_sentence_transformers.json") or {}
    return Pooling(
        tuple(way for way in WAYS if way in ways) or ("mean",),
        tuple(path for path, kind in kinds.items() if kind == "Dense"),
        "Normalize" in kinds.values() or own.get("similarity_fn_name") != "dot",
        (own.get("prompts") or {}).get(own.get("default_prompt_name"), ""),
    )


def embed(model: PreTrainedModel, hidden: Tensor, mask: Tensor) -> Tensor:
    """Pool hidden states (batch, tokens, width) over what the mask (batch, tokens) does not cover: (batch, width)."""
    pooling, real = read_pooling(model), mask.unsqueeze(-1)  # (batch, tokens, 1)
    rows, places = torch.arange(len(hidden), device=hidden.device), torch.arange(mask.shape[1], device=hidden.device)
    made = {
        "cls": lambda: hidden[rows, mask.argmax(1)],
        "max": lambda: hidden.masked_fill(real == 0, -torch.inf).amax(1),
        "mean": lambda: (hidden * real).sum(1) / real.sum(1),
        "lasttoken": lambda: hidden[rows, (mask * places).argmax(1)],
    }
    pooled = torch.cat([made[way]() for way in pooling.ways], -1)  # (batch, ways · width)
    for folder in pooling.dense:
        layer, settings = load_file(_find(model, f"{folder}/model.safetensors")), _read(model, f"{folder}/config.json")
        pooled = F.linear(pooled, layer["linear.weight"].to(pooled), layer.get("linear.bias"))
        pooled = getattr(nn, settings["activation_function"].rpartition(".")[2])()(pooled)
    return F.normalize(pooled, dim=-1) if pooling.normalize else pooled


def _find(model: PreTrainedModel, name: str) -> Any:
    """Return the path of a file beside the model's own, in its folder or on the hub; None if there is none."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(model.name_or_path, name, **quiet) if model.name_or_path else None


def _read(model: PreTrainedModel, name: str) -> Any:
    file = _find(model, name)
    try:
        return file and json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}") from error
