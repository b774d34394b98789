"""What was recorded, put in order: places of blocks that run again, and which tokens are real."""

import copy

import pytest
import torch

from bittern.attention import Taps, attach, recording
from bittern.errors import ModelError
from bittern.layers import anatomy_of
from bittern.recorded import attended, by_module, by_place, check_shapes, out_tokens, real_tokens, token_masks
from families import SUPPORTED
from helpers import refused


def test_places() -> None:
    """A block that runs again counts as the next one, and what the stack reads has a place of its own."""
    model, batch = SUPPORTED["bert"]()
    anatomy = anatomy_of(model)
    attach(model, anatomy)
    with torch.no_grad(), recording(model, "map", "embedding") as taps:
        model(**batch)
    assert list(by_place(taps, anatomy, "map")) == [(0, 0), (1, 0)]
    assert list(by_place(taps, anatomy, "embedding")) == [(-1, 0)]
    again = Taps(("map", "embedding"))
    for point in ("map", "embedding"):
        again[point] = taps[point] * 2
        again.names[point] = taps.names[point] * 2
    assert list(by_place(again, anatomy, "map")) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert list(by_place(again, anatomy, "embedding")) == [(-1, 0)]
    assert [len(of) for of in by_module(again.names["map"], again["map"]).values()] == [2, 2]


@pytest.mark.parametrize("boolean", [True, False])
def test_real_tokens(boolean: bool) -> None:
    """A key that no query may attend to is padding, in masks of both kinds; other layouts have no padding to tell."""
    model, _ = SUPPORTED["bert"]()
    anatomy = anatomy_of(copy.deepcopy(model))
    name = anatomy.attentions[0].name
    seen = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)[:, None, None].expand(2, 1, 3, 3)
    mask = seen if boolean else torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    found = attended(mask)
    assert found is not None
    assert torch.equal(found, seen)
    assert attended(None) is None
    masks = token_masks([(name, mask)], anatomy)
    real = real_tokens(masks, name, 2, 3)
    assert real is not None
    assert real.tolist() == [[True, True, True], [True, True, False]]
    assert real_tokens(masks, name, 2, 4) is None
    assert real_tokens(masks, name, 3, 3) is None
    assert real_tokens({}, name, 2, 3) is None
    shared = real_tokens(token_masks([(name, mask[1:])], anatomy), name, 5, 3)
    assert shared is not None
    assert shared.shape == (5, 3)


@pytest.mark.parametrize("made", [True, False])
def test_what_a_decoder_gives(made: bool) -> None:
    """Tokens that an encoder-decoder gives something for are its decoder's, though its source be as long; a decoder
    that reads the same tokens, or that makes its own of them, has the same padding."""
    source, target = torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "attention_mask": source}
    out = torch.zeros(2, 3, 50)
    read = batch["input_ids"] + (0 if made else 3)
    for more, expected in (
        ({}, source),
        ({"decoder_input_ids": read}, source if made else None),
        ({"decoder_input_ids": read, "decoder_attention_mask": target}, target),
        ({"decoder_input_ids": read, "labels": torch.where(target == 1, read, -100)}, target),
    ):
        found = out_tokens(batch | more, out)
        assert (found is None) == (expected is None)
        assert found is None or torch.equal(found, expected == 1)
    assert out_tokens(batch | {"labels": torch.tensor([0, 1])}, out[:, 0]) is None


def test_shapes() -> None:
    """Tensors of other shapes are refused in one line that names the place."""
    check_shapes("map", "layer.0", torch.zeros(2, 3), torch.ones(2, 3))
    with refused(ModelError, "map at layer.0", "(2, 3)", "(2, 4)", "same heads"):
        check_shapes("map", "layer.0", torch.zeros(2, 3), torch.zeros(2, 4))
