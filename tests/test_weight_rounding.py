"""Codes chosen by inputs: against exhaustive search, a naive loop and least squares in numpy."""

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bittern.errors import ModelError, RecipeError
from bittern.ptq import weight_rounding
from bittern.ptq.weight_rounding import output_error, ridge
from bittern.quantizers import code_range, decode, encode, fake_quantize, find_scale
from bittern.recipe import Format

FORMATS = [
    Format(bits=bits, scheme=scheme, granularity=unit, group_size=4 if unit == "group" else None, range="static")
    for bits in (2, 4, 8, 12)
    for scheme, unit in (("symmetric", "row"), ("symmetric", "group"), ("asymmetric", "row"), ("asymmetric", "tensor"))
]


def adaround(weight: Tensor, fmt: Format, *given: object, **options: float) -> Tensor:
    """The values alone; format and scale are as they were."""
    values, found, scale = weight_rounding.adaround(weight, fmt, *given, **options)
    assert (found, scale) == (fmt, given[0])
    return values


def compensate(weight: Tensor, fmt: Format, *given: object, **options: float) -> Tensor:
    """The values alone; format and scale are as they were."""
    values, found, scale = weight_rounding.compensate(weight, fmt, *given, **options)
    assert (found, scale) == (fmt, given[0])
    return values


def bit_split(weight: Tensor, fmt: Format, *given: object, **options: int) -> tuple[Tensor, Tensor]:
    """The values and their scales; the format is as it was."""
    values, found, (scale, _) = weight_rounding.bit_split(weight, fmt, None, *given, **options)
    assert found == fmt
    return values, scale


ROUNDERS: dict[str, Callable[..., Tensor]] = {
    "compensate": compensate,
    "adaround": partial(adaround, steps=60),
}
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
each_rounder = pytest.mark.parametrize("method", ROUNDERS)
property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def layer(rows: int, columns: int, samples: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs of unequal size, and the same inputs in 4 bits."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) * torch.linspace(0.2, 1, columns)
    x = torch.randn(samples, columns, generator=generator) @ mix + 0.3
    return weight, x, fake_quantize(x, Format(bits=4))


def products(x: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    seen_or_x = x if seen is None else seen
    return seen_or_x.t() @ seen_or_x, None if seen is None else seen.t() @ x


def outputs_differ(weight: Tensor, quantized: Tensor, x: Tensor, seen: Tensor | None = None) -> np.ndarray:
    """‖Xw − X̂ŵ‖² of each row, in numpy."""
    w, q, x64 = weight.double().numpy(), quantized.double().numpy(), x.double().numpy()
    other = x64 if seen is None else seen.double().numpy()
    return np.square(x64 @ w.T - other @ q.T).sum(0)


def on_grid(quantized: Tensor, fmt: Format, scale: Tensor, offset: Tensor | None = None) -> bool:
    return torch.equal(decode(encode(quantized, fmt, scale, offset), fmt, scale, offset), quantized)


# All of them


@each_rounder
@each_format
@pytest.mark.parametrize("drift", [False, True], ids=["float inputs", "quantized inputs"])
def test_result_is_on_the_grid(method: str, fmt: Format, drift: bool) -> None:
    """The values encode and decode to themselves, bit for bit, and have the shape and type of a float32 weight."""
    weight, x, seen = layer(6, 24)
    weight[2], weight[3] = 0, 0.7
    scale, offset = find_scale(weight * 0.8, fmt)
    got = ROUNDERS[method](weight, fmt, (scale, offset), *products(x, seen if drift else None))
    assert (got.shape, got.dtype) == (weight.shape, torch.float32)
    assert on_grid(got, fmt, scale, offset)


@property_test
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 4),
    samples=st.integers(1, 12),
    bits=st.integers(2, 12),
    seed=st.integers(0, 99),
)
def test_any_shape(rows: int, columns: int, samples: int, bits: int, seed: int) -> None:
    """Any shape works, with fewer samples than columns too, and gives values on the grid."""
    weight, x, seen = layer(rows, 4 * columns, samples, seed)
    group = Format(bits=bits, scheme="asymmetric", granularity="group", group_size=4, range="static")
    row = Format(bits=bits, granularity="row")
    for fmt in (group, row):
        scale, offset = find_scale(weight, fmt)
        for method in ROUNDERS.values():
            for given_inputs in (None, seen):
                got = method(weight, fmt, (scale, offset), *products(x, given_inputs))
                assert on_grid(got, fmt, scale, offset)
    got, scale = bit_split(weight, row, *products(x, seen))
    assert on_grid(got, row, scale)


