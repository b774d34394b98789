"""Whole blocks on the kernels against the same blocks part by part."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bittern import attention
from bittern.deploy import blocks
from bittern.layers import fake_quants
from bittern.native.block import Block
from bittern.recipe import Format, Recipe, Rule
from families import SUPPORTED
from helpers import outputs, quantized, same

pytestmark = pytest.mark.kernels
WHOLE = ["bert", "roberta", "distilbert", "electra", "albert", "vit", "deit", "bart"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Each block that the kernels are asked for."""
    made: list[Any] = []
    run = Block.__call__
    monkeypatch.setattr(Block, "__call__", lambda self, *args: made.append(self) or run(self, *args))
    return made


def in_parts(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """What the model gives if no block is run whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_serves", lambda *_: False)
        return outputs(model, batch)


@pytest.mark.parametrize("name", SUPPORTED)
def test_families(name: str, calls: list[Any]) -> None:
    """Blocks of these families run whole, others stay as they are, and outputs are the same bits in both cases."""
    for recipe in ("ternary-2-2-8", "w8a8"):
        model, batch = quantized(name, recipe)
        expected = in_parts(model, batch)
        assert not calls
        assert same(outputs(model, batch), expected)  # the first time they are compared
        calls.clear()
        assert same(outputs(model, batch), expected)
        assert bool(calls) == (name in WHOLE)
        calls.clear()


@pytest.mark.parametrize(
    "layer", [{"weight": Format(bits=4, scheme="asymmetric"), "input": Format()}, {"weight": Format()}]
)
def test_layers_without_kernels(layer: dict[str, Format], calls: list[Any]) -> None:
    """A block of which the kernels serve the attention but not the layers runs in parts."""
    points = dict.fromkeys(("query", "key", "value", "map"), Format())
    recipe = Recipe(
        name="mixed",
        rules=(Rule(roles=("attention",), **points), Rule(roles=("qkv", "attention_output", "ffn"), **layer)),
    )
    model, batch = quantized("bert", recipe)
    expected = in_parts(model, batch)
    for _ in range(2):
        assert same(outputs(model, batch), expected)
    assert not calls


def test_first_calls_from_threads() -> None:
    """Threads that call a packed model at once, the first time, all get what one thread gets."""
    model, batch = quantized("bert", "ternary-2-2-8")
    expected = outputs(deepcopy(model), batch)
    for _ in range(5):
        fresh = deepcopy(model)
        gate = Barrier(8)

        def run(fresh: nn.Module = fresh, gate: Barrier = gate) -> dict[str, Tensor]:
            gate.wait()
            return outputs(fresh, batch)

        with ThreadPoolExecutor(8) as pool:
            found = [future.result() for future in [pool.submit(run) for _ in range(8)]]
        assert all(same(other, expected) for other in found)
        assert same(outputs(fresh, batch), expected)


def test_what_is_watched_runs_in_parts(calls: list[Any]) -> None:
    """Hooks inside, recorded signals, attention maps and gradients get what they ask for, and blocks go on after it."""
    model, batch = quantized("bert", "w8a8")
    expected, count = outputs(model, batch), len(attention.sites(model))
    calls.clear()
    layers = [m for m in model.modules() if hasattr(m, "integer_product")]
    seen: list[Any] = []
    for register in (nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook):
        nameless = partial(lambda *_: seen.append(1))  # as a hook may be
        hooks = [register(layer, nameless) for layer in layers]
        for _ in range(2):
            outputs(model, batch)
        for hook in hooks:
            hook.remove()
    assert len(seen) == 4 * len(layers)
    with attention.recording(model, "map") as taps:
        outputs(model, batch)
    assert len(taps["map"]) == count
    with torch.no_grad():
        assert len(model(**batch, output_attentions=True).attentions) == count
    assert model(**batch).logits.requires_grad
    model.train()
    outputs(model, batch)
    assert not calls
    model.eval()
    for _ in range(2):
        assert same(outputs(model, batch), expected)
    assert len(calls) == 2 * count


@torch.no_grad()
def test_changes_are_seen(calls: list[Any]) -> None:
    """After a change of weights, scales, biases or norms a block gives what its parts give, and so does a copy."""
    model, batch = quantized("vit", "w8a8")
    outputs(model, batch)
    layer = [m for m in model.modules() if hasattr(m, "integer_product")][-2]
    norm = next(m for m in model.modules() if isinstance(m, nn.LayerNorm))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for change in (
        lambda: layer.bias.add_(torch.randn(len(layer.bias))),  # type: ignore[union-attr, arg-type, operator]
        lambda: [q.set_scale(q.scale * 2, q.offset) for _, q in fake_quants(model) if q.scale is not None],
        lambda: norm.weight.mul_(2),
        lambda: setattr(norm, "bias", nn.Parameter(torch.ones_like(norm.bias))),
        lambda: model.load_state_dict({k: v * 0 if "codes" in k else v for k, v in state.items()}),
    ):
        before = outputs(model, batch)
        change()
        expected = in_parts(model, batch)
        assert not same(before, expected)
        assert same(outputs(model, batch), expected)
        calls.clear()
        copied = deepcopy(model)
        for either in (model, copied, copied):
            assert same(outputs(either, batch), expected)
        assert calls


def test_other_modules_are_seen(calls: list[Any]) -> None:
    """A block into which somebody put another module runs as it is written, with that module."""
    model, batch = quantized("bert", "w8a8")
    before = outputs(model, batch)
    attending = model.bert.encoder.layer[0].attention.self
    width = model.config.hidden_size
    attending.query = nn.Linear(width, width).eval()
    calls.clear()
    found = outputs(model, batch)
    assert len(calls) == model.config.num_hidden_layers - 1
    assert not same(found, before)
    assert same(found, in_parts(model, batch))
