"""Forwards of packed models from a tape against the same forwards as they are written."""

import inspect
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy, deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import bittern
from bittern import attention, native
from bittern.deploy import blocks, packed, tape
from families import SUPPORTED
from helpers import outputs, quantized, same
from test_experts import MIXTURES, mixture

pytestmark = pytest.mark.kernels
CACHED = ["gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma2", "opt", "gpt_neox", "gptj", "bloom"]
CACHED += ["t5", "bart", "whisper"]
Batch = dict[str, Tensor]
Forward = Callable[..., Any]


def as_written(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """What the model gives by its own code, part by part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "watched", lambda *_: True)
        return outputs(model, batch)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each look at a tape, whether it served."""
    looks: list[bool] = []
    replay = tape.Tape.replay

    def look(own: tape.Tape, inputs: Any) -> Any:
        out = replay(own, inputs)
        looks.append(out is not None)
        return out

    monkeypatch.setattr(tape.Tape, "replay", look)
    return looks


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of this file may have tapes."""
    monkeypatch.setattr(tape, "KNOWN", tape.KNOWN | {__name__})


def odd(change: Callable[[Any, Any, Tensor], Any]) -> tuple[hf.PreTrainedModel, Batch]:
    """A packed encoder that gives what `change` makes of the model, its usual output and x; and a batch with x."""

    class Odd(hf.BertModel):
        def forward(self, x: Tensor, **batch: Tensor) -> Any:
            return change(self, super().forward(**batch), x)

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Odd(hf.BertConfig(vocab_size=99, **sizes)).eval()
    ids = torch.randint(99, (2, 8))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "x": torch.randn(2, 4)}
    model.seen, model.after, model.config.scales, model.shifts = 0, nn.Sequential(), {"a": {"b": 1.0}}, [0.5]
    model.register_buffer("own", torch.randn(2, 4), persistent=False)
    bittern.simulate(model, "w8a8", batch)
    bittern.calibrate(model, [batch])
    model.seen = 0
    return bittern.pack(model), batch


def other(batch: Batch) -> Batch:
    """The same batch with other numbers of the same kind."""
    torch.manual_seed(5)
    return {
        name: value.flip(0) if not value.is_floating_point() else torch.randn_like(value)
        for name, value in batch.items()
    }


@pytest.mark.parametrize("name", SUPPORTED)
def test_families(name: str, served: list[bool]) -> None:
    """All families but those that give a cache of their own run from a tape, whatever the numbers, to the same bits."""
    for recipe in ("ternary-2-2-8", "w8a8", "w8a8-token"):
        model, batch = quantized(name, recipe)
        both = [(given, as_written(model, given)) for given in (batch, other(batch))]
        served.clear()
        for given, expected in (*both[:1] * 3, *both[1:] * 2, *both[:1]):
            assert same(outputs(model, given), expected)
        tops = [made for known in model._tapes.values() for made in known]
        assert all(tops) != (name in CACHED or name == "beit"), tops


def test_blocks_in_one_step() -> None:
    """All blocks of an encoder are one step, and what follows from shapes alone is none."""
    for name, most in (("bert", 18), ("vit", 10), ("mpnet", 28)):
        model, batch = quantized(name, "w8a8")
        for _ in range(2):
            outputs(model, batch)
        ((made,),) = model._tapes.values()
        whole = [step for step in made.steps if step.function is blocks.run_whole]
        assert [len(step.args[0]) for step in whole] == [model.config.num_hidden_layers]
        assert len(made.steps) <= most


@torch.no_grad()
def test_numbers_that_decide(served: list[bool]) -> None:
    """Whether a mask hides anything is read again in each call: each case gets a tape of its own, up to three."""
    model, batch = quantized("bert", "w8a8")
    whole = batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}
    for _ in range(3):
        for given in (batch, whole):
            assert same(outputs(model, given), as_written(model, given))
    (known,) = model._tapes.values()
    assert len(known) == 2
    served.clear()
    outputs(model, batch)
    outputs(model, whole)
    assert served.count(True) == 2

    model, batch = odd(lambda model, out, x: {**out, "more": out.pooler_output * x[0, 0].item()})
    for first in (1.0, 2, 3, 4, 5, 4, 3, 2, 1):
        batch["x"] = torch.full((2, 4), float(first))
        for _ in range(3):
            assert same(outputs(model, batch), as_written(model, batch))
    assert [len(known) for known in model._tapes.values()] == [tape.MOST_TAPES]


def _set(x: Tensor, value: Tensor) -> Tensor:
    x[0] = value
    return x


def _root(x: Tensor) -> Tensor:
    try:
        return torch.linalg.cholesky(x[:2, :2])
    except RuntimeError:
        return torch.eye(2)


def _of_list(x: Tensor) -> Tensor:
    parts = [x, x * 2]
    found = torch.stack(parts)
    parts[0] = x * 3
    return found + torch.stack(parts)


def _late(x: Tensor) -> Tensor:
    ramp = torch.zeros(x.shape[-1])
    found = x + ramp
    ramp += 1
    return found


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2


READS: dict[str, Callable[[Tensor], Any]] = {
    "float": lambda x: float(x.flatten()[0]),
    "index": lambda x: range(99)[(x.flatten()[0].abs() > 0.5).long()],
    "list": lambda x: 1.5 if x.flatten()[:2].tolist()[0] > 0 else 2.5,
    "numpy": lambda x: float(x.numpy().max()),
    "equal": lambda x: 1.0 + torch.equal(x, x.flip(0)),
    "shape": lambda x: float(len((x > 0.5).nonzero())),
    "select": lambda x: x[x > 0.5].sum(),
    "branch": lambda x: x * 2 if (x > 1).any() else x * 3,
    "pieces": lambda x: sum(part.sum() for part in x.unbind(0)),
    "max": lambda x: x.max(-1, keepdim=True).values,
    "index array": lambda x: x[:, torch.tensor([0, 2]).tolist()].sum(),
    "in place": lambda x: x.clone().add_(x).mul_(2),
    "view in place": lambda x: x.clone().view(-1)[:5].zero_().sum() + x,
    "put": lambda x: torch.zeros(3).index_put((torch.tensor([0]),), x.flatten()[0]).sum(),
    "set item": lambda x: _set(x.clone(), x.mean()),
    "set item of zeros": lambda x: _set(torch.zeros_like(x), x.mean()),
    "new zeros": lambda x: _set(x.new_zeros(x.shape), x.mean()),
    "empty": lambda x: torch.empty_like(x).copy_(x),
    "fixed in place": lambda x: x + torch.arange(x.shape[-1]).add_(1),
    "fixed, then changed": _late,
    "out": lambda x: torch.mul(x, 2, out=torch.zeros(x.shape)),
    "relu": lambda x: F.relu(x.clone(), inplace=True),
    "vmap": torch.vmap(lambda row: row * 2 + row.sum()),
    "function": _Twice.apply,
    "scalar tensor": lambda x: torch.where(x > torch.tensor(x.mean().item()), x, 0.0),
    "invert": lambda x: (~(x > 0)).sum(),
    "caught": _root,
    "changed list": _of_list,
    "gradients": lambda x: x * (2.0 if torch.is_grad_enabled() else 3.0),
    "from numbers": lambda x: x + torch.tensor([x.flatten()[0].item(), 1.0]).sum(),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", READS)
def test_operations(name: str, mode: Any) -> None:
    """Whatever a forward does with numbers, memory and types, it gives for others what its own code does."""
    read = READS[name]
    model, batch = odd(lambda model, out, x: {**out, "first": read(x) * out[1].sum(), "then": read(out[1]) * x.mean()})
    for turn in range(10):
        torch.manual_seed(turn // 3)
        batch["x"] = torch.randn(2, 4)
        with mode():
            assert same(outputs(model, batch), as_written(model, batch)), turn


def _counts(model: Any, out: Any, x: Tensor) -> Any:
    model.seen += 1
    return {**out, "seen": x * model.seen}


def _keeps(model: Any, out: Any, x: Tensor) -> Any:
    before, model.kept = getattr(model, "kept", x), x * 2
    return {**out, "before": before + 0}


def _changes_weights(model: Any, out: Any, x: Tensor) -> Any:
    model.embeddings.LayerNorm.weight.mul_(1.25)
    return out


def _draws(model: Any, out: Any, x: Tensor) -> Any:
    return {**out, "noise": torch.rand(4) + x}


def _draws_like(model: Any, out: Any, x: Tensor) -> Any:
    return {**out, "noise": F.dropout(x, 0.5, training=True)}


def _writes_its_argument(model: Any, out: Any, x: Tensor) -> Any:
    x += 1
    return {**out, "x": x * 2}


def _writes_a_view_of_it(model: Any, out: Any, x: Tensor) -> Any:
    x[0].zero_()
    return {**out, "x": x * 2}


@pytest.mark.parametrize(
    "change", [_counts, _keeps, _changes_weights, _draws, _draws_like, _writes_its_argument, _writes_a_view_of_it]
)
def test_what_does_more_than_compute(change: Any) -> None:
    """A forward that changes its model or arguments, or draws numbers, does so in each call."""
    model, batch = odd(change)
    plain = deepcopy(model)
    for turn in range(6):
        given, found = [{name: value.clone() for name, value in batch.items()} for _ in range(2)]
        torch.manual_seed(turn)
        expected, drawn = as_written(plain, given), torch.get_rng_state()
        torch.manual_seed(turn)
        assert same(outputs(model, found), expected), turn
        assert same(found, given)
        assert torch.equal(torch.get_rng_state(), drawn)


@torch.no_grad()
def test_what_it_gives_belongs_to_the_caller() -> None:
    """Outputs share no memory with those of other calls, and what a caller writes into them stays there."""
    model, batch = odd(
        lambda model, out, x: {**out, "fixed": torch.arange(3), "own": model.embeddings.position_ids, "x": x}
    )
    for _ in range(2):
        expected = {name: value.clone() for name, value in outputs(model, batch).items()}
        for value in outputs(model, batch).values():
            assert (
                value is batch["x"]
                or value.data_ptr() == model.embeddings.position_ids.data_ptr()
                or value.add_(1) is value
            )
        assert same(outputs(model, batch), expected)
    (known,) = model._tapes.values()
    assert not any(known)
    model, batch = quantized("bert", "w8a8")
    asked = batch | {"output_hidden_states": True}
    seen = [tensor for _ in range(4) for tensor in (model(**asked).logits, *model(**asked).hidden_states)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in seen}) == len(seen)


def changes(model: Any) -> Iterator[Callable[[], Any]]:
    """Ways to make the model give something else."""
    layer = model.bert.encoder.layer[0]
    packed = [m for m in model.modules() if hasattr(m, "integer_product")]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    yield lambda: layer.output.LayerNorm.weight.mul_(2)
    yield lambda: packed[-1].bias.add_(1)
    yield lambda: setattr(layer.attention.self, "scaling", 0.01)
    yield lambda: setattr(model.bert.embeddings, "position_ids", torch.zeros_like(model.bert.embeddings.position_ids))
    yield lambda: model.bert.embeddings.position_ids.fill_(3)
    yield lambda: setattr(model.bert.encoder, "layer", model.bert.encoder.layer[:1])
    yield lambda: setattr(model, "classifier", nn.Linear(32, 3).requires_grad_(False))
    yield lambda: setattr(
        model.bert.embeddings.position_ids, "data", torch.zeros_like(model.bert.embeddings.position_ids)
    )
    yield model.bert.embeddings.position_embeddings.weight.data.neg_
    yield lambda: setattr(model.dropout, "forward", torch.zeros_like)
    yield lambda: setattr(model, "forward", lambda **batch: {"logits": torch.zeros(2)})
    yield lambda: model.load_state_dict({k: v * 0 if "codes" in k else v for k, v in state.items()})


@torch.no_grad()
@pytest.mark.parametrize("number", range(12))
def test_changes_are_seen(number: int) -> None:
    """After a change of weights, buffers, attributes, modules or forwards the model gives what its own code gives."""
    model, batch = quantized("bert", "w8a8")
    for _ in range(3):
        before = outputs(model, batch)
    [*changes(model)][number]()
    for _ in range(4):
        found = outputs(model, batch)
        assert not same(found, before)
        assert same(found, as_written(model, batch))


def _holds(model: Any, out: Any, x: Tensor) -> Any:
    return {**out, "held": model.after(x) * model.config.scales["a"]["b"] + sum(model.shifts)}


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.after.append(nn.Tanh()),
        lambda model: model.config.scales["a"].update(b=2.0),
        lambda model: model.config.scales.update(a={"b": 3.0}),
        lambda model: model.shifts.append(2.0),
    ],
)
def test_changes_of_what_modules_hold_are_seen(change: Any, served: list[bool]) -> None:
    """So it is after a change of containers that were empty, of nested configurations and of lists."""
    model, batch = odd(_holds)
    for _ in range(3):
        before = outputs(model, batch)
    assert served[-1]
    change(model)
    for _ in range(4):
        assert not same(outputs(model, batch), before)
        assert same(outputs(model, batch), as_written(model, batch))


def test_arguments_that_are_one(served: list[bool]) -> None:
    """A tensor that is given twice, or belongs to the model, is not taken for two, nor for one, in other calls."""
    model, batch = quantized("bert", "w8a8")
    ids = {"input_ids": batch["attention_mask"] + 1}
    once = ids | {"attention_mask": ids["input_ids"]}
    twice = ids | {"attention_mask": batch["attention_mask"]}
    for given in (once, once, once, twice, twice, twice, once):
        assert same(outputs(model, given), as_written(model, given))
    model, batch = odd(lambda model, out, x: {**out, "own": x * 2 + model.own})
    own = batch | {"x": model.own}
    for given in (own, own, own, own | {"x": own["x"] + 1}, own | {"x": own["x"] + 2}):
        assert same(outputs(model, given), as_written(model, given))


@torch.no_grad()
def test_writes_into_a_block_output(served: list[bool]) -> None:
    """What is done in place to a block's output is done though it did nothing when the tape was made."""

    def masked(model: Any, out: Any, x: Tensor) -> Any:
        hidden = x.repeat(1, 8).view(2, 1, 32)
        for layer in model.encoder.layer:
            hidden = layer(hidden, None)
            hidden *= (x > -9).all().float()
        return {"hidden": hidden}

    model, batch = odd(masked)
    for x in (batch["x"], batch["x"], batch["x"], batch["x"] - 10, batch["x"] - 10):
        assert same(outputs(model, batch | {"x": x}), as_written(model, batch | {"x": x}))
    assert served.count(True) == 4


@torch.no_grad()
def test_a_tape_of_another_state_never_serves() -> None:
    """A forward that changes the model now and then gives what it gives by its own code, before and after."""

    def now_and_then(model: Any, out: Any, x: Tensor) -> Any:
        if x[0, 0].item() > 5:
            model.embeddings.position_ids.add_(1).remainder_(5)
        return {**out, "ids": model.embeddings.position_ids * 2 + x.mean()}

    model, batch = odd(now_and_then)
    plain, more = deepcopy(model), batch | {"x": batch["x"] + 10}
    for given in (batch, batch, batch, more, batch, batch, more, more, batch, batch, batch):
        assert same(outputs(model, given), as_written(plain, given))


@torch.no_grad()
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_changes_of_an_owner_outside_are_seen(name: str, served: list[bool]) -> None:
    """An encoder whose embedding shows what a module outside it holds gives what that holds now."""
    model, batch = quantized(name, "w8a8")
    encoder = model.get_encoder()
    (own,) = encoder.embed_tokens.owner
    given = {"input_ids": batch["input_ids"]}
    for change in (
        lambda: own.weight_scale.mul_(2),
        lambda: setattr(own, "weight_scale", own.weight_scale * 2),
        lambda: setattr(own, "weight_codes", own.weight_codes.flip(0)),
        lambda: own.load_state_dict({k: v.flip(0) if v.dim() else v * 3 for k, v in own.state_dict().items()}),
    ):
        served.clear()
        before = [outputs(encoder, given) for _ in range(3)][-1]
        assert any(served)
        change()
        after = outputs(encoder, given)
        assert not same(after, before)
        assert same(after, as_written(encoder, given))


@torch.no_grad()
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name: str) -> None:
    """Experts, whose layers are told which of them is asked, give in each call what they give by their own code."""
    model, batch = mixture(name)
    given = batch | {"use_cache": False}
    bittern.simulate(model, "w8a8", given)
    bittern.calibrate(model, [given])
    packed_model = bittern.pack(model)
    expected = as_written(packed_model, given)
    assert all(same(outputs(packed_model, given), expected) for _ in range(4))


