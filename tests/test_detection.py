"""Detectors: scenes in COCO format, each bad one refused in one line, and mAP against figures worked out by hand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import bittern
from bittern import jobs
from bittern.data import evaluate, load_data, task_of
from bittern.data.detection import Box, Scene, match_boxes, mean_average_precision, pycocotools, read_scenes
from bittern.data.evaluate import metrics, predict, resampled
from bittern.errors import InputError
from bittern.ladder import paired_loss
from families import SUPPORTED, VISION
from helpers import refused
from material import command, succeed

SIZES = [(32, 32), (24, 40), (40, 32)]  # height, width
BOXES: list[list[tuple[int, tuple[float, ...]]]] = [  # category and bbox of each image
    [(0, (2, 3, 10, 12)), (2, (1, 20, 20, 10))],
    [(1, (5.5, 4, 20, 8))],
    [],
]


def content(names: tuple[str, ...] = ("LABEL_0", "LABEL_1", "LABEL_2")) -> dict[str, Any]:
    """Three images and three annotations; ids of images are 10, 11 and 12."""
    images = [{"id": 10 + i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(SIZES)]
    pairs = [(10 + i, category, list(box)) for i, found in enumerate(BOXES) for category, box in found]
    annotations = [{"id": n, "image_id": i, "category_id": c, "bbox": box} for n, (i, c, box) in enumerate(pairs)]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
    }


def write(images: Path, annotations: Path, data: dict[str, Any] | None = None) -> None:
    """The three images in one folder, and their annotations in a file."""
    images.mkdir(parents=True, exist_ok=True)
    annotations.parent.mkdir(parents=True, exist_ok=True)
    for i, (height, width) in enumerate(SIZES):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
    annotations.write_text(json.dumps(data or content()))


@pytest.fixture(scope="module")
def detr() -> hf.PreTrainedModel:
    return SUPPORTED["detr"]()[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, detr: hf.PreTrainedModel) -> Path:
    """`scenes` holds train and val; `detr` a model with its image processor, `other` one of other weights."""
    root = tmp_path_factory.mktemp("place")
    for split in ("train", "val"):
        write(root / "scenes" / split, root / "scenes" / split / "annotations.json")
    detr.save_pretrained(root / "detr")
    hf.DetrImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 48}).save_pretrained(root / "detr")
    shutil.copytree(root / "detr", root / "other")
    torch.manual_seed(1)
    hf.DetrForObjectDetection(detr.config).save_pretrained(root / "other")
    return root


def scenes_of(*boxes: list[tuple[int, tuple[float, ...]]]) -> list[Scene]:
    return [Scene(Path("none"), 100, 100, tuple(Box(c, *b, False) for c, b in found)) for found in boxes]


def guess(*found: tuple[float, int, tuple[float, ...]]) -> dict[str, torch.Tensor]:
    """Scores, labels and boxes, given as x, y, width, height, in the form that a processor gives."""
    boxes = [(x, y, x + w, y + h) for _, _, (x, y, w, h) in found]
    return {
        "scores": torch.tensor([s for s, _, _ in found]),
        "labels": torch.tensor([c for _, c, _ in found]),
        "boxes": torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
    }


# mAP


def scored(scenes: list[Scene], found: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    return mean_average_precision(match_boxes(scenes, found))


def by_coco(scenes: list[Scene], found: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """The same figures by pycocotools alone."""
    coco, evaluation = pycocotools()
    truth, boxes = coco(), [(i, box) for i, scene in enumerate(scenes) for box in scene.boxes]
    truth.dataset = {
        "images": [{"id": i} for i in range(len(scenes))],
        "categories": [{"id": label} for label in sorted({box.label for _, box in boxes})],
        "annotations": [
            {"id": n, "image_id": i, "category_id": b.label, "bbox": list(b[1:5]), "iscrowd": int(b.crowd)}
            | {"area": b.width * b.height}
            for n, (i, b) in enumerate(boxes, 1)
        ],
    }
    truth.createIndex()
    guesses = [
        {"image_id": i, "category_id": int(c), "bbox": [x, y, right - x, bottom - y], "score": float(s)}
        for i, one in enumerate(found)
        for s, c, (x, y, right, bottom) in zip(one["scores"], one["labels"], one["boxes"].tolist(), strict=True)
    ]
    run = evaluation(truth, truth.loadRes(guesses), "bbox")
    for step in (run.evaluate, run.accumulate, run.summarize):
        step()
    return dict(zip(("AP", "AP50", "AP75"), map(float, run.stats[:3]), strict=True))


def made_up(count: int, seed: int) -> tuple[list[Scene], list[dict[str, torch.Tensor]]]:
    """Scenes with 0 to 5 objects of 4 classes, some of them crowds, and up to 130 guesses each, most of them near."""
    draw, scenes, found = np.random.default_rng(seed), [], []
    for _ in range(count):
        kinds = draw.integers(4, size=draw.integers(6)).tolist()
        places = draw.uniform(5, 60, (len(kinds), 4)).round().tolist()
        boxes = tuple(Box(k, *p, bool(draw.random() < 0.15)) for k, p in zip(kinds, places, strict=True))
        scenes.append(Scene(Path("none"), 130, 130, boxes))
        near = [(b.label, np.array(b[1:5]) + draw.normal(0, 2, 4).clip(-4, 4)) for b in boxes for _ in range(2)]
        far = [(int(draw.integers(5)), draw.uniform(5, 60, 4)) for _ in range(draw.choice([0, 3, 120]))]
        guesses = [(float(s), k, tuple(p)) for s, (k, p) in zip(draw.random(len(near + far)), near + far, strict=True)]
        found.append(guess(*guesses))
    return scenes, found


@pytest.mark.parametrize("seed", range(4))
def test_as_coco(seed: int) -> None:
    """mAP is that of pycocotools to the last bit, also where scenes count several times: that of a set that has them
    so often."""
    scenes, found = made_up(25, seed)
    matches = match_boxes(scenes, found)
    assert mean_average_precision(matches) == by_coco(scenes, found)
    times = np.bincount(np.random.default_rng(seed).integers(25, size=25), minlength=25)
    rows = np.repeat(np.arange(25), times)
    repeated = by_coco([scenes[i] for i in rows], [found[i] for i in rows])
    assert mean_average_precision(matches, times) == repeated != by_coco(scenes, found)


def test_perfect() -> None:
    """The boxes themselves have the mAP 1, at any score and beside none for an image without objects."""
    found = [guess(*((0.3 + 0.1 * i, c, b) for i, (c, b) in enumerate(boxes))) for boxes in BOXES]
    assert scored(scenes_of(*BOXES), found) == pytest.approx({"AP": 1.0, "AP50": 1.0, "AP75": 1.0})


@pytest.mark.parametrize(
    ("shift", "passed"),  # IoU = (20 - s) / (20 + s): 0.905, 0.818, 0.739, 0.6, 0.481
    [(1, 9), (2, 7), (3, 5), (5, 3), (7, 0)],
)
def test_shifted(shift: int, passed: int, capfd: pytest.CaptureFixture[str]) -> None:
    """A box of width 20 shifted by s counts at each of the thresholds 0.5, 0.55 to 0.95 below its IoU."""
    found = scored(scenes_of([(4, (10, 10, 20, 20))]), [guess((0.5, 4, (10 + shift, 10, 20, 20)))])
    assert found == pytest.approx({"AP": passed / 10, "AP50": float(passed > 0), "AP75": float(passed > 5)})
    assert capfd.readouterr() == ("", "")  # pycocotools prints


def test_by_hand() -> None:
    """A wrong guess above the right one halves precision; a missed object leaves the rest of the recall empty."""
    scenes = scenes_of([(0, (0, 0, 10, 10)), (1, (50, 50, 20, 20)), (1, (10, 50, 20, 20))])
    found = [guess((0.9, 0, (40, 0, 10, 10)), (0.8, 0, (0, 0, 10, 10)), (0.7, 1, (50, 50, 20, 20)))]
    # class 0: precision 1/2 at each of the 101 recalls; class 1: 1 at recalls 0 to 0.50, which are 51
    assert scored(scenes, found)["AP50"] == pytest.approx((0.5 + 51 / 101) / 2)


def test_crowd() -> None:
    """A guess in a crowd is neither right nor wrong, and the crowd need not be found."""
    crowd = Scene(Path("none"), 100, 100, (Box(0, 0, 0, 50, 50, True), Box(0, 60, 60, 20, 20, False)))
    found = [guess((0.9, 0, (5, 5, 10, 10)), (0.5, 0, (60, 60, 20, 20)))]
    assert scored([crowd], found)["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("found", [[], [(0.5, 7, (0, 0, 10, 10))]], ids=["nothing", "a class that is not there"])
def test_nothing_found(found: list[Any]) -> None:
    """Where no object is found, mAP is 0."""
    assert set(scored(scenes_of([(0, (0, 0, 10, 10))]), [guess(*found)]).values()) == {0.0}


def test_loss_of_boxes(place: Path, detr: hf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes are matched once for each of two models, not for each draw of the bootstrap; a draw is as good as its own
    scenes."""
    data = load_data(str(place / "scenes"), detr, place / "detr", split="test")
    assert data is not None
    output, calls = torch.rand(3, 7, 8, generator=torch.Generator().manual_seed(0)), list[int]()
    output[..., 4:] = torch.tensor([0.32, 0.28, 0.4, 0.5])  # near one of the objects
    for rows in ([0, 1, 2], [2, 0, 0], [1, 1, 1]):
        found = resampled("AP50", detr, data, output)(rows)
        assert found == metrics(detr, data.take(rows), output[rows])["AP50"], found
    matching = evaluate.match_boxes
    monkeypatch.setattr(evaluate, "match_boxes", lambda *args: calls.append(1) or matching(*args))
    loss = paired_loss("AP50", detr, data, output, output.flip(1))
    assert loss["points"] == 0
    assert len(calls) == 2


