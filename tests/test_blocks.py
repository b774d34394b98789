"""Whole blocks on the kernels against the same blocks part by part."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from threading import Barrier, Event
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertLayer

import bittern
from bittern import attention, native
from bittern.deploy import blocks
from bittern.layers import fake_quants
from bittern.recipe import Format, Recipe, Rule
from families import SUPPORTED
from helpers import outputs, quantized, same

pytestmark = pytest.mark.kernels
WHOLE = ["bert", "roberta", "distilbert", "electra", "albert", "vit", "deit", "bart", "gpt2", "mpnet"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Each block that the kernels are asked for."""
    made: list[Any] = []
    run, finish = blocks.run_blocks, blocks.KernelBlock.finish
    monkeypatch.setattr(blocks, "run_blocks", lambda whole, *args: made.extend(whole) or run(whole, *args))
    monkeypatch.setattr(blocks.KernelBlock, "finish", lambda whole, *args: made.append(whole) or finish(whole, *args))
    return made


def in_parts(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """What the model gives if no block is run whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "watched", lambda *_: True)
        return outputs(model, batch)


@pytest.mark.parametrize("name", SUPPORTED)
def test_families(name: str, calls: list[Any]) -> None:
    """Blocks of these families run whole, others stay as they are, and outputs are the same bits in both cases."""
    for recipe in ("ternary-2-2-8", "w8a8", "w8a8-token"):
        model, batch = quantized(name, recipe)
        expected = in_parts(model, batch)
        assert not calls
        assert same(outputs(model, batch), expected)  # the first time they are compared
        calls.clear()
        assert same(outputs(model, batch), expected)
        assert bool(calls) == (name in WHOLE)
        calls.clear()


def test_images_as_grids(calls: list[Any]) -> None:
    """Blocks that read (batch, height, width, hidden), as SAM 3's do, run in parts."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    images = {"image_size": 32, "patch_size": 8, "pretrain_image_size": 32}
    torch.manual_seed(0)
    model = hf.Sam3ViTModel(hf.Sam3ViTConfig(**sizes, **images, window_size=2, global_attn_indexes=[1])).eval()
    batch = {"pixel_values": torch.randn(2, 3, 32, 32)}
    bittern.simulate(model, "w8a8", batch)
    bittern.calibrate(model, [batch])
    bittern.pack(model)
    expected = in_parts(model, batch)
    for _ in range(2):
        assert same(outputs(model, batch), expected)
    assert not calls


@pytest.mark.parametrize(
    "layer", [{"weight": Format(bits=4, scheme="asymmetric"), "input": Format()}, {"weight": Format()}]
)
def test_layers_without_kernels(layer: dict[str, Format], calls: list[Any]) -> None:
    """A block of which the kernels serve the attention but not the layers runs in parts."""
    points = dict.fromkeys(("query", "key", "value", "map"), Format())
    recipe = Recipe(
        name="mixed",
        rules=(Rule(roles=("attention",), **points), Rule(roles=("qkv", "attention_output", "ffn"), **layer)),
    )
    model, batch = quantized("bert", recipe)
    expected = in_parts(model, batch)
    for _ in range(2):
        assert same(outputs(model, batch), expected)
    assert not calls


def test_first_calls_from_threads() -> None:
    """Threads that call a packed model at once, the first time, all get what one thread gets."""
    model, batch = quantized("bert", "ternary-2-2-8")
    expected = outputs(deepcopy(model), batch)
    for _ in range(5):
        fresh = deepcopy(model)
        gate = Barrier(8)

        def run(fresh: nn.Module = fresh, gate: Barrier = gate) -> dict[str, Tensor]:
            gate.wait()
            return outputs(fresh, batch)

        with ThreadPoolExecutor(8) as pool:
            found = [future.result() for future in [pool.submit(run) for _ in range(8)]]
        assert all(same(other, expected) for other in found)
        assert same(outputs(fresh, batch), expected)


def test_copies_while_threads_compute() -> None:
    """Copies of a packed model that other threads call, whose layers exchange codes and panels, give what it gives."""
    model, batch = quantized("bert", "w8a8")
    expected, going = outputs(model, batch), Event()

    def call() -> bool:
        right = True
        while not going.is_set():
            right &= same(outputs(model, batch), expected)
        return right

    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(call) for _ in range(3)]
        try:
            copies = [deepcopy(model) if i % 2 else pickle.loads(pickle.dumps(model)) for i in range(30)]
        finally:
            going.set()
    assert all(called.result() for called in calls)
    assert all(same(outputs(copied, batch), expected) for copied in copies)


