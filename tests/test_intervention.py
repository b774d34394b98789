"""Teacher Intervention: what is replaced, which gradients flow, and when."""

import copy
import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from bittern import simulate
from bittern.anatomy import Anatomy
from bittern.attention import Point, Taps, recording, sites
from bittern.errors import InputError, ModelError
from bittern.layers import QuantLayer, anatomy_of, fake_quants
from bittern.options import SIGNALS, Act, Intervention, parse_distill
from bittern.qat.distill import Distiller
from bittern.qat.trainer import QATTrainer
from bittern.recipe import Format, Recipe, Rule
from families import ENCODER_DECODER, SUPPORTED, TEXT, Batch
from helpers import refused, small_trainer, student_and_teacher

ALL = (
    "bert",
    "albert",
    "modernbert",
    "vit",
    "dinov2",
    "swin",
    "detr",
    "gpt2",
    "gpt_neox",
    "llama",
    "qwen3",
    "t5",
    "bart",
    "whisper",
    "mpnet",
    "deberta_v2",
)
TERNARY, COARSE = Format(kind="ternary", clip=2.5), Format(bits=4, granularity="token")


pair = partial(student_and_teacher, apart=0.05)


def distiller_of(
    student: hf.PreTrainedModel, teacher: hf.PreTrainedModel, batch: Batch, schedule: str, terms: str = "prediction"
) -> Distiller:
    return Distiller(parse_distill(terms, balance="fixed"), student, teacher, Intervention(schedule, steps=6))


# Gradients, against a BERT written by hand