def test_without_pycocotools(place: Path, detr: hf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pycocotools, data to test a detector is refused at once, with what to install; to calibrate it serves."""
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.coco", None)
    with refused(InputError, "pip install 'bittern[detection]'"):
        load_data(str(place / "scenes"), detr, place / "detr", split="test")
    assert load_data(str(place / "scenes"), detr, place / "detr", split="train")


# Scenes


LAYOUTS = {
    "a folder per split": (("train", "train/annotations.json"), ("val", "val/annotations.json")),
    "images apart": (("train/images", "train/a.json"), ("test/images", "test/annotations/a.json")),
    "COCO": (
        ("train2017", "annotations/instances_train2017.json"),
        ("val2017", "annotations/instances_val2017.json"),
    ),
    "COCO, images below one": (
        ("images/train", "annotations/instances_train.json"),
        ("images/val", "annotations/instances_val.json"),
    ),
    "COCO, images together": (
        ("images", "annotations/instances_train.json"),
        ("images", "annotations/instances_val.json"),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, detr: hf.PreTrainedModel, tmp_path: Path) -> None:
    """Each common layout gives the images with their sizes and boxes, images without objects too."""
    for split, (images, annotations) in zip(("train", "test"), LAYOUTS[layout], strict=True):
        write(tmp_path / images, tmp_path / annotations)
        scenes = read_scenes(str(tmp_path), split, detr)
        assert [s.path for s in scenes] == [tmp_path / images / f"{i}.png" for i in range(3)]
        assert [(s.height, s.width) for s in scenes] == SIZES
        assert [[(b.label, b[1:5]) for b in s.boxes] for s in scenes] == BOXES
        if split == "train":
            assert read_scenes(str(tmp_path), "test", detr) is None


def test_validation_before_test(detr: hf.PreTrainedModel, tmp_path: Path) -> None:
    """Of val and test, the first is used: COCO's own test has no boxes."""
    for split in ("test", "val"):
        write(tmp_path / split, tmp_path / split / "a.json")
    assert read_scenes(str(tmp_path), "test", detr)[0].path.parent.name == "val"


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("label_2", "LABEL_0", "Label_1"), [2, 1, 0]), (("ant", "bee", "cow"), [0, 2, 1])],
    ids=["names", "numbers"],
)
def test_categories(names: tuple[str, ...], expected: list[int], detr: hf.PreTrainedModel, tmp_path: Path) -> None:
    """Categories are the model's classes by name, if it knows all the names, or else by number."""
    write(tmp_path / "train", tmp_path / "train" / "a.json", content(names))
    labels = [box.label for scene in read_scenes(str(tmp_path), "train", detr) for box in scene.boxes]
    assert labels == expected