@torch.no_grad()
def test_layers_called_in_other_ways(served: list[bool]) -> None:
    """Layers and norms whose input has a name, and a layer that turns the kernels away, are steps as well."""

    class Elsewhere(packed.PackedLinear):
        def layer_for(self, x: Tensor) -> None:
            return None

    Elsewhere.__module__ = "bittern.tests"

    def by_name(model: Any, out: Any, x: Tensor) -> Any:
        words = model.embeddings.word_embeddings(input=x.abs().long())
        return {**out, "more": model.embeddings.LayerNorm(input=model.pooler.dense(input=words))}

    for kind in (packed.PackedLinear, Elsewhere):
        model, batch = odd(by_name)
        model.pooler.dense.__class__ = kind
        expected = as_written(model, batch)
        served.clear()
        assert all(same(outputs(model, batch), expected) for _ in range(4))
        assert served[-1]


@torch.no_grad()
def test_modules_of_others(monkeypatch: pytest.MonkeyPatch, served: list[bool]) -> None:
    """A model with modules of another package, which may do anything, or with patched ones runs as it is written."""
    monkeypatch.setattr(tape, "KNOWN", {"transformers", "torch", "bittern"})
    model, batch = odd(_counts)
    seen = [outputs(model, batch)["seen"] for _ in range(5)]
    assert len({float(value[0, 0]) for value in seen}) == 5
    model, batch = quantized("bert", "w8a8")
    layer, calls = model.bert.encoder.layer[0], list[int]()
    usual = layer.forward
    layer.forward = lambda *args, **kwargs: calls.append(1) or usual(*args, **kwargs)
    for _ in range(5):
        outputs(model, batch)
    assert len(calls) == 5
    assert not served


