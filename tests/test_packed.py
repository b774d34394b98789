"""Codes in bytes, and packed layers that give what simulated layers give."""

import gc
import io
import pickle
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from bittern import calibrate, is_packed, native, pack, simulate
from bittern.deploy import packed
from bittern.deploy.bits import bytes_per_row, pack_codes, unpack_codes
from bittern.deploy.packed import PACKED, PackedLayer, pack_layers
from bittern.errors import ModelError
from bittern.kernels import NO_GRAPH
from bittern.layers import QuantLayer, fake_quants, swap, weight_matrix
from bittern.quantizers import find_scale
from bittern.recipe import Format, Recipe, Rule
from families import SUPPORTED
from helpers import outputs, quantized, refused, same

TERNARY, BASE3, BINARY = Format(kind="ternary"), Format(kind="ternary", storage="base3"), Format(kind="binary")
FORMATS = [
    *(TERNARY, BASE3, BINARY),
    *(Format(bits=bits) for bits in range(2, 13)),
    *(Format(bits=bits, scheme=scheme) for scheme in ("unsigned", "asymmetric") for bits in range(1, 13)),
]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f}{' base3' if f.storage == 'base3' else ''}")


def all_codes(fmt: Format) -> list[int]:
    """Every code of a format from the lowest, in plain words."""
    if fmt.kind == "uniform":
        lowest = -(2 ** (fmt.bits - 1)) if fmt.scheme == "symmetric" else 0
        return list(range(lowest, lowest + 2**fmt.bits))
    return [-1, 0, 1] if fmt.kind == "ternary" else [-1, 1]


def in_bytes(row: list[int], fmt: Format) -> list[int]:
    """One row of codes as bytes, bit by bit (base3: digit by digit), the first code lowest."""
    numbers = [all_codes(fmt).index(code) for code in row]
    if fmt.storage == "base3":
        return [sum(n * 3**i for i, n in enumerate(numbers[at : at + 5])) for at in range(0, len(row), 5)]
    low = [number & 255 for number in numbers] if fmt.bits > 8 else []  # first the low bytes of all, then the rest
    rest = range(8 if low else 0, fmt.bits)
    bits = [number >> place & 1 for number in numbers for place in rest]
    return low + [sum(bit << i for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)]


# Codes


@every_format
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data(), columns=st.integers(1, 35))
def test_pack_and_unpack(fmt: Format, data: st.DataObject, columns: int) -> None:
    """Codes are laid out in bytes as the reference says, and come back as they were."""
    row = st.lists(st.sampled_from(all_codes(fmt)), min_size=columns, max_size=columns)
    rows = data.draw(st.lists(row, max_size=3))
    codes = torch.tensor(rows, dtype=torch.int16).view(-1, columns)
    bytes_ = pack_codes(codes, fmt)
    assert bytes_.dtype == torch.uint8
    assert bytes_.tolist() == [in_bytes(row, fmt) for row in rows]
    assert bytes_.shape[1] == bytes_per_row(columns, fmt)
    assert torch.equal(unpack_codes(bytes_, columns, fmt), codes.float())


@every_format
def test_every_code(fmt: Format) -> None:
    """Every code of a format survives packing."""
    codes = torch.tensor([all_codes(fmt)])
    assert unpack_codes(pack_codes(codes, fmt), codes.shape[1], fmt).tolist() == codes.tolist()


