"""Post-training runs from end to end: the same bits after a crash, whatever the moment, and refusals in one line."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import bittern
from bittern.data import digits
from bittern.demo import DIGITS
from bittern.deploy.files import Journal
from bittern.errors import CheckpointError, InputError, ModelError
from bittern.layers import fake_quants
from bittern.ptq import Mixed, Result, quantize
from bittern.ptq.methods import METHODS, Method
from bittern.ptq.search import Space
from bittern.recipe import Format, Recipe, Rule, load_recipe
from families import SUPPORTED
from helpers import outputs, refused, same

QUICK = {  # the same code with little to search
    name: replace(METHODS[name], space=replace(METHODS[name].space or Space(), candidates=8, rounds=2))
    for name in ("bittern", "vt", "easyquant", "search")
}
RUNS: dict[str, tuple[Method, str, Mixed | None]] = {
    "bittern": (QUICK["bittern"], "w4a4", None),
    "vt": (QUICK["vt"], "vt-w4a4", None),
    "sequential": (QUICK["easyquant"], "w4a8", None),
    "mixed": (QUICK["search"], "w8a8", Mixed(5.0, (4, 6))),
}
ROLES = {"attention": ("qkv", "attention_output", "attention"), "ffn": ("ffn",)}  # of the parts that have a width
each_run = pytest.mark.parametrize("name", RUNS)


def batches(size: int = 8, count: int = 16) -> list[dict[str, Tensor]]:
    return [{"pixel_values": part} for part in digits("train")[0][:count].split(size)]


def run(name: str, folder: Path | None = None, **changes: Any) -> tuple[hf.PreTrainedModel, Result]:
    method, recipe, mixed = RUNS[name]
    model = changes.pop("model", None) or bittern.load(DIGITS)
    given = {"method": method, "mixed": mixed, "folder": folder} | changes
    return model, quantize(model, given.pop("recipe", recipe), given.pop("data", batches()), **given)


def state(model: hf.PreTrainedModel) -> dict[str, Any]:
    """Everything that a run sets: parameters, scales and formats."""
    formats = {name: torch.tensor(list(str(q.format).encode())) for name, q in fake_quants(model)}
    return dict(model.state_dict()) | formats


@cache
def undisturbed(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """State and report of a run without a folder."""
    model, result = run(name)
    report = result.to_dict()
    return state(model), {key: report[key] for key in ("solved", "by_extremes", "bits", "frontier")}


def check_resumed(name: str, folder: Path) -> None:
    """The same call gives the undisturbed state and report, bit for bit, and again when all is finished."""
    for _ in range(2):
        model, result = run(name, folder)
        expected, report = undisturbed(name)
        assert same(state(model), expected)
        assert {key: result.to_dict()[key] for key in report} == report


def killed(work: Callable[[], object], delay: float | None) -> bool:
    """Do this in a forked process and kill it after a time, or let it kill itself; whether it was killed."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@each_run
