"""Texts as inputs: tokenizers, batches of them, blocks of tokens for language models, and built-in sentences."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from bittern.errors import InputError, first_line

Collate = Callable[[Sequence[Any]], dict[str, Tensor]]


@cache
def sentences() -> list[str]:
    """Return English sentences from the descriptions of scikit-learn's data sets."""
    from importlib.resources import files

    found: list[str] = []
    for file in sorted((files("sklearn") / "datasets" / "descr").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".rst"):
            for paragraph in re.split(r"\n\s*\n", file.read_text(encoding="utf-8")):
                text = re.sub(r"[`*]|:\w+:", "", " ".join(paragraph.split()))
                found += re.findall(r"(?<![\w.])[A-Z][A-Za-z][A-Za-z0-9 ,;:'()\-]{38,260}[a-z)]\.(?=\s|$)", text)
    return list(dict.fromkeys(found))


def load_tokenizer(path: str | Path) -> Any:
    """Load the tokenizer of a model folder. Raises InputError if there is none, where transformers may make up one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more for a missing tokenizer
        raise InputError(f"{path} has no tokenizer: {first_line(error)}") from error
    special = {*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder}
    if len(tokenizer.get_vocab().keys() - special) < 2:
        raise InputError(f"{path} has no tokenizer; expected tokenizer.json or its like beside config.json")
    return tokenizer


def text_collate(processor_path: str | Path, model: PreTrainedModel, max_length: int) -> Collate:
    """Return a function that makes padded batches of texts or pairs of texts, cut to what the model takes."""
    tokenizer, length = load_tokenizer(processor_path), longest(model, max_length)
    length = min(length, tokenizer.model_max_length)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"{processor_path}: its tokenizer has no token to pad with; set pad_token and save it again"
            )
        tokenizer.pad_token = tokenizer.eos_token

    def collate(rows: Sequence[tuple[str, ...]]) -> dict[str, Tensor]:
        texts = [list(part) for part in zip(*rows, strict=True)]
        return dict(tokenizer(*texts, padding=True, truncation=True, max_length=length, return_tensors="pt"))

    return collate


def longest(model: PreTrainedModel, max_length: int) -> int:
    """max_length, or as many tokens as the model has positions for."""
    positions: int = getattr(model.config, "max_position_embeddings", max_length)
    return min(max_length, positions)


def blocks(texts: Sequence[str], processor_path: str | Path, length: int) -> list[Tensor]:
    """Join the texts to one stream of tokens, an end token after each if there is one, in blocks of `length` tokens.

    What is left at the end is dropped, unless it is all there is.
    """
    tokenizer = load_tokenizer(processor_path)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream = torch.tensor([i for ids in tokenizer(list(texts))["input_ids"] for i in [*ids, *end]])
    if len(stream) < 2:
        raise InputError(f"the texts hold {len(stream)} tokens; a language model needs 2 or more")
    return [b for b in stream.split(length) if len(b) == min(length, len(stream))]


def stack_blocks(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Make a batch of blocks of tokens, which have no padding."""
    ids = torch.stack(list(rows))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