@pytest.mark.parametrize(
    ("fmt", "sizes"),
    [
        (TERNARY, {1: 1, 4: 1, 5: 2, 768: 192, 769: 193}),
        (BASE3, {1: 1, 5: 1, 6: 2, 768: 154, 770: 154, 771: 155}),
        (BINARY, {1: 1, 8: 1, 9: 2, 768: 96}),
        (Format(bits=2), {4: 1, 5: 2}),
        (Format(bits=3), {2: 1, 3: 2, 8: 3, 9: 4}),
        (Format(bits=4), {1: 1, 2: 1, 3: 2, 768: 384}),
        (Format(bits=5), {8: 5, 9: 6}),
        (Format(bits=6), {4: 3, 5: 4}),
        (Format(bits=7), {8: 7, 9: 8}),
        (Format(bits=8), {1: 1, 7: 7, 768: 768}),
        (Format(bits=9), {1: 2, 8: 9, 9: 11}),
        (Format(bits=10), {1: 2, 4: 5, 5: 7}),
        (Format(bits=12), {1: 2, 2: 3, 768: 1152}),
    ],
    ids=str,
)
def test_bytes_per_row(fmt: Format, sizes: dict[int, int]) -> None:
    """A byte holds 4 ternary codes, 5 in base 3, 8 binary ones, 2 of 4 bits, and so on, with the last one padded."""
    for columns, size in sizes.items():
        assert pack_codes(torch.full((2, columns), all_codes(fmt)[0]), fmt).shape == (2, size)
        assert bytes_per_row(columns, fmt) == size


@every_format
def test_impossible_codes(fmt: Format) -> None:
    """A code that the format does not have is refused."""
    codes = all_codes(fmt)
    for wrong in {codes[0] - 1, codes[-1] + 1, *range(codes[0], codes[-1])} - set(codes):
        with refused(ModelError, f"from {min(codes[0], wrong)} to {max(codes[-1], wrong)}", f"do not fit {fmt}"):
            pack_codes(torch.tensor([[*codes, wrong]]), fmt)


# Layers

