"""Object detection: images with boxes in COCO's format, checked before use, and COCO's mean average precision."""

import io
import json
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from bittern.data.labels import match_classes
from bittern.data.splits import Split, split_files
from bittern.errors import InputError, first_line, need
from bittern.options import Labels

RECALLS = np.linspace(0, 1, 101)  # at which COCO looks up the precision
FOUND = ("scores", "labels", "boxes")
LAYOUT = "train/ and val/, each with images and an annotations .json, or annotations/instances_{train,val}*.json"


class Box(NamedTuple):
    """An object: the model's label, its left upper corner and size in pixels; crowd if it stands for several."""

    label: int
    x: float
    y: float
    width: float
    height: float
    crowd: bool


class Scene(NamedTuple):
    """An image file, its size in pixels, and its objects."""

    path: Path
    height: int
    width: int
    boxes: tuple[Box, ...]


def read_scenes(source: str, split: Split, model: PreTrainedModel, labels: Labels | None = None) -> list[Scene] | None:
    """Read all scenes of a split of a folder in COCO's format; None if it has the other split only.

    Categories are the model's classes by name, or by id if the model has no names (see `match_classes`). Raises
    InputError for a missing or unknown image, a box that is none, and a category that is no class of the model.
    """
    if not (found := split_files(Path(source), _annotation_files(Path(source)))):
        raise InputError(f"{source} is no folder in COCO format; {type(model).__name__} needs {LAYOUT}")
    if split not in found:
        return None
    file, *more = found[split]
    if more:
        raise InputError(f"{file.parent} holds {1 + len(more)} .json files; expected one of annotations")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        images, annotations, categories = (list(content[key]) for key in ("images", "annotations", "categories"))
        sizes = {str(i["id"]): (str(i["file_name"]), int(i["height"]), int(i["width"])) for i in images}
        names = {int(c["id"]): str(c["name"]) for c in categories}
        raw = [
            (str(a["image_id"]), int(a["category_id"]), list(a["bbox"]), bool(a.get("iscrowd"))) for a in annotations
        ]
    except KeyError as missing:
        raise InputError(f"{file} is not in COCO format: an entry has no {missing}") from missing
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:  # no JSON, or of another structure
        raise InputError(f"{file} is not in COCO format: {first_line(error)}") from error
    if not raw or len(sizes) < len(images):
        what = "several images of the same id; expected one" if raw else "no annotations; expected boxes of objects"
        raise InputError(f"{file} has {what}")
    if (unknown := next((category for _, category, _, _ in raw if category not in names), None)) is not None:
        raise InputError(f"{file}: annotations are of category {unknown}, which is not among its categories")
    used = list(dict.fromkeys(names[category] for _, category, _, _ in raw))
    numbers = match_classes(str(file), names, used, model, labels)
    boxes: dict[str, list[Box]] = {image: [] for image in sizes}
    for annotation, (image, category, box, crowd) in zip(annotations, raw, strict=True):
        where = f"{file}: annotation {annotation.get('id', '')} ".replace("  ", " ")
        if image not in boxes:
            raise InputError(f"{where}is of image {image}, which is not among the {len(sizes)} images of the file")
        if len(box) != 4 or not all(isinstance(x, int | float) and math.isfinite(x) for x in box) or min(box[2:]) < 0:
            raise InputError(f"{where}has the bbox {box}; expected x, y, width, height in pixels")
        x, y, width, height = box
        boxes[image].append(Box(numbers[names[category]], x, y, width, height, crowd))
    first, _, _ = next(iter(sizes.values()))
    folders = _image_folders(Path(source), file)
    folder = next((f for f in folders if (f / first).is_file()), folders[0])
    scenes = [Scene(folder / name, h, w, tuple(boxes[image])) for image, (name, h, w) in sizes.items()]
    if (bad := next((s for s in scenes if min(s.height, s.width) < 1 or not s.path.is_file()), None)) is not None:
        what = "is missing" if bad.height > 0 < bad.width else f"has the size {bad.width}×{bad.height}"
        raise InputError(f"{file}: image {bad.path} {what}")
    return scenes


def _annotation_files(folder: Path) -> list[Path]:
    """Find what may be annotations, relative to the folder."""
    found = {file for layout in ("*/*.json", "*/annotations/*.json") for file in folder.glob(layout)}
    files = sorted(file.relative_to(folder) for file in found)
    return [file for file in files if file.parts[0] != "annotations" or file.name.startswith("instances_")]