def reference_layer(
    w: dict[str, Tensor], x: Tensor, heads: int, teacher: dict[str, Tensor], mode: str
) -> dict[str, Tensor]:
    """One post-norm layer with the gradient rule of [TI] spelled out by `detach`."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], heads, -1).transpose(1, 2)

    for_map = x if mode == "none" else x.detach()
    for_value = x if mode in ("none", "map") else x.detach()
    query, key = (split(linear(f"attention.self.{n}", for_map)) for n in ("query", "key"))
    value = split(linear("attention.self.value", for_value))
    own_map = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
    context = (teacher["map"] if mode == "map" else own_map) @ value
    own_context = context
    if mode == "context":
        context = teacher["context"]
    own_out = out = linear("attention.output.dense", context.transpose(1, 2).flatten(2))
    if mode == "output":
        out = teacher["output"]
    norm = ("attention.output.LayerNorm", "output.LayerNorm")
    y = F.layer_norm(x + out, x.shape[-1:], w[f"{norm[0]}.weight"], w[f"{norm[0]}.bias"], 1e-12)
    ffn = linear("output.dense", F.gelu(linear("intermediate.dense", y)))
    hidden = F.layer_norm(y + ffn, x.shape[-1:], w[f"{norm[1]}.weight"], w[f"{norm[1]}.bias"], 1e-12)
    return {"map": own_map, "context": own_context, "output": own_out, "y": y, "hidden": hidden}


def reference(model: hf.PreTrainedModel, ids: Tensor, shown: list[dict[str, Tensor]] | None, mode: str) -> Any:
    """Logits, what the first block reads, and what each layer computes."""
    weights = {n.removeprefix("bert."): p for n, p in model.named_parameters()}
    names = ("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight")
    words, positions, types = (weights[f"embeddings.{n}"] for n in names)
    x = words[ids] + positions[: ids.shape[1]] + types[0]
    norm = (weights[f"embeddings.LayerNorm.{n}"] for n in ("weight", "bias"))
    x = first = F.layer_norm(x, x.shape[-1:], *norm, 1e-12)
    layers = []
    for i in range(TEXT["num_hidden_layers"]):
        prefix = f"encoder.layer.{i}."
        w = {n.removeprefix(prefix): p for n, p in weights.items() if n.startswith(prefix)}
        layers.append(reference_layer(w, x, TEXT["num_attention_heads"], shown[i] if shown else {}, mode))
        x = layers[-1]["hidden"]
    pooled = torch.tanh(x[:, 0] @ weights["pooler.dense.weight"].T + weights["pooler.dense.bias"])
    return pooled @ weights["classifier.weight"].T + weights["classifier.bias"], first, layers


@pytest.mark.parametrize("terms", ["prediction", "prediction,hidden,map", "map=1", "output=1", "self_output,context"])
@pytest.mark.parametrize("mode", SIGNALS)
def test_gradients(mode: str, terms: str) -> None:
    """Losses and all gradients are those of a layer written by hand, where Q, K and V (under map: Q and K) read a
    detached input and losses on maps, contexts and outputs without residual see the student's own, so that V and W_O
    learn from them even where the teacher's output stands in."""
    student, teacher, batch = pair("bert")
    student, teacher, ids = student.double(), teacher.double(), batch["input_ids"].clamp(min=5)
    distiller = distiller_of(student, teacher, {"input_ids": ids}, mode, terms)
    by_hand = copy.deepcopy(student)
    _, found = distiller.forward(student, {"input_ids": ids})
    torch.stack(list(found.values())).sum().backward()
    distiller.release()

    with torch.no_grad():
        expected, first_t, theirs = reference(teacher, ids, None, "none")
    logits, first, mine = reference(by_hand, ids, theirs, mode)
    pairs = list(zip(mine, theirs, strict=True))
    hidden = [(first, first_t), *((a["hidden"], b["hidden"]) for a, b in pairs)]
    losses = {
        "prediction": -(expected.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean(),
        "hidden": sum((a - b).square().mean() for a, b in hidden),
        "map": sum((b["map"] * (b["map"] / a["map"]).log()).sum(-1).mean() for a, b in pairs),
        "output": sum((a["y"] - b["y"]).square().mean() for a, b in pairs),
        "self_output": sum((a["output"] - b["output"]).square().mean() for a, b in pairs),
        "context": sum((a["context"] - b["context"]).square().mean() for a, b in pairs),
    }
    torch.stack([losses[term] for term in found]).sum().backward()
    assert {n: v.item() for n, v in found.items()} == pytest.approx({n: losses[n].item() for n in found}, rel=1e-6)
    for (name, a), b in zip(student.named_parameters(), by_hand.parameters(), strict=True):
        grads = [torch.zeros_like(a) if p.grad is None else p.grad for p in (a, b)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7, msg=f"{name}: {{}}".format)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


class SplitInputs(nn.Module):
    """GPT-2's one layer for Q, K and V as three, the first two reading a detached input."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        parts = zip((x.detach(), x.detach(), x), self.weight.chunk(3, 1), self.bias.chunk(3), strict=True)  # type: ignore[arg-type, operator]
        return torch.cat([x @ w + b for x, w, b in parts], -1)


def test_one_layer_for_three() -> None:
    """Where one layer gives Q, K and V, under map the gradient still reaches its input through V alone."""
    student, teacher, batch = pair("gpt2")
    distiller = distiller_of(student, teacher, batch, "map", "prediction,map")
    by_hand = copy.deepcopy(student)
    for block in by_hand.transformer.h:
        block.attn.c_attn = SplitInputs(block.attn.c_attn)
    grads = []
    for model, gates in ((student, distiller.intervener.gates), (by_hand, {})):
        distiller.student = distiller.intervener.student = model
        distiller.intervener.gates = gates
        _, terms = distiller.forward(model, batch)
        torch.stack(list(terms.values())).sum().backward()
        distiller.release()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-7, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "gpt_neox", "llama", "t5", "bart", "detr", "mpnet", "bloom"])
def test_value_columns(family: str) -> None:
    """A gate knows which of its layer's outputs become values: changing the others changes no value, and these do."""
    student, teacher, batch = pair(family)
    distiller = distiller_of(student, teacher, batch, "map")
    distiller.forward(student, batch)
    distiller.release()
    for attention in distiller.anatomy.attentions:
        for name in attention.inputs:
            columns = distiller.intervener.gates[name].columns
            layer = student.get_submodule(name)
            for chosen, changes in ((~columns, False), (columns, True)):
                if not chosen.any():
                    continue
                changed = []
                for shift in (0.0, 1.0):
                    handle = layer.register_forward_hook(lambda _, args, out, by=shift * chosen: out + by)
                    with torch.no_grad(), recording(student, "value") as taps:
                        student(**batch)
                    handle.remove()
                    changed.append(taps["value"][taps.names["value"].index(attention.name)])
                assert torch.equal(*changed) is not changes, (name, chosen)


# What is replaced


def everything_else_float(point: str) -> Recipe:
    """Ternary and 4 bits in whatever the teacher's signal replaces; the rest stays float."""
    site = {"query": COARSE, "key": COARSE} | ({} if point == "map" else {"value": COARSE, "map": COARSE})
    rules = [Rule(roles=("attention",), **site)]
    if point != "map":
        roles = ("qkv", "attention_output") if point == "output" else ("qkv",)
        rules.append(Rule(roles=roles, weight=TERNARY, input=COARSE))
    return Recipe(name=f"replaced by {point}", rules=tuple(rules))


@pytest.mark.parametrize("point", SIGNALS)
@pytest.mark.parametrize("family", ALL)
def test_equals_teacher(family: str, point: str) -> None:
    """If all that is quantized is replaced, in every attention, the student gives what the teacher gives."""
    teacher, batch = SUPPORTED[family]()
    student = copy.deepcopy(teacher)
    simulate(student, everything_else_float(point), batch)
    distiller = Distiller(parse_distill("truth"), student, teacher, Intervention(point))
    distiller.distill = parse_distill("hidden")  # any that needs no labels
    with torch.no_grad():
        expected = first_tensor(teacher(**batch))
        alone = first_tensor(student(**batch))
        taught = first_tensor(distiller.forward(student, batch)[0])
        distiller.release()
        after = first_tensor(student(**batch))
    assert not torch.allclose(alone, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(taught, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(after, alone)


def first_tensor(out: Any) -> Tensor:
    return next(x for name, x in out.items() if isinstance(x, Tensor) and name != "loss")


def begin(distiller: Distiller, batch: Batch, point: Point, scope: str = "all") -> Taps:
    """From now on the teacher intervenes; what was recorded of it."""
    assert distiller.teacher is not None
    with torch.no_grad(), recording(distiller.teacher, point) as shown:
        distiller.teacher(**batch)
    distiller.intervener.begin(Act(point), shown, scope, batch)
    return shown


@pytest.mark.parametrize("point", ["output", "map"])
def test_before_dropout(point: Point) -> None:
    """Dropout acts on the teacher's signal: when it drops all, nothing of the signal is left."""
    student, teacher, batch = pair("bert")
    distiller = distiller_of(student, teacher, batch, point)
    student.train()
    for name, module in student.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = float(name.endswith("self.dropout") == (point == "map"))
    begin(distiller, batch, point)
    with recording(student, "embedding", "residual", "context") as taps:
        student(**batch)
    if point == "output":
        assert torch.equal(taps["residual"][0], taps["embedding"][0])
    else:
        assert not taps["context"][0].any()


def test_before_quantization() -> None:
    """The student's quantizer of maps works on the teacher's map."""
    recipe = Recipe(name="map", rules=(Rule(roles=("attention",), map=Format(bits=3, granularity="token")),))
    student, teacher, batch = pair("vit", recipe)
    distiller = distiller_of(student, teacher, batch, "map")
    shown = begin(distiller, batch, "map")
    with torch.no_grad(), recording(student, "map", "value", "context") as taps:
        student(**batch)
    for site, given, value, context in zip(sites(student), shown["map"], taps["value"], taps["context"], strict=True):
        expected = site.quantize("map", given) @ value
        assert not torch.allclose(expected, given @ value, rtol=1e-3)
        torch.testing.assert_close(context, expected)


def test_own_maps_are_compared() -> None:
    """Where nothing below was replaced, the loss of a map is what it is without intervention."""
    for point in SIGNALS:
        student, teacher, batch = pair("bert")
        distiller = distiller_of(student, teacher, batch, point, "map")
        distiller.distill = parse_distill("map", balance="fixed", layers=(0,))
        with torch.no_grad():
            taught = distiller.forward(student, batch, step=0)[1]["map"]
            distiller.release()
            alone = distiller.forward(student, batch, step=6)[1]["map"]
        assert taught == alone > 0


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "mpnet"])
@pytest.mark.parametrize("point", SIGNALS)
def test_padding(family: str, point: str) -> None:
    """Padding changes nothing while the teacher intervenes."""
    student, teacher, batch = pair(family)
    real = int(batch["attention_mask"][1].sum())
    padded = {k: v[1:] for k, v in batch.items()}
    cut = {k: v[:, :real] if v.shape[1] == batch["attention_mask"].shape[1] else v for k, v in padded.items()}
    distiller = distiller_of(student, teacher, batch, point, "hidden,map,output")
    with torch.no_grad():
        found = []
        for given in (padded, cut):
            found.append({n: v.item() for n, v in distiller.forward(student, given)[1].items()})
            distiller.release()
    assert found[0] == pytest.approx(found[1], rel=1e-4)


# When


def points(schedule: str, seed: int = 0) -> list[str]:
    """What each of 60 steps replaces."""
    acts = [Intervention(schedule, 60, seed=seed).act(step) for step in range(60)]
    return [act.point for act in acts if act]


def test_schedules() -> None:
    """Gradual: output for a sixth, context for a sixth, then map; inverted: thirds in the other order; stochastic: all
    three by seed; fade: less and less of the teacher. Then the student is alone."""
    names = {schedule: points(schedule) for schedule in ("gradual", "inverted", "stochastic")}
    assert names["gradual"] == ["output"] * 10 + ["context"] * 10 + ["map"] * 40
    assert names["inverted"] == ["map"] * 20 + ["context"] * 20 + ["output"] * 20
    assert min(Counter(names["stochastic"]).values()) > 10
    assert names["stochastic"] == points("stochastic")
    assert names["stochastic"] != points("stochastic", seed=1)
    shares = [Intervention("fade", steps=4).act(i).share for i in range(4)]  # type: ignore[union-attr]
    assert shares == [1, 0.75, 0.5, 0.25]
    for schedule in ("output", "gradual", "inverted", "stochastic", "fade"):
        assert Intervention(schedule, steps=60).act(60) is None
        assert Intervention(schedule, steps=60).phases(90)[-1] == {"name": "alone", "from": 60, "to": 90}


def test_fade() -> None:
    """A share of the teacher's signal, the rest the student's own, and only that rest gets a gradient."""
    student, teacher, batch = pair("vit")
    distiller = distiller_of(student, teacher, batch, "fade", "prediction,self_output")
    with torch.no_grad(), recording(teacher, "output") as shown:
        teacher(**batch)
    distiller.forward(student, batch, step=3)
    with recording(student, "output", "residual", "embedding") as taps:
        student(**batch)
    expected = 0.5 * taps["output"][0] + 0.5 * shown["output"][0] + taps["embedding"][0]
    torch.testing.assert_close(taps["residual"][0], expected)
    (grad,) = torch.autograd.grad(taps["residual"][0].sum(), taps["output"][0])
    assert torch.equal(grad, torch.full_like(grad, 0.5))


def scoped(anatomy: Anatomy, student: hf.PreTrainedModel) -> set[str]:
    """Roles of layers, and operands of attention, whose quantizers are at work."""
    found: set[str] = set()
    for name, module in student.named_modules():
        if isinstance(module, QuantLayer) and module.weight_quantizer and not module.weight_quantizer.bypass:
            found.add("value layer" if name.endswith("value") else anatomy.roles[name])
    for name, quantizer in fake_quants(student):
        if ".quantize_" in name and not quantizer.bypass:
            found.add(name.rpartition("quantize_")[2])
    return found


def test_scope() -> None:
    """`part` quantizes what the paper trains: under output the FFN, under context also W_O, under map also V."""
    student, teacher, batch = pair("bert", "ternary-2-2-8")
    distiller = distiller_of(student, teacher, batch, "gradual")
    outside = set(distiller.anatomy.roles.values()) - {"qkv", "attention_output", "ffn"}
    expected = {
        "output": {"ffn"},
        "context": {"ffn", "attention_output"},
        "map": {"ffn", "attention_output", "value layer", "value", "map"},
    }
    everything = scoped(distiller.anatomy, student)
    assert {"query", "key", "qkv"} < everything
    for point in SIGNALS:
        begin(distiller, batch, point, "part")
        assert scoped(distiller.anatomy, student) - outside == expected[point]
        distiller.release()
        assert scoped(distiller.anatomy, student) == everything


# In the trainer


def trainer(folder: Path, intervention: Intervention, **arguments: Any) -> QATTrainer:
    settings = {"max_steps": 10, "logging_steps": 1, "warmup_steps": 0.5}
    return small_trainer(folder, pair("bert", "ternary-2-2-8"), settings | arguments, intervention=intervention)


class Watch(hf.TrainerCallback):
    """The optimizer's own count of steps, and whether anything is replaced, at each event."""

    def __init__(self, running: QATTrainer):
        self.running = running
        self.counts: list[int] = []
        self.replaced: list[bool] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        states = getattr(optimizer, "optimizer", optimizer).state.values()
        self.counts.append(max((int(s["step"]) for s in states), default=0))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.replaced.append(any(site.replacements for site in sites(self.running.model)))


def test_two_steps(tmp_path: Path) -> None:
    """After the intervention the optimizer starts afresh, and the learning rate rises and falls again; between steps,
    where the student is measured, nothing is replaced."""
    running = trainer(tmp_path, Intervention("gradual", steps=4))
    watch = Watch(running)
    running.add_callback(watch)
    running.train()
    assert watch.counts == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert not any(watch.replaced)
    rates = [entry["learning_rate"] / 1e-3 for entry in running.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0, 1 / 2, 1, 1 / 2, 0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3])


