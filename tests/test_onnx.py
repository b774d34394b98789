"""Exported files hold the model's own codes, compute in integers, and are kept only if they do what they should."""

from __future__ import annotations

import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from bittern import Format, Recipe, load, pack, save, simulate
from bittern.attention import Site
from bittern.deploy.onnx import export as exporter
from bittern.deploy.onnx import graph
from bittern.deploy.onnx.export import export
from bittern.deploy.onnx.forms import Clip, may_saturate, pack_blocks
from bittern.deploy.onnx.parity import check_parity, complete, made_up, measure_parity, run_model, session
from bittern.deploy.packed import PackedConv1D, PackedLayer, PackedLinear
from bittern.errors import CheckpointError, InputError, ModelError
from bittern.layers import QuantLayer
from bittern.quantizers import FakeQuant
from families import SUPPORTED
from helpers import quantized, refused
from material import command, save_text_model, succeed, tree

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert static": ("bert", "w8a8", {}),
    "roberta ternary as bytes": ("roberta", "ternary-2-2-8", {}),
    "vit dynamic, unsigned weights": ("vit", "w8a8", {"dynamic": True, "safe": True}),
    "deit 4-bit": ("deit", "w4a8", {"form": "nbits"}),
    "dinov2 ternary, standard": ("dinov2", "ternary-2-2-8", {"form": "portable"}),
    "detr static": ("detr", "w8a8", {}),
    "gpt2 ternary": ("gpt2", "ternary-2-2-8", {"form": "nbits"}),
}
PRODUCTS = ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits")


def saved(family: str, recipe: str, folder: Path) -> Path:
    """A packed model of a family in a folder; `float` for none."""
    model = SUPPORTED[family]()[0] if recipe == "float" else quantized(family, recipe)[0]
    save(model, folder)
    return folder


def optimized(file: Path) -> Counter[str]:
    """What onnxruntime makes of a file: operators by type."""
    target = file.with_suffix(".optimized")
    session(file, 1, target)
    return Counter(node.op_type for node in onnx.load(target).graph.node)


def initializers(file: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer}


@pytest.mark.parametrize("case", CASES)
def test_families(case: str, tmp_path: Path) -> None:
    """Every quantized matrix product of every family is one integer product in onnxruntime's own graph, no float weight
    of it is left in the file, and another batch of another length gives what the packed model gives, nearly."""
    family, recipe, options = CASES[case]
    source, file = saved(family, recipe, tmp_path / "model"), tmp_path / "out.onnx"
    result = export(source, file, samples=16, **options)
    model = load(source)
    layers = [m for m in model.modules() if isinstance(m, PackedLinear | PackedConv1D)]
    nodes = optimized(file)
    assert sum(nodes[kind] for kind in PRODUCTS) == len(layers) > 7
    assert nodes["SkipLayerNormalization"] == 0  # slower than what it stands for
    values = {value.name: value.type.tensor_type for value in onnx.load(file).graph.value_info}
    made = {name for node in onnx.load(file).graph.node for name in node.output}
    assert not any(values[name].HasField("shape") for name in made & values.keys())  # with them it is slower
    assert nodes["MatMulNBits"] == (len(layers) if "form" in options else 0)
    assert nodes["DynamicQuantizeMatMul"] == (6 if result["layers"].get("dynamic") else 0)  # others share their bytes
    floats = sum(a.size for a in initializers(file).values() if a.dtype == np.float32)
    scales = sum(m.weight_shape[0] for m in model.modules() if isinstance(m, PackedLayer))
    own = sum(t.numel() for t in (*model.parameters(), *model.buffers()) if t.dtype == torch.float32)
    assert floats < own + scales + 32 * 32  # less than the smallest weight more
    assert result["parity"]["file"] <= result["parity"]["limit"] < 0.5
    assert result["parity"]["twin"] > 1e-3
    batch = made_up(model, 3, 17, seed=5)
    wanted = run_model(model, [batch])
    found = session(file, 1).run(list(wanted), {k: v.numpy() for k, v in batch.items()})
    for name, values in zip(wanted, found, strict=True):
        error = (torch.from_numpy(values) - wanted[name][0]).norm() / wanted[name][0].norm()
        assert error < result["parity"]["limit"] + 3 * result["parity"]["simulated"], name


