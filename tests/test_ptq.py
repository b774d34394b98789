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
from bittern.deploy.journal import Journal
from bittern.errors import CheckpointError, InputError, ModelError
from bittern.layers import fake_quants
from bittern.ptq import Mixed, Result, quantize
from bittern.ptq import model as model_module
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


@pytest.mark.parametrize("case", ["sums of local errors", "made up"])
def test_mixed_precision_against_one_width(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sums over parts mislead, so that one width for all gives better outputs, that width is taken: the run is
    bit for bit the one with this width alone, and the report says which outputs were how far from the float ones."""
    if case == "made up":  # what hurts is said to help
        monkeypatch.setattr(model_module, "sensitivities", lambda calls, sizes, parts, how: upside_down(calls, parts))
    given = {"method": "minmax", "recipe": "vt-w4a4", "data": batches(16, 32)}
    model, result = run("mixed", mixed=Mixed(4, (3, 4, 5)), **given)
    assert set(result.divergence) == {"mixed", "4 bits"}
    assert result.divergence["mixed"] > result.divergence["4 bits"]
    assert set(result.bits.values()) == {4}
    alone, _ = run("mixed", mixed=Mixed(4, (4,)), **given)
    assert same(state(model), state(alone))
    reference, total = bittern.load(DIGITS), 0.0
    for batch in given["data"]:
        right, got = (outputs(m, batch)["logits"].double() for m in (reference, model))
        total += float((got - right).square().sum() / right.square().sum()) / 2
    assert result.divergence["4 bits"] == pytest.approx(total, rel=1e-4)
    assert result.to_dict()["divergence"] == result.divergence


def upside_down(calls: Any, parts: Any) -> dict[str, float]:
    """Sensitivities by which attention wants many bits and the FFN few, whatever they lose."""
    bits = min(q.format.bits for _, q in fake_quants(calls[0].module))
    return {part: -bits * (10.0 if part == "attention" else -1.0) for part in parts.values()}


def test_mixed_precision_that_is_better() -> None:
    """Where different widths give better outputs than one, they are taken."""
    _, result = run("mixed", mixed=Mixed(4, (2, 4, 6)), method="minmax", recipe="w4a4", data=batches(16, 32))
    assert result.divergence["mixed"] < result.divergence["4 bits"]
    assert len(set(result.bits.values())) > 1


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
        ((3.5,), "minmax", ("no choice", "3.5")),
        ((5.0, ()), "minmax", ("candidate bits", "none")),
        ((5.0, (1, 8)), "minmax", ("candidate bits must be 2 to 12", "1, 8")),
        ((5.0, (4, 13)), "minmax", ("candidate bits must be 2 to 12", "13")),
        ((5.0,), "easyquant", ("easyquant", "parallel inputs")),
    ],
)
def test_impossible_mixed_precision(mixed: tuple[Any, ...], method: str, parts: tuple[str, ...]) -> None:
    """A target that no choice meets, impossible widths and sequential methods are refused before the model changes."""
    model = bittern.load(DIGITS)
    with refused(InputError, *parts):
        run("mixed", model=model, mixed=Mixed(*mixed), method=method)
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


# Blocks that run several times, and layers of which no search can be made


@torch.no_grad()
def largest_inputs(model: hf.PreTrainedModel, batch: dict[str, Any]) -> dict[str, float]:
    """The largest magnitude that each layer of a float model reads, in all its runs, padding left out."""
    mask, found = batch["attention_mask"].bool(), dict[str, float]()

    def look(name: str, x: Tensor) -> None:
        x = x[mask] if x.shape[:2] == mask.shape else x
        found[name] = max(found.get(name, 0.0), float(x.abs().max()))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, args, name=name: look(name, args[0]))
    model(**batch)
    return found


@pytest.mark.parametrize("method", ["minmax", "easyquant", "search", "bittern"])
def test_a_block_that_runs_twice(method: str, tmp_path: Path) -> None:
    """ALBERT, whose blocks share one module, is solved once, on the rows of all runs; a second call takes what is kept;
    no thread is left."""
    before, found = set(threading.enumerate()), []
    for _ in range(2):
        model, batch = SUPPORTED["albert"]()
        expected = outputs(model, batch)["logits"]
        result = quantize(model, "vt-w6a6", [batch], method=QUICK.get(method, method), folder=tmp_path)
        assert len({s.name for s in result.solved}) == len(result.solved) >= 8
        assert result.by_extremes == []
        found.append(state(model))
    assert same(*found)
    assert set(threading.enumerate()) <= before
    loss = float((outputs(model, batch)["logits"] - expected).norm() / expected.norm())
    assert loss < 0.2
    if method == "minmax":
        largest = largest_inputs(SUPPORTED["albert"]()[0], batch)
        for name, quantizer in fake_quants(model):
            if name.endswith("input_quantizer") and "albert_layers" in name:
                wanted = largest[name.removesuffix(".input_quantizer")] / 31
                assert float(quantizer.scale) == pytest.approx(wanted, rel=1e-5), name


def test_a_block_inside_another() -> None:
    """Blocks inside of a block, as in GroupViT's stages, which end with an attention, are solved as parts of it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    groups: Any = {"num_group_tokens": [4, 2], "num_output_groups": [4, 2], "assign_mlp_ratio": [1, 2]}
    config = hf.GroupViTVisionConfig(**sizes, **groups, depths=[1, 1], num_hidden_layers=2)
    model, batch = hf.GroupViTVisionModel(config).eval(), {"pixel_values": torch.randn(4, 3, 32, 32)}
    result = quantize(model, "w8a8", [batch], method=QUICK["bittern"])
    solved = {s.name for s in result.solved}
    assert {f"vision_model.encoder.stages.0.{x}.fc1" for x in ("layers.0.mlp", "downsample.mlp_channels")} <= solved
    assert result.by_extremes == []


class Odd(torch.nn.Module):
    """An FFN and layers beside it: one reads a vector, one three items of all samples, one nothing of small batches."""

    def __init__(self, mlp: torch.nn.Module, least: int = 2):
        super().__init__()
        self.mlp, self.least = mlp, least
        self.vector, self.windows, self.nothing = (torch.nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x) + self.vector(x.mean((0, 1))) + self.windows(x.flatten(0, 1)[:3]).mean(0)
        return out + self.nothing(x[: len(x) if len(x) > self.least else 0]).sum()


def odd_model(least: int) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    model, _ = SUPPORTED["vit"]()
    model.vit.layers[0].mlp = Odd(model.vit.layers[0].mlp, least)
    return model.eval()


@pytest.mark.parametrize("mixed", [None, Mixed(6.0, (4, 8))])
def test_unclear_inputs(mixed: Mixed | None, tmp_path: Path) -> None:
    """Layers that read a vector, or rows of no known sample, get the scales of their extremes and are named, also when
    the run goes on; one that reads nothing of a batch is solved on the others."""
    fmt = Format(bits=8, range="static")
    rule = Rule(roles=("stem", "qkv", "attention_output", "ffn", "head", "other"), weight=fmt, input=fmt)
    for _ in range(2):
        model = odd_model(2)
        images = [
            {"pixel_values": torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))} for n in (2, 5)
        ]
        given = quantize(model, Recipe(name="x", rules=(rule,)), images, method="search", mixed=mixed, folder=tmp_path)
        unclear = [f"vit.layers.0.mlp.{name}" for name in ("vector", "windows")]
        assert given.by_extremes == unclear
        names = [s.name for s in given.solved]
        assert "vit.layers.0.mlp.nothing" in names
        assert not set(unclear) & set(names)
        assert len(set(names)) == len(names)
        assert all(torch.isfinite(value).all() for value in outputs(model, images[0]).values())
        for name in unclear:
            layer = model.get_submodule(name)
            for quantizer in (layer.weight_quantizer, layer.input_quantizer):
                assert quantizer.scale is not None
            bits = layer.weight_quantizer.format.bits
            largest = float(layer.weight.detach().abs().max()) / (2 ** (bits - 1) - 1)
            assert float(layer.weight_quantizer.scale) == pytest.approx(largest, rel=1e-5)


def test_empty_inputs_only() -> None:
    """A layer that never reads a value is refused in one line, by both ways to calibrate."""
    fmt = Format(bits=8, range="static")
    formats = Recipe(name="x", rules=(Rule(roles=("ffn", "other"), weight=fmt, input=fmt),))
    batch = {"pixel_values": torch.randn(2, 3, 32, 32)}
    with refused(ModelError, "mlp.nothing.input never ran during calibration", "keep it float"):
        quantize(odd_model(2), formats, [batch], method="minmax")
    model = odd_model(2)
    bittern.simulate(model, formats, batch)
    with refused(ModelError, "mlp.nothing.input never ran during calibration", "keep it float"):
        bittern.calibrate(model, [batch])


def test_idle_tied_layer() -> None:
    """A layer of a block that never runs, and is tied to one that does, has that one's weight after a search."""
    model, batch = SUPPORTED["bert"]()
    block = model.bert.encoder.layer[0]
    block.never = torch.nn.Linear(32, 48)
    block.never.weight = block.intermediate.dense.weight
    quantize(model, "w8a8", [batch])
    assert torch.equal(block.never.quantized_weight(), block.intermediate.dense.quantized_weight())


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
