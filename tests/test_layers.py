import json
import pickle
import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.pytorch_utils import Conv1D

from bittern import calibrate, layers, load, native, pack, save
from bittern.anatomy import Anatomy, Record, record_of
from bittern.attention import Site
from bittern.dry_run import read_anatomy
from bittern.errors import ModelError, RecipeError
from bittern.layers import (
    QuantConv1D,
    QuantConv2d,
    QuantEmbedding,
    QuantLayer,
    QuantLinear,
    QuantScaledEmbedding,
    anatomy_of,
    as_float,
    describe,
    fake_quants,
    formats,
    is_simulated,
    restore,
    simulate,
)
from bittern.qat.trainer import QATTrainer
from bittern.quantizers import FakeQuant
from bittern.recipe import Format, Recipe, Role, Rule, recipe_names
from families import CLASSES, FLOAT_ATTENTION, SUPPORTED, TEXT, Batch, text

ROW = Format(bits=8, granularity="row")
INPUT = Format(bits=8, scheme="asymmetric")
LAYERS: tuple[Role, ...] = ("stem", "qkv", "attention_output", "ffn", "pooler", "head", "other")
DYNAMIC = Recipe(
    name="w8a8-dynamic",
    rules=(
        Rule(roles=("embedding",), weight=ROW),
        Rule(roles=LAYERS, weight=ROW, input=INPUT),
        Rule(roles=("attention",), query=Format(), key=Format(), value=Format(), map=Format(scheme="unsigned")),
    ),
)


def recipe(*rules: Rule) -> Recipe:
    return Recipe(name="test", rules=rules)


def logits(model: hf.PreTrainedModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        output = model(**batch)
        return output["logits_per_image" if "logits_per_image" in output else "logits"]


def rounded(weight: Tensor, bits: int = 8) -> Tensor:
    """Symmetric codes, one scale per row, in plain words."""
    rows = []
    for row in weight.flatten(1):
        scale = row.abs().max() / (2 ** (bits - 1) - 1)
        rows.append(torch.round(row / scale) * scale)
    return torch.stack(rows).view_as(weight)


@pytest.mark.parametrize("name", SUPPORTED)
def test_simulate_and_restore(name: str) -> None:
    """8 bits change a little, names and parameters stay, and `restore` gives the float model back bit for bit."""
    model, batch = SUPPORTED[name]()
    expected, keys = logits(model, batch), list(model.state_dict())
    classes = {n: type(m) for n, m in model.named_modules()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    values = {key: p.detach().clone() for key, p in parameters.items()}

    simulate(model, DYNAMIC, batch)
    assert is_simulated(model)
    error = (logits(model, batch) - expected).norm() / expected.norm()
    assert 0 < error < 0.2
    assert list(model.state_dict()) == keys
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(parameters)
    assert all(after[key] is parameters[key] and torch.equal(after[key], values[key]) for key in after)

    restore(model)
    assert not is_simulated(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("name", SUPPORTED)
def test_report(name: str) -> None:
    """The report lists all that holds parameters and each attention module once, with its format or as float."""
    model, batch = SUPPORTED[name]()
    weighted = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding | Conv1D)}
    others = {n for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))} - weighted
    biases = sum(
        m.bias.numel() for n, m in model.named_modules() if n in weighted and getattr(m, "bias", None) is not None
    )
    total = sum(p.numel() for p in model.parameters())
    report = simulate(model, DYNAMIC, batch)
    assert len({layer.name for layer in report.layers}) == len(report.layers)
    assert {layer.name for layer in report.layers if layer.role not in ("", "attention")} == weighted
    assert {layer.name for layer in report.layers if layer.role == ""} == others - {
        a.name for a in report.anatomy.attentions
    }
    assert {layer.name for layer in report.layers if layer.role == "attention"} == {
        a.name for a in report.anatomy.attentions
    }
    assert sum(layer.weights for layer in report.layers) + biases == total  # a shared weight counts once
    assert {*report.quantized} | {*report.kept_float} == {*report.layers}
    assert not {*report.quantized} & {*report.kept_float}
    modules = dict(model.named_modules())
    for layer in report.layers:
        module = modules[layer.name]
        assert layer.is_float == (not isinstance(module, QuantLayer) and "bittern" not in module._modules)
        assert layer.role != "position" or layer.is_float
        if layer.role == "attention":
            assert layer.attention.split(", ")[0] == "query uniform 8-bit per tensor"
        elif not layer.is_float:
            assert layer.weight == "uniform 8-bit per row"
            assert layer.input == ("" if "Embedding" in layer.type else "uniform 8-bit asymmetric per tensor")