Spoil = Callable[[dict[str, Any]], Any]
BAD: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "unknown image": (lambda c: c["annotations"][1].update(image_id=7), ("annotation 1 is of image 7", "3 images")),
    "missing image": (lambda c: c["images"][2].update(file_name="no.png"), ("train/no.png is missing",)),
    "image without size": (lambda c: c["images"][0].pop("height"), ("an entry has no 'height'",)),
    "image of no size": (lambda c: c["images"][0].update(width=0), ("0.png has the size 0×32",)),
    "images of one id": (lambda c: c["images"][0].update(id=11), ("several images of the same id",)),
    "NaN": (lambda c: c["annotations"][0].update(bbox=[0, 0, float("nan"), 1]), ("annotation 0 has the bbox", "nan")),
    "infinite": (lambda c: c["annotations"][0].update(bbox=[float("inf"), 0, 1, 1]), ("has the bbox [inf",)),
    "negative": (lambda c: c["annotations"][2].update(bbox=[0, 0, 3, -1]), ("has the bbox [0, 0, 3, -1]",)),
    "three numbers": (lambda c: c["annotations"][0].update(bbox=[0, 0, 3]), ("expected x, y, width, height",)),
    "no number": (lambda c: c["annotations"][0].update(bbox=[0, 0, "3", 1]), ("expected x, y, width, height",)),
    "box is no list": (lambda c: c["annotations"][0].update(bbox=3), ("is not in COCO format",)),
    "category of no name": (lambda c: c["annotations"][0].update(category_id=5), ("of category 5, which is not",)),
    "category of no class": (
        lambda c: (c["annotations"][0].update(category_id=5), c["categories"].append({"id": 5, "name": "eel"})),
        (
            "the classes LABEL_0, LABEL_1, LABEL_2, eel",
            "the model has LABEL_0, LABEL_1, LABEL_2, none of which is 'eel'",
        ),
    ),
    "no annotations": (lambda c: c["annotations"].clear(), ("has no annotations",)),
    "no categories": (lambda c: c.pop("categories"), ("an entry has no 'categories'",)),
    "another structure": (lambda c: c.update(images=3), ("is not in COCO format",)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_annotations(name: str, detr: hf.PreTrainedModel, tmp_path: Path) -> None:
    """Whatever is wrong with annotations is told by file and entry before any image is read."""
    spoil, parts = BAD[name]
    data = content()
    spoil(data)
    write(tmp_path / "train", tmp_path / "train" / "annotations.json", data)
    with refused(InputError, f"{tmp_path}/train/annotations.json", *parts):
        read_scenes(str(tmp_path), "train", detr)


@pytest.mark.parametrize("text", ["", "{", "[]", '"images"', "\x00", '{"a":' * 100_000], ids=lambda t: t[:9])
def test_no_annotations_at_all(text: str, detr: hf.PreTrainedModel, tmp_path: Path) -> None:
    """A file that is no JSON, deeper than can be read, or not of an object, is refused."""
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "a.json").write_text(text)
    with refused(InputError, f"{tmp_path}/val/a.json is not in COCO format"):
        read_scenes(str(tmp_path), "test", detr)


