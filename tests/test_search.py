"""The search against all candidates scored one by one in numpy, on a real layer with real, padded texts."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from bittern import load, simulate
from bittern.data.texts import sentences
from bittern.demo import minilm_folder
from bittern.layers import as_float
from bittern.ptq import search
from bittern.ptq.capture import Captured, Heads, capture
from bittern.ptq.product import Objective, Product, loss, ranking_penalty
from bittern.ptq.search import Space, candidate_scales, choose, search_left, search_right, search_weight
from bittern.ptq.stream import stream
from bittern.quantizers import fake_quantize, find_scale
from bittern.recipe import Format

GOLDEN = load_file(Path(__file__).parent / "data" / "golden.safetensors")
BLOCK, HEADS, CANDIDATES = "encoder.layer.2", 12, 100
OBJECTIVES: tuple[Objective, ...] = ("pearson", "cosine", "mse")
BITS = (8, 6, 4)
each_width = pytest.mark.parametrize("bits", BITS)


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates look at a part of the rows, as they do with the thousands of rows of a real calibration."""
    monkeypatch.setattr(search, "ESTIMATE_ROWS", 128)
    monkeypatch.setattr(search, "CROSS_ROWS", 128)


# The reference: what the float model reads and gives, and candidates in numpy


class Layer(NamedTuple):
    """A linear layer of the float model: its inputs without padding, the sample of each row, and its weight."""

    x: np.ndarray
    sample: np.ndarray
    weight: np.ndarray


class Block(NamedTuple):
    """What our own hooks saw in the float model, and what `capture` says of the same block."""

    layers: dict[str, Layer]
    heads: dict[str, list[np.ndarray]]  # per sample: query, key, value, map (heads, tokens, …)
    captured: Captured


@cache
def block() -> Block:
    """One block of all-MiniLM-L6-v2 on 12 sentences in padded batches of 4."""
    model, tokenizer = load(minilm_folder()), hf.AutoTokenizer.from_pretrained(minilm_folder())
    batches = [
        dict(tokenizer(sentences()[i : i + 4], padding=True, truncation=True, max_length=24, return_tensors="pt"))
        for i in range(0, 12, 4)
    ]
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    layers, heads = _hooked(model, batches)
    simulate(model, "vt-w8a8", batches[0])
    with as_float(model):
        for _unit, calls in stream(model, [BLOCK], batches):
            captured = capture(calls, batches, [4, 4, 4], 0)
    return Block(layers, heads, captured)


@torch.no_grad()
def _hooked(
    model: hf.PreTrainedModel, batches: list[dict[str, Tensor]]
) -> tuple[dict[str, Layer], dict[str, list[np.ndarray]]]:
    linears = {n: m for n, m in model.get_submodule(BLOCK).named_modules() if isinstance(m, nn.Linear)}
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in linears}
    hooks = [
        m.register_forward_hook(lambda m, args, out, name=name: seen[name].append((args[0], out)))
        for name, m in linears.items()
    ]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    valid = [mask.bool() for batch in batches for mask in batch["attention_mask"]]
    layers, made = {}, {}
    for name, linear in linears.items():
        x = [rows for given, _ in seen[name] for rows in given]
        made[name.rpartition(".")[2]] = [rows for _, out in seen[name] for rows in out]
        rows = [sample[mask] for sample, mask in zip(x, valid, strict=True)]
        sample = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
        layers[name] = Layer(torch.cat(rows).numpy(), sample, linear.weight.numpy().copy())
    heads: dict[str, list[np.ndarray]] = {"query": [], "key": [], "value": [], "map": []}
    for i, mask in enumerate(valid):
        q, k, v = (made[n][i][mask].view(-1, HEADS, 32).permute(1, 0, 2).numpy() for n in ("query", "key", "value"))
        scores = q.astype(np.float64) @ k.transpose(0, 2, 1) / np.sqrt(32)
        power = np.exp(scores - scores.max(-1, keepdims=True))
        probabilities = (power / power.sum(-1, keepdims=True)).astype(np.float32)
        for name, value in zip(heads, (q, k, v, probabilities), strict=True):
            heads[name].append(value)
    return layers, heads