def test_frozen_blocks() -> None:
    """An intervention does not mind that the first blocks are frozen."""
    student, teacher, batch = pair("bert")
    for part in (student.bert.embeddings, student.bert.encoder.layer[0]):
        part.requires_grad_(False)
    distiller = distiller_of(student, teacher, batch, "map")
    distiller.forward(student, batch)[1]["prediction"].backward()
    gates = distiller.intervener.gates
    assert all(bool(gate.columns.all()) == name.endswith("value") for name, gate in gates.items())


def test_inputs_of_its_own() -> None:
    """A classifier that made-up tokens do not fit, since all its texts must end alike, learns under an intervention."""
    config = hf.BartConfig(vocab_size=99, max_position_embeddings=64, **ENCODER_DECODER, num_labels=3, eos_token_id=2)
    teacher = hf.BartForSequenceClassification(config).eval()
    batch = {"input_ids": torch.tensor([[5, 6, 7, 2], [8, 9, 10, 2]]), "attention_mask": torch.ones(2, 4).long()}
    student = copy.deepcopy(teacher)
    simulate(student, "ternary", batch)
    anatomy_of(teacher, batch)  # as `train` reads it
    distiller = distiller_of(student, teacher, batch, "output")
    distiller.forward(student, batch)[1]["prediction"].backward()
    assert student.model.decoder.layers[0].self_attn.q_proj.weight.grad.count_nonzero() == 0
    assert student.model.decoder.layers[0].fc1.weight.grad.count_nonzero() > 0


