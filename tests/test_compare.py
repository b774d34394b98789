"""The pass over data that records teacher and student: every family, padding, classes of tokens, untouched models."""

import copy
import math
from typing import Any

import pytest
import torch
import transformers as hf

from bittern.analysis.compare import INTERVENTIONS, compare
from bittern.analysis.pair import Pair
from bittern.analysis.tokens import image_kinds, is_punctuation, text_kinds
from bittern.deploy.files import digest
from bittern.errors import InputError, ModelError
from bittern.layers import fake_quants
from bittern.recipe import Recipe
from families import SUPPORTED, Batch
from helpers import code_margin, first_clear, refused, teacher_and_student
from material import save_text_model

BY_TOKEN = Recipe.from_yaml("""
name: by-token
rules:
  - roles: [qkv, attention_output, ffn]
    weight: {kind: ternary}
    input: {bits: 4, granularity: token}
""")


def flat(found: Any) -> list[float]:
    """All numbers of a result, in order."""
    if isinstance(found, dict):
        return [x for value in found.values() for x in flat(value)]
    if isinstance(found, list):
        return [x for value in found for x in flat(value)]
    return [found] if isinstance(found, float) else []


@pytest.mark.parametrize("name", [n for n in SUPPORTED if n not in ("conditional_detr", "opt", "qwen2", "electra")])
def test_families(name: str) -> None:
    """Encoders, decoders and both together, of texts and images: every head has every number, all finite."""
    pair, batch = teacher_and_student(name)
    found = compare(pair, [batch])
    assert found["attentions"]
    for attention in found["attentions"]:
        for key in ("cover", "cover_floor", "ranking_sum", "ranking", "divergence", "first_student", "first_teacher"):
            assert len(attention[key]) == attention["heads"]
        for key in ("gen", "norm", "prop"):
            assert len(attention[key]["all"]) == attention["heads"]
        assert all(d > 0 for d in attention["divergence"])
    assert len(found["places"]) == len(found["depth"]["plain"])
    ends = [*found["extremes"]["student"].values()]
    assert all(low < high for low, high in zip(ends[::2], ends[1::2], strict=True))
    assert all(math.isfinite(x) for x in flat(found))


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "mpnet"])
def test_teacher_against_itself(name: str) -> None:
    """Two equal models differ nowhere, and the cover length is its floor."""
    teacher, batch = SUPPORTED[name]()
    found = compare(Pair(copy.deepcopy(teacher), teacher), [batch])
    for a in found["attentions"]:
        assert a["cover"] == a["cover_floor"]
        assert max(map(abs, a["ranking_sum"] + a["divergence"] + flat([a["gen"], a["norm"], a["prop"]]))) < 1e-9
    assert flat(found["depth"]) == [0.0] * len(flat(found["depth"]))
    assert found["extremes"]["student"] == found["extremes"]["teacher"]


@pytest.mark.parametrize("packed", [True, False])
def test_models_stay(packed: bool) -> None:
    """Packed or simulated, no tensor of either model changes, nor does any quantizer's switch."""
    pair, batch = teacher_and_student("bert", packed=packed)
    models = (pair.student, pair.teacher)
    before = [digest(sorted(m.state_dict().items())) for m in models]
    compare(pair, [batch])
    assert [digest(sorted(m.state_dict().items())) for m in models] == before
    assert not any(q.bypass for _, q in fake_quants(pair.student))
    assert all(p.grad is None for m in models for p in m.parameters())


@torch.no_grad()
def rank_margin(pair: Pair, batch: Batch) -> float:
    """How near two probabilities of a row come to each other in either model, relative to the larger."""
    found = []
    for taps in pair.record(batch, "map"):
        for rows in taps["map"]:
            ordered = rows.sort(dim=-1, descending=True).values
            gaps = (ordered[..., :-1] - ordered[..., 1:]) / ordered[..., :-1]
            found.append(gaps[ordered[..., 1:] > 0].min().item())
    return min(found)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "mpnet"])
