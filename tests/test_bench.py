"""The command that times a packed model beside its float model."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import bittern
from bittern import native
from bittern.cli.commands import app
from bittern.deploy import bench as benches
from bittern.deploy.bench import alternate, ratios, without_kernel
from bittern.deploy.packed import pack_layers, weight_bytes
from bittern.errors import InputError, ModelError
from bittern.layers import swap
from families import SUPPORTED
from helpers import quantized, refused

pytestmark = pytest.mark.kernels


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    packed, _ = quantized("bert", "w8a8")
    bittern.save(packed, tmp_path / "packed", report={"source": str(tmp_path / "float")})
    bittern.save(SUPPORTED["bert"]()[0], tmp_path / "float")
    return tmp_path / "packed", tmp_path / "float"


def test_bench_compares_with_float(folders: tuple[Path, Path]) -> None:
    """Both models get a time, a ratio and sizes; the codes take a part of the float weights' memory."""
    done = CliRunner().invoke(
        app, ["bench", str(folders[0]), "--rounds", "2", "--length", "8", "--threads", "1", "--json"]
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert list(result["engines"]) == [benches.OURS, benches.FLOAT]
    ours, other = result["engines"][benches.OURS], result["engines"][benches.FLOAT]
    assert all(e["latency_ms"] > 0 and e["times_ours"] > 0 for e in result["engines"].values())
    assert other["file"] > ours["file"]
    assert ours["times_ours"] == 1
    assert ours["samples_per_second"] == pytest.approx(1000 / ours["latency_ms"])
    assert ours["weights_in_memory"] < other["weights_in_memory"]
    assert ours["file"] == sum(f.stat().st_size for f in folders[0].glob("*.safetensors"))
    assert result["kernels"] == native.engine()[0]
    assert result["difference_kernels_simulated"] < 0.05
    assert result["without_kernel"] == {}


def test_bench_says_how_long_the_texts_are(folders: tuple[Path, Path]) -> None:
    """Texts longer than the model takes are shorter, and the title tells how long."""
    done = CliRunner().invoke(app, ["bench", str(folders[0]), "--rounds", "1", "--length", "1000"])
    assert "input_ids 1 × 62;" in done.output


def test_bench_says_what_is_slow(folders: tuple[Path, Path]) -> None:
    """Formats without a kernel are named, and so is a machine without kernels."""
    model, batch = SUPPORTED["bert"]()
    rule = {"weight": {"bits": 4, "scheme": "asymmetric"}, "input": {"bits": 8}}
    bittern.simulate(model, bittern.Recipe.from_dict({"name": "odd", "rules": [{"roles": ["ffn"]} | rule]}), batch)
    bittern.save(bittern.pack(model), folders[0], report={"source": str(folders[1])}, force=True)
    with native.disabled():
        done = CliRunner().invoke(app, ["bench", str(folders[0]), "--rounds", "1", "--length", "8"])
    assert done.exit_code == 0, done.output
    assert "no fast path for weight uniform 4-bit asymmetric per tensor" in done.output
    assert "no kernels here: the kernels are switched off" in done.output


def test_refusals(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A float model, and a packed one whose float model is unknown, are refused in one line."""
    with refused(ModelError, "holds no packed model"):
        benches.bench(folders[1])
    for text in ("[1]", "[" * 100_000):
        (folders[0] / "bittern.json").write_text(text)
        with refused(InputError, "names its float model", "--against"):
            benches.bench(folders[0])


def test_weights_take_a_sixteenth() -> None:
    """Ternary weights take at most 1/15 of the memory of floats once the kernels run."""
    layer = torch.nn.ModuleList([torch.nn.Linear(768, 3072)])
    size = weight_bytes(layer)
    swap(layer[0], "linear", bittern.Format(kind="ternary"), bittern.Format())
    pack_layers(layer)
    with torch.no_grad():
        assert layer[0].integer_product(torch.randn(2, 768)) is not None
    assert size / weight_bytes(layer) > 15


def test_ratios_are_paired() -> None:
    """A contender's ratio is the median over rounds of its time by the base's in the same round."""
    assert ratios({"a": [1.0, 2.0, 8.0], "b": [2.0, 2.0, 4.0]}, "a") == {"a": 1.0, "b": 1.0}
    order: list[str] = []
    times = alternate({name: partial(order.append, name) for name in "ab"}, 2)
    assert "".join(order) == "ab" + "ab" + "ba"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


def test_convolutions() -> None:
    """A convolution has a kernel, whether its patches overlap or not, but is named if it is in groups."""
    model, batch = SUPPORTED["detr"]()
    bittern.simulate(model, "w8a8", batch)
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {m.stride == m.kernel_size for m in convolutions.values()} == {True, False}
    assert not without_kernel(model)
    name, layer = convolutions.popitem()
    layer.groups = 2
    assert without_kernel(model).keys() == {name}