def test_what_is_watched_runs_in_parts(calls: list[Any]) -> None:
    """Hooks inside, recorded signals, attention maps and gradients get what they ask for, and blocks go on after it."""
    model, batch = quantized("bert", "w8a8")
    expected, count = outputs(model, batch), len(attention.sites(model))
    calls.clear()
    layers = [m for m in model.modules() if hasattr(m, "integer_product")]
    seen: list[Any] = []
    for register in (nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook):
        nameless = partial(lambda *_: seen.append(1))  # as a hook may be
        hooks = [register(layer, nameless) for layer in layers]
        for _ in range(2):
            outputs(model, batch)
        for hook in hooks:
            hook.remove()
    assert len(seen) == 4 * len(layers)
    with attention.recording(model, "map") as taps:
        outputs(model, batch)
    assert len(taps["map"]) == count
    with torch.no_grad():
        assert len(model(**batch, output_attentions=True).attentions) == count
    assert model.requires_grad_(True)(**batch).logits.requires_grad
    model.train()
    outputs(model, batch)
    assert not calls
    model.eval()
    for _ in range(4):
        calls.clear()
        assert same(outputs(model, batch), expected)
    assert len(calls) == count


@torch.no_grad()
def test_changes_are_seen(calls: list[Any]) -> None:
    """After a change of weights, scales, biases or norms a block gives what its parts give, and so does a copy."""
    model, batch = quantized("vit", "w8a8")
    outputs(model, batch)
    layer: Any = [m for m in model.modules() if hasattr(m, "integer_product")][-2]
    norm = next(m for m in model.modules() if isinstance(m, nn.LayerNorm))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for change in (
        lambda: layer.bias.add_(torch.randn(len(layer.bias))),
        lambda: [q.set_scale(q.scale * 2, q.offset) for _, q in fake_quants(model) if q.scale is not None],
        lambda: layer.weight_scale.mul_(2),
        lambda: setattr(layer, "weight_scale", layer.weight_scale * 2),
        lambda: norm.weight.mul_(2),
        lambda: setattr(norm, "bias", nn.Parameter(torch.ones_like(norm.bias))),
        lambda: model.load_state_dict({k: v * 0 if "codes" in k else v for k, v in state.items()}),
    ):
        before = outputs(model, batch)
        change()
        found = outputs(model, batch)
        expected = in_parts(deepcopy(model), batch)  # to copy a model makes it forget what it kept
        assert same(found, expected)
        assert not same(before, expected)
        assert same(outputs(model, batch), expected)
        calls.clear()
        copied = deepcopy(model)
        for either in (model, copied, copied):
            assert same(outputs(either, batch), expected)
        assert calls


def test_what_depends_on_the_length() -> None:
    """A block whose own code depends on the length, as where its FFN takes a text in chunks, runs as it is written for
    other lengths too, errors and all, though kernels could run the first one whole."""
    model, _ = quantized("bert", "ternary")  # each tensor has its own range
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 6
    short, long, odd = ({"input_ids": torch.arange(2, 2 * n + 2).view(2, n)} for n in (6, 12, 9))
    found = [outputs(model, batch) for batch in (short, short, long, short, long)]
    with pytest.raises(ValueError, match="multiple of the chunk size"):
        outputs(model, odd)
    expected = [in_parts(deepcopy(model), batch) for batch in (short, short, long, short, long)]
    assert all(map(same, found, expected))


def test_masks_of_other_shapes(calls: list[Any]) -> None:
    """Masks that broadcast do so on the kernels too, and those of other lengths are refused."""
    model, batch = quantized("bert", "w8a8")
    samples, tokens = batch["input_ids"].shape
    torch.manual_seed(0)
    hidden = torch.finfo(torch.float32).min * (torch.rand(samples, 1, tokens, tokens) < 0.3)
    for mask in (hidden, hidden[..., :1] / 2, hidden[:1, :, :1]):
        given = batch | {"attention_mask": mask}
        found = [outputs(model, given) for _ in range(3)]
        assert all(same(out, in_parts(deepcopy(model), given)) for out in found)
    assert calls
    with pytest.raises(RuntimeError, match="size"):
        outputs(model, batch | {"attention_mask": torch.zeros(samples, 1, tokens, tokens + 3)})