def test_report_as_text_and_data() -> None:
    """A report prints one line per role and format, and goes to JSON."""
    model, batch = SUPPORTED["bert"]()
    report = simulate(model, recipe(Rule(roles=("ffn",), weight=ROW)), batch)
    assert str(report).splitlines() == [
        "embedding            1 modules        3,168 weights  float",
        "position             2 modules        2,112 weights  float",
        "LayerNorm            5 modules          320 weights  float",
        "attention            2 modules            0 weights  float",
        "qkv                  6 modules        6,144 weights  float",
        "attention_output     2 modules        2,048 weights  float",
        "ffn                  4 modules        6,144 weights  uniform 8-bit per row",
        "pooler               1 modules        1,024 weights  float",
        "head                 1 modules           96 weights  float",
        *report.notes,
    ]
    data = json.loads(json.dumps([asdict(layer) for layer in report.layers]))
    assert [layer["name"] for layer in data] == [layer.name for layer in report.layers]


@pytest.mark.parametrize("name", ["gpt2", "t5", "bart", "whisper"])
def test_ties(name: str) -> None:
    """Tied layers stay tied, and all have the quantized values of the embedding, whatever rule their own role has."""
    model, batch = SUPPORTED[name]()
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    weight = words.weight
    assert head.weight is weight
    simulate(model, recipe(Rule(roles=("embedding",), weight=Format(bits=3, granularity="row"))), batch)
    tied = [m for m in model.modules() if getattr(m, "weight", None) is weight]
    assert head in tied
    assert words in tied
    for layer in tied:
        assert isinstance(layer, QuantLayer)
        assert torch.equal(layer.quantized_weight(), rounded(weight, bits=3))
    restore(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight is weight


def simulated(layer: nn.Module, weight: Format | None = ROW, fmt_input: Format | None = None) -> Any:
    """One layer of a model, simulated alone."""
    model, batch = SUPPORTED[
        "vit" if isinstance(layer, nn.Conv2d) else "gpt2" if isinstance(layer, Conv1D) else "bert"
    ]()
    name, old = next((n, m) for n, m in model.named_modules() if type(m) is type(layer))
    for attribute in ("weight", "bias"):
        setattr(layer, attribute, getattr(old, attribute, None))
    model.set_submodule(name, layer)
    simulate(model, recipe(Rule(modules=name, weight=weight, input=fmt_input)), batch)
    return layer


def test_linear() -> None:
    """Weights are rounded per output channel, inputs per tensor from their minimum."""
    layer = simulated(nn.Linear(32, 32), fmt_input=INPUT)
    assert isinstance(layer, QuantLinear)
    x = torch.randn(3, 32)
    scale = (x.max() - x.min()) / 255
    codes = ((x - x.min()) / scale).round()
    expected = F.linear(codes * scale + x.min(), rounded(layer.weight), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-4)


def test_conv1d() -> None:
    """GPT-2's layer is rounded per output channel, which is a column of its weight."""
    layer = simulated(Conv1D(96, 32))
    assert isinstance(layer, QuantConv1D)
    assert layer.weight.shape == (32, 96)
    weight = rounded(layer.weight.t()).t()
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(layer(x), x @ weight + layer.bias)
    assert not torch.allclose(layer(x), x @ rounded(layer.weight) + layer.bias, atol=1e-4)


def test_conv2d() -> None:
    """A convolution is rounded per output channel, and keeps its stride."""
    layer = simulated(nn.Conv2d(3, 32, 8, stride=8))
    assert isinstance(layer, QuantConv2d)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(layer(x), F.conv2d(x, rounded(layer.weight), layer.bias, stride=8))


def test_embedding() -> None:
    """An embedding is rounded per token, and the padding token gets no gradient."""
    layer = simulated(nn.Embedding(99, 32, padding_idx=0))
    assert isinstance(layer, QuantEmbedding)
    ids = torch.tensor([[0, 3, 98]])
    rows = layer(ids)
    torch.testing.assert_close(rows, rounded(layer.weight)[ids])
    rows.sum().backward()
    assert layer.weight.grad.any(1).nonzero().flatten().tolist() == [3, 98]


@pytest.mark.parametrize("name", ["bart", "gemma2"])
def test_scaled_embedding(name: str) -> None:
    """Word embeddings that multiply by a number still do, and have their own class back after `restore`."""
    model, batch = SUPPORTED[name]()
    words = model.get_input_embeddings()
    own, ids, scale = type(words), torch.tensor([3, 98]), 32**0.5
    torch.testing.assert_close(words(ids), words.weight[ids] * scale)
    simulate(model, recipe(Rule(roles=("embedding",), weight=ROW)), batch)
    assert isinstance(words, QuantScaledEmbedding)
    torch.testing.assert_close(words(ids), rounded(words.weight)[ids] * scale)
    restore(model)
    assert type(words) is own


@pytest.mark.parametrize("name", ["bart", "gemma2", "detr", "clip"])
@pytest.mark.parametrize("ready_made", recipe_names())
def test_ready_made_recipes(name: str, ready_made: str) -> None:
    """Ready-made recipes fit families of each kind as they are, and quantize all blocks."""
    model, batch = SUPPORTED[name]()
    report = simulate(model, ready_made, batch)
    assert not [layer for layer in report.kept_float if layer.role in ("qkv", "attention_output", "ffn", "attention")]


UPDATES: dict[str, Callable[[nn.Parameter], object]] = {
    "in place": lambda w: w.mul_(1.5),
    "new data": lambda w: setattr(w, "data", w.data * 1.5),
    "copied": lambda w: w.copy_(torch.randn_like(w)),
}


@pytest.mark.parametrize("update", UPDATES)
def test_kept_weight_follows_updates(update: str) -> None:
    """The quantized weight that is kept in eval follows each change of the weight, and is kept between changes."""
    layer = simulated(nn.Linear(32, 32))
    x = torch.randn(3, 32)
    with torch.no_grad():
        for _ in range(3):
            UPDATES[update](layer.weight)
            torch.testing.assert_close(layer(x), F.linear(x, rounded(layer.weight), layer.bias))
            assert layer.quantized_weight() is layer.quantized_weight()


def test_kept_weight_follows_its_scale() -> None:
    """The quantized weight that is kept in eval follows a static scale."""
    layer = simulated(nn.Linear(32, 32), weight=Format(bits=8, range="static"))
    with torch.no_grad():
        before = layer.quantized_weight()
        layer.weight_quantizer.scale.mul_(2)
        in_place = layer.quantized_weight()
        layer.weight_quantizer.set_scale(layer.weight_quantizer.scale * 2)
        assert len({t.sum().item() for t in (before, in_place, layer.quantized_weight())}) == 3


def test_kept_weight_follows_its_quantizer() -> None:
    """The quantized weight that is kept in eval follows a change of format."""
    layer = simulated(nn.Linear(32, 32))
    with torch.no_grad():
        assert torch.equal(layer.quantized_weight(), rounded(layer.weight))
        layer.weight_quantizer = FakeQuant(Format(bits=4, granularity="row"))
        assert torch.equal(layer.quantized_weight(), rounded(layer.weight, bits=4))


def test_kept_weight_follows_its_checkpoint() -> None:
    """After `load_state_dict` a simulated model computes with the loaded weights."""
    model, batch = SUPPORTED["bert"]()
    simulate(model, DYNAMIC, batch)
    other = deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(logits(model, batch), logits(other, batch))
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model, batch), logits(other, batch))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_kept_weight_follows_training(optimizer: str) -> None:
    """Evaluation between training steps computes with the weights of the last step, whatever optimizer made it."""
    model, batch = SUPPORTED["bert"]()
    simulate(model, recipe(Rule(roles=("ffn", "embedding"), weight=ROW)), batch)
    steps = OPTIMIZERS[optimizer](model.parameters())
    seen = [logits(model, batch)]
    for _ in range(3):
        model.train()
        model(**batch, labels=torch.tensor([0, 2])).loss.backward()
        steps.step()
        steps.zero_grad()
        model.eval()
        seen.append(logits(model, batch))
        assert not torch.equal(seen[-1], seen[-2])
        with torch.enable_grad():  # keeps nothing
            assert torch.equal(seen[-1], model(**batch).logits)


