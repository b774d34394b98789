"""All batches side by side, unit by unit: the same outputs as one forward after another."""

import threading
from collections import Counter

import pytest
import torch
import transformers as hf
from torch import nn

from bittern import read_anatomy
from bittern.attention import attention_configs
from bittern.errors import ModelError
from bittern.ptq.stream import stream
from families import SUPPORTED, Batch
from helpers import outputs, refused, same


def batches_of(batch: Batch) -> list[Batch]:
    """The batch as it is, one that differs in its numbers, and its first sample alone."""
    flipped = {k: v.flip(1) if v.dtype == torch.long and k.endswith("ids") else v * 1 for k, v in batch.items()}
    return [batch, flipped, {name: value[:1] for name, value in batch.items()}]


@torch.no_grad()
def run(model: hf.PreTrainedModel, units: list[str], batches: list[Batch]) -> list[str]:
    """A stream to its end; the units as they came."""
    seen = []
    for name, calls in stream(model, units, batches):
        seen.append(name)
        assert [call.batch for call in calls] == list(range(len(batches)))
        assert all(call.unit == name and call.module is model.get_submodule(name) for call in calls)
        for call in calls:
            call.output = call.run()
            first = call.output[0] if isinstance(call.output, tuple) else call.output
            assert not first.requires_grad
    return seen


def captured_outputs(model: hf.PreTrainedModel, units: list[str], batches: list[Batch]) -> list[dict[str, object]]:
    """What the model's forward gives for each batch inside a stream."""
    found: list[dict[str, object]] = [{} for _ in batches]
    plain = type(model).forward
    lock = {
        id(batch.get("input_ids", batch.get("pixel_values", batch.get("input_features")))): i
        for i, batch in enumerate(batches)
    }

    def forward(**batch: object) -> object:
        out = plain(model, **batch)
        first = batch.get("input_ids", batch.get("pixel_values", batch.get("input_features")))
        found[lock[id(first)]] = {n: v for n, v in out.items() if isinstance(v, torch.Tensor)}
        return out

    model.forward = forward
    try:
        run(model, units, batches)
    finally:
        del model.forward
    return found


@pytest.mark.parametrize("family", sorted(SUPPORTED))
def test_families(family: str) -> None:
    """Every family gives in a stream, bit by bit, what plain forwards give, in batches of several sizes."""
    model, batch = SUPPORTED[family]()
    units = [block.name for block in read_anatomy(model, batch).blocks]
    batches = batches_of(batch)
    for config in attention_configs(model):
        config.use_cache = False
    expected = [outputs(model, b) for b in batches]
    got = captured_outputs(model, units, batches)
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))


def vit() -> tuple[hf.PreTrainedModel, list[Batch], list[str]]:
    model, batch = SUPPORTED["vit"]()
    units = ["classifier", "vit.layers.1", "vit.layers.0", "vit.embeddings.patch_embeddings.projection"]
    return model, batches_of(batch), units


def test_order() -> None:
    """Units come in the order in which the model runs them, whatever order they are named in, each with all batches."""
    model, batches, units = vit()
    assert run(model, units, batches) == units[::-1]


def test_one_forward() -> None:
    """Every layer runs once for each batch."""
    model, batches, units = vit()
    counts: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda m, args, out, name=name: counts.update([name]))
    run(model, units, batches)
    assert set(counts.values()) == {len(batches)}
    assert len(counts) == 14


def test_output_is_what_goes_on() -> None:
    """The model goes on with the output that a call was given."""
    model, batches, units = vit()
    for name, calls in stream(model, units, batches):
        for call in calls:
            call.output = call.run()
            if name == "vit.layers.0":
                call.output = torch.zeros_like(call.output)
            if name == "vit.layers.1":
                assert not call.args[0].any()


def check_as_before(model: hf.PreTrainedModel, units: list[str], threads: set[threading.Thread]) -> None:
    assert set(threading.enumerate()) <= threads  # others may have ended
    assert not any("forward" in model.get_submodule(name).__dict__ for name in units)
    assert all(config.use_cache for config in attention_configs(model) if hasattr(config, "use_cache"))


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_leaving_early(steps: int) -> None:
    """Who leaves early leaves no thread, and the model with its own forward and cache."""
    model, batch = SUPPORTED["gpt2"]()
    units, threads = ["transformer.h.0", "transformer.h.1"], set(threading.enumerate())
    running = stream(model, units, [batch, batch])
    for _ in range(steps):
        for call in next(running)[1]:
            call.output = call.run()
    if steps:
        assert len(set(threading.enumerate()) - threads) == 2
        assert not model.config.use_cache
    running.close()
    check_as_before(model, units, threads)


@pytest.mark.parametrize("at", ["transformer.h.0.ln_1", "transformer.h.1.mlp", "lm_head", "transformer.wte"])
def test_errors(at: str) -> None:
    """An error inside the forward of one batch arrives as it is, and everything is as before."""
    model, batch = SUPPORTED["gpt2"]()
    units, threads = ["transformer.h.0", "transformer.h.1"], set(threading.enumerate())
    short = {name: value[:1] for name, value in batch.items()}

    def fail(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) == 1:
            raise RuntimeError("out of luck")

    hook = model.get_submodule(at).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        run(model, units, [batch, short, batch])
    hook.remove()
    check_as_before(model, units, threads)
    assert outputs(model, batch)


def test_different_ways() -> None:
    """Batches that take different ways through the model are refused in one line."""
    model, batch = SUPPORTED["clip"]()
    threads = set(threading.enumerate())
    units = ["vision_model.encoder.layers.0", "text_model.encoder.layers.0"]
    whole = type(model).forward

    def forward(**given: torch.Tensor) -> object:
        return whole(model, **given) if "pixel_values" in given else model.get_text_features(**given)

    model.forward = forward
    texts = {name: value for name, value in batch.items() if name != "pixel_values"}
    with refused(ModelError, "different ways", *units):
        run(model, units, [batch, texts])
    check_as_before(model, units, threads)


def test_input_changed_in_place() -> None:
    """A unit whose input was changed in place cannot run on it again, and says so."""
    model, batch = SUPPORTED["vit"]()
    with torch.no_grad():
        for unit, calls in stream(model, ["vit.layers.0"], [batch]):
            calls[0].output = calls[0].run()
            calls[0].args[0].mul_(2)
            with refused(ModelError, unit, "changed in place"):
                calls[0].run()
