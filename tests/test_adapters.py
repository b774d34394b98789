"""Adapters of PEFT: trained on a packed base, merged before, or refused; never lost, never quantized apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import bittern
from bittern.errors import ModelError
from families import SUPPORTED
from helpers import outputs, quantized, refused, same

LORA = LoraConfig(target_modules=["query", "value", "intermediate.dense"], init_lora_weights=False)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A folder with the same BERT in float, simulated and packed, and an adapter of the float one."""
    model, _ = quantized("bert", "w8a8", packed=False)
    SUPPORTED["bert"]()[0].save_pretrained(tmp_path / "float")
    bittern.save(model, tmp_path / "simulated")
    bittern.save(bittern.pack(model), tmp_path / "packed")
    torch.manual_seed(0)
    get_peft_model(bittern.load(tmp_path / "float"), LORA).save_pretrained(tmp_path / "adapter")
    return tmp_path


def adapted(folders: Path, state: str) -> PeftModel:
    return PeftModel.from_pretrained(bittern.load(folders / state), folders / "adapter", is_trainable=True).eval()


def gradients(model: PeftModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model(**batch).logits.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_adapter_on_packed(folders: Path) -> None:
    """An adapter on a packed model has the outputs and gradients that it has on the simulated one, whose codes it
    leaves alone; and transformers' Trainer trains it."""
    _, batch = SUPPORTED["bert"]()
    packed, simulated = adapted(folders, "packed"), adapted(folders, "simulated")
    assert not same(outputs(packed, batch), outputs(bittern.load(folders / "packed"), batch))
    found, expected = gradients(packed, batch), gradients(simulated, batch)
    assert found.keys() >= {n for n in expected if "lora" in n} != set()
    for name in found:
        assert (found[name] - expected[name]).norm() <= 1e-3 * expected[name].norm()
    rows = [{**{k: v[0] for k, v in batch.items()}, "labels": 0}] * 8
    arguments = hf.TrainingArguments(str(folders / "run"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    before = {n: p.detach().clone() for n, p in packed.named_parameters() if p.requires_grad}
    codes = bittern.load(folders / "packed").state_dict()
    hf.Trainer(packed, arguments, train_dataset=rows).train()
    assert any(not torch.equal(p, before[n]) for n, p in packed.named_parameters() if p.requires_grad)
    kept = {n.replace("base_model.model.", "").replace("base_layer.", ""): t for n, t in packed.state_dict().items()}
    assert all(torch.equal(kept[name], codes[name]) for name in codes if name.endswith("codes"))


def test_merge_before(folders: Path) -> None:
    """A merged adapter is part of the model: it is quantized, saved and loaded with it."""
    _, batch = SUPPORTED["bert"]()
    expected = outputs(adapted(folders, "float"), batch)
    merged = adapted(folders, "float").merge_and_unload()
    bittern.simulate(merged, "w8a8")
    bittern.calibrate(merged, [batch])
    bittern.save(bittern.pack(merged), folders / "merged")
    found = outputs(bittern.load(folders / "merged"), batch)
    assert (found["logits"] - expected["logits"]).norm() < 0.1 * expected["logits"].norm()


def test_merge_into_simulated(folders: Path) -> None:
    """What is merged into a simulated model through `weight.data` is seen, though PyTorch does not count it."""
    _, batch = SUPPORTED["bert"]()
    model = bittern.load(folders / "simulated")
    outputs(model, batch)  # whose quantized weights are kept
    query = model.bert.encoder.layer[0].attention.self.query
    kept = query.quantized_weight
    with torch.no_grad():
        before = kept()
        query.weight.data += 1
        assert not torch.equal(kept(), before)
        with refused(ModelError, "cannot be changed"):
            adapted(folders, "packed").merge_and_unload()


def test_adapters_are_not_lost(folders: Path) -> None:
    """A model with adapters that are not merged is neither quantized nor saved, nor is an adapter loaded as a model."""
    with refused(ModelError, "merge_and_unload"):
        bittern.simulate(adapted(folders, "float").get_base_model(), "w8a8")
    with refused(ModelError, "merge_and_unload"):
        bittern.save(adapted(folders, "packed").get_base_model(), folders / "out")
    with refused(ModelError, "holds an adapter", "merge_and_unload"):
        bittern.load(folders / "adapter")
    assert not (folders / "out").exists()
