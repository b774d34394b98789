"""The integer kernels against numpy's integers and the quantizers' codes, and what their Python functions refuse."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hatch_build
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bittern import native
from bittern.errors import InputError
from bittern.native import Coding, Panels, linear, padded_bias, quantize_rows, rounding
from bittern.native.block import LAYER_NAMES, KernelBlock, KernelLayer, KernelNorm, run_blocks
from bittern.native.products import convolve
from bittern.quantizers import encode, find_scale, kernel_coding
from bittern.recipe import Format
from native.cases import INPUTS, WEIGHTS

pytestmark = pytest.mark.kernels
KINDS = native.kinds()
SIGNED, UNSIGNED = Coding(-128, 127), Coding(0, 255, "unsigned")
ONE = ((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)))  # a kernel that reads one place


def test_there_are_kernels() -> None:
    """The package was built with the kernels that this machine runs, so that the tests below test something."""
    assert KINDS, native.engine()[1]
    assert native.available()
    assert native.engine() == (os.environ.get("BITTERN_KERNELS") or KINDS[0], "")


def test_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """BITTERN_KERNELS names the kernels in use, or switches them off; a kind that cannot be is refused in one line."""
    with monkeypatch.context() as environment:
        for kind in KINDS:
            environment.setenv("BITTERN_KERNELS", kind)
            native.use()
            assert native.engine() == (kind, "")
        environment.setenv("BITTERN_KERNELS", "none")
        native.use()
        assert native.engine() == ("", native.SWITCHED_OFF)
        assert not native.available()
        environment.setenv("BITTERN_KERNELS", "")
        native.use()
        assert native.engine() == (KINDS[0], "")
        environment.setenv("BITTERN_KERNELS", "sse2")
        expected = "amx, avx512, avx2, i8mm, dotprod, neon or none"
        with pytest.raises(InputError, match=f"^BITTERN_KERNELS is 'sse2'; expected {expected}$"):
            native.use()
        best, least = ("i8mm", "neon") if KINDS[-1] == "neon" else ("amx", "avx2")
        environment.setattr("bittern.native.library._cpu_flags", lambda: frozenset({"avx2", "fma", "bmi2", "neon"}))
        environment.setenv("BITTERN_KERNELS", best)
        with pytest.raises(InputError, match=f"^BITTERN_KERNELS is '{best}'; this machine runs {least}$"):
            native.use()
        assert native.engine() == (KINDS[0], "")
    native.use()


def test_switch_is_read_at_first_use() -> None:
    """A process that asks for kernels that do not exist is told when it first needs them, each time."""
    code = """
from bittern import native
for _ in range(2):
    try:
        print(native.available())
    except Exception as error:
        print(type(error).__name__)
"""
    for kind, said in (("none", "False\nFalse\n"), ("wrong", "InputError\nInputError\n"), (KINDS[-1], "True\nTrue\n")):
        environment = os.environ | {"BITTERN_KERNELS": kind}
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert run.stdout == said


def test_libraries_of_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries that were compiled before the interface changed are not called."""
    with monkeypatch.context() as changed:
        changed.delenv("BITTERN_KERNELS", raising=False)
        changed.setattr("bittern.native.library.INTERFACE", 10**6)
        native.use()
        assert not native.available()
        assert "compiled from other sources" in native.engine()[1]
    native.use()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_defaults_of_pytorch_do_not_matter(kind: str, dtype: torch.dtype) -> None:
    """Buffers of the kernels have the type and device that C++ takes them for, whatever PyTorch makes by default."""

    def results() -> list[Tensor]:
        panels = Panels(codes, scale, 2, 1)
        rows = quantize_rows(x, SIGNED)
        assert rows is not None
        attended = native.attention(four, four, four, None, 0.5, codings)
        assert attended is not None
        layers = dict.fromkeys(LAYER_NAMES, KernelLayer(square, padded_bias(None, square), SIGNED))
        norms = (KernelNorm(x[0], x[1], 1e-5),) * 2
        block = KernelBlock(layers, norms, codings, pre_norm=True, activation="gelu", heads=2, key_heads=2, scaling=0.5)
        blocks = run_blocks([block, block], x[None], None)
        assert blocks is not None
        rounded = rounding.uniform(x, SIGNED), rounding.ternary(x, 0.7, None, True)
        product = linear(rows, panels, padded_bias(bias, panels))
        loss = rounding.losses(x, (-128, 127), scales, None, x.T[:, :3].contiguous(), x[0])
        images = convolve(x[None, None].contiguous(), panels, padded_bias(bias, panels), SIGNED, ONE)
        assert images is not None
        return [
            images,
            product,
            native.norm(x, x[0], x[1], 1e-5),
            native.activate(x, "gelu"),
            loss,
            blocks,
            *attended,
            *rounded,
        ]

    torch.manual_seed(0)
    codes, scale, bias = torch.randint(-1, 2, (20, 32)), torch.rand(20), torch.randn(20)
    x, four, scales = torch.randn(5, 32), torch.randn(1, 2, 5, 16), torch.rand(2, 5) + 0.1
    codings = dict.fromkeys(("query", "key", "value"), SIGNED) | {"map": UNSIGNED}
    square = Panels(torch.randint(-1, 2, (32, 32)), torch.rand(32), 2, 1)
    expected = results()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    native.use(request.param)
    yield request.param
    native.use()


