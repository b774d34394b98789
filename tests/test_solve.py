"""What is set in a layer or an attention module, measured on the model itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import bittern
from bittern import pack
from bittern.errors import ModelError
from bittern.layers import QuantLayer, as_float, fake_quants, weight_matrix
from bittern.ptq.methods import METHODS, Method, find_method
from bittern.ptq.model import quantize
from bittern.ptq.solve import solve_layers
from bittern.quantizers import fake_quantize, find_scale
from bittern.recipe import Format, Recipe, Rule
from families import SUPPORTED
from helpers import outputs, refused, same

GOLDEN = load_file(Path(__file__).parent / "data" / "golden.safetensors")
STATIC8 = Format(bits=8, range="static")
SEARCHED = [name for name, m in METHODS.items() if m.space is not None]


def quick(method: str | Method, **changes: Any) -> Method:
    """A method with less to search."""
    method = find_method(method)
    space = method.space and replace(method.space, candidates=15, rounds=3)
    return replace(method, space=space, **changes)


def recipe(bits: int, **attention: Any) -> Recipe:
    """Per-tensor formats for the layers of blocks, and for attention."""
    fmt, weight = Format(bits=bits, range="static"), Format(bits=bits, range="static", granularity="row")
    points = dict.fromkeys(("query", "key", "value", "map"), fmt) | attention
    return Recipe(
        name="test",
        rules=(
            Rule(roles=("qkv", "attention_output", "ffn"), weight=weight, input=fmt),
            Rule(roles=("attention",), **points),
        ),
    )


def layer_of(weight: Tensor, bias: bool = True, bits: int = 8, scheme: str = "symmetric", unit: str = "row") -> Any:
    """A linear layer as `simulate` makes it, with static formats."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    layer.weight.data.copy_(weight)
    fmt = Format(bits=bits, granularity=unit, range="static")
    bittern.layers.swap(layer, "layer", fmt, Format(bits=bits, scheme=scheme, range="static"))
    layer.weight_quantizer.set_scale(*find_scale(weight, fmt))
    return layer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Bias