@pytest.mark.parametrize("source", ["digits", "nowhere", "empty"])
def test_no_folder_of_scenes(source: str, place: Path, detr: hf.PreTrainedModel, tmp_path: Path) -> None:
    """A source that is no folder in COCO format is refused, with the layouts that serve."""
    (tmp_path / "empty").mkdir()
    source = str(tmp_path / "empty") if source == "empty" else source
    with refused(InputError, f"{source} is no folder in COCO format", "annotations/instances_{train,val}*.json"):
        load_data(source, detr, place / "detr", split="train")


def test_several_annotation_files(detr: hf.PreTrainedModel, tmp_path: Path) -> None:
    """Of several .json files none is chosen."""
    for name in ("a", "b"):
        write(tmp_path / "train", tmp_path / "train" / f"{name}.json")
    with refused(InputError, f"{tmp_path}/train holds 2 .json files"):
        read_scenes(str(tmp_path), "train", detr)


def test_image_of_another_size(detr: hf.PreTrainedModel, place: Path, tmp_path: Path) -> None:
    """An image whose size is not that of its annotations is refused when it is read: its boxes would be elsewhere."""
    shutil.copytree(place / "scenes" / "train", tmp_path / "train")
    Image.new("RGB", (32, 31)).save(tmp_path / "train" / "0.png")
    with refused(InputError, "0.png has 32×31 pixels, but 32×32 in its annotations"):
        list(load_data(str(tmp_path), detr, place / "detr", split="train"))