def coding_of(x: Tensor, fmt: Format) -> Coding:
    found = kernel_coding(fmt, *(find_scale(x, fmt) if fmt.range == "static" else (None, None)))
    assert found is not None
    return found


def integers(x: native.Quantized) -> np.ndarray[Any, np.dtype[np.int64]]:
    return x.codes[: x.rows, : x.columns].numpy().astype(np.int64) + x.coding.shift


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("weights", WEIGHTS)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(shape=st.tuples(st.integers(0, 70), st.integers(1, 900), st.integers(1, 70)), seed=st.integers(0, 999))
def test_product(name: str, weights: str, shape: tuple[int, int, int], seed: int) -> None:
    """Codes are the quantizer's, sums are numpy's 64-bit integers, and the rest is rounding, for every kind of CPU."""
    torch.manual_seed(seed)
    (rows, inputs, outputs), (bits, low, high), fmt = shape, WEIGHTS[weights], INPUTS[name]
    x, bias, scale = torch.randn(rows, inputs), torch.randn(outputs), torch.rand(outputs) + 0.5
    codes = torch.randint(low, high + 1, (outputs, inputs))
    if not rows and fmt.range == "static":
        return
    found = find_scale(x, fmt) if rows else (torch.ones(()), None)
    for kind in KINDS:
        native.use(kind)
        q = quantize_rows(x, coding_of(x, fmt))
        assert q is not None
        if rows:
            assert (integers(q) == encode(x, fmt, *found).numpy()).all()
        panels = Panels(codes, scale, bits, -low)
        assert torch.equal(panels.codes().long(), codes)
        out = linear(q, panels, padded_bias(bias, panels))
        sums = integers(q) @ codes.numpy().T
        unit, offset = q.numbers[:2, :rows, None].view(torch.float32).double().numpy()
        exact = (unit * sums + offset * codes.sum(1).numpy()) * scale.double().numpy()
        size = np.abs(unit * sums) + np.abs(offset * codes.sum(1).numpy())
        bound = 8 * 2.0**-24 * (size * scale.double().numpy() + np.abs(bias.numpy())) + 1e-37
        assert (np.abs(out.numpy() - exact - bias.double().numpy()) <= bound).all()
    native.use()


def test_ties(kind: str) -> None:
    """Values that lie exactly between two codes, or one float beside, round as the quantizer rounds them."""
    for scale in (0.1, 1 / 3, 0.0127, 3e-5, 7.0):
        halves = (torch.arange(-130, 130) + 0.5) * torch.tensor(scale)
        away = torch.tensor(torch.inf)
        x = torch.cat([halves, torch.nextafter(halves, away), torch.nextafter(halves, -away)])[None]
        for fmt, offset in ((Format(range="static"), None), (Format(scheme="asymmetric", range="static"), -1.7)):
            unit = torch.tensor(scale), None if offset is None else torch.tensor(offset)
            q = quantize_rows(x, kernel_coding(fmt, *unit))
            assert q is not None
            assert (integers(q) == encode(x, fmt, *unit).numpy()).all()