def test_golden_bias() -> None:
    """With the scales of the extremes the bias is corrected by what the golden file says."""
    x, w = GOLDEN["vt.linear.x"].flatten(0, 1), GOLDEN["vt.linear.w_in_out"].T.contiguous()
    layer = layer_of(w, bits=6, unit="tensor")
    before = layer.bias.detach().clone()
    solve_layers({"layer": layer}, x, torch.arange(3).repeat_interleave(6), Method("x", correct_bias=True))
    torch.testing.assert_close(layer.bias.detach() - before, GOLDEN["vt.linear.bias_correction"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["vt", "search", "bittern"])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_mean_error(method: str, scheme: str) -> None:
    """After the correction no output unit is off on average over the calibration rows."""
    x, w = random(60, 12) + 0.5, random(7, 12, seed=1)
    layer = layer_of(w, bits=4, scheme=scheme)
    expected = nn.functional.linear(x, layer.weight, layer.bias).detach()
    solve_layers({"layer": layer}, x, torch.arange(60) // 10, quick(method))
    with torch.no_grad():
        error = (layer(x) - expected).mean(0)
        size = (layer(x) - expected).abs().mean()
    assert error.abs().max() < 1e-5 * expected.abs().max()
    assert size > 1e-2


def test_no_bias() -> None:
    """A layer without a bias has nothing to correct, and gets none."""
    layer = layer_of(random(7, 12), bias=False)
    solve_layers({"layer": layer}, random(30, 12, seed=1), torch.zeros(30, dtype=torch.long), quick("vt"))
    assert layer.bias is None


# Both ends of a range


def gelu_layer(x: Tensor) -> tuple[Any, Tensor]:
    layer = layer_of(random(7, 12, seed=1), bias=False, scheme="asymmetric", bits=4)
    layer.weight_quantizer = None
    return layer, x @ layer.weight.detach().T


def test_both_ends() -> None:
    """The range of GELU's outputs, short below and long above, is searched at both ends: no other factor of one end
    alone is better than what was found, and no common factor of both is nearly as good."""
    x = nn.functional.gelu(random(300, 12) - 1) + 3 * nn.functional.relu(random(300, 12, seed=2) - 2)
    layer, out = gelu_layer(x)
    space = replace(METHODS["search"].space, slack=0.0, rounds=10)
    solve_layers({"layer": layer}, x, torch.zeros(300, dtype=torch.long), Method("x", space=space))
    fmt, factors = layer.input_quantizer.format, space.factors(layer.input_quantizer.format)
    low, high = x.min(), x.max()

    def loss(f: Tensor, g: Tensor) -> float:
        scale, offset = find_scale(torch.stack([f * low, g * high]), fmt)
        with torch.no_grad():
            near = fake_quantize(x, fmt, scale, offset) @ layer.weight.T
        return float((near - out).square().sum() / out.square().sum())

    with torch.no_grad():
        found = float((layer(x) - out).square().sum() / out.square().sum())
    losses = np.array([[loss(f, g) for g in factors] for f in factors])
    i, j = np.unravel_index(abs(losses - found).argmin(), losses.shape)
    assert found == pytest.approx(losses[i, j], rel=1e-4)
    assert losses[i, j] <= min(losses[i].min(), losses[:, j].min()) + 1e-6
    assert losses[i, j] < 0.9 * np.diagonal(losses).min()


def test_one_end() -> None:
    """What is nowhere negative has no lower end to search, and is found like any other."""
    x = random(300, 12).abs()
    layer, out = gelu_layer(x)
    (solved,) = solve_layers({"layer": layer}, x, torch.zeros(300, dtype=torch.long), METHODS["search"])
    with torch.no_grad():
        found = float((layer(x) - out).square().sum() / out.square().sum())
    assert solved.after == pytest.approx(found, rel=1e-3)
    assert 0 < solved.after <= solved.before


# Reported losses


@pytest.mark.parametrize("method", ["vt", "easyquant", "search"])
def test_reported_losses(method: str) -> None:
    """Before and after are the losses that the layer itself shows with the scales of the extremes and as it is left."""
    x, w = random(40, 12), random(7, 12, seed=1)
    objective = find_method(method).space.objective

    def measured(layer: Any) -> float:
        with torch.no_grad():
            out = (x @ w.T).numpy().astype(np.float64)
            near = (layer(x) - bias).numpy().astype(np.float64)
        losses = []
        for a, b in zip(out.reshape(4, -1), near.reshape(4, -1), strict=True):
            if objective == "mse":
                losses.append(((b - a) ** 2).sum() / (a**2).sum())
            elif objective == "pearson":
                losses.append(1 - np.corrcoef(a, b)[0, 1])
            else:
                losses.append(1 - a @ b / np.sqrt((a @ a) * (b @ b)))
        return float(np.mean(losses))

    layer = layer_of(w, bits=4)
    bias = layer.bias.detach().clone()
    layer.input_quantizer.set_scale(*find_scale(x, layer.input_quantizer.format))
    before = measured(layer)
    (solved,) = solve_layers({"layer": layer}, x, torch.arange(4).repeat_interleave(10), quick(method))
    assert solved.before == pytest.approx(before, rel=1e-4)
    assert solved.after == pytest.approx(measured(layer), rel=1e-4)
    assert solved.after < solved.before
    ratio = layer.input_quantizer.scale / find_scale(x, layer.input_quantizer.format)[0]
    assert solved.scales["input"] == pytest.approx(ratio.item())


BLOCKS = {"vit": "vit.layers.0.*", "bert": "bert.encoder.layer.0.*", "gpt2": "transformer.h.0.*"}


@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str, family: str) -> None:
    """Every method runs on every kind of model; what it sets is finite, packs to the same outputs, and a searched
    scale loses no more than the scales of the extremes, but for the grid (which does not hold them)."""
    model, batch = SUPPORTED[family]()
    result = quantize(model, only_first_block(family, 4), [batch], method=quick(method))
    assert len(result.solved) == (6 if family == "gpt2" else 8)
    for solved in result.solved:
        assert np.isfinite([solved.before, solved.after]).all()
        if method in SEARCHED:
            assert solved.after <= 1.1 * solved.before + 1e-6, solved
        if method == "minmax":
            assert solved.after == pytest.approx(solved.before)
    expected = outputs(model, batch)
    assert all(torch.isfinite(value).all() for value in expected.values())
    assert same(outputs(pack(model), batch), expected)


def only_first_block(family: str, bits: int) -> Recipe:
    rules = recipe(bits).rules
    return Recipe(name="first", rules=tuple(r.model_copy(update={"modules": BLOCKS[family]}) for r in rules))


# Padding and odd data


@pytest.mark.parametrize("method", ["vt", "bittern", "easyquant"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_padding(method: str, family: str) -> None:
    """More padding changes no scale and no bias."""

    def solved(extra: int) -> dict[str, Tensor]:
        model, batch = SUPPORTED[family]()
        padded = {name: nn.functional.pad(value, (0, extra)) for name, value in batch.items()}
        quantize(model, recipe(6), [padded], method=quick(method))
        return {n: t for n, t in model.state_dict().items() if n.endswith((".scale", ".offset", ".bias"))}

    plain, padded = solved(0), solved(9)
    assert plain.keys() == padded.keys()
    for name, value in plain.items():
        torch.testing.assert_close(padded[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["constant", "zeros", "zero row", "one sample", "one row"])
def test_odd_inputs(method: str, case: str) -> None:
    """Constant and zero inputs, a row of zero weights, one sample, one row: every scale is finite, every output too."""
    x, w, sample = random(20, 8), random(5, 8, seed=1), torch.arange(20) // 5
    if case in ("constant", "zeros"):
        x = torch.full_like(x, 0.7 if case == "constant" else 0.0)
    if case == "zero row":
        w[2] = 0
    if case in ("one sample", "one row"):
        sample = torch.zeros(20, dtype=torch.long)
    if case == "one row":
        x, sample = x[:1], sample[:1]
    layer = layer_of(w, bits=4)
    with torch.no_grad():
        (solved,) = solve_layers({"layer": layer}, x, sample, quick(method))
        assert torch.isfinite(layer(x)).all()
        assert np.isfinite([solved.before, solved.after]).all()
        if case == "zero row":
            assert not layer.quantized_weight()[2].any()


def test_one_class() -> None:
    """A batch of one image again and again, all of one class, gives what it gives once."""
    model, batch = SUPPORTED["vit"]()
    image = batch["pixel_values"][:1]
    found = []
    for count in (1, 5):
        model, _ = SUPPORTED["vit"]()
        quantize(model, recipe(6), [{"pixel_values": image.repeat(count, 1, 1, 1)}], method=quick("vt"))
        found.append({n: t for n, t in model.state_dict().items() if n.endswith(".scale")})
    for name, value in found[0].items():
        assert torch.isfinite(value).all()
        torch.testing.assert_close(found[1][name], value, rtol=0.1, atol=0, msg=name)


# Folding


@pytest.mark.parametrize("family", ["vit", "llama", "gpt2"])
@pytest.mark.parametrize("exponent", [0.5, 1.0])
@torch.no_grad()
def test_folds(family: str, exponent: float) -> None:
    """Ranges of channels that move from a norm into weights leave the float model's outputs as they were."""
    model, batch = SUPPORTED[family]()
    if family != "vit":
        del batch["attention_mask"]  # padded places mean nothing
    expected = outputs(model, batch)
    method = Method("fold", folds=(exponent,))
    wide = Format(bits=3, range="static")
    rows = Format(bits=8, granularity="row", range="static")
    narrow = Recipe(name="x", rules=(Rule(roles=("qkv", "ffn"), input=wide, weight=rows),))
    norms = {n: p.clone() for n, p in model.named_parameters() if "norm" in n or "ln_" in n}
    result = quantize(model, narrow, [batch], method=method)
    assert any(solved.folded for solved in result.solved)
    changed = [n for n, p in norms.items() if not torch.equal(p, model.get_parameter(n))]
    assert changed
    with as_float(model):
        for name, value in outputs(model, batch).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()))


def test_fold_that_helps() -> None:
    """Where one channel is far larger than the others the fold is taken, and the output error falls."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(12)
    norm.weight.data[3] = 60
    norm.bias.data.normal_()
    x = norm(torch.randn(80, 12)).detach()
    w = random(7, 12)
    sample = torch.arange(80) // 10
    losses = []
    for folds in ((), (0.5, 1.0)):
        layer, own = layer_of(w, bits=4), nn.LayerNorm(12)
        own.load_state_dict(norm.state_dict())
        with torch.no_grad():
            (solved,) = solve_layers({"a": layer}, x, sample, quick("search", folds=folds), norm=own)
        assert solved.folded == bool(folds)
        losses.append(solved.after)
    assert losses[1] < 0.6 * losses[0]


# Ties, formats


@pytest.mark.parametrize(("family", "owner"), [("t5", "shared"), ("gpt2", "transformer.wte")])
@pytest.mark.parametrize("method", ["bittern", "bit-split"])
def test_ties(family: str, owner: str, method: str) -> None:
    """A weight that others share keeps its values and stays shared; both get one scale."""
    model, batch = SUPPORTED[family]()
    assert model.get_submodule(owner).weight is model.lm_head.weight
    before = model.get_submodule(owner).weight.detach().clone()
    row = Format(bits=4, granularity="row", range="static")
    rules = (Rule(roles=("embedding",), weight=row), Rule(roles=("head", "ffn"), weight=row, input=STATIC8))
    quantize(model, Recipe(name="tied", rules=rules), [batch], method=quick(method))
    one, other = model.get_submodule(owner), model.lm_head
    assert one.weight is other.weight
    assert torch.equal(one.weight, before)
    expected = outputs(model, batch)
    assert same(outputs(pack(model), batch), expected)


@pytest.mark.parametrize("family", ["vit", "llama", "gpt2", "t5", "mpnet"])
def test_heads(family: str) -> None:
    """With scales per head each head of Q, K, V and the map has its own, grouped ones too, and the model runs."""
    model, batch = SUPPORTED[family]()
    head = Format(bits=6, granularity="head", range="static")
    rules = (Rule(roles=("attention",), query=head, key=head, value=head, map=head),)
    result = quantize(model, Recipe(name="heads", rules=rules), [batch], method=quick("vt"))
    assert result.by_extremes == []
    for _, quantizer in fake_quants(model):
        owned = 2 if family == "llama" and quantizer.name.endswith((".key", ".value")) else 4
        assert quantizer.scale.shape == (1, owned, 1, 1)
        assert len(quantizer.scale.unique()) > 1 or quantizer.name.endswith(".map")  # of causal maps all reach 1
    assert all(torch.isfinite(value).all() for value in outputs(model, batch).values())


def test_mixed_granularity() -> None:
    """Scales per head for one side of a product only are refused in one line."""
    model, batch = SUPPORTED["vit"]()
    head = Format(bits=6, granularity="head", range="static")
    with refused(ModelError, "query and key", "both have one scale per head, or neither"):
        quantize(model, recipe(6, query=head), [batch], method=quick("vt"))


def test_dynamic_and_ternary() -> None:
    """Of a ternary recipe with dynamic activations only what is static gets a scale; biases are corrected."""
    model, batch = SUPPORTED["vit"]()
    before = {n: p.clone() for n, p in model.named_parameters()}
    result = quantize(model, "ternary-2-2-8", [batch], method=quick("bittern"))
    assert result.by_extremes == []
    for name, quantizer in fake_quants(model):
        assert (quantizer.scale is None) == (quantizer.format.range == "dynamic"), name
    assert not any("query" in s.name for s in result.solved)
    changed = {n for n, p in before.items() if not torch.equal(p, model.get_parameter(n))}
    assert changed
    assert all(name.endswith("bias") for name in changed)
    assert all(s.scales == {} and not s.folded for s in result.solved)


def test_weights_keep_their_values() -> None:
    """Methods without rounding change scales and biases, never a weight; the rest of the model is untouched."""
    for method in ("vt", "easyquant", "omse", "percentile"):
        model, batch = SUPPORTED["bert"]()
        before = {n: p.clone() for n, p in model.named_parameters()}
        quantize(model, recipe(6), [batch], method=quick(method))
        changed = {n for n, p in before.items() if not torch.equal(p, model.get_parameter(n))}
        assert bool(changed) == find_method(method).correct_bias
        layers = {f"{n}.bias" for n, m in model.named_modules() if isinstance(m, QuantLayer)}
        assert changed <= layers


@pytest.mark.parametrize("method", ["adaround", "bit-split", "bittern"])
def test_rounded_weights_are_on_the_grid(method: str) -> None:
    """Rounded weights are whole codes of their scale, so that quantizing them again changes nothing."""
    layer = layer_of(random(6, 16), bits=4)
    with torch.no_grad():
        solve_layers({"layer": layer}, random(50, 16, seed=1), torch.arange(50) // 10, quick(method))
        codes = weight_matrix(layer) / layer.weight_quantizer.scale
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        torch.testing.assert_close(layer.quantized_weight(), layer.weight)