@each_rounder
def test_no_randomness(method: str) -> None:
    """The same inputs give the same bits."""
    weight, x, _ = layer(8, 32)
    fmt = Format(bits=3, granularity="row")
    scale, _ = find_scale(weight, fmt)
    first, second = (ROUNDERS[method](weight, fmt, (scale, None), *products(x)) for _ in range(2))
    assert torch.equal(first, second)


@each_rounder
def test_works_without_grad_mode_and_on_parameters(method: str) -> None:
    """Parameters are read, not changed, also under inference mode."""
    weight, x, _ = layer(4, 16)
    parameter, fmt = torch.nn.Parameter(weight.clone()), Format(bits=3, granularity="row")
    scale, _ = find_scale(weight, fmt)
    expected = ROUNDERS[method](weight, fmt, (scale, None), *products(x))
    with torch.inference_mode():
        got = ROUNDERS[method](parameter, fmt, (scale, None), *products(x))
    assert torch.equal(got, expected)
    assert torch.equal(ROUNDERS[method](parameter, fmt, (scale, None), *products(x)), expected)
    assert torch.equal(parameter, weight)


@each_rounder
def test_rows_are_separate(method: str) -> None:
    """A row gets the codes that it gets alone."""
    weight, x, _ = layer(6, 32)
    fmt = Format(bits=3, granularity="row")
    scale, _ = find_scale(weight, fmt)
    together = ROUNDERS[method](weight, fmt, (scale, None), *products(x))
    alone = torch.cat([ROUNDERS[method](weight[[i]], fmt, (scale[[i]], None), *products(x)) for i in range(6)])
    assert (together == alone).float().mean() > 0.98  # a sum in another order may turn a tie


@each_rounder
def test_dead_inputs_get_nearest_codes(method: str) -> None:
    """Inputs that are always zero say nothing: their weights go to the nearest codes, and disturb no others."""
    weight, x, _ = layer(5, 16)
    x[:, 3:6] = 0
    fmt = Format(bits=3, granularity="row")
    scale, _ = find_scale(weight, fmt)
    got = ROUNDERS[method](weight, fmt, (scale, None), *products(x))
    live = [c for c in range(16) if c not in (3, 4, 5)]
    if method == "compensate":
        assert torch.equal(got[:, 3:6], fake_quantize(weight, fmt, scale)[:, 3:6])
        assert torch.equal(got[:, live], compensate(weight[:, live], fmt, (scale, None), *products(x[:, live])))
    silent = ROUNDERS[method](weight, fmt, (scale, None), torch.zeros(16, 16))
    assert torch.equal(silent, fake_quantize(weight, fmt, scale))


@pytest.mark.parametrize("where", ["weight", "gram", "cross"])
@pytest.mark.parametrize("method", [*ROUNDERS, "bit_split", "ridge"])
def test_no_nan(method: str, where: str) -> None:
    """NaN in a weight or a product of inputs is refused in one line that names it."""
    weight, x, seen = layer(4, 8)
    gram, cross = products(x, seen)
    {"weight": weight, "gram": gram, "cross": cross}[where][1, 2] = math.nan
    fmt = Format(bits=4, granularity="row")
    named = "a weight" if where == "weight" else f"{where} of a weight"
    call = {
        "ridge": lambda: ridge(weight, gram, cross, 0.01),
        "bit_split": lambda: bit_split(weight, fmt, gram, cross),
    }.get(method, lambda: ROUNDERS[method](weight, fmt, (torch.ones(4, 1), None), gram, cross))
    with pytest.raises(ModelError, match=rf"^{named} holds NaN or infinite values;[^\n]*$"):
        call()