def test_killed_at_random(name: str, tmp_path: Path) -> None:
    """Killed at any of 5 random moments, one after another in the same folder or each in its own, a run goes on."""
    undisturbed(name)
    start = time.perf_counter()
    run(name, tmp_path / "whole")
    whole, dice = time.perf_counter() - start, random.Random(name)
    for moment in range(5):
        folder = tmp_path / str(moment // 2)
        model = bittern.load(DIGITS)
        killed(partial(run, name, folder, model=model), dice.uniform(0, whole))
        if moment % 2 or moment == 4:
            check_resumed(name, folder)


@pytest.mark.parametrize("write", [1, 2, 5])
@pytest.mark.parametrize("half", [True, False])
def test_killed_at_a_write(write: int, half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after a part is written, or before it has its name, a run goes on; the half part is not taken."""
    rename, writes = Path.rename, []

    def dies(path: Path, target: Path) -> Path:
        writes.append(target)
        if half and len(writes) > write:
            os.kill(os.getpid(), signal.SIGKILL)
        done = rename(path, target)
        if len(writes) > write:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    model = bittern.load(DIGITS)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        assert killed(lambda: run("vt", tmp_path, model=model), None)
    assert len(list(tmp_path.glob("*.safetensors"))) == write - half
    check_resumed("vt", tmp_path)


def other_model() -> hf.PreTrainedModel:
    model = bittern.load(DIGITS)
    with torch.no_grad():
        model.classifier.bias[0] += 1e-3
    return model


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("recipe", lambda: {"recipe": "w8a8"}),
        ("model", lambda: {"model": other_model()}),
        ("data", lambda: {"data": batches(count=24)}),
        ("data", lambda: {"data": batches(size=4)}),
        ("method", lambda: {"method": "minmax"}),
        ("method options", lambda: {"method": replace(QUICK["vt"], margin=0.3)}),
        ("mixed precision", lambda: {"mixed": Mixed(5.0)}),
        ("seed", lambda: {"seed": 1}),
    ],
)
def test_another_run(what: str, changes: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    """A folder of another run is refused in one line that says what differs, before anything happens to the model."""
    folder = finished_part(tmp_path)
    given = changes()
    model = given.pop("model", None) or bittern.load(DIGITS)
    with refused(InputError, str(folder), f"another {what} "):
        run("vt", folder, model=model, **given)
    assert not bittern.is_simulated(model)


def finished_part(folder: Path) -> Path:
    """The folder of a run that stopped after a few units."""

    def stop(items: Any, description: str) -> Any:
        for item in items:
            if item == 3:
                raise KeyboardInterrupt
            yield item

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        run("vt", folder, track=stop)
    assert set(threading.enumerate()) <= before  # it left no thread
    return folder


def test_interrupted(tmp_path: Path) -> None:
    """Ctrl-C between units ends all threads, and the same call goes on."""
    check_resumed("vt", finished_part(tmp_path))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_damaged_part(damage: str, tmp_path: Path) -> None:
    """A damaged part is an error that names its file; without the file the run goes on to the same bits."""
    folder = finished_part(tmp_path)
    path = sorted(folder.glob("*.safetensors"))[1]
    whole = bytearray(path.read_bytes())
    whole[len(whole) * 3 // 4] ^= 16
    path.write_bytes({"flip": whole, "truncate": whole[:-5], "empty": b""}[damage])
    with refused(CheckpointError, str(path), "damaged"):
        run("vt", folder)
    path.unlink()
    check_resumed("vt", folder)


def test_refused_recipe_leaves_the_folder_free(tmp_path: Path) -> None:
    """After a recipe that the model refuses, the right one runs in the same folder."""
    wrong = Recipe(name="x", rules=(Rule(modules="nothing", weight=Format()),))
    with refused(bittern.RecipeError, "matches nothing"):
        run("vt", tmp_path, recipe=wrong)
    check_resumed("vt", tmp_path)


# What a run gives


@each_run
def test_report(name: str) -> None:
    """Every layer and product of the model is reported once, with finite losses, and everything else is counted."""
    model, result = run(name)
    report = result.to_dict()
    blocks = 4 * (6 + 2)
    assert len(report["solved"]) == len({s["name"] for s in report["solved"]}) == blocks + 1
    assert report["by_extremes"] == []
    for entry in report["solved"]:
        assert 0 <= entry["after"] < 2
        assert 0 <= entry["before"] < 2
    assert report["samples"] == 16
    assert report["method"] == RUNS[name][0].name
    assert report["inputs"] == ("sequential" if name == "sequential" else "parallel")
    assert report["peak_memory"] > 1e7
    assert {"forward", "search"} <= report["seconds"].keys()
    assert all(q.scale is not None for _, q in fake_quants(model) if q.format.range == "static")
    assert not any(q.bypass for _, q in fake_quants(model))


@pytest.mark.parametrize("sensitivity", ["relative", "paper"])
def test_mixed_precision(sensitivity: Any, tmp_path: Path) -> None:
    """The chosen widths are those of the quantizers, meet the target, and the packed file gives what was simulated."""
    mixed = Mixed(5.5, (4, 6, 9), sensitivity)
    model, result = run("mixed", mixed=mixed, method="minmax")
    total = size = 0
    for i, layer in enumerate(model.vit.layers):
        for part, module in (("attention", layer.attention), ("ffn", layer.mlp)):
            bits = result.bits[f"vit.layers.{i}.{part}"]
            formats = [q.format for _, q in fake_quants(module)]
            assert formats
            assert {fmt.bits for fmt in formats} == {bits}
            weights = sum(p.numel() for p in module.parameters() if p.dim() > 1)
            total, size = total + weights, size + weights * bits
    assert len(set(result.bits.values())) > 1
    assert size <= 5.5 * total
    assert [p.size for p in result.frontier] == sorted(p.size for p in result.frontier)
    assert max(p.size for p in result.frontier if p.size <= 5.5 * total) == size
    batch = batches()[0]
    expected = outputs(model, batch)
    bittern.save(model, tmp_path / "simulated")
    assert same(outputs(bittern.load(tmp_path / "simulated"), batch), expected)
    bittern.save(bittern.pack(model), tmp_path / "packed")
    loaded = bittern.load(tmp_path / "packed")
    assert same(outputs(model, batch), expected)
    assert same(outputs(loaded, batch), expected)


def test_mixed_precision_of_one_width() -> None:
    """With one candidate width a mixed run is a plain run at that width, bit for bit."""
    rules = tuple(
        rule.model_copy(
            update={
                field: fmt.model_copy(update={"bits": 6})
                for field in ("weight", "input", "query", "key", "value", "map")
                if (fmt := getattr(rule, field)) is not None
            }
        )
        if rule.roles[0] in ("qkv", "attention")
        else rule
        for rule in load_recipe("w8a8").rules
    )
    plain, _ = run("mixed", mixed=None, recipe=Recipe(name="w8a8", rules=rules))
    mixed, result = run("mixed", mixed=Mixed(6.0, (6,)))
    assert set(result.bits.values()) == {6}
    assert same(state(mixed), state(plain))


@pytest.mark.parametrize(
    ("mixed", "method", "parts"),
    [
        (Mixed(3.5), "minmax", ("no choice", "3.5")),
        (Mixed(5.0, ()), "minmax", ("candidate bits", "none")),
        (Mixed(5.0, (1, 8)), "minmax", ("candidate bits must be 2 to 12", "1, 8")),
        (Mixed(5.0, (4, 13)), "minmax", ("candidate bits must be 2 to 12", "13")),
        (Mixed(5.0), "easyquant", ("easyquant", "parallel inputs")),
    ],
)
def test_impossible_mixed_precision(mixed: Mixed, method: str, parts: tuple[str, ...]) -> None:
    """A target that no choice meets, impossible widths and sequential methods are refused before the model changes."""
    model = bittern.load(DIGITS)
    with refused(InputError, *parts):
        run("mixed", model=model, mixed=mixed, method=method)
    assert not bittern.is_simulated(model)


@pytest.mark.parametrize("bits", [9, 10, 11, 12])
def test_wide_weights(bits: int, tmp_path: Path) -> None:
    """Weights of 9 to 12 bits are packed, saved, loaded, and are what was simulated."""
    weight = Format(bits=bits, granularity="row", range="static")
    recipe = Recipe(name="wide", rules=(Rule(roles=("qkv", "attention_output", "ffn"), weight=weight),))
    model, _ = run("vt", recipe=recipe, method="minmax")
    batch = batches()[0]
    expected = outputs(model, batch)
    bittern.save(bittern.pack(model), tmp_path / "packed")
    loaded = bittern.load(tmp_path / "packed")
    assert same(outputs(loaded, batch), expected)
    assert loaded.vit.layers[0].mlp.fc1.weight_codes.shape[1] == -(-48 * bits // 8)


@pytest.mark.parametrize("name", ["vt", "bittern", "sequential"])
def test_batch_split(name: str) -> None:
    """The same samples in batches of 4 or of 16 give the same scales, up to the order of float sums."""
    found = [state(run(name, data=batches(size))[0]) for size in (4, 16)]
    for key, value in found[0].items():
        if key.endswith((".scale", ".offset")):
            torch.testing.assert_close(value, found[1][key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["minmax", "easyquant"])
def test_a_block_that_runs_twice(method: str) -> None:
    """ALBERT, whose blocks share one module, is refused in one line, and its threads end."""
    model, batch = SUPPORTED["albert"]()
    before = set(threading.enumerate())
    with refused(ModelError, "runs more than once", "bittern quantize"):
        quantize(model, "w8a8", [batch], method=method)
    assert set(threading.enumerate()) <= before  # it left no thread
    assert outputs_of_restored(model, batch)


def outputs_of_restored(model: hf.PreTrainedModel, batch: dict[str, Any]) -> bool:
    bittern.restore(model)
    return same(outputs(model, batch), outputs(SUPPORTED["albert"]()[0], batch))


def test_no_batches() -> None:
    """Without batches, or with batches without tensors, one line says so."""
    for data, part in (([], "no batches"), ([{"text": "a"}], "holds no tensors, only text")):
        with refused(InputError, part):
            quantize(bittern.load(DIGITS), "w8a8", data)


def test_attention_only() -> None:
    """A recipe for attention alone, without layers, is searched too."""
    wide = Format(bits=6, range="static")
    recipe = Recipe(name="a", rules=(Rule(roles=("attention",), query=wide, key=wide, value=wide, map=wide),))
    _, result = run("vt", recipe=recipe)
    assert len(result.solved) == 8
    assert result.by_extremes == []


def test_journal_is_kept(tmp_path: Path) -> None:
    """A finished folder holds a part for every unit, and `delete` removes it."""
    run("vt", tmp_path / "work")
    assert len(list((tmp_path / "work").glob("*.safetensors"))) == 5
    Journal.delete(tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_report_names_present_formats() -> None:
    """With mixed precision the report names the widths that modules have, not the recipe's."""
    model, batch = SUPPORTED["vit"]()
    result = quantize(model, "w6a6", [batch], method="minmax", mixed=Mixed(5, (4, 8)))
    for name, bits in result.bits.items():
        unit, _, part = name.rpartition(".")
        wanted = f"uniform {bits}-bit"
        own = [x for x in result.simulation.quantized if x.name.startswith(unit) and x.role in ROLES[part]]
        assert own
        assert all(wanted in (x.weight or x.attention) for x in own)