def factors(bits: int) -> np.ndarray:
    return np.linspace(0.1 if bits <= 4 else 0.5, 1.2, CANDIDATES, dtype=np.float32)


def rounded(x: np.ndarray, low: Any, high: Any, factor: float, bits: int, scheme: str = "symmetric") -> np.ndarray:
    """x in the codes of a format whose extremes are low and high times a factor."""
    low, high = np.float32(low) * np.float32(factor), np.float32(high) * np.float32(factor)
    if scheme == "symmetric":
        scale = max(abs(low), abs(high)) / np.float32(2 ** (bits - 1) - 1)
        return np.clip(np.round(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    low = min(low, np.float32(0)) if scheme == "asymmetric" else np.float32(0)
    scale = (high - low) / np.float32(2**bits - 1)
    zero = np.round(low / scale) * scale
    return np.clip(np.round((x - zero) / scale), 0, 2**bits - 1) * scale + zero


def by_row(weight: np.ndarray, top: np.ndarray, factor: float, bits: int) -> np.ndarray:
    """A weight in symmetric codes, each row by its own largest magnitude."""
    scale = top * np.float32(factor) / np.float32(2 ** (bits - 1) - 1)
    return np.clip(np.round(weight / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def direct_loss(out: np.ndarray, changed: np.ndarray, objective: str) -> float:
    """1 - similarity of all entries of two outputs, or the relative squared error, as they are defined."""
    a, b = out.astype(np.float64).ravel(), changed.astype(np.float64).ravel()
    if objective == "mse":
        return float(((b - a) ** 2).sum() / (a**2).sum())
    if objective == "pearson":
        a, b = a - a.mean(), b - b.mean()
    return float(1 - a @ b / np.sqrt((a @ a) * (b @ b)))


def direct_losses(out: np.ndarray, changed: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """The mean of `direct_loss` over samples for each objective; out and changed (rows, columns) in float32.

    From sums of O, Ô - O and their products in float64, row by row: differences in float32 lose nothing here.
    """
    error = changed - out
    first = np.flatnonzero(np.diff(sample, prepend=-1))

    def by_sample(rows: np.ndarray) -> np.ndarray:
        return np.add.reduceat(rows.astype(np.float64), first)

    p, q, power = (by_sample(np.einsum("ij,ij->i", a, b)) for a, b in ((out, error), (error, error), (out, out)))
    so, se = by_sample(out.sum(1, dtype=np.float64)), by_sample(error.sum(1, dtype=np.float64))
    n = np.diff([*first, len(sample)]) * out.shape[1]
    centred = p - so * se / n, q - se**2 / n, power - so**2 / n
    pearson, cosine = (1 - (s + a) / np.sqrt(s * (s + 2 * a + b)) for a, b, s in (centred, (p, q, power)))
    return np.array([pearson.mean(), cosine.mean(), (q / power).mean()])


def is_best(losses: np.ndarray, index: int) -> bool:
    """Whether a similarity is the best of all candidates, or within 1e-6 of it."""
    return bool(losses[index] - losses.min() <= 1e-6)


def as_format(bits: int, scheme: str = "symmetric") -> Format:
    return Format(bits=bits, scheme=scheme, range="static")


def options_of(x: Tensor, fmt: Format) -> list[search.Scale]:
    return candidate_scales(*x.aminmax(), fmt, Space().factors(fmt))


# Linear layers

GROUPS = {
    "query": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "output": ("attention.output.dense",),
    "ffn in": ("intermediate.dense",),
    "ffn out": ("output.dense",),
}


def test_candidates() -> None:
    """100 candidates from 0.5 to 1.2 times the scale of the extremes, from 0.1 at 4 bits and fewer."""
    for bits in range(2, 13):
        np.testing.assert_allclose(Space().factors(Format(bits=bits)), factors(bits), rtol=1e-6)
    assert [len(Space(candidates=n).factors(Format())) for n in (3, 100)] == [3, 100]


@pytest.mark.kernels
@each_width
@pytest.mark.parametrize(
    ("group", "scheme"), [("query", "asymmetric"), ("output", "symmetric"), ("ffn out", "asymmetric")]
)
def test_inputs(group: str, scheme: str, bits: int) -> None:
    """Of all scales for a layer's input, that of layers which share it included, the search finds the best."""
    b, fmt = block(), as_format(bits, scheme)
    layers = [b.layers[name] for name in GROUPS[group]]
    inputs = next(i for i in b.captured.inputs if f"{BLOCK}.{GROUPS[group][0]}" in i.layers)
    assert [n.removeprefix(f"{BLOCK}.") for n in inputs.layers] == list(GROUPS[group])
    x, sample = layers[0].x, layers[0].sample
    products = [(layer, rounded(layer.weight, 0, np.abs(layer.weight).max(), 1, bits).T) for layer in layers]
    losses = np.zeros((CANDIDATES, 3))
    for i, factor in enumerate(factors(bits)):
        changed = rounded(x, x.min(), x.max(), factor, bits, scheme)
        for layer, right in products:
            losses[i] += direct_losses(x @ layer.weight.T, changed @ right, sample) / len(layers)
    for objective, own in zip(OBJECTIVES, losses.T, strict=True):
        pairs = [
            (Product(inputs.x, torch.from_numpy(layer.weight).T, inputs.sample, objective), torch.from_numpy(right))
            for layer, right in products
        ]
        for start in (None, 71):
            found = search_left(inputs.x, fmt, pairs)(options_of(inputs.x, fmt), start)
            assert is_best(own, found), (objective, found, own.argmin(), own[found] - own.min())


@each_width
@pytest.mark.parametrize("name", ["attention.self.key", "attention.output.dense", "output.dense"])
def test_weights(name: str, bits: int) -> None:
    """Of all scales for a layer's weight the search finds the best."""
    b, fmt = block(), as_format(bits)
    layer = b.layers[name]
    inputs = next(i for i in b.captured.inputs if f"{BLOCK}.{name}" in i.layers)
    given = rounded(layer.x, layer.x.min(), layer.x.max(), 1, bits)
    top, out = np.abs(layer.weight).max(), layer.x @ layer.weight.T
    losses = np.array(
        [direct_losses(out, given @ rounded(layer.weight, 0, top, f, bits).T, layer.sample) for f in factors(bits)]
    )
    weight, candidates = torch.from_numpy(layer.weight), Space().factors(fmt)
    for objective, own in zip(OBJECTIVES, losses.T, strict=True):
        product = Product(inputs.x, weight.T, inputs.sample, objective)
        for start in (None, candidates[71]):
            factor = search_weight(fmt, find_scale(weight, fmt), candidates, product, torch.from_numpy(given), start)
            found = int((candidates - factor).abs().argmin())
            assert is_best(own, found), (objective, found, own.argmin(), own[found] - own.min())


def row_losses(layer: Layer, given: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """For each row of a weight, its output's squared error over all samples, each weighted by 1/‖O‖² of the sample."""
    out = layer.x.astype(np.float64) @ layer.weight.T
    power = np.array([(out[layer.sample == s] ** 2).sum() for s in range(layer.sample.max() + 1)])
    error = given.astype(np.float64) @ changed.T - out
    return (error**2 / power[layer.sample][:, None]).sum(0)


@pytest.mark.kernels
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_by_row(bits: int) -> None:
    """With scales per row nine rows in ten have the best of all candidates, and together they lose 0.5% at most."""
    b, fmt = block(), Format(bits=bits, granularity="row", range="static")
    layer = b.layers["attention.output.dense"]
    inputs = next(i for i in b.captured.inputs if f"{BLOCK}.attention.output.dense" in i.layers)
    given = rounded(layer.x, layer.x.min(), layer.x.max(), 1, bits)
    weight, candidates = torch.from_numpy(layer.weight), Space().factors(fmt)
    top = np.abs(layer.weight).max(1, keepdims=True)
    losses = np.stack([row_losses(layer, given, by_row(layer.weight, top, f, bits)) for f in factors(bits)])
    product = Product(inputs.x, weight.T, inputs.sample, "mse")
    found = search_weight(fmt, find_scale(weight, fmt), candidates, product, torch.from_numpy(given), None)
    index = (candidates - found).abs().argmin(1).numpy()
    chosen, least = losses[index, np.arange(len(index))], losses.min(0)
    assert (chosen <= losses[[70, 71]].max(0)).all()  # beside 1: the extremes themselves are no candidate
    assert np.mean(chosen <= least * (1 + 1e-6)) > 0.9
    assert chosen.sum() <= 1.005 * least.sum()


@pytest.mark.parametrize("size", [32, 96])
def test_weights_by_group(size: int) -> None:
    """With scales per group the row's squared error is less than that of the extremes, and of one scale per row."""
    b = block()
    layer = b.layers["attention.output.dense"]
    inputs = next(i for i in b.captured.inputs if f"{BLOCK}.attention.output.dense" in i.layers)
    given, weight = rounded(layer.x, layer.x.min(), layer.x.max(), 1, 8), torch.from_numpy(layer.weight)
    totals = []
    for fmt in (Format(bits=4, granularity="group", group_size=size), Format(bits=4, granularity="row")):
        largest = find_scale(weight, fmt)
        product = Product(inputs.x, weight.T, inputs.sample, "mse")
        factor = search_weight(fmt, largest, Space().factors(fmt), product, torch.from_numpy(given), None)
        assert factor.shape == largest[0].shape
        for scale in (largest[0] * factor, largest[0]):
            totals.append(row_losses(layer, given, fake_quantize(weight, fmt, scale).numpy()))
    assert (totals[0] <= totals[1]).all()
    assert totals[0].sum() < totals[2].sum() < totals[3].sum()


# Attention


def pad(parts: list[np.ndarray]) -> Tensor:
    """(heads, tokens, …) of samples of several lengths as one tensor (samples, heads, tokens, …), zero where padded."""
    size = max(p.shape[1] for p in parts)
    return torch.stack(
        [
            torch.from_numpy(np.pad(p, [(0, 0), (0, size - p.shape[1]), (0, size - p.shape[2] if square(p) else 0)]))
            for p in parts
        ]
    )


def square(x: np.ndarray) -> bool:
    return x.shape[1] == x.shape[2]


def attention_losses(b: Block, left: str, right: str, changed: Callable[[str, np.ndarray], np.ndarray]) -> np.ndarray:
    """Mean over samples of the loss of QKᵀ or of map·V for each objective, all heads of a sample in one."""
    total = np.zeros(3)
    for one, other in zip(b.heads[left], b.heads[right], strict=True):
        turn = (0, 2, 1) if left == "query" else (0, 1, 2)
        out, near = one @ other.transpose(turn), changed(left, one) @ changed(right, other).transpose(turn)
        total += [direct_loss(out, near, objective) for objective in OBJECTIVES]
    return total / len(b.heads[left])


def product_of(heads: Heads, left: str, right: str, objective: Objective) -> tuple[Product, Tensor, Tensor]:
    """The product as `solve` makes it from what was captured: all heads of all samples, padded entries not counted."""
    a, b = getattr(heads, left).flatten(0, 1), getattr(heads, right).flatten(0, 1)
    b = b.mT if left == "query" else b
    rows, keys = (v.repeat_interleave(HEADS, 0) for v in (heads.valid_rows, heads.valid_keys))
    columns = keys.sum(-1, keepdim=True) if left == "query" else torch.full_like(rows[:, :1], 32, dtype=torch.long)
    sample = heads.sample.repeat_interleave(HEADS).unsqueeze(-1).expand_as(rows)
    return Product(a, b, sample, objective, columns * rows), a, b


@each_width
@pytest.mark.parametrize(("left", "right"), [("query", "key"), ("map", "value")])
def test_attention(left: str, right: str, bits: int) -> None:
    """Of all scales for Q, K, the map and V the search finds the best, padding left out."""
    b = block()
    (heads,) = b.captured.heads.values()
    schemes = {"map": "unsigned"}
    ends = {n: (min(x.min() for x in b.heads[n]), max(x.max() for x in b.heads[n])) for n in (left, right)}

    def at(factor: float, searched: str) -> Callable[[str, np.ndarray], np.ndarray]:
        def changed(name: str, x: np.ndarray) -> np.ndarray:
            return rounded(x, *ends[name], factor if name == searched else 1, bits, schemes.get(name, "symmetric"))

        return changed

    for searched in (left, right):
        losses = np.array([attention_losses(b, left, right, at(f, searched)) for f in factors(bits)])
        for objective, own in zip(OBJECTIVES, losses.T, strict=True):
            product, x, y = product_of(heads, left, right, objective)
            formats = [as_format(bits, schemes.get(name, "symmetric")) for name in (left, right)]
            near = [fake_quantize(t, fmt, *find_scale(t, fmt)) for t, fmt in zip((x, y), formats, strict=True)]
            if searched == left:
                found = search_left(x, formats[0], [(product, near[1])])(options_of(x, formats[0]), None)
            else:
                found = search_right(y, formats[1], product, near[0])(options_of(y, formats[1]), None)
            assert is_best(own, found), (searched, objective, found, own.argmin(), own[found] / own.min())


@each_width
@pytest.mark.parametrize("weight", [0.1, 1, 10])
@pytest.mark.parametrize("searched", ["query", "key"])
def test_ranking(searched: str, weight: float, bits: int) -> None:
    """With the ranking loss, which no estimate knows, the scale is the best of all or loses 2 % more at most."""
    (heads,) = block().captured.heads.values()
    product, x, y = product_of(heads, "query", "key", "pearson")
    rows, keys = (v.repeat_interleave(HEADS, 0) for v in (heads.valid_rows, heads.valid_keys))
    penalty = ranking_penalty(product, rows, keys, weight, 0.2)
    fmt = as_format(bits)
    left, right = (fake_quantize(t, fmt, *find_scale(t, fmt)) for t in (x, y))
    if searched == "query":
        options, found = options_of(x, fmt), search_left(x, fmt, [(product, right)], penalty)
        losses = [product.loss(fake_quantize(x, fmt, *scale).__getitem__, right, penalty) for scale in options]
    else:
        options, found = options_of(y, fmt), search_right(y, fmt, product, left, penalty)
        losses = [product.loss(left.__getitem__, fake_quantize(y, fmt, *scale), penalty) for scale in options]
    index = found(options, None)
    assert losses[index] <= 1.02 * min(losses)


# Formulas


def test_golden_similarity() -> None:
    """Steps, quantized tensors and Pearson of each sample are those of the golden file."""
    fmt = Format(bits=6, range="static")
    x, w = GOLDEN["vt.linear.x"], GOLDEN["vt.linear.w_in_out"]
    near = {}
    for name, tensor in (("x", x), ("w", w)):
        scale, _ = find_scale(tensor, fmt)
        torch.testing.assert_close(scale, GOLDEN[f"vt.linear.step_{name}"])
        near[name] = fake_quantize(tensor, fmt, scale)
        torch.testing.assert_close(near[name], GOLDEN[f"vt.linear.{name}_hat_6bit"])
    for i, pearson in enumerate(GOLDEN["vt.linear.pearson_per_sample"].tolist()):
        product = Product(x[i], w, torch.zeros(len(x[i]), dtype=torch.long), "pearson")
        assert product.loss(near["x"][i].__getitem__, near["w"]) == pytest.approx(1 - pearson, rel=1e-4)
    sample = torch.arange(3).repeat_interleave(6)
    product = Product(x.flatten(0, 1), w, sample, "pearson")
    mean = 1 - GOLDEN["vt.linear.pearson_per_sample"].mean().item()
    assert product.loss(near["x"].flatten(0, 1).__getitem__, near["w"]) == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.1, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("toward", [-1.0, 0.0, 1.0])
def test_loss(size: float, objective: Objective, toward: float) -> None:
    """The loss is 1 - cosine (centred for Pearson) as it is defined, for tiny errors and anticorrelated outputs too."""
    rng = np.random.default_rng(0)
    out = rng.normal(size=(7, 11))
    out = out - out.mean() if objective == "pearson" else out
    error = size * (0.3 * rng.normal(size=out.shape) + toward * out)
    error = error - error.mean() if objective == "pearson" else error
    p, q, power = ((a * b).sum() for a, b in ((out, error), (error, error), (out, out)))
    got = loss(*(torch.tensor(v, dtype=torch.float64) for v in (p, q, power)), objective).item()
    assert got == pytest.approx(direct_loss(out, out + error, objective), rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_of_anticorrelated_and_constant_outputs(objective: Objective) -> None:
    """-O has the loss 2 (mse: 4); of samples with a constant output Pearson has nothing to say, and no NaN."""
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    sample = torch.tensor([0, 0, 0, 1, 1, 1])
    product = Product(x, torch.eye(5), sample, objective)
    assert product.loss((-x).__getitem__, torch.eye(5)) == pytest.approx(4 if objective == "mse" else 2, rel=1e-5)
    for width, constant in ((5, 0.5), (5, 0.1), (384, 1e-3), (384, 33.3)):  # whose sums are rounded, all but the first
        x = torch.randn(6, width, generator=torch.Generator().manual_seed(0))
        x[3:] = constant
        product = Product(x, torch.eye(width), sample, objective)
        alone = Product(x[:3], torch.eye(width), sample[:3], objective)
        near = x + 0.1 * x.roll(1, 0).roll(1, 1)
        got = product.loss(near.__getitem__, torch.eye(width))
        assert np.isfinite(got)
        if objective == "pearson":
            assert got == pytest.approx(alone.loss(near[:3].__getitem__, torch.eye(width)), rel=1e-5)
    nothing = Product(torch.zeros(4, 5), torch.eye(5), torch.zeros(4, dtype=torch.long), objective)
    assert nothing.loss(torch.zeros(4, 5).__getitem__, torch.eye(5)) == 0


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    losses=st.lists(st.integers(0, 1 << 20), min_size=1, max_size=100),
    constant=st.integers(-1000, 1000),
    start=st.none() | st.integers(0, 99),
)
def test_choose(losses: list[int], constant: int, start: int | None) -> None:
    """If the estimate is off by the same number for all, the candidate of least loss is chosen, wherever one starts."""
    exact = [value / 1024 for value in losses]
    estimate = torch.tensor(exact, dtype=torch.float64) + constant
    found = choose(estimate, exact.__getitem__, None if start is None else start % len(exact))
    assert exact[found] == min(exact)


def test_choose_scores_the_present_candidate() -> None:
    """Where the estimate would keep the present candidate but its score tells otherwise, another one is chosen."""
    estimate, losses = [0.23, 0.21, 0.20, 0.24, 0.30], [0.25, 0.2222, 0.2333, 0.26, 0.32]
    assert choose(torch.tensor(estimate), losses.__getitem__, start=2) == 1
    assert choose(torch.tensor(estimate), losses.__getitem__, start=2, slack=0.01) == 1


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    shape=st.tuples(st.integers(1, 80), st.integers(1, 80)), rank=st.integers(0, search.RANK), size=st.floats(-15, 12)
)
def test_leading(shape: tuple[int, int], rank: int, size: float) -> None:
    """Of few directions none is lost, whatever the values' size and however many of them are equal."""
    random = np.random.default_rng((*shape, rank))
    x = random.integers(-1, 2, (shape[0], rank)) @ random.integers(-1, 2, (rank, shape[1])) * 10**size
    factor = search._leading(torch.tensor(x, dtype=torch.float32)).double().numpy()
    assert np.abs(factor @ factor.T - x.T @ x).max() <= 1e-5 * np.abs(x.T @ x).max()
