"""Embeddings are pooled as the model's folder says, in the files of sentence-transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from transformers import BertForSequenceClassification

import bittern
from bittern import jobs
from bittern.data import load_data
from bittern.data.evaluate import predict
from bittern.data.pooling import Pooling, embed, read_pooling
from bittern.errors import CheckpointError, InputError
from families import SUPPORTED
from helpers import refused
from material import TEXTS, save_text_model, write_tables

HIDDEN = torch.tensor([[[3.0, 0.0], [3.0, 8.0], [9.0, 9.0]], [[9.0, 9.0], [0.0, -2.0], [4.0, -1.0]]])
MASK = torch.tensor([[1, 1, 0], [0, 1, 1]])  # padded on the right, and on the left


def sentence_model(folder: Path, *kinds: str, pooling: dict[str, Any] | None = None, **own: Any) -> Path:
    """An encoder with the files of sentence-transformers: these modules after the model itself."""
    save_text_model(folder, head=False)
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(["Transformer", *kinds])
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(own))
    for module in modules[1:]:
        (folder / str(module["path"])).mkdir()
    if pooling:
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, [[3, 0], [0, -2]]),
        ({"pooling_mode_max_tokens": True, "include_prompt": True}, [[3, 8], [4, -1]]),
        ({"pooling_mode_lasttoken": True}, [[3, 8], [4, -1]]),
        ({"pooling_mode": "mean"}, [[3, 4], [2, -1.5]]),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, [[3, 0, 3, 4], [0, -2, 2, -1.5]]),
    ],
    ids=str,
)
def test_ways(settings: dict[str, Any], expected: list[list[float]], tmp_path: Path) -> None:
    """Each way takes what it should of the tokens that are not padding."""
    model = bittern.load(sentence_model(tmp_path / "m", "Pooling", pooling=settings, similarity_fn_name="dot"))
    assert embed(model, HIDDEN, MASK).tolist() == expected


def test_length(tmp_path: Path) -> None:
    """Embeddings have the length 1, unless the folder has them compared by products without a module for it."""
    mean, dot = {"pooling_mode_mean_tokens": True}, {"similarity_fn_name": "dot"}
    for name, kinds, own, normal in (
        ("cosine", ("Pooling",), {}, True),
        ("dot", ("Pooling",), dot, False),
        ("both", ("Pooling", "Normalize"), dot, True),
    ):
        model = bittern.load(sentence_model(tmp_path / name, *kinds, pooling=mean, **own))
        assert read_pooling(model).normalize is normal
        assert torch.allclose(embed(model, HIDDEN, MASK).norm(dim=-1), torch.ones(2)) is normal
    assert read_pooling(SUPPORTED["bert"]()[0].base_model) == Pooling()


def test_dense(tmp_path: Path) -> None:
    """A dense layer after the pooling is part of the embedding."""
    folder = sentence_model(
        tmp_path / "m", "Pooling", "Dense", pooling={"pooling_mode": "mean"}, similarity_fn_name="dot"
    )
    save_file(
        {"linear.weight": torch.tensor([[1.0, -1.0]]), "linear.bias": torch.ones(1)},
        folder / "2_Dense" / "model.safetensors",
    )
    (folder / "2_Dense" / "config.json").write_text(
        json.dumps({"activation_function": "torch.nn.modules.activation.ReLU"})
    )
    assert embed(bittern.load(folder), HIDDEN, MASK).tolist() == [[0.0], [4.5]]


def test_head_that_was_not_kept(tmp_path: Path) -> None:
    """config.json may name a head that no file holds, as all-mpnet-base-v2's does: sentence-transformers load none."""
    settings = {"pooling_mode": "mean", "embedding_dimension": 32}
    folder = sentence_model(tmp_path / "m", "Pooling", pooling=settings)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    encoder, bare = SentenceTransformer(str(folder), device="cpu"), bittern.load(folder)
    batch = encoder.tokenizer(TEXTS[:4], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(bare(**batch).last_hidden_state, encoder[0].auto_model(**batch).last_hidden_state)
    assert jobs.quantize(folder, "w8a8", tmp_path / "packed", data="sentences")["packed"]["similarity"] > 0.9
    assert SentenceTransformer(str(tmp_path / "packed"), device="cpu").encode(TEXTS[:4]).shape == (4, 32)
    (folder / "modules.json").unlink()
    with refused(CheckpointError, "holds no weights cls.predictions", "would be random"):
        bittern.load(folder)
    (save_text_model(folder) / "modules.json").write_text("[]")
    assert type(bittern.load(folder)) is BertForSequenceClassification  # whose head is there


def test_unknown_module(tmp_path: Path) -> None:
    """What is not known would give other embeddings than the model's own, so it is refused."""
    with refused(InputError, "makes embeddings by LSTM, which is not served"):
        read_pooling(bittern.load(sentence_model(tmp_path / "a", "LSTM")))
    with refused(InputError, "makes embeddings by weightedmean"):
        settings = {"pooling_mode_weightedmean_tokens": True}
        read_pooling(bittern.load(sentence_model(tmp_path / "b", "Pooling", pooling=settings)))
    (tmp_path / "b" / "modules.json").write_text("[" * 100_000)
    with refused(InputError, "modules.json is not JSON"):
        read_pooling(bittern.load(tmp_path / "b"))


def test_prompt(tmp_path: Path) -> None:
    """The prompt that a folder names as its default stands before each text."""
    names = {"prompts": {"query": "dawn ", "other": "day "}, "default_prompt_name": "query"}
    folder = sentence_model(tmp_path / "m", "Pooling", pooling={"pooling_mode": "mean"}, **names)
    data = load_data("sentences", bittern.load(folder), folder, split="test")
    assert all(row[0].startswith("dawn ") for row in data.rows)


def test_jobs(tmp_path: Path) -> None:
    """Jobs compare embeddings that are pooled so; models that pool differently are not compared."""
    folder = sentence_model(tmp_path / "m", "Pooling", pooling={"pooling_mode_cls_token": True})
    data = str(write_tables(tmp_path / "data", text=TEXTS))
    model = bittern.load(folder)
    loaded = load_data(data, model, folder, split="test")
    (batch,) = (loaded.collate(loaded.rows) for _ in range(1))
    with torch.no_grad():
        first = model(**batch).last_hidden_state[:, 0]
    torch.testing.assert_close(predict(model, [batch]), torch.nn.functional.normalize(first, dim=-1))
    assert 0.9 < jobs.quantize(folder, "w8a8", tmp_path / "packed", data=data)["packed"]["similarity"] <= 1
    save_text_model(tmp_path / "mean", head=False)
    with refused(InputError, "pool tokens differently"):
        jobs.evaluate(tmp_path / "mean", data, against=folder)