def _image_folders(folder: Path, file: Path) -> list[Path]:
    """Return the folders that the images of an annotation file may be in."""
    if file.parent != folder / "annotations":
        part = file.parent.parent if file.parent.name == "annotations" else file.parent
        return [part, part / "images"]
    name = file.stem.removeprefix("instances_")
    parts = [name, f"images/{name}", name.rstrip("0123456789"), "images", "."]  # val2017, then val
    return [folder / part for part in parts]


class Matches(NamedTuple):
    """Guesses of one class, by falling score: the scene of each (guesses,), whether it is right or wrong at each IoU
    (10, guesses), neither in a crowd. objects: how many there are to be found in each scene (scenes,)."""

    scene: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    objects: np.ndarray


def match_boxes(scenes: Sequence[Scene], found: Sequence[dict[str, Any]]) -> list[Matches]:
    """Match what was found to the objects of each scene, for each of their classes, by pycocotools.

    found: for each scene scores (n,), labels (n,) and boxes (n, 4) as x0, y0, x1, y1 in pixels, as
    `post_process_object_detection` gives them.
    """
    coco, evaluation = pycocotools()
    truth = coco()
    boxes = [(i, box) for i, scene in enumerate(scenes) for box in scene.boxes]
    truth.dataset = {
        "images": [{"id": i} for i in range(len(scenes))],
        "categories": [{"id": label} for label in sorted({box.label for _, box in boxes})],
        "annotations": [
            {"id": n, "image_id": i, "category_id": box.label, "bbox": list(box[1:5]), "iscrowd": int(box.crowd)}
            | {"area": box.width * box.height}
            for n, (i, box) in enumerate(boxes, 1)  # an id of 0 would be no match
        ],
    }
    guesses = [
        {"image_id": i, "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for i, one in enumerate(found)
        for score, label, (x0, y0, x1, y1) in zip(*(one[key].tolist() for key in FOUND), strict=True)
    ]
    with redirect_stdout(io.StringIO()):  # both classes print
        truth.createIndex()
        run = evaluation(truth, truth.loadRes(guesses) if guesses else coco(), "bbox")  # loadRes asks the first guess
        run.params.areaRng, run.params.maxDets = run.params.areaRng[:1], [100]  # of all sizes
        run.evaluate()
    matches, count = [], len(scenes)
    for start in range(0, len(run.evalImgs), count):  # of a class, what each scene holds; None where there is nothing
        held = {i: one for i, one in enumerate(run.evalImgs[start : start + count]) if one is not None}
        scores, hit, ignored = (
            np.concatenate([np.array(one[key]) for one in held.values()], -1)
            for key in ("dtScores", "dtMatches", "dtIgnore")
        )
        scene = np.repeat(list(held), [len(one["dtIds"]) for one in held.values()])
        objects = np.array([np.sum(held[i]["gtIgnore"] == 0) if i in held else 0 for i in range(count)])
        order = np.argsort(-scores, kind="stable")
        hit, counts = hit[:, order] > 0, ~ignored[:, order].astype(bool)
        matches.append(Matches(scene[order], hit & counts, ~hit & counts, objects))
    return matches


def mean_average_precision(matches: Sequence[Matches], times: np.ndarray | None = None) -> dict[str, float]:
    """Return COCO's mAP (AP at IoU 0.5 to 0.95, AP50, AP75) in [0, 1]; -1 if there are no objects.

    times: how often each scene counts (scenes); once by default. The result is that of a set with so many of each.
    """
    levels = []
    for scene, right, wrong, objects in matches:
        weight = np.ones_like(objects) if times is None else times
        if not (total := objects @ weight):
            continue
        hits, misses = (np.cumsum(marks * weight[scene], axis=1, dtype=float) for marks in (right, wrong))
        precision = hits / (misses + hits + np.spacing(1))  # (10, guesses)
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # at this recall or a higher one
        best = np.pad(best, ((0, 0), (0, 1)))  # 0 at recalls that are not reached
        levels.append([row[np.searchsorted(reached, RECALLS)] for row, reached in zip(best, hits / total, strict=True)])
    found = np.stack(levels, -1) if levels else -np.ones((10, 1, 1))  # (10, recalls, classes)
    return {name: float(part.mean()) for name, part in {"AP": found, "AP50": found[0], "AP75": found[5]}.items()}


def pycocotools() -> tuple[Any, Any]:
    """Import COCO and COCOeval. Raises InputError if they are not installed."""
    coco, evaluation = (need(f"pycocotools.{name}", "detection") for name in ("coco", "cocoeval"))
    return coco.COCO, evaluation.COCOeval
