"""Images as inputs: read from files or table cells, and made into batches by the model's own processor."""

from collections.abc import Iterable, Sequence
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedModel

from bittern.data.detection import Scene
from bittern.data.texts import Collate
from bittern.errors import InputError, need, one_line

MOST_PIXELS = 4096**2


def image_processor(path: str | Path) -> Any:
    """Load the image processor of a model folder."""
    with one_line(InputError, f"{path} has no image processor"):
        processor = AutoImageProcessor.from_pretrained(path)
    for size in map(processor.to_dict().get, ("size", "crop_size", "pad_size")):  # lengths, or numbers of pixels
        numbers = [n for n in size.values() if isinstance(n, int)] if isinstance(size, dict) else []
        if numbers and max(*numbers, prod(numbers) if "height" in size else 0) > MOST_PIXELS:
            raise InputError(f"{path}: its image processor makes images of {size}; expected at most 4096 × 4096 pixels")
    return processor


def image_collate(processor_path: str | Path, model: PreTrainedModel) -> Collate:
    """Return a function that makes batches of images, from their files or table cells."""
    processor, mode = image_processor(processor_path), image_mode(model)

    def collate(rows: Sequence[Any]) -> dict[str, Tensor]:
        images = [read_image(row, mode) for row in rows]
        with one_line(InputError, f"the image processor of {processor_path} refuses the images"):
            return dict(processor(images=images, return_tensors="pt"))

    return collate


def image_mode(model: PreTrainedModel) -> str:
    """Return Pillow's name for images of as many channels as the model takes."""
    return "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"


def bad_images(rows: Iterable[Any], mode: str) -> dict[int, str]:
    """Return what is wrong with images that cannot be read, by row."""
    bad: dict[int, str] = {}
    for i, row in enumerate(rows):
        try:
            read_image(row, mode)
        except InputError as error:
            bad[i] = str(error)
    return bad


def read_image(row: Path | Scene | dict[str, Any] | None, mode: str) -> Any:
    """Read an image from its file, or from a cell of a table that holds its bytes or path. It is turned as its EXIF tag
    says, as by transformers and `datasets`; 16 bits of grey are scaled to 8."""
    Image, ImageOps = need("PIL.Image"), need("PIL.ImageOps")  # noqa: N806
    content = row["bytes"] if isinstance(row, dict) else None
    path: Any = row["path"] if isinstance(row, dict) else row.path if isinstance(row, Scene) else row
    name = path or "a row"
    explained = one_line(InputError, f"{name} is not a readable image")
    with explained, Image.open(BytesIO(content) if content else path) as stored:
        image = ImageOps.exif_transpose(stored)
        if isinstance(row, Scene) and stored.size == (row.width, row.height) != image.size:
            image = stored  # its boxes were drawn on the image as it is stored
        if image.mode.startswith("I;16"):
            image = image.convert("I").point(lambda value: value * (1 / 257))
        elif image.mode == "F" or (image.mode == "I" and image.getextrema()[1] > 255):
            raise ValueError(f"it has pixels of 32 bits (Pillow's mode {image.mode}); save it with 8 or 16")
        image = image.convert(mode)
    if isinstance(row, Scene) and image.size != (row.width, row.height):
        width, height = image.size
        raise InputError(f"{name} has {width}×{height} pixels, but {row.width}×{row.height} in its annotations")
    return image
