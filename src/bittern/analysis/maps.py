"""Attention maps of a few samples, teacher and students side by side, small enough to be shown in a page."""

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bittern.analysis.compare import numbers, output_point
from bittern.analysis.pair import Pair
from bittern.anatomy import Batch
from bittern.attention import Point, Taps
from bittern.data import Data
from bittern.data.texts import load_tokenizer
from bittern.errors import need

SAMPLES, TOKENS, BYTES = 6, 40, 3_000_000  # shown at most: samples, tokens of a text, bytes of maps in a report


@torch.no_grad()
def shown_samples(
    pairs: Sequence[Pair], data: Data, processor_path: str | Path, order: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Maps of a few samples of `data`, by preference in the given order of rows.

    Of each: its `text` and `tokens`, or its `image` (a data URI) and the `grid` of its patches; `maps` of the teacher
    and the students, codes of round(255·√p) in base64 of (attention modules, heads, queries, keys), whose `shape` is
    given; for images the queries are the first token and the mean of all. `extremes`: per token smallest and largest
    hidden unit of Y, by attention module (texts only). Empty where maps are not between tokens of one sequence.
    """
    model, size, point = pairs[0].teacher, 0, output_point(pairs[0].anatomy)
    found: list[dict[str, Any]] = []
    tokenizer = load_tokenizer(processor_path) if model.main_input_name == "input_ids" else None
    rows = range(len(data)) if order is None else order
    if tokenizer:
        lengths = {i: data.collate([data.rows[i]])["input_ids"].shape[1] for i in rows[: 4 * SAMPLES]}
        rows = [i for i, length in lengths.items() if length <= TOKENS] or rows
    for i in rows[:SAMPLES]:
        batch = {k: v.to(model.device) for k, v in data.collate([data.rows[i]]).items()}
        both = [pair.record(batch, "map", point) for pair in pairs]
        taps = [both[0][1], *(own for own, _ in both)]
        shapes = {x.shape for tap in taps for x in tap["map"]}
        if len(shapes) > 1 or any(shape[0] > 1 or shape[2] != shape[3] for shape in shapes):
            break
        maps = [torch.cat(tap["map"]) for tap in taps]
        sample = _text(taps, maps, point, batch, tokenizer) if tokenizer else _image(maps, batch, model)
        if sample is None:
            break
        size += sum(len(text) for text in sample["maps"])
        if found and size > BYTES:
            break
        found.append(sample | {"predictions": _predictions([model, *(p.student for p in pairs)], batch)})
    return found


def _text(taps: Sequence[Taps], maps: Sequence[Tensor], point: Point, batch: Batch, tokenizer: Any) -> dict[str, Any]:
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())[:TOKENS]
    maps = [m[..., : len(tokens), : len(tokens)] for m in maps]
    return {
        "text": tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True),
        "tokens": [t.replace("Ġ", "·").replace("▁", "·") for t in tokens],
        "shape": list(maps[0].shape),
        "maps": [_encoded(m) for m in maps],
        "extremes": [[[numbers(x[0, : len(tokens)]) for x in y.aminmax(dim=-1)] for y in tap[point]] for tap in taps],
    }


def _image(maps: Sequence[Tensor], batch: Batch, model: PreTrainedModel) -> dict[str, Any] | None:
    if not isinstance(size := getattr(model.config, "patch_size", None), int):
        return None
    height, width = (side // size for side in batch["pixel_values"].shape[-2:])
    extra = maps[0].shape[-1] - height * width
    if not 0 <= extra < maps[0].shape[-1]:
        return None
    queries = [torch.stack([m[:, :, 0], m.mean(2)] if extra else [m.mean(2)], 2)[..., extra:] for m in maps]
    return {
        "image": _data_uri(batch["pixel_values"][0]),
        "grid": [height, width],
        "shape": list(queries[0].shape),
        "queries": ["from [CLS]", "mean of all tokens"][-queries[0].shape[2] :],
        "maps": [_encoded(m) for m in queries],
    }


def _encoded(maps: Tensor) -> str:
    codes = (maps.float().clamp(0, 1).sqrt() * 255).round().to(torch.uint8)
    return base64.b64encode(codes.cpu().contiguous().numpy().tobytes()).decode()


def _data_uri(pixels: Tensor) -> str:
    """A picture of normalised pixels (channels, height, width), its own darkest and lightest as black and white."""
    pixels = pixels.float().cpu()
    pixels = (pixels - pixels.amin()) / (pixels.amax() - pixels.amin()).clamp(min=1e-12)
    array = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = need("PIL.Image").fromarray(array[..., 0] if array.shape[-1] == 1 else array[..., :3])
    image.thumbnail((224, 224))
    file = BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _predictions(models: Sequence[PreTrainedModel], batch: Batch) -> list[str]:
    """Return what each model says of a sample, if it is a classifier: the class and its probability."""
    found = []
    for model in models:
        if (logits := model(**batch).get("logits")) is None or logits.dim() != 2 or logits.shape[1] < 2:
            return []
        probability, label = logits[0].softmax(-1).max(-1)
        name = (model.config.id2label or {}).get(int(label), int(label))
        found.append(f"{name} ({float(probability):.0%})")
    return found
