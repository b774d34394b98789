"""Intact files of all kinds, for mutants.py to damage: models, adapters, recipes, tables, images, scenes, reports."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import torch
import transformers as hf
import yaml
from peft import LoraConfig, get_peft_model
from PIL import Image

from bittern.deploy.store import load
from bittern.recipe import load_recipe
from material import TEXTS


def prepare(work: Path) -> None:
    """Write what is damaged: models, adapters, recipes, tables, images, scenes, reports."""
    place, made = work / "mutants", work / "world"
    if (place / "done").exists():
        return
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name in ("packed", "low", "packed-simulated", "bert", "vit"):
        shutil.copytree(made / name, place / name)
    processor = hf.ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    processor.save_pretrained(place / "vit")
    hf.AutoModelForSequenceClassification.from_pretrained(made / "bert").save_pretrained(
        place / "shards", max_shard_size="40KB"
    )
    load(made / "packed").save_pretrained(place / "packed-shards", max_shard_size="40KB")
    lora = LoraConfig(target_modules=["query", "intermediate.dense"], init_lora_weights=False)
    get_peft_model(load(made / "bert"), lora).save_pretrained(place / "adapter")
    for name in ("w8a8", "vt-w4a4", "ternary"):
        (place / f"recipe-{name}").mkdir()
        text = yaml.safe_dump(load_recipe(name).model_dump(mode="json", exclude_defaults=True))
        (place / f"recipe-{name}" / "recipe.yaml").write_text(text)
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(TEXTS)]
    for kind in ("csv", "json", "jsonl", "parquet", "txt", "tsv"):
        (place / f"table-{kind}").mkdir()
        file = place / f"table-{kind}" / f"train.{kind}"
        if kind == "parquet":
            shutil.copy(made / "texts" / "train.parquet", file)
        elif kind == "json":
            file.write_text(json.dumps(rows))
        elif kind == "jsonl":
            file.write_text("\n".join(map(json.dumps, rows)))
        elif kind == "txt":
            file.write_text("\n".join(TEXTS))
        else:
            stream = io.StringIO()
            table = csv.DictWriter(stream, ["text", "label"], delimiter="\t" if kind == "tsv" else ",")
            table.writeheader()
            table.writerows(rows)
            file.write_text(stream.getvalue())
    for kind in ("png", "jpg", "gif", "bmp", "tiff", "webp", "ppm"):
        for label in (0, 1):
            folder = place / f"images-{kind}" / "train" / str(label)
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.{kind}")
    folder = place / "scenes" / "train"
    shutil.copytree(place / "images-png" / "train" / "0", folder)
    images = [{"id": i, "file_name": f"{i}.png", "height": 8, "width": 8} for i in range(3)]
    boxes = [{"id": i, "image_id": i % 3, "category_id": i % 3, "bbox": [0, 1, 2.5, 3], "iscrowd": 0} for i in range(6)]
    names = [{"id": i, "name": name} for i, name in enumerate(("cat", "dog", "bird"))]
    (folder / "labels.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": names}))
    (place / "report").mkdir()
    run = {"metric": "accuracy", "best": 0.5, "best_step": 3, "steps": 12, "history": [{"step": 1, "loss": 1.0}]}
    (place / "report" / "bittern.json").write_text(json.dumps({"source": "bert", "qat": run, "ptq": {"bits": {}}}))
    (place / "done").touch()