def test_masks_with_another_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block whose own code also reads its mask runs as it is written, though the first mask hid nothing."""
    plain = BertLayer.forward

    def forward(self: Any, x: Tensor, attention_mask: Tensor, *rest: Any, **options: Any) -> Tensor:
        out = plain(self, x, attention_mask, *rest, **options)
        return out.masked_fill((attention_mask[:, 0, 0] < -1)[..., None], 0)

    monkeypatch.setattr(BertLayer, "forward", forward)
    model, batch = quantized("bert", "w8a8")
    samples, tokens = batch["input_ids"].shape
    seeing = torch.zeros(samples, 1, tokens, tokens)
    given = [batch | {"attention_mask": mask} for mask in (seeing, seeing - 1e9 * torch.eye(tokens)[0], seeing)]
    found = [outputs(model, each) for each in given]
    assert all(map(same, found, [in_parts(deepcopy(model), each) for each in given]))
    assert not same(*found[:2])


def test_other_modules_are_seen(calls: list[Any]) -> None:
    """A block into which somebody put another module runs as it is written, with that module."""
    model, batch = quantized("bert", "w8a8")
    before = outputs(model, batch)
    attending = model.bert.encoder.layer[0].attention.self
    width = model.config.hidden_size
    attending.query = nn.Linear(width, width).eval()
    for _ in range(3):
        calls.clear()
        found = outputs(model, batch)
        assert not same(found, before)
        assert same(found, in_parts(model, batch))
    assert len(calls) == model.config.num_hidden_layers - 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_stack_in_one_call(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that follow each other run in one call from the third forward on, to the same bits, unless the output of
    each is asked for. No output shares its memory with another."""
    counts: list[int] = []
    run = blocks.run_blocks
    monkeypatch.setattr(blocks, "run_blocks", lambda whole, *args: counts.append(len(whole)) or run(whole, *args))
    for name in ("bert", "distilbert", "vit", "bart", "albert"):
        model, batch = quantized(name, "w8a8")
        asked = batch | {"output_hidden_states": True}
        expected = in_parts(model, batch)
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "watched", lambda *_: True)
            alone = states(model(**asked))
        with mode():
            for given, count in ((batch, [1, 1] if name == "bart" else [2]), (asked, [1, 1])):
                for _ in range(3):
                    counts.clear()
                    found = model(**given)
                assert counts == count, name
                assert same({key: value for key, value in found.items() if isinstance(value, Tensor)}, expected)
            last = [*states(found), *states(model(**asked))]
        assert all(map(torch.equal, last, alone * 2))
        assert len({state.untyped_storage().data_ptr() for state in last}) == len(last)


def states(found: Any) -> list[Tensor]:
    return list(found.get("hidden_states") or found["encoder_hidden_states"])


