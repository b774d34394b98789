from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.gpt_oss import modeling_gpt_oss

from bittern.anatomy import Anatomy
from bittern.attention import (
    POINTS,
    Point,
    Site,
    attach,
    attention_configs,
    attention_forward,
    detach,
    recording,
    replace,
    sites,
)
from bittern.dry_run import read_anatomy
from bittern.errors import ModelError
from bittern.layers import simulate
from bittern.quantizers import fake_quantize
from bittern.recipe import Format, Recipe, Rule
from families import SUPPORTED, Batch

INSIDE: tuple[Point, ...] = ("query", "key", "value", "score", "map", "context")
# Families whose blocks have no norm that reads the sum of block input and attention output alone.
WITHOUT_RESIDUAL_NORM = ("gemma2", "gpt_neox", "swinv2", "gptj")
WITHOUT_TEXT = ("vit", "deit", "swin", "swinv2", "dinov2", "beit", "detr", "conditional_detr", "whisper")


def load(name: str) -> tuple[hf.PreTrainedModel, Batch, Anatomy]:
    """A model of the family with sites, its batch and its anatomy."""
    model, batch = SUPPORTED[name]()
    anatomy = read_anatomy(model, batch)
    attach(model, anatomy)
    return model, batch, anatomy


def eager_copy(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    copy = deepcopy(model)
    copy.set_attn_implementation("eager")
    return copy


def logits(model: hf.PreTrainedModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        return result(model(**batch))


def result(output: Any) -> Tensor:
    """The logits of one output, for CLIP those of images."""
    return output["logits_per_image" if "logits_per_image" in output else "logits"]


def maps_of(output: Any) -> list[Tensor]:
    """The maps that transformers gives, in order of execution."""
    if "vision_model_output" in output:
        return [*output.vision_model_output.attentions, *output.text_model_output.attentions]
    if "encoder_attentions" in output:
        decoder = zip(output.decoder_attentions, output.cross_attentions, strict=True)
        return [*output.encoder_attentions, *(m for pair in decoder for m in pair)]
    return list(output.attentions)


def calls(name: str, anatomy: Anatomy) -> list[str]:
    """Attention modules in order of their calls: the shared one of ALBERT is called once per layer."""
    return [a.name for a in anatomy.attentions] * (2 if name == "albert" else 1)


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", SUPPORTED)
def test_equals_eager(name: str) -> None:
    """With sites attached, a model computes what the family's own eager attention does."""
    model, batch = SUPPORTED[name]()
    expected = logits(eager_copy(model), batch)
    attach(model, read_anatomy(model, batch))
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [n for n in SUPPORTED if n not in WITHOUT_TEXT])
def test_padding_counts(name: str) -> None:
    """No map looks at padded keys, so that the mask of the batch did arrive."""
    model, batch, _ = load(name)
    with torch.no_grad(), recording(model, "map") as taps:
        model(**batch)
    from_text = [m for m in taps["map"] if m.shape[-1] == batch["attention_mask"].shape[1]]
    assert from_text
    assert all(m[1, :, :9, -3:].max() == 0 for m in from_text)


@pytest.mark.parametrize("name", SUPPORTED)
def test_recorded_maps(name: str) -> None:
    """Recorded maps are those of `output_attentions`; of Swin, which gives the last of each stage, those."""
    model, batch = SUPPORTED[name]()
    with torch.no_grad():
        expected = maps_of(eager_copy(model)(**batch, output_attentions=True))
    attach(model, read_anatomy(model, batch))
    with torch.no_grad(), recording(model, "map") as taps:
        model(**batch)
    recorded = taps["map"][1::2] if name.startswith("swin") else taps["map"]
    torch.testing.assert_close(recorded, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", SUPPORTED)
def test_recorded_counts(name: str) -> None:
    """Each point is recorded once per call of its module, in order, under the module's name."""
    model, batch, anatomy = load(name)
    with torch.no_grad(), recording(model, *POINTS) as taps:
        model(**batch)
    ran = calls(name, anatomy)
    of_norms = [] if name in WITHOUT_RESIDUAL_NORM else ran
    of_blocks = [anatomy.block_of(a).attentions[0].name for a in anatomy.attentions]
    for point in (*INSIDE, "output"):
        assert taps.names[point] == ran
    assert taps.names["residual"] == taps.names["norm"] == of_norms
    assert taps.names["ffn"] == taps.names["hidden"] == list(dict.fromkeys(of_blocks)) * (len(ran) // len(of_blocks))
    assert all(len(taps[point]) == len(taps.names[point]) for point in POINTS)


SHAPES: dict[tuple[str, int], dict[str, tuple[int, ...]]] = {  # family, number of the attention call
    ("bert", 0): {"query": (2, 4, 12, 8), "key": (2, 4, 12, 8), "map": (2, 4, 12, 12), "hidden": (2, 12, 32)},
    ("llama", 1): {"query": (2, 4, 12, 8), "key": (2, 2, 12, 8), "map": (2, 4, 12, 12), "hidden": (2, 12, 32)},
    ("t5", 3): {"query": (2, 4, 9, 8), "key": (2, 4, 12, 8), "map": (2, 4, 9, 12), "hidden": (2, 9, 32)},
    ("swin", 0): {"query": (32, 2, 16, 8), "key": (32, 2, 16, 8), "map": (32, 2, 16, 16), "hidden": (2, 256, 16)},
}


@pytest.mark.parametrize(("name", "call"), SHAPES)
def test_shapes(name: str, call: int) -> None:
    """Shapes are as documented: key heads before they are repeated, keys of cross-attention, windows as samples."""
    model, batch, anatomy = load(name)
    expected = SHAPES[name, call]
    with torch.no_grad(), recording(model, *POINTS) as taps:
        model(**batch)
    assert taps["query"][call].shape == taps["context"][call].shape == expected["query"]
    assert taps["key"][call].shape == taps["value"][call].shape == expected["key"]
    assert taps["score"][call].shape == taps["map"][call].shape == expected["map"]
    assert taps["output"][call].numel() == torch.Size(expected["hidden"]).numel()
    assert taps["residual"][call].shape == taps["norm"][call].shape == expected["hidden"]
    block = anatomy.blocks.index(anatomy.block_of(anatomy.attentions[call]))
    assert taps["ffn"][block].shape == taps["hidden"][block].shape == expected["hidden"]


def test_points_are_related() -> None:
    """Recorded tensors of BERT obey the formulas: map of the scores, context of the map, norm of the residual sum."""
    model, batch, _ = load("bert")
    with torch.no_grad(), recording(model, *POINTS) as taps:
        model(**batch)
    first = {point: taps[point][0] for point in POINTS}
    raw = first["query"] @ first["key"].transpose(2, 3) / 8**0.5
    seen = batch["attention_mask"].bool()[:, None, None].expand_as(raw)
    torch.testing.assert_close(first["score"][seen], raw[seen])
    assert (first["score"][~seen] < -1e38).all()
    torch.testing.assert_close(first["map"], first["score"].softmax(-1))
    torch.testing.assert_close(first["context"], first["map"] @ first["value"])
    layer = model.bert.encoder.layer[0]
    merged = first["context"].transpose(1, 2).flatten(2)
    torch.testing.assert_close(first["output"], layer.attention.output.dense(merged))
    torch.testing.assert_close(first["norm"], layer.attention.output.LayerNorm(first["residual"]))
    torch.testing.assert_close(first["ffn"], layer.output.dense(layer.intermediate(first["norm"])))
    torch.testing.assert_close(first["hidden"], layer.output.LayerNorm(first["ffn"] + first["norm"]))
    assert torch.equal(taps["residual"][1], taps["output"][1] + first["hidden"])


def test_quantized_matmuls() -> None:
    """Q, K, V and the map enter the matmuls quantized, and are recorded before."""
    model, batch = SUPPORTED["bert"]()
    anatomy = read_anatomy(model, batch)
    name = anatomy.attentions[0].name
    formats = {"query": Format(bits=4), "key": Format(bits=3), "value": Format(bits=5), "map": Format(bits=2)}
    attach(model, anatomy, {name: formats})
    with torch.no_grad(), recording(model, *INSIDE) as taps:
        model(**batch)
        q, k, v = (fake_quantize(taps[point][0], formats[point]) for point in ("query", "key", "value"))
    assert not torch.equal(q, taps["query"][0])
    scores = q @ k.transpose(2, 3) * 8**-0.5
    seen = batch["attention_mask"].bool()[:, None, None].expand_as(scores)
    torch.testing.assert_close(taps["score"][0][seen], scores[seen])
    torch.testing.assert_close(taps["context"][0], fake_quantize(taps["map"][0], formats["map"]) @ v)
    assert [set(site.formats) for site in sites(model)] == [set(formats), set()]


def test_boolean_mask() -> None:
    """A boolean mask (True: attend) is the additive one in other words."""
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    mask = torch.rand(2, 1, 5, 5) > 0.5
    mask[..., 0] = True
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for ours, theirs in zip(*(attention_forward(nn.Identity(), q, k, v, m) for m in (mask, added)), strict=True):
        assert torch.equal(ours, theirs)


def test_attention_sinks() -> None:
    """A sink takes probability and gives no value, as in GPT-OSS."""
    module = nn.Module().eval()
    module.sinks, module.__dict__["num_key_value_groups"] = nn.Parameter(torch.randn(4)), 2
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    ours = attention_forward(module, q, k, v, None, scaling=0.3)
    theirs = modeling_gpt_oss.eager_attention_forward(module, q, k, v, None, scaling=0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert (ours[1].sum(-1) < 1).all()


@pytest.mark.parametrize("name", SUPPORTED)
def test_replaced_hidden(name: str) -> None:
    """Blocks with other weights give the original's logits exactly, once its hidden states replace theirs."""
    model, batch, anatomy = load(name)
    other = deepcopy(model)
    with torch.no_grad():
        for block in anatomy.blocks:
            for parameter in other.get_submodule(block.name).parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    with recording(model, "hidden") as taps:
        expected = logits(model, batch)
    assert not torch.allclose(logits(other, batch), expected, atol=1e-3)
    replace(other, {(n, "hidden"): x for n, x in zip(taps.names["hidden"], taps["hidden"], strict=True)})
    assert torch.equal(logits(other, batch), expected)
    replace(other, {})
    assert not torch.allclose(logits(other, batch), expected, atol=1e-3)


# A replacement serves all calls of its module, so ALBERT's, which has another map in each call, is left out.
@pytest.mark.parametrize("name", [n for n in SUPPORTED if n != "albert"])
@pytest.mark.parametrize("point", ["map", "output"])
def test_replaced_by_its_own(name: str, point: Point) -> None:
    """What a point computes anyway can replace it without a trace."""
    model, batch, _ = load(name)
    with recording(model, point) as taps:
        expected = logits(model, batch)
    replace(model, {(n, point): x for n, x in zip(taps.names[point], taps[point], strict=True)})
    assert torch.equal(logits(model, batch), expected)


def test_one_replacement_for_all_samples() -> None:
    """A replacement with one sample stands for each sample of the batch."""
    model, batch, anatomy = load("vit")
    uniform = torch.full((1, 4, 17, 17), 1 / 17)
    replace(model, {(a.name, "map"): uniform for a in anatomy.attentions})
    with torch.no_grad(), recording(model, "value", "context") as taps:
        model(**batch)
    torch.testing.assert_close(taps["context"][0], taps["value"][0].mean(2, keepdim=True).expand(-1, -1, 17, -1))


@pytest.mark.parametrize(
    ("point", "bypassed"),
    [
        ("query", ["query"]),
        ("map", ["query", "key"]),
        ("context", ["query", "key", "value"]),
        ("output", ["query", "key", "value", "attention.output.dense"]),
        ("norm", ["query", "key", "value", "attention.output"]),
        ("hidden", [""]),
    ],
)
def test_gradient_of_replaced_points(point: Point, bypassed: list[str]) -> None:
    """What a replacement bypasses gets a zero gradient, not none; all other weights of the layer learn."""
    model, batch, anatomy = load("bert")
    with torch.no_grad(), recording(model, point) as taps:
        model(**batch)
    name = anatomy.attentions[1].name
    replace(model, {(name, point): taps[point][1]})
    result(model(**batch)).square().sum().backward()
    layer = model.bert.encoder.layer[1]
    for path, parameter in layer.named_parameters():
        assert parameter.grad is not None
        if path != "attention.self.key.bias":  # softmax does not see it
            assert parameter.grad.any() != any(part in path for part in bypassed), path
    before = model.bert.encoder.layer[0].output.dense.weight.grad
    # From the norm on, the layer before is bypassed too: its output reaches the rest through the residual sum alone.
    assert before.any() != (point in ("norm", "hidden"))


def test_replacement_that_is_impossible() -> None:
    """A wrong shape, an unknown module or point, and a point that a module does not have, are each refused."""
    model, batch, anatomy = load("t5")
    name, cross = anatomy.attentions[2].name, anatomy.attentions[3].name
    replace(model, {(name, "map"): torch.zeros(2, 4, 9, 8)})
    with pytest.raises(
        ModelError, match=r"SelfAttention\.map has shape \(2, 4, 9, 9\), its replacement \(2, 4, 9, 8\)"
    ):
        model(**batch)
    with pytest.raises(ModelError, match="cannot replace at 'decoder'; attention modules are encoder"):
        replace(model, {("decoder", "map"): torch.zeros(1)})
    with pytest.raises(ModelError, match=r"cannot replace 'maps' at decoder.*; its points are query, key"):
        replace(model, {(name, "maps"): torch.zeros(1)})  # type: ignore[dict-item]
    with pytest.raises(ModelError, match=r"cannot replace 'hidden' at decoder.*EncDecAttention"):
        replace(model, {(cross, "hidden"): torch.zeros(1)})


def test_recording_that_is_impossible() -> None:
    """An unknown point, and a model without sites, are each refused."""
    model, batch = SUPPORTED["bert"]()
    with pytest.raises(ModelError, match="no attention sites"), recording(model, "map"):
        pass
    attach(model, read_anatomy(model, batch))
    with pytest.raises(ModelError, match="cannot record 'maps'; the points are query"), recording(model, "maps"):  # type: ignore[arg-type]
        pass


def test_recording_ends_with_its_block() -> None:
    """After an error in the block, too, nothing more is recorded."""
    model, batch, _ = load("bert")
    with pytest.raises(IndexError), recording(model, "map") as taps:
        model(input_ids=torch.full((1, 3), 1000))
    model(**batch)
    assert taps["map"] == []


def test_recording_some_sites() -> None:
    """Of given sites alone is recorded, and a block around goes on with its own record afterwards."""
    model, batch, anatomy = load("bert")
    with torch.no_grad(), recording(model, "map", "query") as outer:
        with recording(sites(model)[1:], "map") as inner:
            model(**batch)
        model(**batch)
    first, second = (a.name for a in anatomy.attentions)
    assert (inner.names["map"], outer.names["map"]) == ([second], [first, first, second])
    with recording([], "map") as nothing:
        model(**batch)
    assert nothing["map"] == []


@pytest.mark.parametrize("name", ["bert", "swin", "detr", "gemma2", "t5", "clip"])
def test_detach(name: str) -> None:
    """Without its sites a model has its keys, hooks, attention implementation and outputs back."""
    model, batch = SUPPORTED[name]()
    keys, expected, hooks = list(model.state_dict()), logits(model, batch), hook_count(model)
    was = [config._attn_implementation for config in attention_configs(model)]
    attach(model, read_anatomy(model, batch))
    assert hook_count(model) > hooks
    assert {config._attn_implementation for config in attention_configs(model)} == {"bittern"}
    detach(model)
    assert list(model.state_dict()) == keys
    assert hook_count(model) == hooks
    assert [config._attn_implementation for config in attention_configs(model)] == was
    assert not any(isinstance(m, Site) for m in model.modules())
    assert torch.equal(logits(model, batch), expected)


def test_attach_again() -> None:
    """Attaching twice changes nothing: quantizers stay, and nothing is recorded twice."""
    model, _, anatomy = load("bert")
    detach(model)
    attach(model, anatomy, {anatomy.attentions[0].name: {"query": Format(bits=4)}})
    before, hooks = sites(model), hook_count(model)
    attach(model, anatomy)
    assert [id(site) for site in sites(model)] == [id(site) for site in before]
    assert set(sites(model)[0].formats) == {"query"}
    assert hook_count(model) == hooks


def test_deep_copy() -> None:
    """A deep copy of a model has sites of its own: it records, replaces and detaches alone."""
    model, batch, anatomy = load("bert")
    copy = deepcopy(model)
    with torch.no_grad():
        copy.classifier.weight.zero_()
        copy.bert.embeddings.word_embeddings.weight.mul_(2)
    with recording(copy, *POINTS) as of_copy, recording(model, *POINTS) as of_model:
        logits(copy, batch)
        assert all(len(x) == (1 if p == "embedding" else 2) for p, x in of_copy.items())
        assert not any(of_model.values())
        expected = logits(model, batch)
    assert all(len(of_copy[p]) == len(of_model[p]) == (1 if p == "embedding" else 2) for p in POINTS)
    assert not any(torch.equal(*pair) for point in POINTS for pair in zip(of_copy[point], of_model[point], strict=True))
    replace(copy, {(anatomy.attentions[0].name, "hidden"): of_model["hidden"][0]})
    assert torch.equal(logits(model, batch), expected)
    detach(copy)
    assert hook_count(copy) == 0
    assert torch.equal(logits(model, batch), expected)
    assert len(sites(model)) == 2


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "t5", "bart", "whisper"])
def test_generation(name: str) -> None:
    """With a cache of keys and values, generation gives the tokens and logits of eager attention."""
    model, batch = SUPPORTED[name]()
    eager = eager_copy(model)
    attach(model, read_anatomy(model, batch))
    given = {key: value for key, value in batch.items() if key != "decoder_input_ids"}
    options: Any = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "use_cache": True}
    ours, theirs = (
        m.generate(**given, **options, output_logits=True, return_dict_in_generate=True) for m in (model, eager)
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bert", "vit", "swin", "gpt2", "llama", "t5", "bart", "detr"])
def test_activation_checkpointing(name: str) -> None:
    """Losses on recorded tensors, with a replaced map, have the same gradients with activation checkpointing."""
    model, batch, anatomy = load(name)
    with torch.no_grad(), recording(model, "map") as own:
        model(**batch)
    replace(model, {(anatomy.attentions[-1].name, "map"): own["map"][-1]})

    def gradients() -> dict[str, Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        with recording(model, "map", "context", "output", "ffn", "hidden") as taps:
            loss = result(model(**batch)).square().mean()
        loss = loss + sum(x.square().mean() for tensors in taps.values() for x in tensors)
        loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    model.train()
    expected = gradients()
    assert all(
        f"{b.name}.{key}" in expected
        for b in anatomy.blocks
        for key, _ in model.get_submodule(b.name).named_parameters()
    )
    word = "activation" if hasattr(model, "is_activation_checkpointing") else "gradient"  # the old word up to 5.22
    getattr(model, f"{word}_checkpointing_enable")({"use_reentrant": False})
    assert getattr(model, f"is_{word}_checkpointing")
    torch.testing.assert_close(gradients(), expected, atol=1e-5, rtol=1e-4)


def test_attention_is_kept_without_rules_for_it() -> None:
    """A recipe for layers alone leaves the model its fast attention."""
    model, batch = SUPPORTED["bert"]()
    simulate(model, Recipe(name="layers", rules=(Rule(roles=("ffn",), weight=Format(bits=8)),)), batch)
    assert model.config._attn_implementation == "sdpa"
    assert not any(isinstance(m, Site) for m in model.modules())