def test_padding_and_company(name: str) -> None:
    """More padding and other samples in the batch change nothing: means of samples alone are those of a batch.

    No activation is so near to another code, and no key to another rank, that rounding could take it there.
    """
    pair, batch = first_clear(
        lambda seed: teacher_and_student(name, BY_TOKEN, seed=seed),
        lambda made: min(code_margin(made[0].student, made[1]) / 5, rank_margin(*made)),
        2e-5,
    )
    together = compare(pair, [batch])
    lengths = batch["attention_mask"].sum(1).tolist()
    alone = [{k: v[i : i + 1, :n] for k, v in batch.items()} for i, n in enumerate(lengths)]
    assert flat(compare(pair, alone)) == pytest.approx(flat(together), rel=2e-4, abs=1e-6)
    longer = {k: torch.cat([v, v.new_zeros(2, 5)], 1) for k, v in batch.items()}
    assert flat(compare(pair, [longer])) == pytest.approx(flat(together), rel=2e-4, abs=1e-6)


def test_interventions() -> None:
    """With the teacher's attention output put in everywhere, the first block's error is that of its FFN and input
    alone; a student whose attention alone is quantized then has no error at all."""
    attention_only = Recipe.from_yaml("name: a\nrules:\n  - roles: [qkv]\n    weight: {kind: ternary}\n")
    pair, batch = teacher_and_student("bert", attention_only)
    depth = compare(pair, [batch])["depth"]
    assert set(depth) == {"plain", *INTERVENTIONS}
    assert min(depth["plain"][1:]) > 1e-3
    assert max(depth["output"] + depth["context"]) < 1e-9
    assert depth["map"][-1] > 0  # the values are quantized still


def test_text_kinds(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tokens are told apart by the tokenizer: [CLS], [SEP], punctuation, other."""
    folder = save_text_model(tmp_path_factory.mktemp("text") / "model")
    kinds = text_kinds(hf.AutoTokenizer.from_pretrained(folder))
    ids = torch.tensor([[2, 4, 5, 3, 0]])
    assert kinds.names == ("[CLS]", "[SEP]", "punctuation", "other")
    of = kinds.of({"input_ids": ids}, 5)
    assert of is not None
    assert of.tolist() == [[0, 3, 3, 1, 2 if is_punctuation("[PAD]") else 3]]
    assert kinds.of({"input_ids": ids}, 6) is None
    assert [is_punctuation(t) for t in (",", "##.", "Ġ(", "▁", "word", "$", "a.b")] == [
        True,
        True,
        True,
        False,
        False,
        True,
        False,
    ]


def test_image_kinds() -> None:
    """Of a ViT's tokens the first is CLS, further extra ones are other, the rest patches."""
    batch = {"pixel_values": torch.zeros(2, 3, 16, 8)}
    with_registers = image_kinds(4).of(batch, 8 + 3)
    assert with_registers is not None
    assert with_registers[1].tolist() == [0, 2, 2] + [1] * 8
    without = image_kinds(4).of(batch, 8)
    assert without is not None
    assert without[0].tolist() == [1] * 8
    assert image_kinds(4).of(batch, 7) is None


def test_classes_make_up_the_whole() -> None:
    """Distances by class, weighted by how often each occurs, are the distance of all."""
    pair, batch = teacher_and_student("vit")
    found = compare(pair, [batch], image_kinds(8))["attentions"][0]["gen"]
    assert set(found) == {"all", "[CLS]", "patches"}
    mixed = [(c + 16 * p) / 17 for c, p in zip(found["[CLS]"], found["patches"], strict=True)]
    assert found["all"] == pytest.approx(mixed, rel=1e-4)


def test_refusals() -> None:
    """Models of different depth or heads, and no data, are refused in one line."""
    teacher, batch = SUPPORTED["bert"]()

    def other(**changes: int) -> hf.PreTrainedModel:
        return hf.BertForSequenceClassification(hf.BertConfig.from_dict(teacher.config.to_dict() | changes))

    with refused(ModelError, "3", "2"):
        Pair(other(num_hidden_layers=3), teacher)
    with refused(ModelError, "shape", "same heads"):
        compare(Pair(other(num_attention_heads=2), teacher), [batch])
    with refused(InputError, "empty"):
        compare(Pair(copy.deepcopy(teacher), teacher), [])