def test_inputs_without_weights(tmp_path: Path) -> None:
    """Layers whose inputs alone are quantized keep their clip and float weights, also where Q, K and V share an input;
    the classes of layers and of attention stay as they are, so that a model beside gives what it gave."""
    model, batch = SUPPORTED["bert"]()
    rules = [{"roles": ["qkv"], "input": {"bits": 8, "clip": 2.5}}, {"roles": ["ffn"], "weight": {"bits": 8}}]
    simulate(model, Recipe.from_dict({"name": "inputs", "rules": rules}), batch)
    save(pack(model), tmp_path / "model")
    classes = (PackedLayer, PackedLinear, QuantLayer, Site)
    before = [dict(vars(cls)) for cls in classes]
    result = export(tmp_path / "model", tmp_path / "out.onnx", samples=8)
    assert [dict(vars(cls)) for cls in classes] == before
    assert result["parity"]["file"] <= result["parity"]["limit"]
    assert result["layers"] == {"nbits": 4}
    assert Counter(node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node)["Clip"] == 2  # one for QKV


def test_codes_are_our_own(tmp_path: Path) -> None:
    """The integers in the file, times its scales, are the packed model's weights exactly; tied ones are there once.

    A simulated folder gives what a packed one gives."""
    source, file = tmp_path / "model", tmp_path / "out.onnx"
    save(quantized("gpt2", "w4a8", packed=False)[0], source)
    export(source, file, samples=8)
    stored, model = initializers(file), quantized("gpt2", "w4a8")[0]
    assert "lm_head.codes" not in stored
    nibbles = stored["transformer.wte.codes"]
    table = np.stack([nibbles & 15, nibbles >> 4], -1).reshape(99, -1).astype(np.float32) - 8
    assert np.array_equal(table * stored["transformer.wte.scale"], model.transformer.wte.unpacked().numpy())
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedConv1D)}
    assert len(layers) == 8
    for name, layer in layers.items():
        codes = stored[f"{name}.codes"].T.astype(np.float32)
        assert np.array_equal(codes * stored[f"{name}.scale"][:, None], layer.unpacked().numpy()), name


def test_float_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float model's file gives its outputs, in a folder with tokenizer and configuration, large weights beside."""
    source, out = save_text_model(tmp_path / "model"), tmp_path / "out"
    monkeypatch.setattr(graph, "LARGEST", 1000)
    result = export(source, out, samples=8)
    assert result["parity"]["error"] < 1e-5
    assert result["parity"]["agreement"] == 1
    assert {p.name for p in out.iterdir()} >= {
        "model.onnx",
        "model.onnx.data",
        "bittern.json",
        "config.json",
        "tokenizer.json",
    }
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert json.loads((out / "bittern.json").read_text())["parity"] == result["parity"]
    session(out / "model.onnx", 1)  # finds its weights where they are now
    assert result["layers"] == {}
    assert {entry["name"] for entry in result["kept_float"]} >= {"classifier", "bert.pooler.dense"}


