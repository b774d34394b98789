"""Static scales of activations: what calibration finds, what it refuses, and what it leaves behind."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from bittern import calibrate, simulate
from bittern.attention import Site
from bittern.errors import InputError, ModelError
from bittern.layers import QuantLayer, fake_quants, restore
from bittern.quantizers import FakeQuant
from bittern.recipe import Format, Recipe, Role, Rule
from families import SUPPORTED, Batch, tokens
from helpers import outputs, refused, same

LAYERS: tuple[Role, ...] = ("stem", "qkv", "attention_output", "ffn", "pooler", "head", "other")
POINTS = ("query", "key", "value", "map")


def static(**fields: Any) -> Format:
    return Format(range="static", **fields)


def recipe(inputs: Format, points: Format | None = None) -> Recipe:
    """Formats of activations alone, so that the float model sees what the quantizers see."""
    rules = (Rule(roles=LAYERS, input=inputs),)
    return Recipe(name="test", rules=(*rules, Rule(roles=("attention",), **dict.fromkeys(POINTS, points or inputs))))


def text_batches() -> list[Batch]:
    """Batches of differing size and length."""
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(5, 99, shape)} for shape in ((2, 12), (3, 7), (1, 20), (4, 2))]


def seen(model: hf.PreTrainedModel, batches: list[Batch]) -> dict[str, list[Tensor]]:
    """All inputs of the layers of a float model, through forward hooks."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, args, name=name: found[f"{name}.input"].append(args[0].flatten())
            )
    for batch in batches:
        outputs(model, batch)
    return found


def reference(x: Tensor, fmt: Format) -> tuple[float, float | None]:
    """Scale and offset of a format by the extremes of x, in plain words."""
    low, high, steps = min(x.min().item(), 0), max(x.max().item(), 0), 2**fmt.bits - 1
    if fmt.scheme == "asymmetric":
        scale = (high - low) / steps
        return scale, round(low / scale) * scale
    if fmt.scheme == "unsigned":
        return high / steps, None
    return max(-low, high) / (2 ** (fmt.bits - 1) - 1), None


@pytest.mark.parametrize(
    "fmt", [static(bits=8, scheme="asymmetric"), static(bits=4), static(bits=6, scheme="unsigned")], ids=str
)
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_scales_are_the_extremes_of_all_batches(name: str, fmt: Format) -> None:
    """Every input's scale is that of the extremes over all batches, of whatever shapes."""
    model, batch = SUPPORTED[name]()
    other = SUPPORTED[name]()[0]
    batches = text_batches() if name == "bert" else [{"pixel_values": torch.randn(n, 3, 32, 32)} for n in (2, 1, 3)]
    expected = {layer: torch.cat(values) for layer, values in seen(other, batches).items()}
    simulate(model, recipe(fmt), batch)
    calibrate(model, iter(batches))
    layers = {q.name: q for _, q in fake_quants(model) if q.name.endswith(".input")}
    assert layers.keys() == expected.keys()
    for layer, quantizer in layers.items():
        scale, offset = reference(expected[layer], fmt)
        assert quantizer.scale.item() == pytest.approx(scale, rel=1e-5)
        assert (quantizer.offset is None) == (offset is None)
        assert offset is None or quantizer.offset.item() == pytest.approx(offset, rel=1e-5, abs=1e-7)


