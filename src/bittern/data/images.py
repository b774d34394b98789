"""Images as inputs: read from files or table cells, and made into batches by the model's own processor."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedModel

from bittern.data.detection import Scene
from bittern.data.texts import Collate
from bittern.errors import InputError, first_line


def image_processor(path: str | Path) -> Any:
    """Load the image processor of a model folder."""
    try:
        return AutoImageProcessor.from_pretrained(path)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more
        raise InputError(f"{path} has no image processor: {first_line(error)}") from error


def image_collate(processor_path: str | Path, model: PreTrainedModel) -> Collate:
    """Return a function that makes batches of images, from their files or table cells."""
    processor = image_processor(processor_path)
    mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"

    def collate(rows: Sequence[Any]) -> dict[str, Tensor]:
        images = [read_image(row, mode) for row in rows]
        try:
            return dict(processor(images=images, return_tensors="pt"))
        except Exception as error:  # sizes or channels that do not fit
            raise InputError(
                f"the image processor of {processor_path} refuses the images: {first_line(error)}"
            ) from error

    return collate


def read_image(row: Path | Scene | dict[str, Any], mode: str) -> Any:
    """Read an image from its file, or from a cell of a table that holds its bytes or path."""
    from PIL import Image

    if isinstance(row, Scene):
        image = read_image(row.path, mode)
        if image.size != (row.width, row.height):
            width, height = image.size
            raise InputError(f"{row.path} has {width}×{height} pixels, but {row.width}×{row.height} in its annotations")
        return image
    name: Any = row["path"] or "a row" if isinstance(row, dict) else row
    try:
        with Image.open(BytesIO(row["bytes"]) if isinstance(row, dict) and row["bytes"] else name) as image:
            return image.convert(mode)
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError and more
        raise InputError(f"{name} is not a readable image: {first_line(error)}") from error