# Evaluation


def test_batches(place: Path, detr: hf.PreTrainedModel) -> None:
    """Images of different sizes are padded and masked in a batch; a part keeps its scenes and the processor."""
    data = load_data(str(place / "scenes"), detr, place / "detr", split="train")
    (batch,) = data
    assert batch["pixel_values"].shape[0] == 3
    assert batch["pixel_mask"].shape == batch["pixel_values"].shape[:1] + batch["pixel_values"].shape[2:]
    assert not batch["pixel_mask"].all()
    part = data.subset(2, seed=1)
    assert set(part.rows) < set(data.rows)
    assert part.processor is data.processor
    assert predict(detr, data).shape == (3, 7, 3 + 1 + 4)


def test_fingerprint_of_boxes(place: Path, detr: hf.PreTrainedModel, tmp_path: Path) -> None:
    """The fingerprint is the same for the same scenes elsewhere, and another if a box moves."""
    data = content()
    shutil.copytree(place / "scenes" / "train", tmp_path / "train")

    def fingerprint(root: Path) -> str:
        return load_data(str(root), detr, place / "detr", split="train").fingerprint()

    assert fingerprint(tmp_path) == fingerprint(place / "scenes")
    data["annotations"][0]["bbox"][0] += 1
    write(tmp_path / "train", tmp_path / "train" / "annotations.json", data)
    assert fingerprint(tmp_path) != fingerprint(place / "scenes")


def test_outputs_become_boxes(place: Path, detr: hf.PreTrainedModel) -> None:
    """Outputs that say what the annotations say have the mAP 1, and each image is scaled by its own size."""
    data = load_data(str(place / "scenes"), detr, place / "detr", split="test")
    output = torch.zeros(3, 7, 8)
    output[..., 3] = 50.0  # no object
    for i, (boxes, (height, width)) in enumerate(zip(BOXES, SIZES, strict=True)):
        for j, (label, (x, y, w, h)) in enumerate(boxes):
            output[i, j, [label, 3]] = torch.tensor([9.0, 0.0])
            output[i, j, 4:] = torch.tensor([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height])
    assert metrics(detr, data, output) == pytest.approx({"AP": 1.0, "AP50": 1.0, "AP75": 1.0})
    moved = output.clone()
    moved[..., :4] *= 1.5
    moved[..., 4:] *= 0.75
    found = metrics(detr, data, moved, output)
    assert found["logits_error"] == pytest.approx(0.5)
    assert found["boxes_error"] == pytest.approx(0.25)
    assert found["max_difference"] == pytest.approx(25.0)


