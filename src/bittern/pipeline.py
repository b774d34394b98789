"""The main job from end to end: load, simulate, calibrate, measure, pack, save, and evaluate what was saved."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bittern.data import has_classes, load_data
from bittern.deploy.checkpoint import is_packed, pack
from bittern.deploy.store import check_output, load, measure, save
from bittern.errors import InputError, ModelError
from bittern.evaluate import compare, predict
from bittern.layers import fake_quants, is_simulated, restore, simulate
from bittern.ptq.calibrate import calibrate
from bittern.recipe import Recipe, load_recipe

Track = Callable[[Iterable[Any], str], Iterable[Any]]


def silent(items: Iterable[Any], description: str) -> Iterable[Any]:
    """No progress bar."""
    return items


def quantize(
    source: str | Path,
    recipe: str | Recipe,
    out: str | Path,
    *,
    data: str | None = None,
    samples: int = 128,
    seed: int = 0,
    force: bool = False,
    track: Track = silent,
    **columns: Any,
) -> dict[str, Any]:
    """Quantize the model in folder `source` by `recipe`, write it packed to `out`, and return what was measured.

    data: where calibration samples come from, and evaluation samples if it has a test or validation split (see
    `load_data`); it may be left out if no scale of the recipe is static. The result is also in `out`/bittern.json.
    """
    recipe = load_recipe(recipe)
    check_output(out, force)
    model = load(source)
    if is_packed(model) or is_simulated(model):
        raise ModelError(f"{source} is quantized already; give the float model that it was made from")
    train, test = (
        (load_data(data, model, source, split=s, **columns) for s in ("train", "test")) if data else (None, None)
    )
    if data and train is None:
        raise InputError(f"{data} has no train split to calibrate with; name one of its files train.parquet")
    calibration = train.subset(samples, seed) if train else None
    batch = next(iter(calibration)) if calibration else None
    if test:  # a recipe that does not fit is refused here, before the model runs on all of the data
        simulate(model, recipe, batch)
        restore(model)
    reference = predict(model, track(test, "float")) if test else None
    size_before = sum(p.numel() for p in model.parameters()) * 4
    simulation = simulate(model, recipe, batch)
    if any(q.format.range == "static" and q.scale is None for _, q in fake_quants(model)):
        if calibration is None:
            raise InputError(f"recipe {recipe.name} has static activation scales, which need data; give --data")
        calibrate(model, track(calibration, "calibrating"))
    simulated = predict(model, track(test, "simulated")) if test else None
    pack(model)
    result: dict[str, Any] = {
        "source": str(source),
        "recipe": recipe.name,
        "quantized": len(simulation.quantized),
        "kept_float": [{"name": layer.name, "type": layer.type} for layer in simulation.kept_float],
        "float_bytes": size_before,
    }
    if test is not None and reference is not None and simulated is not None:
        packed = predict(model, track(test, "packed"))
        result["samples"] = len(test)
        result["float"] = compare(reference, reference, test.labels, has_classes(model))
        result["packed"] = compare(packed, reference, test.labels, has_classes(model))
        result["max_error_simulated_packed"] = (packed - simulated).abs().max().item()
    provenance = {
        "recipe": recipe.model_dump(mode="json", exclude_defaults=True),
        "seed": seed,
        "calibration": calibration and {"data": data, "samples": len(calibration), "sha256": calibration.fingerprint()},
        "versions": {p: version(p) for p in ("bittern", "torch", "transformers")}
        | {"python": platform.python_version()},
        "layers": simulation.to_dict()["layers"],
    }
    save(model, out, processors_from=source, report=result | provenance, force=force)
    return result | {"out": str(out), **asdict(measure(model, out))}


def evaluate(
    source: str | Path,
    data: str,
    *,
    against: str | Path | None = None,
    track: Track = silent,
    **columns: Any,
) -> dict[str, Any]:
    """Metrics of the model in `source` on data, and how far it agrees with the model in `against`.

    A source of data with one part only is used whole.
    """
    model = load(source)
    loaded = load_data(data, model, source, split="test", **columns)
    loaded = loaded or load_data(data, model, source, split="train", **columns)
    if loaded is None:
        raise InputError(f"{data} has no train, validation or test split; give one of its files such a name")
    if against is None and (loaded.labels is None or not has_classes(model)):
        why = "has no labels" if loaded.labels is None else f"is for {type(model).__name__}, which has no classes"
        raise InputError(f"{data} {why}, so there is no accuracy; compare with another model: --against FLOAT_MODEL")
    other = None if against is None else load(against)
    output = predict(model, track(loaded, "evaluating"))
    result: dict[str, Any] = {
        "model": str(source),
        "data": data,
        "samples": len(loaded),
        **asdict(measure(model, source)),
    }
    if other is not None:
        reference = predict(other, track(loaded, "reference"))
        if reference.shape != output.shape:
            raise InputError(f"{against} gives outputs {tuple(reference.shape)}, {source} gives {tuple(output.shape)}")
        return result | {"against": str(against), **compare(output, reference, loaded.labels, has_classes(model))}
    return result | {"accuracy": compare(output, output, loaded.labels, True)["accuracy"]}


def finetune(model: PreTrainedModel, images: Tensor, labels: Tensor, epochs: int, track: Track = silent) -> None:
    """Train a simulated image classifier by the straight-through estimator: what ternary weights need to be of use."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, epochs)
    model.train()
    for _ in track(range(epochs), f"training {epochs} epochs"):
        for index in torch.randperm(len(images)).split(64):
            loss = model(images[index], labels=labels[index]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    model.eval()
