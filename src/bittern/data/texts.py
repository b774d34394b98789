"""Texts as inputs: tokenizers, batches of them, blocks of tokens for language models, and built-in sentences."""

import random
import re
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from bittern.errors import InputError, one_line

UNLIMITED = 10**9  # a tokenizer that knows no limit says more
Collate = Callable[[Sequence[Any]], dict[str, Tensor]]


@cache
def sentences() -> list[str]:
    """Return English sentences from the descriptions of scikit-learn's data sets."""
    found: list[str] = []
    for file in sorted((files("sklearn") / "datasets" / "descr").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".rst"):
            for paragraph in re.split(r"\n\s*\n", file.read_text(encoding="utf-8")):
                text = re.sub(r"[`*]|:\w+:", "", " ".join(paragraph.split()))
                found += re.findall(r"(?<![\w.])[A-Z][A-Za-z][A-Za-z0-9 ,;:'()\-]{38,260}[a-z)]\.(?=\s|$)", text)
    return list(dict.fromkeys(found))


def load_tokenizer(path: str | Path, **options: Any) -> Any:
    """Load the tokenizer of a model folder. Raises InputError if there is none, where transformers may make up one."""
    with one_line(InputError, f"{path} has no tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    special = {*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder}
    if len(tokenizer.get_vocab().keys() - special) < 2:
        raise InputError(f"{path} has no tokenizer; expected tokenizer.json or its like beside config.json")
    return tokenizer


def padding_tokenizer(path: str | Path, model: PreTrainedModel, words: bool = False) -> Any:
    """Load a tokenizer that can pad, with the end token if it has no other, and tell the model what it pads with.
    words: of texts that are split into words."""
    tokenizer = load_tokenizer(path, **{"add_prefix_space": True} if words else {})
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(f"{path}: its tokenizer has no token to pad with; set pad_token and save it again")
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def text_limit(model: PreTrainedModel, tokenizer: Any, asked: int | None) -> int:
    """Return the most tokens of a text: that asked for, as far as tokenizer and model go; else theirs, or 512."""
    positions = getattr(model.config, "max_position_embeddings", None) or UNLIMITED
    for name, module in model.named_modules():  # RoBERTa counts from the padding token's number on
        if "position" in name and getattr(module, "padding_idx", None) is not None:
            positions = min(positions, module.num_embeddings - module.padding_idx - 1)
    limit: int = min(positions, tokenizer.model_max_length)
    return min(limit, asked or (limit if limit < UNLIMITED else 512))


def text_collate(tokenizer: Any, limit: int, both: bool = False) -> Collate:
    """Return a function that makes padded batches of texts or pairs of texts, cut to `limit` tokens. A text without any
    token becomes one token of padding that the model sees. both: the decoder reads the text too."""

    def collate(rows: Sequence[tuple[str, ...]]) -> dict[str, Tensor]:
        texts = [list(part) for part in zip(*rows, strict=True)]
        found = tokenizer(*texts, truncation=True, max_length=limit)
        for i in (i for i, ids in enumerate(found["input_ids"]) if not ids):
            for name in found:
                found[name][i] = [{"input_ids": tokenizer.pad_token_id, "attention_mask": 1}.get(name, 0)]
        batch = dict(tokenizer.pad(found, return_tensors="pt"))
        return batch | {"decoder_input_ids": batch["input_ids"]} if both else batch

    return collate


def warn_of_cuts(name: str, tokenizer: Any, limit: int, texts: Sequence[Any], **options: Any) -> None:
    """Warn of texts longer than `limit` tokens: how many of all, or of some drawn at random."""
    drawn = random.Random(0).sample(range(len(texts)), min(len(texts), 2000))
    columns = [list(part) for part in zip(*(texts[i] for i in drawn), strict=True)]
    if cut := sum(len(ids) > limit for ids in tokenizer(*columns, verbose=False, **options)["input_ids"]):
        how = "texts" if len(drawn) == len(texts) else "texts drawn at random"
        warnings.warn(f"{name}: {cut} of {len(drawn)} {how} were cut at {limit} tokens (--max-length)", stacklevel=2)


def blocks(texts: Sequence[str], tokenizer: Any, length: int) -> list[Tensor]:
    """Join the texts to one stream of tokens, an end token after each if there is one, in blocks of `length` tokens.
    What is left at the end is dropped, unless it is all there is."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream = torch.tensor([i for ids in tokenizer(list(texts))["input_ids"] for i in [*ids, *end]])
    if len(stream) < 2:
        raise InputError(f"the texts hold {len(stream)} tokens; a language model needs 2 or more")
    return [b for b in stream.split(length) if len(b) == min(length, len(stream))]


def stack_blocks(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Make a batch of blocks of tokens, which have no padding."""
    ids = torch.stack(list(rows))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
