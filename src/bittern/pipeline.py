"""The main job from end to end: load, simulate, calibrate, measure, pack, save, and evaluate what was saved."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bittern.data import Data, has_classes, load_data
from bittern.deploy.checkpoint import is_packed, pack
from bittern.deploy.journal import Journal
from bittern.deploy.store import check_output, load, measure, save
from bittern.detection import has_boxes
from bittern.errors import InputError, ModelError
from bittern.evaluate import metrics, predict
from bittern.layers import Simulation, fake_quants, is_simulated, restore, simulate
from bittern.ptq.calibrate import calibrate
from bittern.ptq.methods import find_method
from bittern.ptq.run import Mixed, Track, check_mixed, silent
from bittern.ptq.run import quantize as post_training
from bittern.recipe import Recipe, load_recipe


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

    Static scales come from extremes; `ptq` searches for better ones. data: where calibration samples come from, and
    evaluation samples if it has a test or validation split (see `load_data`); it may be left out if no scale of the
    recipe is static. The result is also in `out`/bittern.json.
    """

    def by_extremes(model: PreTrainedModel, recipe: Recipe, calibration: Data | None) -> Simulation:
        simulation = simulate(model, recipe, next(iter(calibration)) if calibration else None)
        if any(q.format.range == "static" and q.scale is None for _, q in fake_quants(model)):
            if calibration is None:
                raise InputError(f"recipe {recipe.name} has static activation scales, which need data; give --data")
            calibrate(model, track(calibration, "calibrating"))
        return simulation

    job = _Job(source, recipe, out, data, samples, seed, force, track, columns)
    return job.run(lambda *given: (by_extremes(*given), {}))


def ptq(
    source: str | Path,
    recipe: str | Recipe,
    out: str | Path,
    *,
    data: str,
    method: str = "bittern",
    mixed: Mixed | None = None,
    samples: int = 128,
    seed: int = 0,
    force: bool = False,
    track: Track = silent,
    **columns: Any,
) -> dict[str, Any]:
    """Like `quantize`, with scales, biases and weights that a post-training method finds on the calibration samples.

    mixed: a width of its own for each attention and FFN. Finished units are kept in the folder `out`.work until `out`
    is written: the same call after a crash goes on there, to the same bits.
    """
    check_mixed(mixed, find_method(method))
    folder = Path(f"{Path(out)}.work")

    def search(model: PreTrainedModel, recipe: Recipe, calibration: Data | None) -> tuple[Simulation, dict[str, Any]]:
        assert calibration is not None
        result = post_training(
            model, recipe, calibration, method=method, mixed=mixed, folder=folder, seed=seed, track=track
        )
        return result.simulation, {"ptq": result.to_dict()}

    result = _Job(source, recipe, out, data, samples, seed, force, track, columns).run(search)
    Journal.delete(folder)
    return result


@dataclass
class _Job:
    """One command: load, measure, find scales, pack, measure again, save."""

    source: str | Path
    recipe: str | Recipe
    out: str | Path
    data: str | None
    samples: int
    seed: int
    force: bool
    track: Track
    columns: dict[str, Any]

    def run(
        self, find: Callable[[PreTrainedModel, Recipe, Data | None], tuple[Simulation, dict[str, Any]]]
    ) -> dict[str, Any]:
        recipe, data, track = load_recipe(self.recipe), self.data, self.track
        check_output(self.out, self.force)
        model = load(self.source)
        if is_packed(model) or is_simulated(model):
            raise ModelError(f"{self.source} is quantized already; give the float model that it was made from")
        train, test = (
            (load_data(data, model, self.source, split=s, **self.columns) for s in ("train", "test"))
            if data
            else (None, None)
        )
        if data and train is None:
            raise InputError(f"{data} has no train split to calibrate with; name one of its files train.parquet")
        calibration = train.subset(self.samples, self.seed) if train else None
        if test:  # a recipe that does not fit is refused here, before the model runs on all of the data
            simulate(model, recipe, next(iter(calibration)) if calibration else None)
            restore(model)
        reference = predict(model, track(test, "float")) if test else None
        size_before = sum(p.numel() for p in model.parameters()) * 4
        simulation, found = find(model, recipe, calibration)
        simulated = predict(model, track(test, "simulated")) if test else None
        pack(model)
        result: dict[str, Any] = {
            "source": str(self.source),
            "recipe": recipe.name,
            "quantized": len(simulation.quantized),
            "kept_float": [{"name": layer.name, "type": layer.type} for layer in simulation.kept_float],
            "float_bytes": size_before,
            **found,
        }
        if test is not None and reference is not None and simulated is not None:
            packed = predict(model, track(test, "packed"))
            result["samples"] = len(test)
            result["float"] = metrics(model, test, reference, reference)
            result["packed"] = metrics(model, test, packed, reference)
            result["max_error_simulated_packed"] = (packed - simulated).abs().max().item()
        provenance = {
            "recipe": recipe.model_dump(mode="json", exclude_defaults=True),
            "seed": self.seed,
            "calibration": calibration
            and {"data": data, "samples": len(calibration), "sha256": calibration.fingerprint()},
            "versions": {p: version(p) for p in ("bittern", "torch", "transformers")}
            | {"python": platform.python_version()},
            "layers": simulation.to_dict()["layers"],
        }
        save(model, self.out, processors_from=self.source, report=result | provenance, force=self.force)
        summary = {"what": str(simulation)} if found else {}
        return result | summary | {"out": str(self.out), **asdict(measure(model, self.out))}


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
    if against is None and not has_boxes(model) and (loaded.labels is None or not has_classes(model)):
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
    if other is None:
        return result | metrics(model, loaded, output)
    reference = predict(other, track(loaded, "reference"))
    if reference.shape != output.shape:
        raise InputError(f"{against} gives outputs {tuple(reference.shape)}, {source} gives {tuple(output.shape)}")
    return result | {"against": str(against), **metrics(model, loaded, output, reference)}


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