@torch.no_grad()
def test_packed_models_in_threads_of_one() -> None:
    """A packed model whose forward runs packed models in threads does not wait for itself."""
    inner = [quantized("bert", "w8a8") for _ in range(2)]

    def dual(model: Any, out: Any, x: Tensor) -> Any:
        with ThreadPoolExecutor(2) as pool:
            found = [*pool.map(lambda pair: outputs(*pair)["logits"], inner)]
        return {**out, "both": sum(found)}

    model, batch = odd(dual)
    for _ in range(4):
        assert same(outputs(model, batch), as_written(model, batch))


@torch.no_grad()
def test_tapes_that_do_not_serve_end(served: list[bool]) -> None:
    """A number that is another in each call, read at the end, does not cost a replay for ever."""
    model, batch = odd(lambda model, out, x: {**out, "mean": x * out[1].sum().item()})
    for i in range(60):
        outputs(model, batch | {"input_ids": (batch["input_ids"] + i) % 99})
    assert len(served) <= 3 * (tape.MOST_MISSED + 2)


@torch.no_grad()
def test_who_looks_inside_sees_all() -> None:
    """Hooks, recorded signals and asked-for maps get each call, though a tape was made before, and while they watch."""
    model, batch = quantized("bert", "w8a8")
    for _ in range(3):
        expected = outputs(model, batch)
    seen: list[Any] = []
    for module in (model, model.bert, model.bert.encoder, model.bert.encoder.layer[1], model.classifier):
        with module.register_forward_hook(lambda *_: seen.append(1)):
            for count in range(1, 5):
                assert same(outputs(model, batch), expected)
                assert len(seen) == count
        seen.clear()
    with nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1)):
        for _ in range(3):
            seen.clear()
            outputs(model, batch)
            assert len(seen) > 20
    for count in range(1, 5):
        with attention.recording(model, "map") as taps:
            outputs(model, batch)
        assert len(taps["map"]) == 2, count
        assert len(model(**batch, output_attentions=True).attentions) == 2
        assert len(model(**batch, output_hidden_states=True).hidden_states) == 3
    looked: list[Any] = []

    class Looks(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            looked.append(func)
            return func(*args, **(kwargs or {}))

    for _ in range(3):
        looked.clear()
        with Looks():
            assert same(outputs(model, batch), expected)
        assert len(looked) > 20


def test_ways_to_call(served: list[bool]) -> None:
    """Shapes, types, arguments, inference mode, gradients, autocast and other default types each get what is theirs."""
    model, batch = quantized("bert", "w8a8")
    longer = {name: value.repeat(1, 2) for name, value in batch.items()}
    with torch.no_grad():
        embedded = {"inputs_embeds": model.bert.embeddings.word_embeddings(batch["input_ids"]).clone()}
    alone = {"input_ids": batch["input_ids"]}
    turned = {name: value.repeat(2, 1)[::2] for name, value in batch.items()}
    every = [
        batch,
        longer,
        alone,
        turned,
        embedded,
        batch | {"return_dict": True},
        batch | {"output_hidden_states": True},
    ]
    every += [batch | {"labels": torch.tensor([0, 2])}, batch | {"token_type_ids": torch.ones_like(batch["input_ids"])}]
    expected = [as_written(model, given) for given in every]
    for _ in range(4):
        for given, wanted in zip(every, expected, strict=True):
            assert same(outputs(model, given), wanted)
    assert served.count(True) > 2 * len(every)
    with torch.no_grad():
        assert isinstance(model(**batch, return_dict=False), tuple)
        assert torch.equal(model(*batch.values()).logits, expected[0]["logits"])
    x = embedded["inputs_embeds"].requires_grad_()
    model(inputs_embeds=x).logits.sum().backward()
    assert x.grad is not None
    for context in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        for _ in range(3):
            with context:
                found = model(**batch)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(blocks, "watched", lambda *_: True)
                    assert torch.equal(found.logits, model(**batch).logits)
    served.clear()
    for _ in range(3):
        with native.disabled():
            outputs(model, batch)
    assert not served
    with pytest.raises(IndexError):
        outputs(model, {"input_ids": batch["input_ids"] + 99, "attention_mask": batch["attention_mask"]})


@torch.no_grad()
def test_many_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of many lengths leave a bounded number of tapes behind, and no tape makes place for another."""
    monkeypatch.setattr(tape, "MOST_WAYS", 20)
    model, _ = quantized("bert", "w8a8")
    for length in [*range(1, 40), 5, 5, 39, 39, 39]:
        ids = {"input_ids": torch.arange(length).view(1, -1)}
        assert same(outputs(model, ids), as_written(model, ids))
    assert len(model._tapes) == 20
    assert [len(known) for known in model._tapes.values()].count(1) == 1


def test_threads() -> None:
    """Threads that call one model at once, with other numbers and shapes, each get their own."""
    model, batch = quantized("bert", "w8a8")
    given = [{n: v[:, : 4 + i % 3].contiguous().roll(i // 3) for n, v in batch.items()} for i in range(9)]
    expected = [as_written(model, one) for one in given]
    for _ in range(5):
        fresh = deepcopy(model)
        with ThreadPoolExecutor(6) as pool:
            found = [*pool.map(partial(outputs, fresh), given * 10)]
        assert all(map(same, found, expected * 10))


def test_copies_and_classes() -> None:
    """A model with tapes can be copied and pickled, without them, and is of its own class to all who ask."""
    model, batch = quantized("bert", "w8a8")
    for _ in range(3):
        expected = outputs(model, batch)
    assert any(model._tapes.values())
    assert model._tapes.guard.holds()
    model.config.id2label = {}
    assert not model._tapes.guard.holds()
    other = copy(model)
    other.config = deepcopy(model.config)
    assert same(outputs(other, batch), expected)
    for copied in (deepcopy(model), pickle.loads(pickle.dumps(model.bert))):
        assert not copied._tapes
        assert copied._tapes.guard is None
    assert same(outputs(deepcopy(model), batch), expected)
    assert isinstance(model, hf.BertForSequenceClassification)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert "input_ids" in inspect.signature(model.forward).parameters
    assert native.recorder.get() is None
