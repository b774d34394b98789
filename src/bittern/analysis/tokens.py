"""Classes of tokens, by which distances are told apart: [CLS], [SEP], punctuation, other; of images CLS and patches."""

import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bittern.data.texts import load_tokenizer

MOST_EXTRA = 16  # tokens of a ViT that are no patches: CLS, distillation, registers


class Kinds(NamedTuple):
    """names: of the classes; of(batch, keys): that of each key (samples, keys), or None if they are no such tokens."""

    names: tuple[str, ...]
    of: Callable[[Mapping[str, Any], int], Tensor | None]


def token_kinds(model: PreTrainedModel, processor_path: str | Path) -> Kinds | None:
    """Return the classes of a model of texts, by the tokenizer of a model folder, or of images; None for others."""
    if model.main_input_name == "input_ids":
        return text_kinds(load_tokenizer(processor_path))
    size = getattr(model.config, "patch_size", None)
    return image_kinds(size) if model.main_input_name == "pixel_values" and isinstance(size, int) else None


def text_kinds(tokenizer: Any) -> Kinds:
    """Return classes by the tokenizer's own special tokens; the first token of a text stands for a missing [CLS]."""
    names = ("[CLS]" if tokenizer.cls_token else "first", "[SEP]", "punctuation", "other")
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    table = torch.tensor([2 if is_punctuation(word or "") else 3 for word in words])
    for kind, token in enumerate((tokenizer.cls_token_id, tokenizer.sep_token_id)):
        if token is not None:
            table[token] = kind

    def of(batch: Mapping[str, Any], keys: int) -> Tensor | None:
        ids: Tensor = batch["input_ids"]
        if ids.shape[1] != keys:
            return None
        kinds = table.to(ids.device)[ids]
        if not tokenizer.cls_token:
            real = batch.get("attention_mask", torch.ones_like(ids))
            kinds = kinds.scatter(1, real.argmax(1, keepdim=True), 0)
        return kinds

    return Kinds(names, of)


def is_punctuation(token: str) -> bool:
    """True if a token, without the marks of its tokenizer, is punctuation or a symbol and nothing else."""
    text = token.removeprefix("##").strip("▁Ġ")
    return bool(text) and all(unicodedata.category(c)[0] in "PS" for c in text)


def image_kinds(patch_size: int) -> Kinds:
    """Return classes of images: the first token that is no patch is CLS, more of them, such as registers, are other."""

    def of(batch: Mapping[str, Any], keys: int) -> Tensor | None:
        height, width = batch["pixel_values"].shape[-2:]
        extra = keys - (height // patch_size) * (width // patch_size)
        if not 0 <= extra <= MOST_EXTRA:
            return None
        kinds = torch.ones(len(batch["pixel_values"]), keys, dtype=torch.long, device=batch["pixel_values"].device)
        kinds[:, :extra] = 2
        kinds[:, : min(extra, 1)] = 0
        return kinds

    return Kinds(("[CLS]", "patches", "other"), of)
