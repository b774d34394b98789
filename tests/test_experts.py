"""Experts of a mixture are quantized, packed, saved and loaded as all layers are."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import bittern
from bittern import native
from bittern.dry_run import read_anatomy
from bittern.errors import RecipeError
from bittern.experts import ExpertsLinear, close_experts, open_experts
from bittern.layers import QuantExpertsLinear, restore, weight_matrix
from bittern.ptq import quantize
from bittern.recipe import Format, Recipe, Rule

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 99,
    "num_experts_per_tok": 2,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
}
MIXTURES = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=4)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**SIZES, num_local_experts=4)),  # transposed, with a bias
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SIZES, num_experts=4)),
    "granitemoe": lambda: hf.GraniteMoeForCausalLM(
        hf.GraniteMoeConfig(**SIZES, num_local_experts=4)
    ),  # renamed in files
    "nemotron_h": lambda: hf.NemotronHForCausalLM(  # without a gate
        hf.NemotronHConfig(**SIZES, n_routed_experts=4, layers_block_type=["attention", "moe"], n_group=1, topk_group=1)
    ),
    "llama4": lambda: hf.Llama4ForCausalLM(  # all experts in one product
        hf.Llama4TextConfig(**SIZES, num_local_experts=4, intermediate_size_mlp=48, interleave_moe_layer_step=1)
    ),
    "dbrx": lambda: hf.DbrxForCausalLM(  # two dimensions, of which the first counts experts and rows
        hf.DbrxConfig(
            d_model=32,
            n_heads=4,
            n_layers=2,
            vocab_size=99,
            attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        )
    ),
    "jetmoe": lambda: hf.JetMoeForCausalLM(  # of attention too
        hf.JetMoeConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_key_value_heads=2,
            kv_channels=8,
            intermediate_size=24,
            num_local_experts=4,
            num_experts_per_tok=2,
            vocab_size=99,
        )
    ),
}


def mixture(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model: Any = MIXTURES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval(), {"input_ids": torch.randint(0, 99, (2, 12))}


@torch.no_grad()
def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    out: torch.Tensor = model(**batch).logits
    return out


@pytest.mark.parametrize("name", MIXTURES)
def test_run_experts(name: str) -> None:
    """Opened experts give what the model's own code gives, and closed ones are as they were."""
    model, batch = mixture(name)
    expected, names = logits(model, batch), [(n, id(p)) for n, p in model.named_parameters()]
    open_experts(model, read_anatomy(model, batch).experts)
    assert sum(isinstance(m, ExpertsLinear) for m in model.modules()) >= 2
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-5)
    close_experts(model)
    assert torch.equal(logits(model, batch), expected)
    assert sorted((n, id(p)) for n, p in model.named_parameters()) == sorted(names)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("recipe", ["w8a8", "ternary-2-2-8"])
def test_simulated_packed_loaded(name: str, recipe: str, tmp_path: Path) -> None:
    """Nearly all weights are quantized, and a simulated and a packed mixture give the same before and after a load."""
    model, batch = mixture(name)
    report = bittern.simulate(model, recipe)
    assert any(x.type == "ExpertsLinear" and x.weight and x.input and x.role == "ffn" for x in report.layers)
    bittern.calibrate(model, [batch])
    simulated = logits(model, batch)
    bittern.save(model, tmp_path / "simulated")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "simulated").eval(), batch), simulated)
    bittern.pack(model)
    with native.disabled():
        assert torch.equal(logits(model, batch), simulated)
        assert torch.equal(logits(deepcopy(model), batch), simulated)
    bittern.save(model, tmp_path / "packed")
    loaded = type(model).from_pretrained(tmp_path / "packed").eval()
    with native.disabled():
        assert torch.equal(logits(loaded, batch), simulated)
    assert bittern.inspect(tmp_path / "packed", verify=True)


@pytest.mark.parametrize("kept", ["*.experts.*", "*.experts.down_proj", "*.layers.0.*experts.*"])
@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])
def test_some_experts_stay_float(name: str, kept: str, tmp_path: Path) -> None:
    """Where rules keep some or all experts float, a loaded model gives what was saved."""
    model, batch = mixture(name)
    rules = Rule(modules=kept), Rule(roles=("qkv", "ffn"), weight=Format(bits=8, granularity="row"))
    bittern.simulate(model, Recipe(name="test", rules=rules), batch)
    bittern.save(bittern.pack(model), tmp_path / "packed")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "packed").eval(), batch), logits(model, batch))


def test_rows_of_experts() -> None:
    """Each row of each expert has a scale of its own, so that one expert's outlier changes no other expert."""
    model, batch = mixture("gpt_oss")
    bittern.simulate(model, "w8a8", batch)
    layer = next(m for m in model.modules() if isinstance(m, QuantExpertsLinear))
    before = [layer.expert_weight(expert) for expert in range(4)]
    assert before[0].shape == (96, 32)
    with torch.no_grad():
        layer.weight[1, 0, 0] = 100.0
    after = [layer.expert_weight(expert) for expert in range(4)]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True, True]


@pytest.mark.parametrize("name", MIXTURES)
def test_training(name: str) -> None:
    """All experts that a token reaches get gradients, by row or by whole weights."""
    for fmt in (Format(bits=8, granularity="row"), Format(kind="ternary")):
        model, batch = mixture(name)
        bittern.simulate(model, Recipe(name="test", rules=(Rule(roles=("ffn",), weight=fmt),)), batch)
        model.train()(**batch).logits.square().mean().backward()
        for layer in model.modules():
            if isinstance(layer, QuantExpertsLinear):
                assert layer.weight.grad is not None
                assert layer.weight.grad.abs().sum() > 0


@torch.no_grad()
def error_of_experts(model: Any) -> float:
    layers = (m for m in model.modules() if isinstance(m, QuantExpertsLinear))
    return sum(float((m.quantized_weight() - weight_matrix(m)).square().sum()) for m in layers)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_ptq(name: str) -> None:
    """The search leaves experts out: their weights go to what is nearest, and the report names their inputs."""
    model, batch = mixture(name)
    found = quantize(model, "w4a8", [batch])
    error = error_of_experts(model)
    assert sum(x.endswith("experts.down_proj.input") for x in found.by_extremes) == 2
    assert not any("experts" in x.name for x in found.solved)
    restore(model)
    bittern.simulate(model, "w4a8", batch)
    assert 0 < error < 0.99 * error_of_experts(model)


def test_restore() -> None:
    """Restored, or refused, a model has its experts as transformers knows them."""
    model, batch = mixture("mixtral")
    names, expected = list(model.state_dict()), logits(model, batch)
    with pytest.raises(RecipeError):
        bittern.simulate(model, Recipe(name="test", rules=(Rule(modules="nothing*", weight=Format()),)), batch)
    assert list(model.state_dict()) == names
    bittern.simulate(model, "w8a8", batch)
    restore(model)
    assert sorted(model.state_dict()) == sorted(names)
    assert torch.equal(logits(model, batch), expected)