TRAINED: dict[str, Callable[[Batch], Tensor]] = {
    "bert": lambda batch: torch.tensor([0, 2]),
    "vit": lambda batch: torch.tensor([0, 2]),
    "gpt2": lambda batch: batch["input_ids"],
    "t5": lambda batch: batch["decoder_input_ids"],
    "bart": lambda batch: batch["decoder_input_ids"],
}


@pytest.mark.parametrize("name", TRAINED)
def test_training(name: str) -> None:
    """A ternary model learns: each weight gets a finite gradient, and the loss falls."""
    model, batch = SUPPORTED[name]()
    batch["labels"] = TRAINED[name](batch)
    simulate(model, "ternary-2-2-8", batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    torch.manual_seed(0)
    with torch.no_grad():
        before = model(**batch).loss
    model.train()
    for _ in range(12):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key
        optimizer.step()
    model.eval()
    with torch.no_grad():
        assert model(**batch).loss < 0.9 * before


def test_shared_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training Q, K and V quantize what they read once, with the gradients of separate inputs, and let go of it; a
    tensor that changed in place is quantized anew."""
    model, batch = SUPPORTED["bert"]()
    simulate(model, "ternary-2-2-8", batch)
    gradients, calls = [], []
    for layer in model.modules():
        if isinstance(layer, QuantLayer) and layer.input_quantizer is not None:
            layer.input_quantizer.register_forward_hook(lambda *_: calls.append(1))
    for parted in (False, True):
        if parted:
            monkeypatch.setattr(layers, "quantize_once", lambda x, how, quantize: quantize(x))
        model.zero_grad()
        torch.manual_seed(0)
        model(**batch)["logits"].square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        calls.append(0)
    torch.testing.assert_close(*gradients)
    first, second = calls.index(0), len(calls) - calls.index(0) - 2
    assert second - first == 2 * model.config.num_hidden_layers
    monkeypatch.undo()
    layer, x = model.bert.encoder.layer[0].attention.self.query, torch.rand(2, 3, model.config.hidden_size)
    before = layer.quantized_input(x)
    assert layer.quantized_input(x) is before
    after = layer.quantized_input(x.div_(2))
    assert torch.equal(after, before / 2)
    alive = weakref.ref(after)
    del after
    model(**batch)
    assert alive() is None
    ffn = model.bert.encoder.layer[0].intermediate.dense  # feeds no attention, so that each call has its own graph
    assert ffn.quantized_input(x) is not ffn.quantized_input(x)


def test_shared_input_of_attention_in_own_code() -> None:
    """Where blocks are computed again for their gradients, these are the same: attention in a model's own code, too,
    lets go of what Q, K and V share."""
    config = hf.RoFormerConfig(**TEXT, **CLASSES, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    torch.manual_seed(0)
    model, batch = hf.RoFormerForSequenceClassification(config), text()
    simulate(model, "ternary-2-2-8", batch)
    gradients = []
    for again in (False, True):
        model.train()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**batch).logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


def test_restore_keeps_training() -> None:
    """`restore` undoes the simulation, not what was learned since."""
    model, batch = SUPPORTED["bert"]()
    simulate(model, DYNAMIC, batch)
    trained = {key: p.detach().clone().mul_(2) for key, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    restore(model)
    assert all(torch.equal(p, trained[key]) for key, p in model.named_parameters())
    simulate(model, DYNAMIC, batch)
    assert is_simulated(model)


@pytest.fixture
def dry_runs(monkeypatch: pytest.MonkeyPatch) -> list[hf.PreTrainedModel]:
    """The models that were run to read their anatomy."""
    ran: list[hf.PreTrainedModel] = []

    def counted(model: hf.PreTrainedModel, batch: Any = None) -> Anatomy:
        ran.append(model)
        return read_anatomy(model, batch)

    monkeypatch.setattr(layers, "read_anatomy", counted)
    return ran


def test_training_reads_the_anatomy_once(dry_runs: list[hf.PreTrainedModel], tmp_path: Path) -> None:
    """From a float model to its copy as a teacher and a trainer with both, one dry run is enough."""
    model, batch = SUPPORTED["bert"]()
    simulate(model, "ternary-2-2-8", batch)  # a first try, undone
    restore(model)
    teacher = deepcopy(model)
    simulation = simulate(model, "ternary-2-2-8", batch)
    trainer = QATTrainer(model, TrainingArguments(tmp_path, use_cpu=True, report_to=[]), teacher=teacher)
    assert trainer.distiller.anatomy == trainer.distiller.teacher_anatomy == simulation.anatomy
    assert dry_runs == [model]


def test_anatomy_is_read_again_when_it_no_longer_holds(dry_runs: list[hf.PreTrainedModel]) -> None:
    """Other inputs and other layers ask for a dry run of their own; other samples, labels and formats do not."""
    model, batch = SUPPORTED["bert"]()
    expected = anatomy_of(model)  # of a made-up batch
    assert anatomy_of(model) is expected
    assert anatomy_of(model, batch) == expected
    assert len(dry_runs) == 2
    assert anatomy_of(model, {key: x[:1] for key, x in batch.items()} | {"labels": torch.tensor([0])}).inputs == {
        *batch
    }
    simulate(model, DYNAMIC)
    assert anatomy_of(model) == expected
    assert len(dry_runs) == 2
    model.bert.encoder.layer = model.bert.encoder.layer[:1]
    assert len(anatomy_of(model).blocks) == 1
    assert len(dry_runs) == 3
    copy = deepcopy(model)
    copy.classifier = nn.Identity()
    assert "classifier" not in anatomy_of(copy).roles
    assert "classifier" in anatomy_of(model).roles
    assert len(dry_runs) == 4


def test_kept_anatomy_is_checked() -> None:
    """Weights that became NaN since the anatomy was read are refused, and so is what is no Transformer."""
    model, batch = SUPPORTED["bert"]()
    anatomy_of(model, batch)
    model.classifier.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"classifier\.weight holds NaN"):
        anatomy_of(model, batch)
    with pytest.raises(ModelError, match="got Linear"):
        anatomy_of(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_formats_are_the_present_ones(tmp_path: Path) -> None:
    """A simulated model, packed, loaded, tells one and the same formats; a method's other widths are told too."""
    model, batch = SUPPORTED["bert"]()
    simulation = simulate(model, DYNAMIC, batch)
    name = simulation.anatomy.attentions[0].name
    assert formats(model)[name] == DYNAMIC.rules[2].model_copy(update={"roles": ()})
    model.get_submodule(name).bittern.quantizer("map").format = Format(bits=4, scheme="unsigned")
    model.get_submodule(FFN).weight_quantizer.format = Format(bits=3, granularity="row")
    present = formats(model)
    assert (present[name].map, present[FFN].weight) == (
        Format(bits=4, scheme="unsigned"),
        Format(bits=3, granularity="row"),
    )
    told = {layer.name: layer for layer in describe(model).layers}
    assert told[FFN].weight == "uniform 3-bit per row"
    assert told[name].attention.endswith("map uniform 4-bit unsigned per tensor")
    assert formats(pack(model)) == present
    save(model, tmp_path / "packed")
    assert formats(load(tmp_path / "packed")) == present
    assert formats(SUPPORTED["bert"]()[0]) == {}


def test_as_float_nests() -> None:
    """What an outer block keeps in float stays so after an inner block, and after an error in it."""
    model, batch = SUPPORTED["bert"]()
    simulate(model, DYNAMIC, batch)
    ffn = model.bert.encoder.layer[0].intermediate.dense.weight_quantizer
    ffn.bypass = True
    with as_float(model):
        with pytest.raises(RuntimeError), as_float(model.bert.encoder):
            raise RuntimeError
        assert all(quantizer.bypass for _, quantizer in fake_quants(model))
    assert [quantizer for _, quantizer in fake_quants(model) if quantizer.bypass] == [ffn]


@pytest.mark.parametrize("name", ["bart", "mpnet"])
@pytest.mark.parametrize(
    "make_copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_copies(name: str, make_copy: Callable[[hf.PreTrainedModel], hf.PreTrainedModel]) -> None:
    """A deep copy of a simulated model, and one for another process, is simulated alike, and restored alone."""
    model, batch = SUPPORTED[name]()
    simulate(model, DYNAMIC, batch)
    expected = logits(model, batch)
    copy = make_copy(model)
    assert torch.equal(logits(copy, batch), expected)
    restore(copy)
    assert is_simulated(model)
    assert not is_simulated(copy)
    assert torch.equal(logits(model, batch), expected)


def test_static_weights() -> None:
    """Static scales of weights are found at once, those of activations wait for calibration."""
    model, batch = SUPPORTED["bert"]()
    simulate(model, "w8a8", batch)
    found = {name: quantizer.scale is not None for name, quantizer in fake_quants(model)}
    assert {name.rpartition(".")[2] for name, known in found.items() if known} == {"weight_quantizer"}
    assert all(known for name, known in found.items() if name.endswith("weight_quantizer"))
    with pytest.raises(ModelError, match="has a static format and no scale yet; calibrate"):
        model(**batch)


class OwnLinear(nn.Linear):
    """A subclass that does something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OwnScaledWordEmbedding(nn.Embedding):
    """Named as a known kind of embedding, but with more to learn than one."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.extra = nn.Parameter(torch.zeros(1))


FFN = "bert.encoder.layer.0.intermediate.dense"
WORDS = "bert.embeddings.word_embeddings"


def with_own_linear(model: hf.PreTrainedModel) -> None:
    model.set_submodule(FFN, OwnLinear(32, 48))


def with_own_embedding(model: hf.PreTrainedModel) -> None:
    model.set_submodule(WORDS, OwnScaledWordEmbedding(99, 32))


def with_max_norm(model: hf.PreTrainedModel) -> None:
    model.get_submodule(WORDS).max_norm = 1.0


def with_nan(model: hf.PreTrainedModel) -> None:
    with torch.no_grad():
        model.get_submodule(FFN).weight[3, 5] = torch.nan


def as_it_is(model: hf.PreTrainedModel) -> None:
    pass


REFUSED = [
    (
        with_own_linear,
        recipe(Rule(modules=FFN, weight=ROW)),
        rf"{FFN} is a OwnLinear, a subclass of Linear that Bittern does not know",
    ),
    (
        with_own_embedding,
        recipe(Rule(modules=WORDS, weight=ROW)),
        rf"{WORDS} is a OwnScaledWordEmbedding, a subclass of Embedding",
    ),
    (with_max_norm, DYNAMIC, rf"{WORDS} is an embedding with max_norm"),
    (with_nan, DYNAMIC, rf"weight {FFN}\.weight holds NaN"),
    (as_it_is, recipe(Rule(roles=("ffn", "embedding"), input=INPUT)), rf"{WORDS} is an embedding: its input"),
    (
        as_it_is,
        recipe(Rule(weight=Format(bits=4, granularity="group", group_size=24), roles=("ffn", "qkv"))),
        r"query: group_size 24 does not divide its 32 inputs per row",
    ),
    (as_it_is, recipe(Rule(modules="*.layers.*", weight=ROW)), r"'\*\.layers\.\*' matches nothing"),
    (as_it_is, recipe(Rule(roles=("stem",), weight=ROW)), "recipe test selects nothing that BertForSequenceClass"),
]


@pytest.mark.parametrize(("change", "given", "message"), REFUSED, ids=[message[-24:] for *_, message in REFUSED])
def test_refused_before_anything_changes(
    change: Callable[[hf.PreTrainedModel], None], given: Recipe, message: str
) -> None:
    """What cannot be simulated is refused by name in one line, and the model is as it was, but for a kept anatomy."""
    model, batch = SUPPORTED["bert"]()
    change(model)
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    attributes, implementation = [{*vars(m), "_bittern"} for m in model.modules()], model.config._attn_implementation
    with pytest.raises((ModelError, RecipeError), match=message) as error:
        simulate(model, given, batch)
    assert "\n" not in str(error.value)
    assert [type(m) for m in model.modules()] == classes
    assert [{*vars(m), "_bittern"} for m in model.modules()] == attributes
    assert record_of(model) in (Record(), Record(anatomy=record_of(model).anatomy))
    assert list(model.state_dict()) == keys
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize(("change", "name"), [(with_own_linear, FFN), (with_own_embedding, WORDS)])
def test_unknown_layers_stay_float(change: Callable[[hf.PreTrainedModel], None], name: str) -> None:
    """A layer of a class whose forward may differ stays float, and is named, unless a rule asks for it by its name."""
    model, batch = SUPPORTED["bert"]()
    change(model)
    report = simulate(model, DYNAMIC, batch)
    assert name in [layer.name for layer in report.kept_float if layer.unknown]
    note = "layers of classes that Bittern does not know, or with weights that other code reads, stay float: "
    assert report.notes[1:] == (note + name,)


def test_subclass_that_computes_what_its_base_does() -> None:
    """A layer of a subclass that adds a forward only, with the results of its base, is quantized like its base."""
    model, batch = SUPPORTED["bert"]()
    alike = type("AlikeLinear", (nn.Linear,), {"forward": lambda self, x: x @ self.weight.T + self.bias})
    model.get_submodule(FFN).__class__ = alike
    assert FFN in [layer.name for layer in simulate(model, DYNAMIC, batch).quantized]
    restore(model)
    assert type(model.get_submodule(FFN)) is alike


def test_unknown_layers_keep_what_is_tied_to_them_float() -> None:
    """A head that shares the weight of an embedding of an unknown class is not quantized without it."""
    model, batch = SUPPORTED["gpt2"]()
    own = type("OwnEmbedding", (nn.Embedding,), {"forward": lambda self, x: self.weight[x] * 2})(99, 32)
    own.weight = model.lm_head.weight
    model.set_input_embeddings(own)
    report = simulate(model, DYNAMIC, batch)
    assert {"transformer.wte", "lm_head"} <= {layer.name for layer in report.kept_float}


def test_weights_that_other_code_reads() -> None:
    """A weight that a model's own code takes from a layer that never runs stays float, and so do layers tied to it:
    simulated, and then packed, that code would not read the same. All of them are named."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32}
    config = hf.MobileBertConfig(**sizes, num_hidden_layers=2, intermediate_size=48, vocab_size=99)
    model, batch = hf.MobileBertForMaskedLM(config).eval(), {"input_ids": torch.arange(18).view(2, 9)}
    notes = simulate(model, DYNAMIC, batch).notes
    assert notes[-1].endswith("stay float: mobilebert.embeddings.word_embeddings, cls.predictions.dense")
    expected = logits(model, batch)
    pack(model)
    with native.disabled():
        assert torch.equal(logits(model, batch), expected)


def test_idle_tied_layers_read_nothing() -> None:
    """A layer that never runs has the quantized weight of the one that it is tied to, and no quantizer of its input."""
    model, batch = SUPPORTED["bert"]()
    model.bert.never = nn.Linear(32, 48)
    model.bert.never.weight = model.get_submodule(FFN).weight
    simulate(model, "w8a8", batch)
    assert model.bert.never.weight_quantizer is not None
    assert model.bert.never.input_quantizer is None
    calibrate(model, [batch])


def test_share() -> None:
    """A report tells which share of the weights is quantized, and below 80 % what the largest are that are not."""
    model, batch = SUPPORTED["bert"]()
    assert simulate(model, "w8a8", batch).notes == ("88.0% of 21,056 weights are quantized",)
    restore(model)
    note = simulate(model, recipe(Rule(roles=("ffn",), weight=ROW)), batch).notes[0]
    assert note.startswith(
        "29.2% of 21,056 weights are quantized, fewer than 80%; the largest that stay float: bert.emb"
    )


@pytest.mark.parametrize("name", FLOAT_ATTENTION)
def test_attention_that_stays_float(name: str) -> None:
    """Where attention stays float, layers are quantized, packed and right all the same, and the report names it."""
    model, batch = FLOAT_ATTENTION[name]()
    report = simulate(model, "w8a8", batch)
    assert report.notes[1].startswith("products of activations stay float in transformer.layer.0.rel_attn, ")
    assert not any(isinstance(m, Site) for m in model.modules())
    calibrate(model, [batch])
    expected = logits(model, batch)
    pack(model)
    with native.disabled():
        assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "bert", None], ids=["module", "text", "none"])
def test_not_a_transformer(model: Any) -> None:
    """What is no Transformer of Hugging Face is refused by its class."""
    with pytest.raises(ModelError, match=rf"expected a Hugging Face Transformer .*, got {type(model).__name__}"):
        simulate(model, DYNAMIC)


def test_simulated_already() -> None:
    """A simulated model is not simulated again on top."""
    model, batch = SUPPORTED["bert"]()
    simulate(model, DYNAMIC, batch)
    with pytest.raises(ModelError, match="simulated already; call restore"):
        simulate(model, "ternary-2-2-8", batch)


def test_every_quantizer_has_a_name() -> None:
    """Quantizers are listed by their place in the model, of layers and of attention."""
    model, batch = SUPPORTED["bert"]()
    simulate(model, DYNAMIC, batch)
    names = [name for name, _ in fake_quants(model)]
    assert f"{FFN}.weight_quantizer" in names
    assert "bert.encoder.layer.0.attention.self.bittern.quantize_map" in names
    assert len(names) == sum(isinstance(m, FakeQuant) for m in model.modules()) == 1 + 2 * 14 + 2 * 4
    assert sum(isinstance(m, Site) for m in model.modules()) == 2


def test_layers_that_never_run_stay_float() -> None:
    """A table that the model reads without calling it stays float, since its quantization would have no effect."""
    model, batch = SUPPORTED["detr"]()
    report = simulate(model, recipe(Rule(roles=("position", "ffn"), weight=ROW)), batch)
    assert "model.query_position_embeddings" in report.anatomy.idle
    assert "model.query_position_embeddings" in {layer.name for layer in report.kept_float}