def test_impossible_requests() -> None:
    """Wrong shapes and formats are refused with what was expected."""
    weight, x, _ = layer(4, 8)
    gram, scale = x.t() @ x, torch.ones(4, 1)
    row = Format(bits=4, granularity="row")
    with pytest.raises(ModelError, match=r"gram of a weight has the shape \(7, 7\); expected \(8, 8\)"):
        compensate(weight, row, (scale, None), gram[1:, 1:])
    with pytest.raises(ModelError, match=r"a weight has the shape \(8,\); expected \(rows, columns\)"):
        adaround(weight[0], row, (scale, None), gram)
    with pytest.raises(RecipeError, match="kind: uniform, got ternary"):
        compensate(weight, Format(kind="ternary"), (scale, None), gram)


@pytest.mark.parametrize("name", ["compensate", "adaround", "bit_split"])
def test_a_clip_is_for_training(name: str) -> None:
    """Codes may lie beyond a clip: it is no part of the format that is found, in which the values are on the grid."""
    weight, x, _ = layer(4, 8)
    clipped, find = Format(bits=4, granularity="row", clip=0.5), getattr(weight_rounding, name)
    free = clipped.model_copy(update={"clip": None})
    scale = find_scale(weight, free)
    got, fmt, found = find(weight, clipped, scale, x.t() @ x)
    assert fmt == free
    assert on_grid(got, fmt, *found)
    assert torch.equal(got, find(weight, free, scale, x.t() @ x)[0])


def test_bit_split_has_scales_per_row() -> None:
    """Whatever scales the format has, Bit-Split makes symmetric ones of rows."""
    weight, x, _ = layer(4, 8)
    for fmt in (Format(bits=4), Format(bits=4, scheme="asymmetric", granularity="group", group_size=4)):
        got, found, scale = weight_rounding.bit_split(weight, fmt, None, x.t() @ x)
        assert found == Format(bits=4, granularity="row")
        assert on_grid(got, found, *scale)


# Products of inputs


@pytest.mark.parametrize("drift", [False, True], ids=["float inputs", "quantized inputs"])
def test_output_error_is_that_of_the_outputs(drift: bool) -> None:
    """Differences of `output_error` are those of the outputs themselves."""
    weight, x, seen = layer(5, 12)
    given = (x, seen if drift else None)
    a, b = (fake_quantize(weight, Format(bits=bits, granularity="row")) for bits in (2, 3))
    got = output_error(weight, a, *products(*given)) - output_error(weight, b, *products(*given))
    expected = outputs_differ(weight, a, *given) - outputs_differ(weight, b, *given)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-3)


@pytest.mark.parametrize("damp", [1e-6, 0.01, 1.0])
@pytest.mark.parametrize("samples", [6, 200])
def test_ridge_is_least_squares(damp: float, samples: int) -> None:
    """`ridge` is numpy's least-squares weight of the inputs, with rows of √λ that hold it at the float weight."""
    weight, x, seen = layer(5, 12, samples)
    w, a, b = (t.double().numpy() for t in (weight, x, seen))
    root = math.sqrt(damp * np.square(b).sum(0).mean()) * np.eye(12)
    expected = np.linalg.lstsq(np.vstack([b, root]), np.vstack([a @ w.T, root @ w.T]), rcond=None)[0].T
    got = ridge(weight, seen.double().t() @ seen.double(), seen.double().t() @ x.double(), damp)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-3, atol=1e-3)


# GPTQ


