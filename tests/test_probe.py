"""Outputs kept in a file show whether what was loaded still computes what was saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import bittern
from bittern.cli.commands import app
from bittern.deploy import probe
from bittern.deploy.store import compare_outputs
from bittern.errors import CheckpointError, InputError
from families import SUPPORTED
from helpers import outputs, quantized, refused, same


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bittern.save(quantized("bert")[0], tmp_path / "packed")
    return tmp_path / "packed"


def test_what_is_loaded_is_what_was_saved(folder: Path) -> None:
    """A model that loads right passes, by Python and by the command, and stays as it was."""
    model = bittern.load(folder)
    batch = SUPPORTED["bert"]()[1]
    expected = outputs(model, batch)
    model.classifier.train()
    assert compare_outputs(model, folder) < 1e-5
    assert [m.training for m in (model, model.classifier)] == [False, True]
    assert same(outputs(model.eval(), batch), expected)
    assert bittern.inspect(folder, verify=True)["verified"] < 1e-5
    done = CliRunner().invoke(app, ["inspect", str(folder), "--verify"])
    assert done.exit_code == 0, done.output
    assert "those of the model that was saved" in done.output


DAMAGE: dict[str, Any] = {
    "one bias": lambda model: model.bert.encoder.layer[0].output.dense.bias[0].add_(0.5),
    "codes": lambda model: model.bert.encoder.layer[1].output.dense.weight_codes.zero_(),
    "scale of a weight": lambda model: model.bert.encoder.layer[0].output.dense.weight_scale.mul_(1.1),
    "scale of an input": lambda model: model.bert.encoder.layer[0].output.dense.input_quantizer.scale.mul_(1.1),
    "norm": lambda model: nn.init.ones_(model.bert.encoder.layer[0].output.LayerNorm.weight),
    "embedding": lambda model: model.bert.embeddings.word_embeddings.weight_scale.zero_(),
}


@pytest.mark.parametrize("what", DAMAGE)
@torch.no_grad()
def test_what_differs_is_refused(folder: Path, what: str) -> None:
    """A model that computes something else than what was saved fails, whichever part of it is wrong."""
    model = bittern.load(folder)
    DAMAGE[what](model)
    with refused(CheckpointError, "not the one that was saved"):
        compare_outputs(model, folder)


def test_no_outputs_to_compare(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of older versions, of other classes and of models that take unusual inputs say that they hold none."""
    old = Path(__file__).parent / "data" / "format1"
    old = next(path for path in sorted(old.iterdir()) if path.is_dir())
    with refused(InputError, "holds no outputs", "older"):
        bittern.inspect(old, verify=True)
    with refused(InputError, "they are of BertForSequenceClassification"):
        compare_outputs(bittern.load(folder).bert, folder)
    monkeypatch.setattr(probe, "dummy_batch", lambda model: {"unknown": torch.ones(1)})
    bittern.save(quantized("bert")[0], tmp_path / "unusual")
    with refused(InputError, "holds no outputs", "unusual inputs"):
        bittern.inspect(tmp_path / "unusual", verify=True)
