"""What a unit reads, against hooks on the float model and the model's own attention."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from bittern import simulate
from bittern.attention import sites
from bittern.layers import as_float, fake_quants, swap
from bittern.ptq import capture as module
from bittern.ptq.capture import Captured, capture, padding_mask
from bittern.ptq.stream import Call, stream
from bittern.recipe import Format
from families import SUPPORTED, Batch
from helpers import outputs, same


@torch.no_grad()
def captured(family: str, unit: str, batches: int = 1, seed: int = 0) -> tuple[hf.PreTrainedModel, Batch, Captured]:
    """A family's model, its batch, and what one unit of it read in so many of these batches."""
    model, batch = SUPPORTED[family]()
    simulate(model, "w8a8", batch)
    size = len(next(iter(batch.values())))
    found = None
    with as_float(model):
        for _, calls in stream(model, [unit], [batch] * batches):
            found = capture(calls, [batch] * batches, [size] * batches, seed)
    assert found is not None
    return model, batch, found


@torch.no_grad()
def read_by(family: str, names: list[str]) -> dict[str, Tensor]:
    """What these modules of the plain float model read."""
    model, batch = SUPPORTED[family]()
    seen: dict[str, Tensor] = {}
    for name in names:
        layer: nn.Module = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0].clone()}))
    model(**batch)
    return seen


def test_padding() -> None:
    """Rows are what the float model's layers read where there is text, sample by sample."""
    _, batch, found = captured("bert", "bert.encoder.layer.1")
    layers = [group.layers[0] for group in found.inputs]
    reads = read_by("bert", layers)
    mask = batch["attention_mask"].bool()
    assert not mask.all()
    for group in found.inputs:
        torch.testing.assert_close(group.x, reads[group.layers[0]][mask], rtol=1e-4, atol=1e-5)
        assert group.sample.tolist() == [0] * 12 + [1] * 9


def test_padding_of_two_texts() -> None:
    """Of a source and a target as long, tokens that are real in both are read; of one that is longer, its own."""
    source, target = torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = {"attention_mask": source, "decoder_attention_mask": target}
    for shape, expected in (((2, 3), source * target), ((2, 4), None)):
        found = padding_mask(batch, shape)
        assert (found is None) == (expected is None)
        assert found is None or torch.equal(found, expected == 1)
    longer = padding_mask(batch | {"decoder_attention_mask": torch.ones(2, 4)}, (2, 3))
    assert longer is not None
    assert torch.equal(longer, source == 1)


def test_heads_without_padding() -> None:
    """Padded tokens are zero in Q, K, V and the map, and are marked as such."""
    _, batch, found = captured("bert", "bert.encoder.layer.0")
    (heads,) = found.heads.values()
    mask = batch["attention_mask"].bool()
    assert torch.equal(heads.valid_rows, mask)
    assert torch.equal(heads.valid_keys, mask)
    for tensor in (heads.query, heads.key, heads.value, heads.map):
        assert not tensor.transpose(1, 2)[~mask].any()
        assert tensor.transpose(1, 2)[mask].any(-1).all()
    torch.testing.assert_close(heads.map.sum(-1), mask.float()[:, None].expand(2, 4, 12))


def test_lengths_of_several_batches() -> None:
    """Batches of several lengths are joined: the shorter is padded, and its padding is marked."""
    model, batch = SUPPORTED["bert"]()
    short = {name: value[:, :7] for name, value in batch.items()}
    simulate(model, "w8a8", batch)
    with as_float(model), torch.no_grad():
        for _, calls in stream(model, ["bert.encoder.layer.0"], [short, batch]):
            found = capture(calls, [short, batch], [2, 2], 0)
    (heads,) = found.heads.values()
    assert heads.query.shape == (4, 4, 12, 8)
    assert heads.map.shape == (4, 4, 12, 12)
    assert heads.valid_rows.sum(1).tolist() == [7, 7, 12, 9]
    assert heads.sample.tolist() == [0, 1, 2, 3]
    assert [len(g.x) for g in found.inputs] == [35] * len(found.inputs)