@torch.no_grad()
def test_what_happens_between_blocks_is_seen(calls: list[Any]) -> None:
    """A hook of a block that changes what comes after it does so, though the blocks ran in one call before."""
    model, batch = quantized("bert", "w8a8")
    first, second = model.bert.encoder.layer
    norm = next(m for m in second.modules() if isinstance(m, nn.LayerNorm))
    masks: list[Tensor] = []

    def change_weights(*_: Any) -> None:
        norm.weight.mul_(1.5)

    def change_output(module: nn.Module, args: Any, out: Tensor) -> None:
        out.mul_(1.5)

    def other_output(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * 1.5

    def change_mask(module: nn.Module, args: Any, out: Tensor) -> None:
        args[1][..., -2:] = torch.finfo(torch.float32).min
        masks.append(args[1])

    for mode in (torch.no_grad, torch.inference_mode):
        for hook in (change_weights, change_output, other_output, change_mask):
            for _ in range(3):
                outputs(model, batch)
            original = norm.weight.clone()
            with first.register_forward_hook(hook), mode():
                expected = in_parts(model, batch)
                norm.weight.copy_(original)
                for _ in range(3):
                    calls.clear()
                    assert same(outputs(model, batch), expected), (mode, hook)
                    norm.weight.copy_(original)
    assert masks


def test_copies_have_plans_of_their_own() -> None:
    """A model that ran can be copied and pickled; no plan, which holds addresses, goes with it."""
    model, batch = quantized("bert", "w8a8")
    expected = outputs(model, batch)
    layer = model.bert.encoder.layer[0]
    assert layer.__dict__["_plans"]
    for copied in (deepcopy(layer), pickle.loads(pickle.dumps(layer._plans))):
        assert not getattr(copied, "_plans", copied)
    assert same(outputs(deepcopy(model), batch), expected)


@torch.no_grad()
def test_forward_of_an_instance(calls: list[Any]) -> None:
    """A part that somebody gave another forward, as accelerate does, runs by it, before a plan was made and after."""
    for before in (True, False):
        model, batch = quantized("bert", "w8a8")
        norm = model.bert.encoder.layer[0].output.LayerNorm
        if not before:
            outputs(model, batch)
        norm.forward = torch.zeros_like
        for _ in range(3):
            calls.clear()
            found = outputs(model, batch)
            assert same(found, in_parts(model, batch))
        assert len(calls) == model.config.num_hidden_layers - 1
        del norm.forward
        assert not same(outputs(model, batch), found)


def decoder(recipe: str = "w8a8") -> tuple[hf.PreTrainedModel, Tensor]:
    """A packed GPT-2 and ids for it."""
    model, batch = quantized("gpt2", recipe)
    model.generation_config.pad_token_id = 0
    return model, batch["input_ids"]


def kept(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def equal(found: Any, expected: Any) -> bool:
    """True if two runs of `generate` gave the same tokens, scores and caches."""
    pairs = [(found.sequences, expected.sequences), *zip(found.logits, expected.logits, strict=True)]
    pairs += zip(kept(found.past_key_values), kept(expected.past_key_values), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


GENERATE: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
GENERATE |= {"return_dict_in_generate": True, "pad_token_id": 0}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("recipe", ["ternary", "w8a8"])
@pytest.mark.parametrize("way", ["one", "padded", "beams", "threads"])
def test_generation(way: str, recipe: str, cache: str, calls: list[Any]) -> None:
    """A decoder generates the tokens, scores, keys and values that its parts give: from a prompt of some tokens, from
    one that is padded on the left beside another, with beams, by several threads."""
    model, ids = decoder(recipe)
    given = {"input_ids": ids[:2] if way == "padded" else ids[:1]}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    if way == "padded":
        given["attention_mask"][0, :3] = 0
    options = GENERATE | ({"num_beams": 3} if way == "beams" else {})
    options |= {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if way == "threads" else 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "watched", lambda *_: True)
            expected = model.generate(**given, **options)
        assert not calls
        for _ in range(2):
            calls.clear()
            assert equal(model.generate(**given, **options), expected)
        assert len(calls) == GENERATE["max_new_tokens"] * len(model.transformer.h)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_caches_of_all_kinds_hold_what_the_parts_keep(calls: list[Any]) -> None:
    """A cache that was cropped, reordered, copied, used without kernels in between or that holds infinity is right
    afterwards, and so is what the block makes of it."""
    model, ids = decoder()

    def run(whole: bool) -> list[Tensor]:
        found: list[Tensor] = []
        with pytest.MonkeyPatch.context() as patch:
            if not whole:
                patch.setattr(blocks, "watched", lambda *_: True)
            cache = hf.DynamicCache(config=model.config)
            for step, change in enumerate(
                (
                    lambda: None,
                    lambda: cache.crop(-2),
                    lambda: cache.reorder_cache(torch.tensor([1, 0])),
                    lambda: kept(cache)[1][0, 0, 0].fill_(torch.inf),
                )
            ):
                change()
                found.append(model(ids[:2, : 3 - step % 2], past_key_values=cache).logits)
                twin = deepcopy(cache)
                with native.disabled():
                    found.append(model(ids[:2, :1], past_key_values=cache).logits)
                found += [model(ids[:2, 1:2], past_key_values=twin).logits, *kept(cache), *kept(twin)]
        return found

    expected = run(False)
    assert not calls
    for _ in range(2):
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(run(True), expected, strict=True))
    assert calls
    trained = hf.DynamicCache(config=model.config)
    model(ids[:1], past_key_values=trained)
    for layer in trained.layers:
        layer.keys.requires_grad_(True)
    with torch.enable_grad():
        assert model(ids[:1, :1], past_key_values=trained).logits.requires_grad
    assert trained.get_seq_length() == ids.shape[1] + 1


@torch.no_grad()
def test_plans_of_decoders_are_made_where_they_hold(calls: list[Any]) -> None:
    """A block runs in parts if it reads its positions, even if they change nothing now, if its cache has halves, and
    if somebody else's function updates that."""
    model, ids = decoder()
    block = hf.models.gpt2.modeling_gpt2.GPT2Block

    def reads(self: nn.Module, x: Tensor, *args: Any, position_ids: Tensor, **kwargs: Any) -> Tensor:
        return block.forward(self, x, *args, **kwargs) + 0 * position_ids[..., None]

    reading = type("Reading", (block,), {"forward": reads})
    for layer in model.transformer.h:
        layer.__class__ = reading
    blocks.use_kernels(model)
    for _ in range(2):
        model(ids)
    assert not calls
    model, ids = decoder()
    for _ in range(2):
        model(ids)
    made = [len(layer._plans) for layer in model.transformer.h]
    calls.clear()
    halves = hf.EncoderDecoderCache(hf.DynamicCache(config=model.config), hf.DynamicCache(config=model.config))
    for length in (1, 2):
        model(ids[:, :1], past_key_values=halves)
        assert halves.get_seq_length() == length
    own, updates = hf.DynamicCache(config=model.config), 0
    update = own.update

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal updates
        updates += 1
        return update(*args, **kwargs)

    own.update = counted  # type: ignore[method-assign]
    model(ids, past_key_values=own)
    assert updates == len(made)
    assert not calls