@pytest.mark.parametrize("inputs", [1, 63, 64, 65, 768, 769, 3072, 32768])
def test_extremes_do_not_overflow(kind: str, inputs: int) -> None:
    """Sums of the largest codes of both signs are exact, whatever is summed in 16 bits on the way."""
    for bits, low, high in WEIGHTS.values():
        for weight in (low, high):
            for value in (-128.0, 127.0):
                panels = Panels(torch.full((17, inputs), weight), torch.ones(()), bits, -low)
                for rows in (1, 2, 5):
                    q = quantize_rows(torch.full((rows, inputs), value), Coding(-128, 127, scale=1.0))
                    assert q is not None
                    assert (linear(q, panels, padded_bias(None, panels)) == float(weight * value * inputs)).all()


def test_large_outputs(kind: str) -> None:
    """Outputs that are written past the caches, and those whose rows do not begin at a cache line."""
    for outputs in (1024, 1040, 1000):
        panels = Panels(torch.randint(-1, 2, (outputs, 70)), torch.ones(()), 2, 1)
        q, bias = quantize_rows(torch.randn(600, 70), SIGNED), padded_bias(torch.randn(outputs), panels)
        assert q is not None
        pieces = [
            native.Quantized(q.codes[i : i + 30], q.numbers[:, i : i + 30].contiguous(), 30, 70, SIGNED)
            for i in range(0, 600, 30)
        ]
        assert torch.equal(linear(q, panels, bias), torch.cat([linear(p, panels, bias) for p in pieces]))


@pytest.mark.parametrize(
    ("name", "reference", "tolerance"),
    [
        ("gelu", F.gelu, 4e-7),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"), 4e-7),
        ("silu", F.silu, 4e-7),
        ("relu", F.relu, 0),
    ],
)
def test_activations(kind: str, name: native.Activation, reference: Any, tolerance: float) -> None:
    """Activations are the exact functions but for rounding, alone and behind a product."""
    x = torch.cat([torch.linspace(-12, 12, 5001), torch.tensor([0.0, -0.0, 1e-30, -80.0, 300.0])])
    expected = reference(x.double())
    assert ((native.activate(x, name) - expected).abs() <= tolerance * x.abs().clamp(min=1)).all()
    panels = Panels(torch.eye(24).long(), torch.ones(()), 2, 1)
    q = quantize_rows(torch.randn(3, 24), SIGNED)
    assert q is not None
    plain = linear(q, panels, padded_bias(None, panels))
    fused = linear(q, panels, padded_bias(None, panels), name)
    assert torch.equal(fused, native.activate(plain, name))
    images = torch.randn(2, 24, 3, 5).to(memory_format=torch.channels_last)
    found = native.activate(images, name)
    assert found.stride() == images.stride()
    assert torch.equal(found, native.activate(images.contiguous(), name))


def test_norm(kind: str) -> None:
    """Layer normalization in float64 is met but for rounding."""
    for shape in ((1, 1), (3, 7), (2, 50, 768), (0, 8)):
        x, weight, bias = torch.randn(shape) * 3 + 1, torch.randn(shape[-1]), torch.randn(shape[-1])
        expected = F.layer_norm(x.double(), shape[-1:], weight.double(), bias.double(), 1e-5)
        assert torch.allclose(native.norm(x, weight, bias, 1e-5).double(), expected, rtol=1e-5, atol=1e-5)


SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (1, 12, 12, 64, 64, 64),
    (2, 4, 2, 33, 50, 24),
    (1, 3, 3, 197, 197, 64),
    (3, 2, 1, 1, 77, 80),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("static", [False, True])