def test_eval(place: Path) -> None:
    """`eval` prints the mAP of a detector, and against another one the errors of logits and boxes."""
    alone = json.loads(succeed(f"bittern eval {place}/detr --data {place}/scenes --json"))
    assert alone["samples"] == 3
    assert {"AP", "AP50", "AP75"} < alone.keys()
    assert 0 <= alone["AP"] <= 1
    assert "accuracy" not in alone
    same = jobs.evaluate(place / "detr", str(place / "scenes"), against=place / "detr")
    assert same["logits_error"] == same["boxes_error"] == same["max_difference"] == 0
    assert same["AP"] == alone["AP"]
    other = jobs.evaluate(place / "detr", str(place / "scenes"), against=place / "other")
    models = [bittern.load(place / name) for name in ("detr", "other")]
    (batch,) = load_data(str(place / "scenes"), models[0], place / "detr", split="test")
    with torch.no_grad():
        a, b = (model(**batch) for model in models)
    assert other["logits_error"] == pytest.approx(((a.logits - b.logits).norm() / b.logits.norm()).item())
    assert other["boxes_error"] == pytest.approx(((a.pred_boxes - b.pred_boxes).norm() / b.pred_boxes.norm()).item())
    assert "boxes error" in succeed(f"bittern eval {place}/detr --data {place}/scenes --against {place}/other")


def test_eval_refused(place: Path) -> None:
    """A detector without data in COCO format ends in one line."""
    ran = command(f"bittern eval {place}/detr --data digits")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("error: digits is no folder in COCO format; DetrForObjectDetection needs")
    assert ran.err.count("\n") == 1


def test_processor_of_another_kind(place: Path, detr: hf.PreTrainedModel, tmp_path: Path) -> None:
    """An image processor that makes no boxes is refused."""
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with refused(InputError, "ViTImageProcessor", "makes no boxes; expected the one of DetrForObjectDetection"):
        load_data(str(place / "scenes"), detr, tmp_path, split="test")


@pytest.mark.parametrize(("name", "expected"), [("detr", True), ("conditional_detr", True), ("vit", False)])
def test_task(name: str, expected: bool) -> None:
    """Detectors are told by their class."""
    assert (task_of(SUPPORTED[name]()[0]) == "boxes") is expected


def yolos() -> hf.PreTrainedModel:
    return hf.YolosForObjectDetection(hf.YolosConfig(**VISION | {"image_size": [32, 32]}, num_detection_tokens=7))


def table_transformer() -> hf.PreTrainedModel:
    detr = SUPPORTED["detr"]()[0].config
    kept = ("d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
    small = {name: getattr(detr, name) for name in (*kept, "encoder_ffn_dim", "decoder_ffn_dim", "num_queries")}
    return hf.TableTransformerForObjectDetection(
        hf.TableTransformerConfig(backbone_config=detr.backbone_config, **small)
    )


@pytest.mark.parametrize("make", [lambda: SUPPORTED["conditional_detr"]()[0], yolos, table_transformer])
def test_other_detectors(make: Callable[[], hf.PreTrainedModel], place: Path, tmp_path: Path) -> None:
    """Detectors of other kinds are measured by mAP and trained as DETR is."""
    torch.manual_seed(0)
    model = make()
    model.config.id2label = {i: f"LABEL_{i}" for i in range(3)}
    model = type(model)(model.config)
    model.save_pretrained(tmp_path / "model")
    kind = hf.YolosImageProcessorPil if "Yolos" in type(model).__name__ else hf.DetrImageProcessorPil
    kind(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    assert {"AP", "AP50", "AP75"} < jobs.evaluate(tmp_path / "model", str(place / "scenes")).keys()
    options = f"--recipe w8a8 --data {place}/scenes --out {tmp_path}/out --steps 2 --batch-size 2 --distill prediction"
    ran = command(f"bittern qat {tmp_path}/model {options}")
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "out" / "bittern.json").read_text())["packed"].keys() >= {"AP", "logits_error"}