def test_refused(tmp_path: Path) -> None:
    """Interventions that are none, longer than the training, without a teacher or a block to learn from."""
    with refused(InputError, "'maps'", "gradual"):
        Intervention("maps")
    with refused(InputError, "0 steps"):
        Intervention("map", steps=0)
    with refused(InputError, "'some'", "all or part"):
        Intervention("map", scope="some")  # type: ignore[arg-type]
    with refused(InputError, "10 steps of 10", "fewer"):
        trainer(tmp_path, Intervention("map", steps=10)).train()
    with refused(InputError, "reduce_lr_on_plateau"):
        trainer(
            tmp_path,
            Intervention("map", steps=4),
            lr_scheduler_type="reduce_lr_on_plateau",
            eval_strategy="steps",
        ).train()
    student, teacher, batch = pair("bert")
    with refused(InputError, "the intervention needs a teacher"):
        Distiller(parse_distill("none"), student, intervention=Intervention())
    shallow = hf.BertForSequenceClassification(hf.BertConfig(**(TEXT | {"num_hidden_layers": 1}), num_labels=3)).eval()
    _, teacher, batch = pair("bert")
    with refused(ModelError, "1 blocks", "2", "mapping"):
        Distiller(parse_distill("prediction"), shallow, teacher, Intervention())
    distiller = Distiller(parse_distill("prediction", mapping={0: 1}), shallow, teacher, Intervention("map"))
    distiller.forward(shallow, batch)
    assert distiller.intervener.source == {"bert.encoder.layer.0.attention.self": "bert.encoder.layer.1.attention.self"}
