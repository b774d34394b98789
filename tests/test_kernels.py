"""Packed models on the integer kernels against the same models without."""

import gc
import warnings
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

import bittern
from bittern import attention, kernels, native, products
from bittern.deploy import blocks
from bittern.deploy.packed import PackedLayer, PackedLinear, pack_layers
from bittern.layers import swap
from bittern.native.block import KernelLayer
from bittern.quantizers import FakeQuant, find_scale
from bittern.recipe import Format
from families import SUPPORTED
from helpers import outputs, quantized
from test_packed import LAYERS

pytestmark = pytest.mark.kernels
WITHOUT_ATTENTION = (  # on the kernels: theirs has a cap, or is the family's own code
    *("swin", "beit", "gemma2"),
    *("deberta_v2", "swinv2", "bloom"),
)
RECIPES = ["ternary-2-2-8", "w8a8", "w4a8", "vt-w6a6"]


def near(found: Tensor, expected: Tensor) -> bool:
    """Equal but for the rounding of a sum."""
    return bool((found - expected).norm() <= 2e-6 * expected.norm())


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], Counter[str]]:
    """Let each layer, norm, activation and attention of a model be compared, whenever it runs on the kernels, with what
    it gives without on the same input: rounding on the way could tip a value over to the next code. Counts what ran."""
    attend, ran = kernels.attend, Counter[str]()

    def compare(module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
        with native.disabled():
            assert near(out, module.forward(*args, **kwargs)), type(module).__name__
        ran[type(module).__name__] += 1

    def attend_and_compare(quantizers: Any, query: Tensor, key: Tensor, value: Tensor, masks: Any, scaling: Any) -> Any:
        found = attend(quantizers, query, key, value, masks, scaling)
        if found is not None:
            context, probabilities = found
            with native.disabled():
                q, k, v = (quantizers[p](x) for p, x in (("query", query), ("key", key), ("value", value)))
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
                scores = q.double() @ k.double().mT * scaling
                expected = sum(masks, scores).softmax(-1)
                assert near(probabilities, expected)
                assert near(context.transpose(1, 2), quantizers["map"](probabilities).double() @ v.double())
            ran["attention"] += 1
        return found

    monkeypatch.setattr(kernels, "attend", attend_and_compare)
    monkeypatch.setattr(blocks, "watched", lambda *_: True)  # whole blocks give the bits of their parts: test_blocks

    def start(model: nn.Module) -> Counter[str]:
        for module in model.modules():
            served: tuple[type[nn.Module], ...] = (PackedLayer, kernels.LayerNorm, *kernels.SERVED.values())
            if isinstance(module, served):
                module.register_forward_hook(compare, with_kwargs=True)
        ran.clear()
        return ran

    return start


@pytest.mark.parametrize("name", SUPPORTED)
def test_families(name: str, compared: Callable[[nn.Module], Counter[str]]) -> None:
    """In every family each part gives on the kernels what it gives without, but for rounding."""
    for recipe in [*RECIPES, "w8a8-token"]:
        model, batch = quantized(name, recipe)
        ran = compared(model)
        outputs(model, batch)
        assert ran["PackedLinear"] + ran["PackedConv1D"] > 5
        assert ran["attention"] or name in WITHOUT_ATTENTION


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_position_bias(masked: bool) -> None:
    """A position bias, with a mask or without, is added to the scores on the kernels too."""
    model, _ = quantized("t5", "w8a8")
    module = next(m for m in model.modules() if isinstance(m._modules.get(attention.NAME), attention.Site))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 7, 8, generator=generator) for _ in range(3))
    mask = torch.where(torch.rand(2, 1, 7, 7, generator=generator) < 0.3, -3e38, 0.0) if masked else None
    bias = 4 * torch.randn(1, 4, 7, 7, generator=generator)
    found = attention.attention_forward(module, query, key, value, mask, 1.0, position_bias=bias)
    with native.disabled():
        expected = attention.attention_forward(module, query, key, value, mask, 1.0, position_bias=bias)
        unbiased = attention.attention_forward(module, query, key, value, mask, 1.0)
    assert near(found[1], expected[1])
    assert (found[0] - expected[0]).norm() < 1e-2 * expected[0].norm()  # codes of the map may tip over
    assert not near(unbiased[1], expected[1])


Way = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Any]]  # from q, k, a bias and a mask to a map, and else