def test_windows() -> None:
    """All windows of a Swin image are of one sample, side by side."""
    _, _, found = captured("swin", "swin.encoder.layers.0.blocks.0", batches=2)
    (heads,) = found.heads.values()
    windows = 16  # of 4 × 4 tokens in 16 × 16
    assert heads.sample.tolist() == [s for s in range(4) for _ in range(windows)]
    for group in found.inputs:
        assert group.sample.tolist() == [s for s in range(4) for _ in range(256)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_scores_are_the_models_own(family: str) -> None:
    """The map is the softmax of the captured QKᵀ, masked and scaled, and so is that of the model's eager attention."""
    unit = "transformer.h.1" if family == "gpt2" else "model.layers.1"
    _, batch, found = captured(family, unit)
    (heads,) = found.heads.values()
    model, _ = SUPPORTED[family]()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps: Tensor = model(**batch, output_attentions=True).attentions[1]
    items, owners, _, width = heads.query.shape
    tokens = maps.shape[-1]
    assert heads.groups == maps.shape[1] // owners == (1 if family == "gpt2" else 2)
    scores = (heads.query @ heads.key.mT).view(items, maps.shape[1], tokens, tokens) * width**-0.5
    text = batch["attention_mask"].bool()
    allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril() & text[:, None, None]
    own = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    rows = text[:, None].expand(maps.shape[:3])
    torch.testing.assert_close(own[rows], maps[rows], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(heads.map.view_as(maps)[rows], maps[rows], rtol=1e-3, atol=1e-5)


GROUPS: dict[str, tuple[str, list[set[str]]]] = {
    "bert": (
        "bert.encoder.layer.0",
        [
            {"attention.self.query", "attention.self.key", "attention.self.value"},
            {"attention.output.dense"},
            {"intermediate.dense"},
            {"output.dense"},
        ],
    ),
    "llama": (
        "model.layers.0",
        [
            {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
            {"self_attn.o_proj"},
            {"mlp.gate_proj", "mlp.up_proj"},
            {"mlp.down_proj"},
        ],
    ),
    "gpt2": ("transformer.h.0", [{"attn.c_attn"}, {"attn.c_proj"}, {"mlp.c_fc"}, {"mlp.c_proj"}]),
    "bart": (
        "model.decoder.layers.0",
        [
            {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
            {"self_attn.out_proj"},
            {"encoder_attn.q_proj"},
            {"encoder_attn.k_proj", "encoder_attn.v_proj"},
            {"encoder_attn.out_proj"},
            {"fc1"},
            {"fc2"},
        ],
    ),
}


@pytest.mark.parametrize("family", GROUPS)
def test_groups(family: str) -> None:
    """Layers that read one tensor are one group, others are groups of their own."""
    unit, expected = GROUPS[family]
    _, _, found = captured(family, unit, batches=2)
    got = [{name.removeprefix(f"{unit}.") for name in group.layers} for group in found.inputs]
    assert sorted(map(sorted, got)) == sorted(map(sorted, expected))


NORMS: dict[str, tuple[str, dict[str, str | None]]] = {
    "vit": ("vit.layers.0", {"q_proj": "layernorm_before", "fc1": "layernorm_after"}),
    "gpt2": ("transformer.h.0", {"c_attn": "ln_1", "c_fc": "ln_2"}),
    "llama": ("model.layers.0", {"q_proj": "input_layernorm", "gate_proj": "post_attention_layernorm"}),
    "bert": ("bert.encoder.layer.0", {}),  # the residual reads the norm too
    "gemma2": ("model.layers.0", {}),  # 1 + weight is not what scales
    "roberta": ("roberta.encoder.layer.0", {}),
}


@pytest.mark.parametrize("family", NORMS)
def test_norms(family: str) -> None:
    """A group's norm is found if, and only if, the group alone reads it; the model is left as it was."""
    unit, expected = NORMS[family]
    model, batch, found = captured(family, unit)
    got = {group.layers[0].rpartition(".")[2]: group.norm for group in found.inputs if group.norm}
    assert got == expected
    fresh, _ = SUPPORTED[family]()
    with as_float(model):
        ours = outputs(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    assert not same(ours, {})


def test_row_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of very many rows a part is kept, the same for the same seed and another for another, each with its sample."""
    _, _, whole = captured("vit", "vit.layers.0", batches=2)
    monkeypatch.setattr(module, "MAX_ROWS", 20)
    monkeypatch.setattr(module, "MAX_MAP", 2 * 4 * 17 * 17)

    def kept(seed: int) -> dict[str, Any]:
        _, _, found = captured("vit", "vit.layers.0", batches=2, seed=seed)
        (heads,) = found.heads.values()
        assert len(heads.query) == len(heads.map) == 2
        for group, all_rows in zip(found.inputs, whole.inputs, strict=True):
            assert len(group.x) == 20
            for row, sample in zip(group.x, group.sample, strict=True):
                mine = all_rows.x[all_rows.sample % 2 == sample % 2]
                assert (mine == row).all(1).any()
        return {group.layers[0]: group.x for group in found.inputs}

    assert same(kept(0), kept(0))
    assert not same(kept(0), kept(1))


def test_errors_leave_nothing_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a run of a unit that failed, its sites record nothing and its quantizers are at work again."""
    model, batch = SUPPORTED["bert"]()
    simulate(model, "w8a8", batch)
    unit, before = "bert.encoder.layer.0", [q.bypass for _, q in fake_quants(model)]
    with torch.no_grad(), as_float(model):
        for _, calls in stream(model, [unit], [batch]):
            with monkeypatch.context() as patch:
                patch.setattr(model.get_submodule(f"{unit}.output"), "forward", None)
                with pytest.raises(TypeError):
                    capture(calls, [batch], [2], 0)
            capture(calls, [batch], [2], 0)
    assert all(site.taps is None for site in sites(model))
    assert [q.bypass for _, q in fake_quants(model)] == before


class Nested(nn.Module):
    """Gives pairs, as Grounding DINO's fusion of texts and images does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return (self.linear(self.norm(x)), x), x


@torch.no_grad()
def test_outputs_in_pairs() -> None:
    """A norm is found that one layer alone reads, also where a unit gives tuples of tuples."""
    unit, x, fmt = Nested(), torch.randn(2, 3, 8), Format(range="static")
    swap(unit.linear, "unit.linear", fmt, fmt)
    found = capture([Call(0, "unit", unit, (x,), {})], [{"x": x}], [2], 0)
    assert [(group.layers, group.norm) for group in found.inputs] == [(["unit.linear"], "norm")]
