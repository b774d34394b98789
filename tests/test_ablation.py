"""Blocks and classes of tensors one at a time, and nuclear norms, against models built by hand and a full SVD."""

import copy

import pytest
import torch

from bittern import simulate
from bittern.analysis.ablation import block_errors, class_errors, outputs
from bittern.analysis.compare import nuclear_norm_of_scores, nuclear_norms
from bittern.analysis.pair import Pair
from bittern.deploy.files import digest
from bittern.layers import as_float, fake_quants
from bittern.recipe import Recipe
from families import SUPPORTED
from helpers import teacher_and_student

LAST_BLOCK = Recipe.from_yaml("""
name: last
rules:
  - modules: "*.layer.1.*"
    weight: {kind: ternary}
    input: {bits: 4}
""")


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2"])
@pytest.mark.parametrize("packed", [True, False])
def test_blocks(name: str, packed: bool) -> None:
    """A block's error is that of the teacher simulated with only this block's quantizers at work."""
    pair, batch = teacher_and_student(name, packed=packed)
    found = block_errors(pair, [batch])
    reference = outputs(pair.teacher, [batch])
    by_hand = copy.deepcopy(SUPPORTED[name]()[0])
    simulation = simulate(by_hand, "ternary-2-2-8", batch)
    for block, entry in zip(simulation.anatomy.blocks, found, strict=False):
        with as_float(by_hand):
            for quantizer_name, quantizer in fake_quants(by_hand):
                quantizer.bypass = not quantizer_name.startswith(block.name + ".")
            out = outputs(by_hand, [batch])
        expected = ((out - reference).norm() / reference.norm()) ** 2
        assert (entry["name"], entry["error"]) == (block.name, pytest.approx(expected.item(), rel=1e-3))


def test_only_one_block() -> None:
    """If one block alone is quantized, it makes all of the error; the others and the rest make none."""
    pair, batch = teacher_and_student("bert", LAST_BLOCK)
    first, last, rest, everything = (entry["error"] for entry in block_errors(pair, [batch]))
    assert first == rest == 0
    assert last == everything > 1e-3


def test_classes() -> None:
    """Weights alone, with one class of activations, with all: the quantizers are as before afterwards."""
    pair, batch = teacher_and_student("bert", "w4a4")
    before = digest(sorted(pair.student.state_dict().items()))
    found = {entry["name"]: entry["error"] for entry in class_errors(pair, [batch])}
    assert list(found) == ["weights", "inputs of layers", "query and key", "map and value", "all"]
    reference = outputs(pair.teacher, [batch])
    with as_float(pair.student):  # a packed model's weights have no switch
        out = outputs(pair.student, [batch])
    assert found["weights"] == pytest.approx(((out - reference).norm() / reference.norm()).item() ** 2, rel=1e-3)
    assert found["all"] == block_errors(pair, [batch])[-1]["error"]
    assert len(set(found.values())) == 5
    assert not any(q.bypass for _, q in fake_quants(pair.student))
    assert digest(sorted(pair.student.state_dict().items())) == before


def test_no_classes() -> None:
    """A recipe of weights alone has no classes of activations to tell apart."""
    recipe = Recipe.from_yaml("name: w\nrules:\n  - roles: [ffn]\n    weight: {bits: 4}\n")
    pair, batch = teacher_and_student("vit", recipe)
    found = class_errors(pair, [batch])
    assert [entry["name"] for entry in found] == ["weights", "all"]
    assert found[0]["error"] == found[1]["error"] > 0


def test_scores_by_qr() -> None:
    """The nuclear norm of QKᵀ by QR is that of a full SVD, with more tokens than dimensions and with fewer."""
    for tokens in (20, 5):
        query, key = torch.randn(2, 3, tokens, 8), torch.randn(2, 3, tokens + 1, 8)
        expected = torch.linalg.svdvals((query @ key.mT).double()).sum(-1)
        torch.testing.assert_close(nuclear_norm_of_scores(query, key), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_nuclear_norms(name: str) -> None:
    """They are those of a full SVD of each sample's own tokens: padding adds nothing."""
    pair, batch = teacher_and_student(name)
    found = nuclear_norms(pair, [batch])
    _, taps = pair.record(batch, "map", "ffn", "query", "key")
    lengths = batch["attention_mask"].sum(1).tolist() if "attention_mask" in batch else [taps["ffn"][1].shape[1]] * 2
    maps = [torch.linalg.svdvals(taps["map"][1][i, :, :n, :n].double()).sum() for i, n in enumerate(lengths)]
    ffn = [torch.linalg.svdvals(taps["ffn"][1][i, :n].double()).sum() for i, n in enumerate(lengths)]
    query, key = taps["query"][1], taps["key"][1]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    scores = [torch.linalg.svdvals(scores[i, :, :n, :n].double()).sum() for i, n in enumerate(lengths)]
    for what, expected in (("map", maps), ("ffn", ffn), ("scores", scores)):
        assert found[what]["teacher"][1] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
        assert found[what]["student"][1] != found[what]["teacher"][1]


def test_teacher_stays() -> None:
    """Trying blocks in a copy of the teacher leaves the teacher itself as it was."""
    pair, batch = teacher_and_student("vit")
    reference = outputs(pair.teacher, [batch])
    block_errors(pair, [batch])
    assert torch.equal(outputs(pair.teacher, [batch]), reference)
    assert isinstance(pair, Pair)