@pytest.mark.parametrize("wrong", ["scale", "codes"])
def test_wrong_files_are_not_kept(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with a wrong scale, or two codes of each row exchanged, in its layers is refused and leaves nothing."""
    source = saved("vit", "w8a8", tmp_path / "model")
    before = tree(tmp_path)
    if wrong == "scale":
        scales = graph.scales
        monkeypatch.setattr(graph, "scales", lambda layer, blocks=1: 1.05 * scales(layer, blocks))
    else:
        codes = graph.integer_codes
        monkeypatch.setattr(graph, "integer_codes", lambda layer: codes(layer).roll(1, 1))
    with refused(ModelError, "relative error", "its arithmetic explains", "not kept"):
        export(source, tmp_path / "out.onnx", samples=16)
    assert tree(tmp_path) == before


def test_damaged_models_are_refused(tmp_path: Path) -> None:
    """A packed model with a flipped bit gives one line about the checkpoint and no file."""
    source = saved("bert", "w8a8", tmp_path / "model")
    file = source / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    with refused(CheckpointError, "model"):
        export(source, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_options_and_outputs_are_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing extra, an unknown form and an output that exists are refused in one line, before the model is read."""
    nowhere, there = tmp_path / "nowhere", tmp_path / "there.onnx"
    there.write_text("something")
    with refused(InputError, "there.onnx exists", "--force"):
        export(nowhere, there)
    (tmp_path / "killed.json").write_text('{"parity": {}}')
    with refused(InputError, "no such folder"):  # only the report is there: the export was killed, and goes on
        export(nowhere, tmp_path / "killed.onnx")
    (tmp_path / "mine.json").write_text("{}")
    with refused(InputError, "mine.json exists"):
        export(nowhere, tmp_path / "mine.onnx")
    with refused(InputError, "no export of Bittern wrote", "mine.json"):
        export(nowhere, tmp_path / "mine.onnx", force=True)
    with refused(InputError, "no form 'int3'", "int8, nbits, portable"):
        export(nowhere, tmp_path / "out", form="int3")  # type: ignore[arg-type]
    (tmp_path / "folder.onnx").mkdir()
    with refused(InputError, "is a folder"):
        export(nowhere, tmp_path / "folder.onnx")
    monkeypatch.setattr(exporter, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    with refused(InputError, "needs onnxruntime", "pip install bittern[onnx]"):
        export(nowhere, tmp_path / "out")


@pytest.mark.kernels
def test_command(tmp_path: Path) -> None:
    """`bittern export`, where kernels are in use, says what was written, what stayed float and how near it is; another
    target is refused."""
    source = saved("vit", "w8a8", tmp_path / "model")
    printed = succeed(f"bittern export {source} -o {tmp_path}/a.onnx --samples 8")
    for part in ("12 layers: multiplied as bytes", "classifier", "4 MatMul", "2 Softmax", "relative error", "--safe"):
        assert part in printed
    assert (tmp_path / "a.onnx").stat().st_size == json.loads((tmp_path / "a.json").read_text())["bytes"]
    ran = command(f"bittern export {source} --to openvino -o {tmp_path}/b")
    assert ran.code == 1
    assert "cannot export to 'openvino'" in ran.err


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_blocks(bits: int) -> None:
    """Codes come back from their blocks, bit by bit, whatever is left of the last block."""
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (3, 37), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    packed = pack_blocks(codes, bits, 16)
    assert packed.shape == (3, 3, 2 * bits)
    flat = np.unpackbits(packed.numpy().reshape(3, -1), axis=1, bitorder="little").reshape(3, -1, bits)
    values = (flat * 2 ** np.arange(bits)).sum(-1) - half
    assert np.array_equal(values[:, :37], codes)
    assert not values[:, 37:].any()


def test_saturation() -> None:
    """A row may saturate exactly if some input of unsigned bytes takes the sum of two neighbours out of 16 bits."""
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        row = random.integers(-90, 91, (1, 5)).astype(np.int16)
        pairs = np.append(row[0], 0).reshape(-1, 2).astype(int)
        sums = [a * x + b * y for a, b in pairs for x in (0, 255) for y in (0, 255)]
        expected = max(sums) > 32767 or min(sums) < -32768
        assert may_saturate(torch.from_numpy(row)) == expected
        seen.add(bool(expected))
    assert seen == {True, False}
    assert not may_saturate(torch.full((2, 8), 64, dtype=torch.int16))


def test_clip() -> None:
    """A quantizer without its rounding keeps the clip and the static range, and changes nothing between."""
    quantizer = FakeQuant(Format(bits=4, scheme="asymmetric", range="static", clip=1.5))
    quantizer.set_scale(torch.tensor(0.1), torch.tensor(-0.5))
    x = torch.tensor([-9.0, -0.5, 0.33, 0.99, 1.2, 9.0])
    assert torch.allclose(Clip(quantizer, ranged=True)(x), torch.tensor([-0.5, -0.5, 0.33, 0.99, 1.0, 1.0]))
    assert torch.allclose(Clip(quantizer, ranged=False)(x), torch.tensor([-1.5, -0.5, 0.33, 0.99, 1.2, 1.5]))
    free = FakeQuant(Format())
    assert Clip(free, ranged=True)(x) is x


def test_compare() -> None:
    """Errors are relative norms by hand, the worst output counts, and NaN never passes."""
    exact = {"logits": [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])], "pred_boxes": [torch.ones(1, 4)] * 2}
    reference = {
        "logits": [torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0, 4.0]])],
        "pred_boxes": [torch.ones(1, 4)] * 2,
    }
    file = {"logits": [torch.tensor([[3.0, 0.0]]), torch.tensor([[5.0, 4.0]])], "pred_boxes": [torch.ones(1, 4)] * 2}
    found = measure_parity(file, exact, exact, reference)
    limit = 1.5 * (1 + 3 / 2**0.5) * 0.2 + 1e-4
    distances = {"error": 1.0, "largest": 5.0, "drift": 1.0, "simulated": 0.0, "file": 1.0, "twin": 0.2}
    assert found == {"samples": 2, "agreement": 0.5, "limit": limit, **distances}
    with refused(ModelError, "1.00e+00", "9.36e-01"):
        check_parity(found)
    check_parity(measure_parity(reference, exact, exact, reference))
    boxes = file | {"logits": exact["logits"], "pred_boxes": [2 * torch.ones(1, 4)] * 2}
    assert measure_parity(boxes, exact, exact, reference)["error"] == 1.0
    broken = {name: [torch.full_like(t, torch.nan) for t in values] for name, values in exact.items()}
    with refused(ModelError, "nan"):
        check_parity(measure_parity(broken, exact, exact, reference))


def test_inputs_are_completed() -> None:
    """Masks of ones and token types of zeros are added where a batch lacks them, in the file's order."""
    model, _ = SUPPORTED["bert"]()
    batch = complete(model, {"input_ids": torch.tensor([[5, 6, 7]])})
    assert list(batch) == ["input_ids", "attention_mask", "token_type_ids"]
    assert batch["attention_mask"].tolist() == [[1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0]]
