"""Quantizers against golden values, independent references and the properties that every format must have."""

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file
from torch import Tensor

from bittern.errors import ModelError
from bittern.quantizers import FakeQuant, code_range, decode, encode, fake_quantize, find_scale
from bittern.recipe import Format

SHAPE = (2, 3, 4, 8)  # batch, heads, tokens, width: has units of every granularity
GOLDEN = load_file(Path(__file__).parent / "data" / "golden.safetensors")
CASES = sorted(
    key.removesuffix(".input")
    for key in GOLDEN
    if key.endswith(".input") and key.split(".")[0] in ("ternary", "symmetric", "asymmetric")
)
CODE_BOOKS = (
    {"kind": "ternary"},
    {"kind": "binary"},
    {"bits": 4},
    {"bits": 4, "scheme": "unsigned"},
    {"bits": 4, "scheme": "asymmetric"},
)
GRANULARITIES = ("tensor", "row", "group", "token", "head")
FORMATS = [
    Format(**book, granularity=unit, range=source, group_size=4 if unit == "group" else None)
    for book, unit, source in product(CODE_BOOKS, GRANULARITIES, ("dynamic", "static"))
    if (unit, source) != ("token", "static")
]
WIDTHS = [
    Format(kind=kind, scheme=scheme, bits=bits, range=source)
    for kind, scheme, widths in (
        ("uniform", "symmetric", (2, 3, 8)),
        ("uniform", "unsigned", (1, 2, 8)),
        ("uniform", "asymmetric", (1, 2, 8)),
    )
    for bits in widths
    for source in ("dynamic", "static")
]
STATIC = [fmt for fmt in FORMATS if fmt.range == "static"]
OWN_ROWS = [fmt for fmt in FORMATS if fmt.granularity in ("row", "group", "token")]
NEAREST = [fmt for fmt in FORMATS if fmt.kind == "uniform"]

each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
property_test = settings(max_examples=100, deadline=None, derandomize=True, database=None)
tensors = arrays(np.float32, (2, 1, 3, 8), elements=st.floats(-1024, 1024, width=32)).map(torch.from_numpy)