ROWS, COLUMNS = 7, 12
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(COLUMNS, ROWS), lambda: torch.randn(3, COLUMNS)),
    "no_bias": (lambda: nn.Linear(COLUMNS, ROWS, bias=False), lambda: torch.randn(3, COLUMNS)),
    "conv1d": (lambda: Conv1D(ROWS, COLUMNS), lambda: torch.randn(2, 3, COLUMNS)),
    "conv2d": (lambda: nn.Conv2d(3, ROWS, 2, stride=2, padding=1), lambda: torch.randn(2, 3, 6, 5)),
    "grouped_conv2d": (lambda: nn.Conv2d(9, 6, (2, 2), groups=3), lambda: torch.randn(2, 9, 4, 4)),
    "embedding": (lambda: nn.Embedding(ROWS, COLUMNS, padding_idx=1), lambda: torch.randint(0, ROWS, (2, 5))),
    "scaled": (lambda: BartScaledWordEmbedding(ROWS, COLUMNS, 1, 2.5), lambda: torch.randint(0, ROWS, (2, 5))),
    "tensor_scaled": (
        lambda: Gemma3TextScaledWordEmbedding(ROWS, COLUMNS, 1, 2.5),
        lambda: torch.randint(0, ROWS, (2, 5)),
    ),
}
KINDS: dict[str, dict[str, Any]] = {
    "ternary": {"kind": "ternary"},
    "clipped": {"kind": "ternary", "clip": 0.2},
    "base3": {"kind": "ternary", "storage": "base3"},
    "binary": {"kind": "binary"},
    **{f"{bits}-bit": {"bits": bits} for bits in (2, 3, 4, 8)},
    **{f"asymmetric{bits}": {"bits": bits, "scheme": "asymmetric"} for bits in (1, 4, 8)},
    "unsigned": {"bits": 4, "scheme": "unsigned"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_packed_layer_is_simulated_layer(name: str, kind: str) -> None:
    """A packed layer gives what the simulated one gives, bit for bit, from codes of the size that arithmetic says."""
    torch.manual_seed(0)
    make, inputs = LAYERS[name]
    for granularity, range_ in product(("tensor", "row", "group"), ("dynamic", "static")):
        layer, x = make(), inputs()
        shape = layer.weight.shape
        group = {"group_size": 4} if granularity == "group" else {}
        fmt = Format(granularity=granularity, range=range_, **group, **KINDS[kind])
        swap(layer, name, fmt, Format(scheme="asymmetric") if x.is_floating_point() else None)
        matrix = weight_matrix(layer)
        if range_ == "static":
            layer.weight_quantizer.set_scale(*find_scale(matrix, fmt))
        expected, simulated, weight = layer(x), type(layer), layer.quantized_weight()
        pack_layers(nn.ModuleList([layer]))
        assert type(layer) is PACKED[simulated]
        assert torch.equal(layer(x), expected)
        assert layer.weight_codes.dtype == torch.uint8
        assert layer.weight_codes.shape == (len(matrix), bytes_per_row(COLUMNS, fmt))
        assert layer.weight_scale.numel() == {"tensor": 1, "row": len(matrix), "group": len(matrix) * 3}[granularity]
        assert (layer.weight_offset is not None) == (fmt.scheme == "asymmetric")
        assert layer.weight.shape == shape
        assert torch.equal(weight_matrix(layer), weight)


def test_embedding_unpacks_rows() -> None:
    """A packed embedding unpacks the rows that are looked up, not its whole table."""
    layer = nn.Embedding(1000, 8)
    swap(layer, "embedding", Format(bits=4, granularity="row"), None)
    pack_layers(nn.ModuleList([layer]))
    unpacked: list[int] = []

    def spy(codes: Tensor, *rest: Any) -> Tensor:
        unpacked.append(len(codes))
        return unpack_codes(codes, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "unpack_codes", spy)
        assert layer(torch.tensor([[3, 999], [3, 0]])).shape == (2, 2, 8)
    assert unpacked == [4]


@pytest.mark.kernels
@pytest.mark.parametrize("kind", KINDS)
def test_embedding_by_kernels(kind: str) -> None:
    """Rows that the kernels look up are those that PyTorch unpacks, bit for bit, with the scales of that moment,
    and what is no row is refused."""
    for granularity, columns in product(("tensor", "row", "group"), (4, 12, 20)):
        layer = nn.Embedding(ROWS, columns)
        group = {"group_size": 4} if granularity == "group" else {}
        swap(layer, "embedding", Format(granularity=granularity, **group, **KINDS[kind]), None)
        pack_layers(nn.ModuleList([layer]))
        for ids in (torch.randint(0, ROWS, (2, 5)), torch.randint(0, ROWS, (5, 2)).int().t(), torch.empty(2, 0).long()):
            found = layer(ids)
            with native.disabled():
                assert torch.equal(found, layer(ids))
            scale = layer.get_buffer("weight_scale")
            layer.weight_scale = scale * 2
        with pytest.raises(IndexError):
            layer(torch.tensor([[-1]]))


# Models


@pytest.mark.parametrize("name", SUPPORTED)
def test_packed_model_is_simulated_model(name: str) -> None:
    """Packing a model of any family keeps its outputs, bit for bit, and its names of modules; no hook is left in it."""
    model, batch = quantized(name, "w4a4", packed=False)
    expected = outputs(model, batch)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer) and m.weight_quantizer is not None}
    assert pack(model) is model
    assert is_packed(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert {n for n, m in model.named_modules() if isinstance(m, PackedLayer)} == set(layers)
    assert same(outputs(model, batch), expected)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_packing_needs_calibration(name: str) -> None:
    """Packing before calibration is refused by the name of what has no scale, and changes nothing."""
    model, batch = SUPPORTED[name]()
    simulate(model, "w8a8", batch)
    classes, state = {n: type(m) for n, m in model.named_modules()}, dict(model.state_dict())
    missing = next(q.name for _, q in fake_quants(model) if q.scale is None)
    with refused(ModelError, missing, "no scale yet", "calibrate"):
        pack(model)
    assert classes == {n: type(m) for n, m in model.named_modules()}
    assert model.state_dict().keys() == state.keys()
    assert not is_packed(model)
    assert not hasattr(model, "hf_quantizer") or model.hf_quantizer is None
    calibrate(model, [batch])
    expected = outputs(model, batch)
    assert same(outputs(pack(model), batch), expected)


@pytest.mark.parametrize(("name", "shared"), [("gpt2", 2), ("t5", 4), ("bart", 4)])
def test_tied_weights(name: str, shared: int) -> None:
    """Layers that share a weight share one set of codes."""
    model, batch = SUPPORTED[name]()
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    tied = [n for n, w in weights.items() if w is model.get_input_embeddings().weight]
    assert len(tied) == shared
    simulate(model, "ternary-2-2-8", batch)
    pack(model)
    layers = [model.get_submodule(n) for n in tied]
    owners = [layer for layer in layers if not layer.owner]
    assert len(owners) == 1
    assert all(layer.owner == owners for layer in layers if layer is not owners[0])
    assert sum(layer.weight_bytes() for layer in layers) == owners[0].weight_bytes() > 0
    codes = Counter(key.rpartition(".")[0] for key in model.state_dict() if key.endswith(".weight_codes"))
    assert len(codes.keys() & set(tied)) == 1


def test_scales_apart() -> None:
    """Layers that share a weight and have different scales for it are packed each with its own codes."""
    static = Format(bits=4, granularity="row", range="static")
    model, batch = quantized("gpt2", Recipe(name="apart", rules=(Rule(weight=static),)), packed=False)
    model.lm_head.weight_quantizer.scale *= 1.5
    expected = outputs(model, batch)
    pack(model)
    assert not model.lm_head.owner
    assert same(outputs(model, batch), expected)


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2"])
def test_bfloat16(name: str) -> None:
    """A bfloat16 model stays one when packed, with the same outputs, codes in bytes and scales in float32."""
    model, batch = SUPPORTED[name]()
    model.to(torch.bfloat16)
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    simulate(model, "w8a8", batch)
    calibrate(model, [batch])
    expected = outputs(model, batch)
    pack(model)
    assert model.dtype == torch.bfloat16
    got = outputs(model, batch)
    assert same(got, expected)
    assert got["logits"].dtype == torch.bfloat16
    types = {(key.rpartition(".")[-1], tensor.dtype) for key, tensor in model.state_dict().items()}
    assert {("weight_codes", torch.uint8), ("weight_scale", torch.float32), ("scale", torch.float32)} <= types
    assert {kind for name, kind in types if name == "weight"} == {torch.bfloat16}


@pytest.mark.parametrize("recipe", ["w8a8", Recipe(name="weights", rules=(Rule(weight=TERNARY),))], ids=str)
def test_packing_twice(recipe: str | Recipe) -> None:
    """A packed model is not packed again, nor simulated, and neither is tried on a float model."""
    model, batch = quantized("bert", recipe)
    with refused(ModelError, "packed already"):
        pack(model)
    with refused(ModelError, "not simulated", "simulate(model, recipe)"):
        pack(SUPPORTED["bert"]()[0])
    expected = outputs(model, batch)
    with pytest.raises(ModelError):
        simulate(model, recipe, batch)
    assert same(outputs(model, batch), expected)


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_deep_copy(name: str) -> None:
    """A deep copy of a packed model gives the same and shares no layer with it, tied ones included."""
    model, batch = quantized(name)
    copy = deepcopy(model)
    own = {id(m) for m in copy.modules()}
    tied = [m for m in copy.modules() if isinstance(m, PackedLayer) and m.owner]
    assert tied
    assert all(id(layer.owner[0]) in own for layer in tied)
    expected = outputs(model, batch)
    assert same(outputs(copy, batch), expected)
    with torch.no_grad():
        tied[0].owner[0].weight_scale.mul_(2)
    assert not same(outputs(copy, batch), expected)
    assert same(outputs(model, batch), expected)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_that_stay_float(fmt: Format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed layer whose inputs stay float, as a tied head's, multiplies by its codes: it unpacks no whole weight,
    and gives what the simulated layer does, up to the order of sums."""
    layer = nn.Linear(70, 37)
    model = nn.Sequential(layer)
    swap(layer, "layer", fmt, None)
    x = torch.randn(2, 3, 70)
    expected = layer(x).detach()
    pack_layers(model)  # type: ignore[arg-type]
    if native.available() and fmt.bits <= 8 and fmt.storage != "base3":
        monkeypatch.setattr(packed, "unpack_codes", None)
        monkeypatch.setattr(layer, "unpacked", None)
    found = model.to(dtype)(x.to(dtype)).detach()
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.float(), expected, **({} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05})
    )


def test_weight_is_read_only() -> None:
    """The weight of a packed layer costs one number until somebody reads values, takes no gradient, and is not changed:
    whoever tries is told, as transformers when it resizes embeddings, or who reads it after its layer is gone."""
    model, _ = quantized("bert")
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.untyped_storage().nbytes()) == ((99, 32), torch.float32, 4)
    assert not any(p.requires_grad for p in model.parameters())
    for copy in (deepcopy(weight), pickle.loads(pickle.dumps(weight)), weight.detach().clone()):
        assert torch.equal(copy, model.get_input_embeddings().unpacked())
    changes: tuple[Callable[[], Any], ...] = (
        weight.zero_,
        lambda: nn.init.normal_(weight),
        lambda: weight.data.copy_(torch.zeros(99, 32)),
        lambda: weight.__setitem__(0, 1.0),
        lambda: setattr(weight, "data", torch.zeros(99, 32)),
        lambda: model.resize_token_embeddings(120, mean_resizing=False),
    )
    for change in changes:
        with refused(ModelError, "weight of a packed layer", "float model"):
            change()
    weight = quantized("bert")[0].get_input_embeddings().weight
    gc.collect()
    with refused(ModelError, "the layer of this packed weight is gone"):
        weight.sum()


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit"])
def test_sizes_are_true(name: str) -> None:
    """Parameters are counted as in the float model, memory is what codes and the rest take, also after a call."""
    count = SUPPORTED[name]()[0].num_parameters()
    model, batch = quantized(name, "ternary-2-2-8")
    assert model.num_parameters() == count
    before = model.get_memory_footprint()
    tensors = {t.data_ptr(): t for t in (*model.state_dict().values(), *model.buffers())}.values()
    assert before == sum(t.nbytes for t in tensors)
    outputs(model, batch)
    assert before <= model.get_memory_footprint() < 4 * count


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit", "mpnet"])
@pytest.mark.kernels
def test_other_processes(name: str) -> None:
    """A packed model survives torch.save and pickle, before and after its first call, with its ties."""
    model, batch = quantized(name)
    for _ in range(2):
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        for again in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))):
            assert same(outputs(again, batch), outputs(model, batch))
            assert again.num_parameters() == model.num_parameters()


@pytest.mark.own_rounding
@pytest.mark.kernels
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit"])
@torch.no_grad()
def test_graphs(name: str) -> None:
    """torch.compile leaves its graph for what kernels compute and gives the same; other tracers refuse in a line."""
    model, batch = quantized(name, "w8a8")
    expected = outputs(model, batch)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert same(outputs(compiled, batch), expected)
    torch.compiler.reset()
    with pytest.raises(Exception, match=NO_GRAPH):
        torch.compile(model, backend="eager", fullgraph=True)(**batch)
    for strict in (False, True):
        with pytest.raises(Exception, match=NO_GRAPH):
            torch.export.export(model, (), dict(batch), strict=strict)
    with pytest.raises(ModelError, match=NO_GRAPH):
        torch.jit.trace(model, example_kwarg_inputs=dict(batch), strict=False)
    assert same(outputs(model, batch), expected)


@pytest.mark.parametrize("ids", [[[5, -100]], [[-1]], [[99]]])
def test_ids_out_of_range(ids: list[list[int]]) -> None:
    """Ids that a float embedding refuses are refused by the packed one."""
    model, _ = quantized("bert")
    with pytest.raises(IndexError):
        outputs(model, {"input_ids": torch.tensor(ids)})