def usual(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    return F.dropout(((q @ k.mT) / 3 + bias + mask).softmax(-1), training=False), None


def in_place(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    scores = 0.25 * torch.matmul(q, k.transpose(2, 3))
    scores += bias
    scores.add_(mask)
    return F.softmax(scores, -1).to(q.dtype), None


def divided_after(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    return ((q @ k.mT + bias) / 3 + mask).softmax(-1), None


def changed_bias(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    bias = bias.clone()
    scores = q @ k.mT + bias
    bias *= -1
    return (scores + mask).softmax(-1), None


def kept_before(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    scores = q @ k.mT
    less = scores / 3
    scores += 5 * bias
    return (less + mask).softmax(-1), [scores, less]


def changed_before(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    scores = q @ k.mT
    less = scores / 3
    scores.clamp_(-0.1, 0.1)
    return (scores + less + mask).softmax(-1), None


def filled(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    scores = q @ k.mT + bias
    scores[mask.expand_as(scores) < 0] = -1e9
    return scores.softmax(-1), None


def told(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    scores = q @ k.mT + bias + mask
    probabilities = scores.softmax(-1)
    return probabilities, {"scores": scores, "maps": [probabilities]}


def per_head(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    return ((q @ k.mT) * torch.arange(1.0, q.shape[1] + 1)[:, None, None] + mask).softmax(-1), None


def wider(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    return (q @ k.mT + bias[..., :1] + mask).softmax(-1), None


def seen_twice(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    scores = q @ k.mT
    flat = scores.view(len(q), -1)
    scores += bias
    return (flat.view_as(scores) + mask).softmax(-1), None


def doubled(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    scores = q @ k.mT
    return (scores / 3 + scores + mask).softmax(-1), None


def in_buffer(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    torch.matmul(q, k.mT, out=(scores := bias.expand(len(q), -1, -1, -1).clone()))
    return (scores + mask).softmax(-1), None


@pytest.mark.parametrize(
    ("way", "served"),
    [(usual, True), (in_place, True), (told, True), (kept_before, True)]
    + [(way, False) for way in (divided_after, changed_bias, changed_before, filled, per_head, wider)]
    + [(way, False) for way in (seen_twice, doubled, in_buffer)],
)
@torch.no_grad()
def test_attention_in_own_code(way: Way, served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels compute attention that a model's own code writes, where scores become a map in steps that they know; else
    it runs as it is written. Whatever is kept of scores and maps, by the code or by hooks, has the numbers it would."""
    seen: list[Any] = []

    def forward(self: Any, x: Tensor, attention_mask: Tensor, position_bias: Tensor, *_: Any, **__: Any) -> Any:
        q, k, v = (layer(x).unflatten(2, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        self.last, rest = way(q, k, 40 * position_bias, attention_mask)
        return self.o((self.dropout(self.last) @ v).transpose(1, 2).flatten(2)), rest

    def told_after(module: nn.Module, given: Any, out: Any) -> None:
        seen.extend(tree_leaves(out))

    monkeypatch.setattr(MPNetSelfAttention, "forward", forward)
    model, batch = quantized("mpnet", "w8a8")
    modules = [module for module in model.modules() if isinstance(module, MPNetSelfAttention)]
    for module in modules:
        module.register_forward_hook(told_after)
        module.dropout.register_forward_hook(told_after)
    attend, found = kernels.attend, list[bool]()
    monkeypatch.setattr(kernels, "attend", lambda *given: (out := attend(*given), found.append(out is not None))[0])
    runs = []
    for _ in range(2):
        model(**batch)
        runs.append([*seen, *(module.last for module in modules)])
        seen.clear()
        for module in modules:
            module.bittern.on_kernels = False
    assert found == ([True] * 2 if served else [])
    for a, b in zip(*runs, strict=True):
        assert (a is b is None) or (a - b).norm() < 1e-2 * b.norm()  # codes may tip over


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_maps_that_are_returned(name: str) -> None:
    """They lie in memory as others do, of whatever length the texts are."""
    model, batch = quantized(name, "w8a8")
    assert batch["input_ids"].shape[1] % 16
    assert all(maps.is_contiguous() for maps in model(**batch, output_attentions=True).attentions)


@torch.no_grad()
def test_maps_that_are_kept() -> None:
    """Maps that a hook keeps have their numbers, also if it refers to them weakly besides, and if the forward ends by
    an exception."""
    model, batch = quantized("mpnet", "w8a8")
    expected = model(**batch, output_attentions=True).attentions[0]
    kept, known = list[Tensor](), WeakTensorKeyDictionary()

    def keep(module: nn.Module, given: Any, out: Tensor) -> None:
        kept.append(out)
        known[out] = True
        if len(kept) > 1:
            raise KeyError("enough is seen")

    model.get_submodule("mpnet.encoder.layer.0.attention.attn.dropout").register_forward_hook(keep)
    model(**batch)
    with pytest.raises(KeyError, match="enough"):
        model(**batch)
    assert len(kept) == len(known) == 2
    for found in kept:
        assert (found - expected).norm() < 1e-2 * expected.norm()  # codes may tip over


def test_einsum_by_products() -> None:
    """One that sums a dimension of the same size on both sides is a product; one that broadcasts it is left alone."""

    def called(function: Any, types: Any, given: Any) -> Any:
        return function(*given)

    left, right = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    made = products.einsum(called, "bqd, bkd -> bkq", left, right)
    assert torch.allclose(made, torch.einsum("bqd,bkd->bkq", left, right), atol=1e-6)
    assert products.einsum(called, "bqd,bkd->bkq", left[..., :1], right) is None


@torch.no_grad()
def test_nothing_waits_for_ever() -> None:
    """What stands for scores and maps is gone with the forward, without the help of a collector."""
    model, batch = quantized("mpnet", "w8a8")
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            outputs(model, batch)
        assert not [x for x in gc.get_objects() if type(x) is products.Watch]
    finally:
        gc.enable()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bart"])
@torch.no_grad()
def test_generation(name: str, cache: str, compared: Callable[[nn.Module], Counter[str]]) -> None:
    """So does each while a model generates, token by token, on keys and values from a cache; and without kernels the
    tokens and their scores are those of the simulated model."""
    packed, batch = quantized(name, "w8a8")
    simulated, _ = quantized(name, "w8a8", packed=False)
    given = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    options |= {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    expected = simulated.generate(**given, **options)
    with native.disabled():
        found = packed.generate(**given, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))
    ran = compared(packed)
    packed.generate(**given, **options)
    assert ran["attention"] >= 4
    assert ran["PackedLinear"] + ran["PackedConv1D"] > 20


def linear(weight: Format, given: Format, x: Tensor, name: str = "linear") -> nn.Module:
    torch.manual_seed(0)
    layer = LAYERS[name][0]()
    swap(layer, name, weight, given)
    if given.range == "static":
        layer.input_quantizer.set_scale(*find_scale(x, given))
    pack_layers(nn.ModuleList([layer]))
    return layer.eval()


SERVED = [
    (Format(kind="ternary"), Format()),
    (Format(kind="ternary", storage="base3", granularity="row"), Format(clip=0.5)),
    (Format(kind="binary"), Format(bits=4)),
    (Format(bits=3, granularity="row"), Format(granularity="token")),
    (Format(bits=8, granularity="row"), Format(scheme="asymmetric", range="static")),
    (Format(bits=4, scheme="unsigned"), Format(scheme="asymmetric", granularity="token")),
]
OTHERS = [
    (Format(bits=4, scheme="asymmetric"), Format()),
    (Format(bits=12), Format()),
    (Format(bits=2), Format(bits=9)),
    (Format(bits=4, granularity="group", group_size=4), Format()),
    (Format(bits=4), Format(bits=12)),
]


@pytest.mark.parametrize("name", ["linear", "conv1d"])
@pytest.mark.parametrize("formats", SERVED, ids=str)
@torch.no_grad()
def test_layers_multiply_in_integers(name: str, formats: tuple[Format, Format]) -> None:
    """A layer of a format that kernels know uses them, for any number of rows, and differs by rounding only."""
    for shape in ((12,), (0, 12), (1, 12), (2, 5, 12), (300, 12)):
        x = torch.randn(shape)
        layer = linear(*formats, x if x.numel() else torch.randn(3, 12), name)
        with native.disabled():
            expected = layer(x)
        assert layer.integer_product(x) is not None
        assert layer(x).shape == expected.shape
        assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("formats", OTHERS, ids=str)
@torch.no_grad()
def test_layers_without_kernels(formats: tuple[Format, Format]) -> None:
    """A format that integer kernels lack gives what the simulated layer does: its values, in sums of another order."""
    x = torch.randn(5, 12)
    layer = linear(*formats, x)
    assert layer.integer_product(x) is None
    with native.disabled():
        expected, terms = layer(x), layer.quantized_input(x).abs() @ layer.unpacked().abs().T
    assert ((layer(x) - expected).abs() <= 1e-6 * terms).all()
    assert not kernels.has_kernel(*formats)


def test_what_kernels_do_not_serve() -> None:
    """Gradients, other types, values that are not finite and calibration take the way of the simulated layer."""
    layer, x = linear(Format(kind="ternary"), Format(), torch.randn(3, 12)), torch.randn(3, 12)
    assert layer.integer_product(x) is not None
    assert layer.integer_product(x.clone().requires_grad_()) is None
    assert layer.integer_product(x.double()) is None
    assert layer.integer_product(x.to("meta")) is None
    broken = x.clone()
    broken[1, 3] = torch.nan
    assert layer.integer_product(broken) is None
    assert layer(broken).isnan().any()
    with bittern.layers.as_float(layer):
        assert layer.integer_product(x) is None
    y = x.clone().requires_grad_()
    layer(y).sum().backward()
    assert y.grad is not None


def convolution(weight: Format, given: Format, x: Tensor, layer: nn.Conv2d) -> nn.Conv2d:
    """A packed convolution, whose input is quantized for x."""
    swap(layer, "convolution", weight, given)
    if given.range == "static":
        layer.input_quantizer.set_scale(*find_scale(x, given))
    pack_layers(nn.ModuleList([layer]))
    return layer.eval()


WEIGHTS = (
    *(Format(kind="ternary"), Format(kind="binary"), Format(bits=3), Format(bits=4, granularity="row")),
    Format(bits=8, granularity="row"),
)
IMAGES = (
    *(Format(), Format(clip=1.0), Format(range="static"), Format(scheme="unsigned"), Format(bits=4)),
    *(Format(scheme="asymmetric", range="static"), Format(bits=5, scheme="asymmetric", range="static")),
    Format(scheme="asymmetric"),
)
PAIRS = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    formats=st.tuples(st.sampled_from(WEIGHTS), st.sampled_from(IMAGES)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(8, 20), st.integers(8, 20), st.integers(1, 70)),
    size=PAIRS,
    stride=PAIRS,
    dilation=st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 2)]),
    padding=st.one_of(st.sampled_from(["valid", "same"]), st.tuples(st.integers(0, 3), st.integers(0, 3))),
    last=st.booleans(),
    bias=st.booleans(),
)
@torch.no_grad()
def test_convolutions(
    formats: tuple[Format, Format],
    shape: tuple[int, ...],
    size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: Any,
    last: bool,
    bias: bool,
) -> None:
    """A convolution of any geometry gives on every kind of kernels and for any number of threads what the simulated one
    gives, however its input lies in memory; its codes come back as they were."""
    torch.manual_seed(0)
    (batch, channels, high, wide, outputs), stride = shape, (1, 1) if padding == "same" else stride
    x = torch.randn(batch, channels, high, wide) + 0.5
    x = x.to(memory_format=torch.channels_last) if last else x[:, :, :, : wide - 1]
    layer = nn.Conv2d(channels, outputs, size, stride, padding, dilation, bias=bias)
    padded = any(layer._reversed_padding_repeated_twice)
    layer = convolution(*formats, x, layer)
    codes = layer.weight_codes.clone()
    with native.disabled():
        expected = layer(x)
    try:
        for kind, threads in product(native.kinds(), (1, 3)):
            native.use(kind)
            torch.set_num_threads(threads)
            found = layer.integer_convolution(x)
            assert (found is None) == (padded and formats[1] == Format(scheme="asymmetric"))
            assert found is None or (found.shape == expected.shape and near(found, expected))
    finally:
        native.use()
        torch.set_num_threads(1)
    assert torch.equal(layer.weight_codes, codes)


@torch.no_grad()
def test_convolutions_without_kernels() -> None:
    """What the kernels do not convolve is computed as the simulated layer does, errors included."""
    x = torch.randn(2, 8, 9, 9)
    for changed in ({"groups": 2}, {"padding": 1, "padding_mode": "reflect"}):
        assert convolution(Format(), Format(), x, nn.Conv2d(8, 8, 3, **changed)).integer_convolution(x) is None
    layer = convolution(Format(), Format(range="static"), x, nn.Conv2d(8, 8, 3, padding=1))
    broken = x.clone()
    broken[1, 3, 8, 8] = torch.inf
    for other in (x[0], x[:0], x.double(), x.to("meta"), broken):
        assert layer.integer_convolution(other) is None
    assert layer(x[:0]).shape == (0, 8, 9, 9)
    assert layer(x[0]).shape == (8, 9, 9)
    assert near(layer(x.bfloat16()).float(), layer(x.bfloat16().float()).bfloat16().float())
    for wrong in (torch.randn(2, 7, 9, 9), torch.randn(1, 8, 9, 0), torch.randn(1, 8, 0, 9)):
        with pytest.raises(RuntimeError):
            layer(wrong)
    odd = Format(scheme="asymmetric", range="static")
    layer = convolution(Format(), odd, x, nn.Conv2d(8, 8, 3, padding=1))
    layer.input_quantizer.set_scale(torch.tensor(0.02), torch.tensor(-1.007))  # no code stands for 0
    assert layer.integer_convolution(x) is None


@torch.no_grad()
def test_convolutions_hold_codes_once() -> None:
    """Codes of convolutions are held once, and read, copied and moved in the order that a file has."""
    x = torch.randn(1, 5, 8, 8)
    layer = convolution(Format(bits=4, granularity="row"), Format(), x, nn.Conv2d(5, 9, 3, padding=1))
    codes, expected = layer.weight_codes.clone(), layer(x)
    assert "weight_codes" not in layer._buffers
    weight = layer.weight * 1
    with native.disabled():
        assert torch.allclose(layer(x), nn.functional.conv2d(layer.quantized_input(x), weight, layer.bias, padding=1))
    assert torch.equal(deepcopy(layer)(x), expected)
    assert torch.equal(layer.state_dict()["weight_codes"], codes)
    assert torch.equal(layer(x), expected)


@torch.no_grad()
def test_shared_inputs_are_read_again_when_changed() -> None:
    """Layers that read one tensor share its codes, but not those it had before a change in place."""
    layer, x = linear(Format(kind="ternary"), Format(), torch.randn(3, 12)), torch.randn(3, 12)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            for _ in range(3):
                with native.disabled():
                    expected = layer(x)
                assert torch.allclose(layer(x), expected, atol=1e-5)
                x = x.clone() if torch.is_inference_mode_enabled() else x
                x.mul_(-1.7).add_(0.3)


def packed_layers(model: nn.Module) -> list[PackedLayer]:
    return [m for m in model.modules() if isinstance(m, PackedLayer)]


def test_codes_stay_in_one_place(tmp_path: Path) -> None:
    """Codes are held once, in the kernels' order, and are the file's for whatever reads, copies or saves them."""
    model, batch = quantized("bert", "ternary-2-2-8")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = outputs(model, batch)
    running = [m for m in packed_layers(model) if m._panels is not None]
    assert len(running) > 5
    assert not any("weight_codes" in m._buffers for m in running)
    for other in (deepcopy(model), model):
        assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
        assert all(torch.equal(v, expected[k]) for k, v in outputs(other, batch).items())
    bittern.save(model, tmp_path / "saved")
    assert all(torch.equal(v, expected[k]) for k, v in outputs(bittern.load(tmp_path / "saved"), batch).items())
    outputs(model, batch)
    model.load_state_dict({key: torch.zeros_like(v) if "codes" in key else v for key, v in before.items()})
    outputs(model, batch)
    assert running[0].weight_codes.eq(0).all()
    assert model.double().dtype == torch.float64


def test_attention_is_watched_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention runs on the kernels, except while something is recorded or replaced in it."""
    model, batch = quantized("vit", "w8a8")
    calls: list[Any] = []
    attend = native.attention
    monkeypatch.setattr(native, "attention", lambda *args: calls.append(args) or attend(*args))
    plain = outputs(model, batch)["logits"]
    count = len(calls)
    assert count == len(attention.sites(model))
    with attention.recording(model, "map") as taps, torch.no_grad():
        recorded = model(**batch).logits
    assert len(calls) == count
    assert len(taps["map"]) == count
    assert torch.allclose(recorded, plain, rtol=0.05, atol=0.05)
    with torch.no_grad():
        maps = model(**batch, output_attentions=True).attentions
    assert all(torch.allclose(ours, theirs, atol=0.02) for ours, theirs in zip(maps, taps["map"], strict=True))


def test_loading_says_when_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without kernels gives the same outputs and one warning that says why it is slow."""
    model, batch = quantized("vit", "ternary-2-2-8")
    bittern.save(model, tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bittern.load(tmp_path / "model")
    with native.disabled():
        expected = outputs(model, batch)
    monkeypatch.delenv("BITTERN_KERNELS", raising=False)
    monkeypatch.setattr("bittern.native.library._cpu_flags", lambda: frozenset({"sse2"}))
    native.use()
    try:
        assert native.kinds() == []
        with pytest.warns(UserWarning, match="this CPU runs none of the kernels"):
            slow = bittern.load(tmp_path / "model")
        assert all(torch.equal(value, expected[key]) for key, value in outputs(slow, batch).items())
    finally:
        monkeypatch.undo()
        native.use()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers and attention of a 16-bit model multiply on the kernels and give their input's type."""
    linear, attend, ran = KernelLayer.product, native.attention, Counter[str]()
    monkeypatch.setattr(KernelLayer, "product", lambda *given: (ran.update(["linear"]), linear(*given))[1])
    monkeypatch.setattr(native, "attention", lambda *given: (ran.update(["attention"]), attend(*given))[1])
    model, batch = SUPPORTED["bert"]()
    bittern.simulate(model.to(dtype), "ternary-2-2-8", batch)
    bittern.pack(model)
    layers: list[tuple[nn.Module, list[Any]]]
    layers = [(m, []) for m in model.modules() if isinstance(m, PackedLayer) and not isinstance(m, nn.Embedding)]
    for layer, seen in layers:
        layer.register_forward_hook(lambda _m, args, out, seen=seen: seen.append((args[0].clone(), out.clone())))
    assert outputs(model, batch)["logits"].dtype == dtype
    assert ran == {"linear": len(layers), "attention": 2}
    with native.disabled(), torch.no_grad():
        for layer, seen in layers:
            x, out = seen[0]
            plain = layer(x)
            assert (out.float() - plain.float()).norm() < 0.01 * plain.float().norm()


def test_gradient_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed model called without torch.no_grad() runs on the kernels, whole blocks too, since nothing is trained."""
    model, batch = quantized("bert")
    expected = outputs(model, batch)
    monkeypatch.setattr(PackedLinear, "unpacked", None)  # no weight is unpacked
    with warnings.catch_warnings(action="error"):
        found = model(**batch).logits
    assert torch.equal(found, expected["logits"])
    assert not found.requires_grad


def test_whoever_leaves_the_kernels_is_told() -> None:
    """A packed model that computes in float names the cause: a type, or gradients. Without a cause nothing is said."""
    model, batch = quantized("bert")
    with warnings.catch_warnings(action="error"):
        outputs(model, batch)
        with native.disabled():
            outputs(model.requires_grad_(True), batch)
    with pytest.warns(UserWarning, match="leaves the integer kernels.*gradients are asked for"):
        model(**batch).logits.sum().backward()
    assert model.classifier.bias.grad is not None
    with pytest.warns(UserWarning, match=r"leaves the integer kernels.*torch.float64"):
        quantized("bert")[0].double()(**batch)


def test_more_keys_than_the_kernels_take() -> None:
    """Attention to more keys than the kernels take is computed the slower way."""
    formats = {name: FakeQuant(Format(), name) for name in ("query", "key", "value", "map")}
    query, long = torch.randn(1, 1, 1, 4), torch.randn(1, 1, native.MOST_INPUTS + 1, 4)
    assert kernels.attend(formats, query, long[:, :, :9], long[:, :, :9], (), 0.5) is not None
    assert kernels.attend(formats, query, long, long, (), 0.5) is None


def test_inference_mode() -> None:
    """A model that is made, quantized, packed and run inside torch.inference_mode gives what it gives outside."""
    model, batch = quantized("bert", "ternary-2-2-8")
    expected = outputs(model, batch)
    with torch.inference_mode():
        inside, batch = quantized("bert", "ternary-2-2-8")
        for _ in range(2):
            assert torch.equal(inside(**batch).logits, expected["logits"])
