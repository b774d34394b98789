"""The task of a model, read off its class and configuration, and whether two models have the same inputs."""

import re
from inspect import signature
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from bittern.data.pooling import read_pooling
from bittern.data.texts import load_tokenizer
from bittern.errors import InputError

Task = Literal["classes", "labels", "number", "boxes", "tags", "answers", "masked", "next", "embedding"]
HEADS: dict[str, Task] = {
    "SequenceClassification": "classes",
    "ImageClassification": "classes",
    "ImageClassificationWithTeacher": "classes",
    "ObjectDetection": "boxes",
    "TokenClassification": "tags",
    "QuestionAnswering": "answers",
    "MaskedLM": "masked",
}
SERVED_TASKS = (
    "classifiers of texts and images, with one label or several, regressions, token classification, question "
    "answering, masked and causal language models, detectors, and encoders without a head"
)


def task_of(model: PreTrainedModel) -> Task | None:
    """Return what the model tells; None if evaluation does not serve it, such as translation or segmentation.

    classes: one of num_labels; labels: each on or off; number: regression; boxes: of objects; tags: of tokens; answers:
    spans of a text; masked, next: words; embedding: hidden states of a model without a head.
    """
    config = model.config
    if model.can_generate() and not config.is_encoder_decoder and model.main_input_name == "input_ids":
        return "next"
    if (head := re.search(r"For([A-Z]\w*)$", type(model).__name__)) is None:
        towers = config.is_encoder_decoder or all(hasattr(config, f"{part}_config") for part in ("text", "vision"))
        return None if towers else "embedding"
    task = HEADS.get(head[1])
    reads = signature(model.forward).parameters
    if (task == "answers" and "start_positions" not in reads) or (task == "boxes" and "input_ids" in reads):
        return None  # answers of images, by classes; boxes of what a text asks for
    if task == "classes":
        if config.problem_type == "multi_label_classification":
            return "labels"
        return "number" if config.num_labels == 1 or config.problem_type == "regression" else "classes"
    return task


def check_served(model: PreTrainedModel) -> None:
    """Raise InputError unless evaluation serves the model."""
    if task_of(model) is None:
        raise InputError(
            f"{type(model).__name__} cannot be evaluated, which serves {SERVED_TASKS}; `bittern quantize` and `bittern "
            "ptq` take data without a validation or test part for it"
        )


def expected_inputs(model: PreTrainedModel) -> str:
    """Say what the model reads, for an error."""
    if model.main_input_name != "pixel_values":
        return "texts" if model.main_input_name == "input_ids" else str(model.main_input_name)
    channels, size = getattr(model.config, "num_channels", 3), getattr(model.config, "image_size", None)
    return f"images of {channels} channel{'s' if channels > 1 else ''}" + (f" and {size} pixels" if size else "")


def check_same_inputs(model: PreTrainedModel, path: str | Path, other: PreTrainedModel, other_path: str | Path) -> None:
    """Raise InputError unless two models read the same tokens or pixels and tell the same classes or embeddings."""
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
            numbers = f"{words.get(word)} of one and {others.get(word)} of the other"
            raise InputError(f"{path} and {other_path} have different tokenizers: {word!r} is token {numbers}")
        if task_of(model) == "embedding" and read_pooling(model) != read_pooling(other):
            raise InputError(f"{path} and {other_path} pool tokens differently; copy modules.json and what it names")
        share_padding(model, other)


def share_padding(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Let another model that reads the same batches pad with the same token, if it has none of its own."""
    if getattr(other.config, "pad_token_id", None) is None:
        other.config.pad_token_id = getattr(model.config, "pad_token_id", None)
