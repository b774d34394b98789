"""The task of a model, read off its class and configuration, and whether two models have the same inputs."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from bittern.data.texts import load_tokenizer
from bittern.errors import InputError


def has_classes(model: PreTrainedModel) -> bool:
    """True if the model is a classifier: its outputs are logits of num_labels classes."""
    return type(model).__name__.endswith("Classification") and model.config.num_labels > 1


def is_regression(model: PreTrainedModel) -> bool:
    """True if the model's output is one number."""
    return type(model).__name__.endswith("SequenceClassification") and model.config.num_labels == 1


def has_boxes(model: PreTrainedModel) -> bool:
    """True if the model is a detector: its outputs are logits and boxes of queries."""
    return type(model).__name__.endswith("ForObjectDetection")


def is_language_model(model: PreTrainedModel) -> bool:
    """True if the model is a decoder that gives logits of the next token."""
    return bool(model.can_generate()) and not model.config.is_encoder_decoder and model.main_input_name == "input_ids"


def expected_inputs(model: PreTrainedModel) -> str:
    """Say what the model reads, for an error."""
    if model.main_input_name != "pixel_values":
        return "texts" if model.main_input_name == "input_ids" else str(model.main_input_name)
    channels, size = getattr(model.config, "num_channels", 3), getattr(model.config, "image_size", None)
    return f"images of {channels} channel{'s' if channels > 1 else ''}" + (f" and {size} pixels" if size else "")


def check_same_inputs(model: PreTrainedModel, path: str | Path, other: PreTrainedModel, other_path: str | Path) -> None:
    """Raise InputError unless two models read the same tokens or pixels and tell the same classes."""
    if model.main_input_name != other.main_input_name:
        raise InputError(f"{path} reads {model.main_input_name}, {other_path} reads {other.main_input_name}")
    for name in ("vocab_size", "num_channels", "image_size", "num_labels"):
        own, others = getattr(model.config, name, None), getattr(other.config, name, None)
        if own != others:
            raise InputError(f"{path} has {name} {own}, {other_path} has {others}; they must agree")
    if model.main_input_name == "input_ids":
        words, others = (load_tokenizer(p).get_vocab() for p in (path, other_path))
        if words != others:
            word = next(w for w in sorted(words | others) if words.get(w) != others.get(w))
            raise InputError(
                f"{path} and {other_path} have different tokenizers: {word!r} is token {words.get(word)} of one and "
                f"{others.get(word)} of the other"
            )