def naive_compensate(
    w: np.ndarray, gram: np.ndarray, steps: np.ndarray, zero: np.ndarray, limits: tuple[int, int]
) -> np.ndarray:
    """Codes by the definition (optimal brain quantization in a fixed order): round a column, move the others by the
    inverse Hessian of what is left, and take the column out of it."""
    w, (low, high) = w.copy(), limits
    hessian = gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    left = list(np.argsort(-np.diag(gram), kind="stable"))
    codes = np.empty_like(w)
    while left:
        c = left[0]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        codes[:, c] = np.clip(np.rint((w[:, c] - zero[:, c]) / steps[:, c]), low, high)
        error = (w[:, c] - codes[:, c] * steps[:, c] - zero[:, c]) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return codes


@pytest.mark.parametrize("samples", [400, 40], ids=["enough samples", "rank-deficient"])
@each_format
def test_compensate_is_the_naive_loop(fmt: Format, samples: int) -> None:
    """Blocked updates with one Cholesky factor give the codes of the definition, over more columns than a block."""
    weight, x, _ = layer(3, 148, samples)
    gram = x.double().t() @ x.double()
    scale, offset = find_scale(weight * 0.8, fmt)

    def everywhere(t: Tensor | None) -> np.ndarray:
        if t is None:
            return np.zeros((3, 148))
        return (
            t.double().expand(3, 37, 4).reshape(3, 148).numpy() if t.dim() == 3 else t.double().expand(3, 148).numpy()
        )

    got = encode(compensate(weight, fmt, (scale, offset), gram, damp=0.01), fmt, scale, offset)
    expected = naive_compensate(
        weight.double().numpy(), gram.numpy(), everywhere(scale), everywhere(offset), code_range(fmt)
    )
    np.testing.assert_array_equal(got.numpy(), expected)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_compensate_beats_rounding(bits: int) -> None:
    """On correlated inputs the outputs are far better than with the nearest codes, in half the error or less."""
    weight, x, seen = layer(32, 64, 1000)
    fmt = Format(bits=bits, granularity="row")
    scale, _ = find_scale(weight, fmt)
    nearest = fake_quantize(weight, fmt, scale)
    got = compensate(weight, fmt, (scale, None), *products(x))
    assert outputs_differ(weight, got, x).sum() < 0.5 * outputs_differ(weight, nearest, x).sum()
    aware = compensate(weight, fmt, (scale, None), *products(x, seen))
    unaware = compensate(weight, fmt, (scale, None), *products(seen))
    assert outputs_differ(weight, aware, x, seen).sum() < outputs_differ(weight, unaware, x, seen).sum()


def test_compensate_without_damping() -> None:
    """A gram without full rank and damp 0 has no factor; damping grows until it has."""
    weight, x, _ = layer(4, 24, samples=5)
    fmt = Format(bits=4, granularity="row")
    scale, _ = find_scale(weight, fmt)
    assert on_grid(compensate(weight, fmt, (scale, None), *products(x), damp=0), fmt, scale)


# AdaRound


def best_rounding(weight: Tensor, fmt: Format, scale: Tensor, x: Tensor, seen: Tensor | None) -> np.ndarray:
    """The least output error of each row over all ways to round down or up."""
    low, high = code_range(fmt)
    floor = (weight.double() / scale.double()).floor().float()
    ways = torch.tensor(list(product((0.0, 1.0), repeat=weight.shape[1])))
    return np.array(
        [
            outputs_differ(row.expand(len(ways), -1), (base + ways).clamp(low, high) * step, x, seen).min()
            for row, base, step in zip(weight, floor, scale, strict=True)
        ]
    )


@pytest.mark.parametrize("drift", [False, True], ids=["float inputs", "quantized inputs"])
@pytest.mark.parametrize("bits", [2, 4])
def test_adaround_nearly_reaches_the_optimum(bits: int, drift: bool) -> None:
    """Of what the best of all 2^10 roundings gains over the nearest codes, nine tenths are found; no row loses."""
    weight, x, seen = layer(24, 10)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * 2
    x, seen = x + noise, seen + noise
    given, fmt = (x, seen if drift else None), Format(bits=bits, granularity="row")
    scale, _ = find_scale(weight, fmt)
    got = outputs_differ(weight, adaround(weight, fmt, (scale, None), *products(*given)), *given)
    nearest = outputs_differ(weight, fake_quantize(weight, fmt, scale), *given)
    best = best_rounding(weight, fmt, scale, *given)
    assert (got >= best * (1 - 1e-4)).all()
    assert (got <= nearest * (1 + 1e-4)).all()
    assert (nearest - got).sum() >= 0.9 * (nearest - best).sum()