def test_order_and_grouping_of_batches_do_not_matter() -> None:
    """The same samples in another order and in other batches give the same scales."""
    torch.manual_seed(0)
    ids = torch.randint(5, 99, (6, 9))
    found = []
    for groups in ((ids,), ids.split(2), ids.flip(0).split(1)):
        model, batch = SUPPORTED["bert"]()
        simulate(model, recipe(static(scheme="asymmetric"), static()), batch)
        calibrate(model, [{"input_ids": part} for part in groups])
        found.append(torch.stack([q.scale for _, q in fake_quants(model)]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_scales_per_head(name: str) -> None:
    """A static scale per head is that of the head's extremes over all batches and lengths."""
    model, batch = SUPPORTED[name]()
    points = static(bits=8, granularity="head")
    simulate(model, recipe(static(), points), batch)
    found: dict[str, list[Tensor]] = defaultdict(list)
    sites = [m for m in model.modules() if isinstance(m, Site)]
    for quantizer in (q for site in sites for q in site.children()):
        quantizer.register_forward_pre_hook(
            lambda q, args: found[q.name].append(args[0].abs().amax((0, 2, 3))) if q.observed is not None else None
        )
    calibrate(model, text_batches())
    for site in sites:
        for quantizer in site.children():
            heads = torch.stack(found[quantizer.name]).amax(0)
            assert len(found[quantizer.name]) == 4
            assert quantizer.scale.shape == (1, len(heads), 1, 1)
            torch.testing.assert_close(quantizer.scale.flatten(), heads / 127)
    for batch in text_batches():
        assert all(value.isfinite().all() for value in outputs(model, batch).values())


def test_activations_are_float_while_calibrating() -> None:
    """What one quantizer sees does not depend on those before it: calibrated at once or one after the other."""
    formats = recipe(static(bits=2), static(bits=2))
    model, batch = SUPPORTED["bert"]()
    simulate(model, formats, batch)
    calibrate(model, text_batches())
    together = {name: q.scale for name, q in fake_quants(model)}
    for name, quantizer in fake_quants(model):
        for _, other in fake_quants(model):
            other.observed = []  # float
        quantizer.scale, quantizer.observed = None, None
        calibrate(model, text_batches())
        assert torch.equal(quantizer.scale, together[name])


def test_calibrating_twice() -> None:
    """Scales that are there stay, whatever comes after, and nothing runs for them."""
    model, batch = SUPPORTED["bert"]()
    simulate(model, "w8a8", batch)
    calibrate(model, [batch])
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = outputs(model, batch)

    def never() -> Iterator[Batch]:
        raise AssertionError
        yield {}

    calibrate(model, never())
    calibrate(model, [])
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert same(outputs(model, batch), expected)


def test_float_model_needs_no_calibration() -> None:
    """A float model, or one whose scales are all dynamic, passes without a batch."""
    model, batch = SUPPORTED["vit"]()
    calibrate(model, [])
    simulate(model, "ternary-2-2-8", batch)
    calibrate(model, [])
    assert all(q.scale is None for _, q in fake_quants(model))


class BrokenError(Exception):
    pass


def broken() -> Iterator[Batch]:
    yield {"input_ids": tokens()}
    raise BrokenError


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", ["fine", "no batches", "nan", "never ran", "broken data", "wrong batch"])
def test_model_is_left_as_it_was(case: str, training: bool) -> None:
    """After success or any error the model is in its own mode and no quantizer observes; an error sets no scale."""
    model, batch = SUPPORTED["bert"]()
    simulate(model, "w8a8", batch)
    model.train(training)
    batches, error, parts = {
        "fine": ([batch], None, ()),
        "no batches": ([], InputError, ("no batches", "at least one")),
        "nan": ([batch], ModelError, ("encoder.layer.1", "NaN")),
        "never ran": ([batch], ModelError, ("unused.input never ran", "keep it float")),
        "broken data": (broken(), BrokenError, ()),
        "wrong batch": ([{"input_ids": torch.zeros(2, 3, 4, 5, 6)}], Exception, ()),
    }[case]
    if case == "nan":  # a value that only calibration data shows
        layer = model.bert.encoder.layer[0].output.LayerNorm
        layer.register_forward_hook(lambda _module, _args, out: out.index_fill(-1, torch.tensor([3]), torch.nan))
    if case == "never ran":
        model.unused = FakeQuant(static(), "unused.input").train(training)
    before = {name: q.scale for name, q in fake_quants(model)}
    if error is None:
        calibrate(model, batches)
    elif issubclass(error, InputError | ModelError):
        with refused(error, *parts):
            calibrate(model, batches)
    else:
        with pytest.raises(error):
            calibrate(model, batches)
    assert all(module.training is training for module in model.modules())
    assert all(q.observed is None for _, q in fake_quants(model))
    after = {name: q.scale for name, q in fake_quants(model)}
    assert all((after[name] is scale) == (scale is not None or error is not None) for name, scale in before.items())


def test_nan_is_told_by_the_name_of_the_layer() -> None:
    """The first layer that sees NaN is named, with what is wrong."""
    model, batch = SUPPORTED["vit"]()
    simulate(model, "w8a8", batch)
    batch["pixel_values"][1, 2, 3, 4] = torch.nan
    stem = next(name for name, m in model.named_modules() if isinstance(m, QuantLayer))
    with refused(ModelError, f"{stem}.input holds NaN or infinite values"):
        calibrate(model, [batch])


def test_restored_after_calibration() -> None:
    """Calibration changes no weight: restored, the model gives what it gave."""
    model, batch = SUPPORTED["gpt2"]()
    expected = outputs(model, batch)
    simulate(model, "w8a8", batch)
    calibrate(model, [batch])
    restore(model)
    model.set_attn_implementation("sdpa")
    assert same(outputs(model, batch), expected)
