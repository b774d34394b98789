"""The page of the file format holds: a reader made from it alone, in numpy, finds the weights that Bittern uses."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bittern
from bittern.recipe import Recipe
from helpers import quantized

FORMATS: list[dict[str, Any]] = [
    {},
    {"bits": 4, "granularity": "row", "range": "static"},
    {"bits": 3, "granularity": "group", "group_size": 16},
    {"bits": 6, "scheme": "asymmetric", "granularity": "row", "range": "static"},
    {"bits": 1, "scheme": "unsigned"},
    {"bits": 10, "granularity": "row"},
    {"bits": 11, "scheme": "asymmetric"},
    {"kind": "ternary"},
    {"kind": "ternary", "storage": "base3", "granularity": "row"},
    {"kind": "binary", "granularity": "row"},
]
DEFAULTS: dict[str, Any] = {
    "kind": "uniform",
    "bits": 8,
    "scheme": "symmetric",
    "granularity": "tensor",
    "storage": "bits",
}
TYPES = {"U8": "uint8", "I32": "int32", "I64": "int64", "F32": "float32"}  # safetensors → numpy and torch


def read_tensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a safetensors file, as its own specification says."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        data = np.frombuffer(raw[8 + size + start : 8 + size + end], TYPES[entry["dtype"]])
        tensors[name] = data.reshape(entry["shape"])
    return tensors, metadata


def read_numbers(row: np.ndarray, columns: int, bits: int) -> np.ndarray:
    """The unsigned numbers of one packed row."""
    if bits > 8:
        return row[:columns].astype(int) + (read_numbers(row[columns:], columns, bits - 8) << 8)
    whole = int.from_bytes(row.tobytes(), "little")
    return np.array([(whole >> (i * bits)) & ((1 << bits) - 1) for i in range(columns)], int)


def read_codes(packed: np.ndarray, columns: int, fmt: dict[str, Any]) -> np.ndarray:
    """Integer codes (rows, columns) of packed rows."""
    if fmt["storage"] == "base3":
        return np.stack([(packed[:, i // 5] // 3 ** (i % 5)) % 3 for i in range(columns)], 1).astype(int) - 1
    numbers = np.stack([read_numbers(row, columns, fmt["bits"]) for row in packed])
    if fmt["kind"] == "binary":
        return 2 * numbers - 1
    if fmt["kind"] == "ternary":
        return numbers - 1
    return numbers - (2 ** (fmt["bits"] - 1) if fmt["scheme"] == "symmetric" else 0)


def read_weight(tensors: dict[str, np.ndarray], module: str, columns: int, fmt: dict[str, Any]) -> np.ndarray:
    """The float32 weight (rows, columns) of a module."""
    fmt = DEFAULTS | {"ternary": {"bits": 2}, "binary": {"bits": 1}}.get(fmt.get("kind", ""), {}) | fmt
    codes = read_codes(tensors[f"{module}.weight_codes"], columns, fmt).astype(np.float32)
    scale, offset = tensors[f"{module}.weight_scale"], tensors.get(f"{module}.weight_offset")
    runs = codes.reshape(len(codes), -1, fmt["group_size"]) if fmt.get("group_size") else codes
    values = runs * scale if offset is None else runs * scale + offset
    return values.reshape(codes.shape)


def make_folder(folder: Path, weight: dict[str, Any], shards: str = "50GB") -> dict[str, np.ndarray]:
    """A packed model with these weights in its blocks; their values as Bittern computes with them, by module."""
    rule = {"roles": ["qkv", "ffn"], "weight": weight, "input": {"bits": 8}}
    model, _ = quantized("bert", Recipe.model_validate({"name": "made", "rules": [rule]}))
    bittern.save(model, folder, max_shard_size=shards)
    packed = {name: module for name, module in model.named_modules() if hasattr(module, "unpacked")}
    assert packed
    return {name: module.unpacked().numpy() for name, module in packed.items()}


@pytest.mark.parametrize("weight", FORMATS, ids=str)
def test_weights(tmp_path: Path, weight: dict[str, Any]) -> None:
    """The reader finds the bits of every weight, in every format that a weight can have."""
    expected = make_folder(tmp_path / "packed", weight)
    tensors, _ = read_tensors(tmp_path / "packed" / "model.safetensors")
    table = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["formats"]
    for name, values in expected.items():
        fmt = table[int(tensors[f"{name}.format_index"][0])]["weight"]
        np.testing.assert_array_equal(read_weight(tensors, name, values.shape[1], fmt), values)


@pytest.mark.parametrize("shards", ["50GB", "20KB"])
def test_checksums(tmp_path: Path, shards: str) -> None:
    """Digests of all tensors, in one file or several, and of the configuration are those that the page describes."""
    make_folder(tmp_path / "packed", {"kind": "ternary"}, shards)
    files = sorted((tmp_path / "packed").glob("*.safetensors"))
    assert (len(files) > 1) == (shards == "20KB")
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        found, metadata = read_tensors(file)
        tensors |= found
    checks = json.loads(metadata["bittern"])
    sha = hashlib.sha256()
    for name in sorted(tensors):
        data = tensors[name]
        sha.update(f"{name}|{torch.from_numpy(data.copy()).dtype}|{list(data.shape)}|".encode() + data.tobytes())
    assert sha.hexdigest() in checks["tensors"]
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    text = json.dumps(config, sort_keys=True, separators=(", ", ": "), ensure_ascii=True)
    assert hashlib.sha256(text.encode()).hexdigest() == checks["config"]
    assert checks["format_version"] == config["quantization_config"]["format_version"] == 1


def test_sizes(tmp_path: Path) -> None:
    """A row takes the bytes that the page says: `bits` a code, or a byte for five ternary ones."""
    for storage, per_row in (("bits", math.ceil(32 * 2 / 8)), ("base3", math.ceil(32 / 5))):
        expected = make_folder(tmp_path / storage, {"kind": "ternary", "storage": storage})
        tensors, _ = read_tensors(tmp_path / storage / "model.safetensors")
        name = next(name for name, values in expected.items() if values.shape[1] == 32)
        assert tensors[f"{name}.weight_codes"].shape[1] == per_row