def test_attention(kind: str, shape: tuple[int, ...], static: bool) -> None:
    """The map is the softmax of quantized Q and K, the context that of the map's own codes, with a mask or not."""
    torch.manual_seed(0)
    batch, heads, key_heads, queries, keys, dim = shape
    q, k, v = (
        torch.randn(batch, n, h, dim).transpose(1, 2)
        for n, h in ((queries, heads), (keys, key_heads), (keys, key_heads))
    )
    hidden = torch.zeros(batch, 1, queries, keys)
    hidden[..., keys // 2 + 1 :] = torch.finfo(torch.float32).min
    fmt = Format(range="static") if static else Format(clip=2.5)
    for mask in (None, hidden):
        codings = {name: coding_of(x, fmt) for name, x in (("query", q), ("key", k), ("value", v))}
        top = Coding(0, 255, "unsigned", scale=1 / 255) if static else Coding(-128, 127, clip=2.5)
        found = native.attention(q, k, v, mask, 0.3, codings | {"map": top})
        assert found is not None
        context, probabilities = found
        rounded = [encode(x, fmt, *find_scale(x, fmt)) * find_scale(x, fmt)[0].double() for x in (q, k, v)]
        rounded = [x.repeat_interleave(heads // x.shape[1], 1) for x in rounded]
        scores = rounded[0] @ rounded[1].transpose(2, 3) * 0.3 + (0 if mask is None else mask)
        expected = scores.softmax(-1)
        assert torch.allclose(probabilities.double(), expected, rtol=2e-6, atol=1e-7)
        scale = torch.tensor(1 / 255) if static else probabilities.max() / 127
        codes = (probabilities / scale).round().clamp(0, 255 if static else 127).double()
        expected = (codes * scale.double()) @ rounded[2]
        assert torch.allclose(context.transpose(1, 2).double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 12), (2, 33, 12), (3, 5, 64), (1, 130, 16)], ids=str)
def test_block(kind: str, shape: tuple[int, int, int], pre_norm: bool, static: bool) -> None:
    """A block gives the bits of its parts one after the other, with a mask or not, on one thread or two; static scales
    let it go from codes to codes."""
    torch.manual_seed(0)
    (batch, tokens, dim), hidden, wide, heads = shape, 100, 70, 4
    sizes = {
        "query": (hidden, heads * dim),
        "key": (hidden, 2 * dim),
        "value": (hidden, 2 * dim),
        "output": (heads * dim, hidden),
        "up": (hidden, wide),
        "down": (wide, hidden),
    }
    layers = {}
    for i, (part, (inputs, outputs)) in enumerate(sizes.items()):
        panels = Panels(torch.randint(-1, 2, (outputs, inputs)), torch.rand(outputs) * 0.1, 2, 1)
        coding = Coding(-128, 127, clip=3.0 + i // 3)
        if part in ("output", "down"):
            known = {"scale": 0.031, "offset": -0.17} if static else {"by_row": True}
            coding = Coding(0, 255, "asymmetric", clip=6.0, **known)  # type: ignore[arg-type]
        layers[part] = KernelLayer(panels, padded_bias(torch.randn(outputs), panels), coding)
    norms = (
        KernelNorm(torch.randn(hidden), torch.randn(hidden), 1e-5),
        KernelNorm(torch.randn(hidden), torch.randn(hidden), 1e-6),
    )
    scales = (0.04, 0.05, 0.3) if static else (None,) * 3
    codings = {"query": Coding(-128, 127, scale=scales[0]), "key": Coding(-128, 127, clip=2.5, scale=scales[1])}
    codings["value"] = Coding(-8, 7, scale=scales[2])
    codings["map"] = Coding(0, 255, "unsigned", scale=1 / 255 if static else None)
    rest: Any = {"pre_norm": pre_norm, "activation": "gelu", "heads": heads, "key_heads": 2, "scaling": 0.3}
    block = KernelBlock(layers, norms, codings, **rest)

    def run(part: str, x: Tensor) -> Tensor:
        layer = layers[part]
        q = quantize_rows(x.reshape(batch * tokens, -1), layer.coding)
        assert q is not None
        return linear(q, layer.panels, layer.bias).view(batch, tokens, -1)

    def split(x: Tensor) -> Tensor:
        return x.view(batch, tokens, -1, dim).transpose(1, 2)

    def norm(x: Tensor, i: int) -> Tensor:
        return native.norm(x, norms[i].weight, norms[i].bias, norms[i].epsilon)

    x, hidden_keys = torch.randn(batch, tokens, hidden), torch.zeros(batch, 1, 1, tokens)
    hidden_keys[..., tokens // 2 + 1 :] = torch.finfo(torch.float32).min
    for mask in (None, hidden_keys):
        read = norm(x, 0) if pre_norm else x
        attended = native.attention(*(split(run(p, read)) for p in ("query", "key", "value")), mask, 0.3, codings)
        assert attended is not None
        total = run("output", attended[0].flatten(2)) + x
        total, read = (total, norm(total, 1)) if pre_norm else (norm(total, 0),) * 2
        expected = run("down", native.activate(run("up", read), "gelu")) + total
        expected = expected if pre_norm else norm(expected, 1)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            one, several = run_blocks([block], x, mask), run_blocks([block] * 4, x, mask)
            torch.set_num_threads(1)
            assert one is not None
            assert torch.equal(one, expected)
            again: Tensor | None = x
            for _ in range(4):
                again = run_blocks([block], again, mask)
                assert again is not None
            assert several is not None
            assert torch.equal(several, again)
        made = block.project(x)
        assert made is not None
        found = block.finish(x, *made, mask)  # in two calls, as with a cache
        assert found is not None
        assert torch.equal(found, expected)
    broken = x.clone()
    broken[0, 0, 0] = torch.inf
    assert run_blocks([block, block], broken, None) is None
    assert block.project(broken) is None
    assert block.finish(x, made[0], made[1], made[2] / 0, None) is None
    bias = layers["up"].bias.clone()
    for value in (torch.inf, torch.nan):
        bias[wide - 1] = value
        inside = layers | {"up": KernelLayer(layers["up"].panels, bias, layers["up"].coding)}
        assert run_blocks([KernelBlock(inside, norms, codings, **rest)], x, None) is None
    wrong: list[Any] = [
        lambda: run_blocks([block], x[..., :-1], None),
        lambda: run_blocks([block], x[0], None),
        lambda: run_blocks([block], x.double(), None),
        lambda: block.project(x[..., :-1]),
        lambda: block.finish(x, *made[:2], made[2][:, :, :, :-1], None),
        lambda: block.finish(x, made[0][:, :1], *made[1:], None),
        lambda: block.finish(x, made[0], made[1].double(), made[2], None),
        lambda: run_blocks([block], torch.randn(2, hidden, 3).transpose(1, 2), None),
        lambda: run_blocks([block], x, torch.zeros(1, 1, 1, tokens, dtype=torch.float64)),
        lambda: run_blocks([block, KernelBlock(layers, norms, codings, **rest | {"heads": 2})], x, None),
        lambda: KernelBlock(layers | {"up": layers["down"]}, norms, codings, **rest),
        lambda: KernelBlock(layers, norms, codings | {"key": UNSIGNED}, **rest),
        lambda: KernelBlock(layers, norms, codings, **rest | {"key_heads": 3}),
        lambda: KernelBlock(layers, (norms[0], KernelNorm(torch.ones(99), norms[0].bias, 1e-5)), codings, **rest),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match=r"block|kernels|heads|mask|expected|contiguous"):
            call()


@pytest.mark.parametrize("scale", [None, 1 / 255], ids=["dynamic", "static"])
def test_mask_makes_nan(kind: str, scale: float | None) -> None:
    """A map that the mask makes NaN, of whatever sign, is found; what is hidden by -inf is just not attended to."""
    codings = dict.fromkeys(("query", "key", "value"), SIGNED) | {"map": Coding(0, 255, "unsigned", scale=scale)}
    x = torch.randn(1, 2, 37, 8)
    for value, several in ((-torch.inf, True), (torch.inf, False), (torch.nan, False), (-torch.nan, False)):
        mask = torch.zeros(1, 1, 37, 37)
        mask[..., 30, : 37 if several else 1] = value
        assert native.attention(x, x, x, mask, 0.3, codings) is None
    mask = torch.zeros(1, 1, 37, 37)
    mask[..., 1:] = -torch.inf
    found = native.attention(x, x, x, mask, 0.3, codings)
    assert found is not None
    assert torch.equal(found[1], F.one_hot(torch.zeros(37, dtype=torch.long), 37).float().expand(1, 2, 37, 37))


def test_not_finite(kind: str) -> None:
    """NaN and infinity are found, whatever the format; the caller then goes the other way."""
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(40, 70)
        x[17, 69] = value
        for fmt in INPUTS.values():
            assert quantize_rows(x, coding_of(torch.randn(40, 70), fmt)) is None
        q = torch.randn(1, 2, 20, 35)
        codings = dict.fromkeys(("query", "key", "value", "map"), SIGNED)
        for i in range(3):
            given = [q, q, q]
            given[i] = x.view(1, 2, 20, 70)[..., 35:]
            assert native.attention(*given, None, 1.0, codings) is None


def test_threads_share_and_agree(kind: str) -> None:
    """Any number of threads, several callers at once, gives the same bits."""
    torch.manual_seed(0)
    panels = Panels(torch.randint(-1, 2, (200, 300)), torch.ones(()), 2, 1)
    x = torch.randn(150, 300)

    def run(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        q = quantize_rows(x, SIGNED)
        assert q is not None
        return linear(q, panels, padded_bias(None, panels))

    try:
        expected = run(1)
        assert torch.equal(run(2), expected)
        assert torch.equal(run(5), expected)
        with ThreadPoolExecutor(4) as callers:
            assert all(torch.equal(out, expected) for out in callers.map(run, [2, 3] * 40))
    finally:
        torch.set_num_threads(1)


def test_refused() -> None:
    """Wrong types, shapes, sizes and layouts raise, before anything is read."""
    x, panels = torch.randn(4, 32), Panels(torch.zeros(8, 32, dtype=torch.int16), torch.ones(()), 2, 1)
    q = quantize_rows(x, SIGNED)
    assert q is not None
    wrong: list[Any] = [
        lambda: quantize_rows(x.double(), SIGNED),
        lambda: quantize_rows(x.t(), SIGNED),
        lambda: quantize_rows(x[:, ::2], SIGNED),
        lambda: quantize_rows(x[0], SIGNED),
        lambda: quantize_rows(torch.empty(2, 40000), SIGNED),
        lambda: quantize_rows(x.to("meta"), SIGNED),
        lambda: Panels(torch.full((2, 2), 3), torch.ones(()), 2, 1),
        lambda: Panels(torch.full((2, 2), -2), torch.ones(()), 2, 1),
        lambda: Panels(torch.zeros(2, 2), torch.ones(3), 2, 1),
        lambda: Panels(torch.zeros(2, 2), torch.ones(()), 3, 1),
        lambda: Panels(torch.zeros(2, 0), torch.ones(()), 2, 1),
        lambda: linear(q, Panels(torch.zeros(8, 33), torch.ones(()), 2, 1), torch.zeros(16)),
        lambda: linear(q, panels, torch.zeros(8)),
        lambda: linear(q, panels, torch.zeros(16, dtype=torch.float64)),
        lambda: linear(q, panels, torch.zeros(32)[::2]),
        lambda: linear(q, panels, torch.zeros(16), "tanh"),  # type: ignore[arg-type]
        lambda: native.norm(x, torch.ones(31), torch.ones(32), 1e-5),
        lambda: native.norm(x.half(), torch.ones(32), torch.ones(32), 1e-5),
        lambda: native.activate(x.half(), "gelu"),
        lambda: convolve(x[None, None, :, :3], panels, torch.zeros(16), SIGNED, ONE),
        lambda: convolve(x[None, None].half(), panels, torch.zeros(16), SIGNED, ONE),
        lambda: convolve(x[None, None].movedim(2, 1), panels, torch.zeros(8), SIGNED, ONE),
        lambda: convolve(x[None, None], panels, torch.zeros(16), Coding(-128, 127, by_row=True), ONE),
        lambda: Coding(-129, 127),
        lambda: Coding(0, 256),
        lambda: Coding(-128, 127, scale=0.0),
        lambda: Coding(-128, 127, scale=float("nan")),
        lambda: native.use("sse2"),
    ]
    four = torch.randn(2, 4, 5, 6)
    codings = dict.fromkeys(("query", "key", "value", "map"), SIGNED)
    for args in (
        (four, four[:, :3], four[:, :3], None),
        (four, four[..., :5], four, None),
        (four, four, four[:, :, :4], None),
        (four.double(), four, four, None),
        (four, four, four, torch.zeros(1, 1, 5, 5).double()),
        (four, four, four, torch.zeros(1, 1, 5, 4)),
    ):
        wrong.append(lambda args=args: native.attention(*args, 1.0, codings))
    wrong.append(lambda: native.attention(four, four, four, None, 1.0, codings | {"key": UNSIGNED}))
    for call in wrong:
        with pytest.raises((ValueError, RuntimeError)):
            call()


def test_disabled() -> None:
    """Inside `disabled` there are no kernels, and whoever calls them is told so; after it they are back."""
    with native.disabled():
        assert not native.available()
        assert native.engine() == ("", "the kernels are switched off")
        with pytest.raises(RuntimeError, match="switched off"):
            quantize_rows(torch.randn(2, 2), SIGNED)
    assert native.available()


THREADS = """
import os, sys, torch
from bittern.native import Coding, Panels, linear, quantize_rows

def count():
    return len(os.listdir("/proc/self/task"))

def product():
    return linear(quantize_rows(x, Coding(-128, 127, scale=0.02)), panels, torch.zeros(1024))

torch.set_num_threads(1)
x, codes = torch.randn(16, 1024), torch.randint(-1, 2, (1024, 1024))
if sys.argv[1] == "before":  # the kernels are loaded
    torch.set_num_threads(3)
    torch.randn(1000, 1000) @ torch.randn(1000, 1000) + 1
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)  # PyTorch itself would wait for threads here
        panels = Panels(codes, torch.ones(()), 2, 1)
        torch.set_num_threads(3)
        product()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    sys.exit()
panels = Panels(codes, torch.ones(()), 2, 1)
alone, before = product(), count()
torch.set_num_threads(3)
assert torch.equal(product(), alone)
assert count() == before + 2
torch.randn(1000, 1000) @ torch.randn(1000, 1000) + 1
assert count() == before + 2, "PyTorch has others"
if (child := os.fork()) == 0:
    os._exit(0 if torch.equal(product(), alone) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads that Linux lists")
@pytest.mark.parametrize("loaded", ["after", "before"])
def test_threads_are_those_of_pytorch(loaded: str) -> None:
    """No threads beside PyTorch's own; a child that is forked before or after the kernels are loaded works alone."""
    subprocess.run([sys.executable, "-c", THREADS, loaded], check=True, timeout=60)


@pytest.mark.parametrize(
    ("sanitizers", "rounds"), [("address,undefined", 150), ("thread", 10)], ids=["memory", "threads"]
)
def test_fuzz_under_sanitizers(tmp_path: Path, sanitizers: str, rounds: int) -> None:
    """No shape makes the kernels read or write outside their buffers, or compute what C++ does not define; and no two
    of their threads, or of their callers', touch the same memory without order."""
    compiler = shutil.which("c++")
    assert compiler, "the kernels' tests need a C++ compiler"
    here = Path(__file__).parent
    sanitize = f"-O{int(sanitizers == 'thread')} -g1 -fsanitize={sanitizers} -fno-sanitize-recover=all"
    include = here.parent / hatch_build.NATIVE
    kinds = {KINDS[0], KINDS[-1]}  # what avx512 has, amx has too
    made = []
    for kind in kinds:
        flags = f"{hatch_build.FLAGS} {hatch_build.KINDS[kind]} {sanitize} -Werror -I {include}".split()
        made.append(subprocess.Popen([compiler, *flags, str(here / "native/fuzz.cpp"), "-o", str(tmp_path / kind)]))
    assert [build.wait() for build in made] == [0] * len(kinds)
    settings = os.environ | {"TSAN_OPTIONS": "halt_on_error=1 die_after_fork=0"}
    for kind in kinds:
        run = subprocess.run(
            [tmp_path / kind, "7", str(rounds)], capture_output=True, text=True, check=False, env=settings
        )
        assert (run.returncode, run.stdout) == (0, "ok\n"), run.stderr[-3000:]