@each_format
def test_adaround_rounds_down_or_up(fmt: Format) -> None:
    """No code is further than one from the weight, and none leaves the range."""
    weight, x, _ = layer(8, 16)
    scale, offset = find_scale(weight * 0.7, fmt)
    codes = encode(adaround(weight, fmt, (scale, offset), *products(x), steps=100), fmt, scale, offset)
    exact = weight if fmt.group_size is None else weight.unflatten(-1, (-1, 4))
    ratios = ((exact if offset is None else exact - offset) / scale).reshape(8, 16)
    low, high = code_range(fmt)
    assert (codes >= ratios.floor().clamp(low, high) - 1e-3).all()
    assert (codes <= ratios.ceil().clamp(low, high) + 1e-3).all()


def test_adaround_does_not_depend_on_units() -> None:
    """Weights and inputs in other units (a power of two) get the same codes: `strength` means the same everywhere."""
    weight, x, _ = layer(8, 24)
    fmt = Format(bits=4, granularity="row")
    scale, _ = find_scale(weight, fmt)
    first = adaround(weight, fmt, (scale, None), *products(x), steps=200)
    second = adaround(weight / 64, fmt, (scale / 64, None), *products(x * 16), steps=200)
    assert torch.equal(first / 64, second)


# Bit-Split


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("drift", [False, True], ids=["float inputs", "quantized inputs"])
def test_bit_split_outputs_only_improve(bits: int, drift: bool) -> None:
    """No row's outputs are worse than after the first stage or with the nearest codes; all codes are symmetric."""
    weight, x, seen = layer(16, 40)
    weight[3], weight[4] = 0, 0.5
    given, fmt = (x, seen if drift else None), Format(bits=bits, granularity="row")
    got, scale = bit_split(weight, fmt, *products(*given))
    first, _ = bit_split(weight, fmt)
    codes = encode(got, fmt, scale)
    assert scale.shape == (16, 1)
    assert on_grid(got, fmt, scale)
    assert codes.abs().max() <= 2 ** (bits - 1) - 1
    errors = outputs_differ(weight, got, *given)
    for other in (first, fake_quantize(weight, fmt)):
        assert (errors <= outputs_differ(weight, other, *given) * (1 + 1e-4) + 1e-6).all()
    assert errors.sum() < 0.9 * outputs_differ(weight, first, *given).sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bit_split_of_weights_alone(bits: int) -> None:
    """Without inputs the weights themselves get nearer than with the scale of the extremes."""
    weight, _, _ = layer(16, 40)
    fmt = Format(bits=bits, granularity="row")
    got, scale = bit_split(weight, fmt)
    nearest = fake_quantize(weight, fmt)
    assert on_grid(got, fmt, scale)
    assert ((got - weight).square().sum(1) <= (nearest - weight).square().sum(1) * (1 + 1e-6)).all()
    assert (got - weight).square().sum() < (nearest - weight).square().sum()


def test_bit_split_ends_where_nothing_helps() -> None:
    """In 2 bits, which are one plane, no other code in one place and no other scale of a row has better outputs."""
    weight, x, _ = layer(4, 12)
    fmt = Format(bits=2, granularity="row")
    got, scale = bit_split(weight, fmt, *products(x), epochs=200)
    codes, least = encode(got, fmt, scale).float(), outputs_differ(weight, got, x) * (1 - 1e-4)
    for column, code in product(range(12), (-1, 0, 1)):
        changed = codes.clone()
        changed[:, column] = code
        assert (outputs_differ(weight, changed * scale, x) >= least).all()
    for factor in (0.99, 1.01):
        assert (outputs_differ(weight, got * factor, x) >= least).all()