def random(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def golden_format(case: str) -> Format:
    """The format that a key of the golden file names: `ternary.per_row` or `symmetric.per_token.4bit`."""
    method, unit, *bits = case.split(".")
    book = {"kind": "ternary"} if method == "ternary" else {"scheme": method, "bits": int(bits[0].removesuffix("bit"))}
    return Format(**book, granularity=unit.removeprefix("per_"), clip=2.5)


def units(shape: tuple[int, ...], fmt: Format) -> list[list[tuple[int, ...]]]:
    """The positions that share a scale, unit by unit."""
    found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for place in np.ndindex(shape):
        if fmt.granularity == "tensor":
            unit: tuple[int, ...] = ()
        elif fmt.granularity == "head":
            unit = (place[1],) if fmt.range == "static" else place[:2]
        elif fmt.granularity == "group":
            unit = (*place[:-1], place[-1] // fmt.group_size)
        else:
            unit = place[:-1]
        found.setdefault(unit, []).append(place)
    return list(found.values())


def reference_scale(values: list[np.float32], fmt: Format) -> tuple[np.float32, np.float32]:
    """Scale and offset of one unit, from the definitions."""
    sizes, largest = [abs(v) for v in values], max(values)
    any_positive = largest > 0  # without, formats that start at zero have no range, and 1 stands for it
    mean = math.fsum(sizes) / len(sizes)
    if fmt.kind == "binary":
        return np.float32(mean), np.float32(0)
    if fmt.kind == "ternary":
        kept = [s for s in sizes if s > 0.7 * mean]
        return np.float32(math.fsum(kept) / len(kept)), np.float32(0)
    if fmt.scheme == "symmetric":
        return max(sizes) / np.float32(2 ** (fmt.bits - 1) - 1), np.float32(0)
    steps = np.float32(2**fmt.bits - 1)
    if fmt.scheme == "unsigned":
        return largest / steps if any_positive else np.float32(1), np.float32(0)
    low, high = min(values), largest
    if fmt.range == "dynamic":
        return (high - low) / steps, low
    low, high = min(low, np.float32(0)), max(high, np.float32(0))
    scale = (high - low) / steps
    return scale, np.rint(low / scale) * scale


def reference_value(v: np.float32, fmt: Format, scale: np.float32, offset: np.float32, mean: float) -> float:
    """What one value becomes, from the definitions; `mean` is the mean magnitude of its unit."""
    if fmt.kind == "binary":
        return float(-scale if v < 0 else scale)
    if fmt.kind == "ternary":
        return math.copysign(scale, v) if abs(v) > 0.7 * mean else 0.0
    half = 2 ** (fmt.bits - 1)
    low, high = (-half, half - 1) if fmt.scheme == "symmetric" else (0, 2 * half - 1)
    return min(max(np.rint((v - offset) / scale), low), high) * scale + offset


def reference(x: Tensor, fmt: Format, seen: Tensor) -> Tensor:
    """x quantized with the scales of `seen`, value by value."""
    values, basis, out = x.numpy(), seen.numpy(), np.empty(x.shape, np.float32)
    for unit in units(values.shape, fmt):
        scale, offset = reference_scale([basis[place] for place in unit], fmt)
        mean = math.fsum(abs(values[place]) for place in unit) / len(unit)
        for place in unit:
            out[place] = reference_value(values[place], fmt, scale, offset, mean)
    return torch.from_numpy(out)


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Equal to 1e-6 of the expected range."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * (expected.max() - expected.min()).item())


def mean_square_error(x: Tensor, **fmt: object) -> float:
    return (fake_quantize(x, Format(**fmt)) - x).square().mean().item()


# Exactness


def test_golden_file_is_complete() -> None:
    """All 16 quantizer cases of the golden file, of all three methods, are tested."""
    assert len(CASES) == 16
    assert {case.split(".")[0] for case in CASES} == {"ternary", "symmetric", "asymmetric"}


@pytest.mark.parametrize("case", CASES)
def test_golden_values(case: str) -> None:
    """Forward agrees with the published code to 1e-6 of the range, and the straight-through gradient exactly."""
    x, output, grad_output, grad_input = (
        GOLDEN[f"{case}.{part}"] for part in ("input", "output", "grad_output", "grad_input")
    )
    x = x.clone().requires_grad_()
    got = fake_quantize(x, golden_format(case))
    got.backward(grad_output)
    assert_close(got.detach(), output)
    assert torch.equal(x.grad, grad_input)


@pytest.mark.parametrize("fmt", [*FORMATS, *WIDTHS], ids=str)
def test_equals_reference(fmt: Format) -> None:
    """A tensor with scales of its own becomes what the definitions give, value by value."""
    x = random()
    assert_close(fake_quantize(x, fmt), reference(x, fmt, x))


@pytest.mark.parametrize("fmt", [*STATIC, *(f for f in WIDTHS if f.range == "static")], ids=str)
def test_equals_reference_beyond_range(fmt: Format) -> None:
    """With the scales of a narrower tensor, what lies beyond its range becomes the outermost code."""
    x, seen = random(), random(seed=1) / 2
    assert_close(fake_quantize(x, fmt, *find_scale(seen, fmt)), reference(x, fmt, seen))


def test_clip_comes_first() -> None:
    """A clip limits the tensor before its scale is found."""
    x, fmt = 4 * random(), Format(bits=4, clip=2.5)
    assert torch.equal(fake_quantize(x, fmt), fake_quantize(x.clamp(-2.5, 2.5), Format(bits=4)))


def test_one_bit_unsigned() -> None:
    """One unsigned bit has the values zero and maximum."""
    x = torch.tensor([-1.0, 0.2, 0.49, 0.51, 1.0])
    assert fake_quantize(x, Format(bits=1, scheme="unsigned")).tolist() == [0, 0, 0, 1, 1]


def test_binary_zero() -> None:
    """Binary has no code for zero: it counts as positive."""
    fmt, x = Format(kind="binary"), torch.tensor([-3.0, 0.0, 1.0, -0.0])
    assert encode(x, fmt, *find_scale(x, fmt)).tolist() == [-1, 1, 1, 1]
    assert fake_quantize(x, fmt).tolist() == [-1, 1, 1, 1]


def test_static_asymmetric_holds_zero() -> None:
    """A static asymmetric format represents zero exactly, also where all values have one sign."""
    fmt = Format(bits=4, scheme="asymmetric", range="static")
    for seen in (random(), random().abs() + 1, -random().abs() - 1):
        assert fake_quantize(torch.zeros(3), fmt, *find_scale(seen, fmt)).tolist() == [0, 0, 0]


# Properties of every format


@property_test
@given(fmt=st.sampled_from(FORMATS), x=tensors)
def test_idempotent(fmt: Format, x: Tensor) -> None:
    """Quantizing the output again with the same scale changes nothing."""
    scale = find_scale(x, fmt)
    once = fake_quantize(x, fmt, *scale)
    assert torch.equal(fake_quantize(once, fmt, *scale), once)


@property_test
@given(fmt=st.sampled_from([*FORMATS, *WIDTHS]), x=tensors, seen=tensors)
def test_codes_within_range(fmt: Format, x: Tensor, seen: Tensor) -> None:
    """No code leaves the range of its format, whether the scale comes from the tensor or from another one."""
    low, high = code_range(fmt)
    for source in (x, seen):
        codes = encode(x, fmt, *find_scale(source, fmt))
        assert low <= codes.min()
        assert codes.max() <= high


@property_test
@given(fmt=st.sampled_from(FORMATS), x=tensors, seen=tensors)
def test_decoded_codes_are_the_simulated_values(fmt: Format, x: Tensor, seen: Tensor) -> None:
    """Codes decode to exactly what the simulation computes, with own scales and with those of another tensor."""
    for source in (x, seen):
        scale = find_scale(source, fmt)
        assert torch.equal(decode(encode(x, fmt, *scale), fmt, *scale), fake_quantize(x, fmt, *scale))


@pytest.mark.parametrize("fmt", [*FORMATS, *WIDTHS], ids=str)
@pytest.mark.parametrize("unit", [1.0, 2.0**-149], ids=["normal", "subnormal"])
def test_own_scale_is_the_found_scale(fmt: Format, unit: float) -> None:
    """Without a scale the values are those of the scale that `find_scale` gives, down to the smallest numbers."""
    x = (190 * random()).round() * unit
    scale = find_scale(x, fmt)
    assert torch.equal(fake_quantize(x, fmt), decode(encode(x, fmt, *scale), fmt, *scale))


@property_test
@given(
    fmt=st.sampled_from([fmt for fmt in FORMATS if fmt.range == "dynamic"]),
    x=arrays(np.float32, (2, 1, 3, 8), elements=st.floats(-8, 8, width=16)).map(torch.from_numpy),
    exponent=st.integers(-10, 10),
)
def test_scale_equivariant(fmt: Format, x: Tensor, exponent: int) -> None:
    """A dynamic format follows the tensor: a factor of a power of two goes through exactly."""
    factor = 2.0**exponent
    assert torch.equal(fake_quantize(factor * x, fmt), factor * fake_quantize(x, fmt))


@property_test
@given(fmt=st.sampled_from(NEAREST), x=tensors, seen=tensors)
def test_no_code_is_nearer(fmt: Format, x: Tensor, seen: Tensor) -> None:
    """Uniform formats round to the nearest of all their values: within half a step, inside the range."""
    scale, offset = find_scale(seen, fmt)
    low, high = code_range(fmt)
    codes = torch.arange(low, high + 1, dtype=torch.int16)
    nearest = torch.stack([(decode(code.expand(x.shape), fmt, scale, offset) - x).abs() for code in codes]).amin(0)
    error = (fake_quantize(x, fmt, scale, offset) - x).abs()
    assert (error <= nearest + 1e-6 * max(x.abs().max(), seen.abs().max()) + 1e-37).all()


@pytest.mark.parametrize("granularity", ["tensor", "row", "head"])
@pytest.mark.parametrize("scheme", ["symmetric", "unsigned", "asymmetric"])
@pytest.mark.parametrize("seed", range(3))
def test_more_bits_less_error(scheme: str, granularity: str, seed: int) -> None:
    """Each further bit of a uniform format lowers the mean squared error of a random tensor."""
    x = random((2, 3, 16, 64), seed)
    x = x.abs() if scheme == "unsigned" else x
    bits = range(2 if scheme == "symmetric" else 1, 9)
    errors = [mean_square_error(x, bits=b, scheme=scheme, granularity=granularity) for b in bits]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("fmt", OWN_ROWS, ids=str)
def test_zero_rows_stay_zero(fmt: Format) -> None:
    """A row of zeros that has a scale of its own stays exactly zero beside rows that do not."""
    x = random()
    x[0, 1, 2] = 0
    assert torch.equal(fake_quantize(x, fmt)[0, 1, 2], torch.zeros(8))


@each_format
@pytest.mark.parametrize("value", [0.0, 0.3, -1000.0, 1e-44])
def test_constant_tensor(fmt: Format, value: float) -> None:
    """A constant tensor has no NaN and gives a constant of at most its size, zero for zero."""
    out = fake_quantize(torch.full(SHAPE, value), fmt)
    assert (out == out.flatten()[0]).all()
    assert (out.abs() <= abs(value) * (1 + 1e-6)).all()


@each_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(fmt: Format, dtype: torch.dtype) -> None:
    """Half-precision tensors keep their type and get the float32 result, cast."""
    x = random().to(dtype)
    assert torch.equal(fake_quantize(x, fmt), fake_quantize(x.float(), fmt).to(dtype))
    assert find_scale(x, fmt)[0].dtype == torch.float32


@pytest.mark.parametrize(
    "layout",
    [
        lambda: random((8, 4)).t(),
        lambda: random((4, 1)).expand(4, 8),
        lambda: random((8, 2, 3, 4)).permute(1, 2, 3, 0),
    ],
    ids=["transposed", "one column", "permuted"],
)
@each_format
def test_memory_layout_is_irrelevant(fmt: Format, layout: Callable[[Tensor], Tensor]) -> None:
    """Views give the same values, codes and gradients as their contiguous copies, up to the order of sums."""
    x = layout()
    if fmt.granularity == "head" and x.dim() < 4:
        x = x.expand(2, 3, *x.shape)
    results = []
    for view in (x.detach(), x.detach().contiguous()):
        view.requires_grad_()
        scale = find_scale(view / 2, fmt)
        out = fake_quantize(view, fmt, *scale)
        results.append((out, encode(view, fmt, *scale), *torch.autograd.grad(out.sum(), view)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@each_format
def test_input_is_left_alone(fmt: Format) -> None:
    """The tensor, its scale and its offset are read only."""
    x = random()
    scale, offset = find_scale(x, fmt)
    read = [t for t in (x, scale, offset) if t is not None]
    before = [t.clone() for t in read]
    fake_quantize(x, fmt)
    fake_quantize(x, fmt, scale, offset)
    decode(encode(x, fmt, scale, offset), fmt, scale, offset)
    assert all(torch.equal(a, b) for a, b in zip(read, before, strict=True))


@each_format
@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (0, 3, 4, 8), (2, 3, 0, 8)], ids=str)
def test_smallest_shapes(fmt: Format, shape: tuple[int, ...]) -> None:
    """One row and no rows at all are quantized too, and keep their shape."""
    x = random(shape).requires_grad_()
    out = fake_quantize(x, fmt)
    out.sum().backward()
    assert out.shape == x.grad.shape == shape
    assert torch.isfinite(out).all()


@each_format
@pytest.mark.parametrize("given_scale", [False, True], ids=["own scale", "given scale"])
def test_nan_stays_nan(fmt: Format, given_scale: bool) -> None:
    """NaN stays NaN where it is, with its own scale and with a given one, so that divergence is seen."""
    x = random()
    scale = find_scale(x, fmt) if given_scale else (None, None)
    x[0, 1, 2, 3] = torch.nan
    assert fake_quantize(x, fmt, *scale)[0, 1, 2, 3].isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("book", CODE_BOOKS, ids=lambda book: str(Format(**book)))
def test_no_scale_for_nan_or_infinity(book: dict, value: float) -> None:
    """NaN and infinity have no scale: the error names the tensor."""
    x = random()
    x[0, 0, 0, 0] = value
    with pytest.raises(ModelError, match=r"encoder\.query\.weight holds NaN or infinite"):
        find_scale(x, Format(**book), "encoder.query.weight")


def test_group_size_must_divide() -> None:
    """Rows that groups do not fill are refused with the numbers and the fix."""
    with pytest.raises(ModelError, match=r"group_size 3 does not divide the 8 inputs .* granularity: row"):
        fake_quantize(random(), Format(granularity="group", group_size=3))


# Gradients


@each_format
@pytest.mark.parametrize("clip", [None, 0.75])
def test_dynamic_gradient_passes_inside_clip(fmt: Format, clip: float | None) -> None:
    """With a scale of its own the gradient passes unchanged inside the clip and is zero at the clip and outside."""
    x, grad = random(), random(seed=1)
    x[0, 0, 0, :2] = torch.tensor([0.75, -0.75])
    x.requires_grad_()
    fake_quantize(x, fmt.model_copy(update={"clip": clip})).backward(grad)
    assert torch.equal(x.grad, grad if clip is None else grad * (x.abs() < clip))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("fmt", STATIC, ids=str)
def test_static_gradient_passes_inside_range(fmt: Format, clip: float | None, dtype: torch.dtype) -> None:
    """With a given scale the gradient of uniform formats also stops beyond the outermost codes, in float32 terms."""
    x, grad = random().to(dtype), random(seed=1).to(dtype)
    fmt = fmt.model_copy(update={"clip": clip})
    scale, offset = find_scale(x.float() * 0.999, fmt)  # the extremes of x are just outside
    low, high = (decode(torch.full(SHAPE, code, dtype=torch.int16), fmt, scale, offset) for code in code_range(fmt))
    x[0, 0], x[1, 1] = low[0, 0], high[1, 1]
    x.requires_grad_()
    fake_quantize(x, fmt, scale, offset).backward(grad)
    passes = torch.ones(SHAPE, dtype=torch.bool) if clip is None else x.abs() < clip
    if fmt.kind == "uniform":
        passes &= (low <= x.float()) & (x.float() <= high)
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, grad * passes)


def test_no_gradient_without_grad_mode() -> None:
    """Without grad mode, or for tensors that ask for none, no graph is built."""
    x = random().requires_grad_()
    with torch.no_grad():
        assert not fake_quantize(x, Format()).requires_grad
    assert not fake_quantize(x.detach(), Format()).requires_grad


# FakeQuant


def test_dynamic_module_is_the_function() -> None:
    """A dynamic quantizer needs no scale and computes `fake_quantize`."""
    x, fmt = random(), Format(bits=4, granularity="token")
    assert torch.equal(FakeQuant(fmt)(x), fake_quantize(x, fmt))
    assert str(fmt) in repr(FakeQuant(fmt))


def test_static_module_needs_a_scale() -> None:
    """A static quantizer without a scale says its name and what to do."""
    with pytest.raises(ModelError, match=r"layer\.input .* calibrate"):
        FakeQuant(Format(range="static"), "layer.input")(random())


@pytest.mark.parametrize("fmt", [fmt for fmt in STATIC if fmt.kind == "uniform"], ids=str)
def test_static_module_keeps_its_scale(fmt: Format) -> None:
    """A static quantizer uses the scale and offset it was given, whatever it sees."""
    quantizer, x, seen = FakeQuant(fmt), random(), random(seed=1) / 2
    quantizer.set_scale(*find_scale(seen, fmt))
    assert torch.equal(quantizer(x), fake_quantize(x, fmt, *find_scale(seen, fmt)))
    assert not list(quantizer.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
def test_impossible_scale(value: float) -> None:
    """A uniform scale that is not finite and positive is refused with the name of the tensor."""
    with pytest.raises(ModelError, match=r"layer\.weight: a scale must be finite and"):
        FakeQuant(Format(range="static"), "layer.weight").set_scale(torch.tensor([1.0, value]))


@pytest.mark.parametrize("kind", ["ternary", "binary"])
def test_zero_scale_of_zero_rows(kind: str) -> None:
    """Ternary and binary scales may be zero, those of rows of zeros are, and give zeros."""
    fmt, x = Format(kind=kind, granularity="row", range="static"), torch.zeros(2, 8)
    quantizer = FakeQuant(fmt)
    quantizer.set_scale(*find_scale(x, fmt))
    assert torch.equal(quantizer(x), x)


def test_scale_is_copied() -> None:
    """A quantizer owns its scale: changing it leaves the tensor alone that it was set from."""
    given = torch.tensor(0.5)
    first, second = (FakeQuant(Format(range="static")) for _ in range(2))
    for quantizer in (first, second):
        quantizer.set_scale(given)
    first.scale.mul_(2)
    assert given == second.scale == 0.5


@pytest.mark.parametrize(
    "fmt",
    [
        Format(bits=4, range="static"),
        Format(bits=4, range="static", scheme="asymmetric", granularity="row"),
        Format(kind="ternary", range="static", granularity="group", group_size=4),
    ],
    ids=str,
)
def test_state_dict_round_trip(fmt: Format) -> None:
    """Scale and offset travel in the state dict, and a quantizer that loads them computes the same."""
    x = random()
    source, target = FakeQuant(fmt), FakeQuant(fmt)
    source.set_scale(*find_scale(x / 2, fmt))
    target.set_scale(*find_scale(x, fmt))
    assert source.state_dict().keys() == {"scale"} | ({"offset"} if fmt.scheme == "asymmetric" else set())
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize(
    "fmt", [f for f in STATIC if f.granularity in ("tensor", "head") and f.kind not in ("ternary", "binary")], ids=str
)
def test_observed_extremes_give_the_scale(fmt: Format) -> None:
    """An observing quantizer passes x through and notes extremes whose scale is that of x."""
    quantizer, x = FakeQuant(fmt), random()
    quantizer.observed = []
    assert quantizer(x) is x
    found = find_scale(torch.cat(quantizer.observed[0], -1), fmt)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, find_scale(x, fmt), strict=True))


@pytest.mark.parametrize("kind", ["ternary", "binary"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_threads_do_not_change_bits(kind: str, granularity: str) -> None:
    """A scale is the same to the last bit however many threads compute it, or packing would differ from simulation."""
    fmt, before = Format(kind=kind, granularity=granularity), torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(1024, 768, generator=generator) for _ in range(8)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.stack([find_scale(weight, fmt)[0] for weight in weights]))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("fmt", [Format(kind="ternary", granularity="row"), Format(granularity="group", group_size=2)])
def test_result_can_be_changed_in_place(fmt: Format) -> None:
    """Model code may change what a quantizer gives in place, in training too, as GIT and CTRL do with embeddings."""
    x = torch.randn(3, 4, requires_grad=True)
    out = fake_quantize(x, fmt)
    out *= 2
    out.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
