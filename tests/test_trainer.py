"""The trainer: what a step learns, and that processes, accumulation, crashes and checkpoints change nothing."""

import copy
import json
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from bittern import calibrate, load, pack, save, simulate
from bittern.attention import recording
from bittern.errors import InputError, ModelError
from bittern.options import Distill, parse_distill
from bittern.qat.distill import Distiller, balanced
from bittern.qat.trainer import QATTrainer
from bittern.recipe import Format, Recipe, Rule, load_recipe
from families import SUPPORTED, TEXT
from helpers import outputs, refused, same, small_trainer, student_and_teacher

SCRIPT = Path(__file__).parent / "distributed_training.py"
ALL_TERMS = "prediction,hidden,score,map,self_output,context,value_relation,query_relation,key_relation"
FAMILIES = ("bert", "albert", "vit", "swin", "gpt2", "llama", "t5", "bart", "detr", "gemma2", "dinov2", "modernbert")


def run(*options: str, processes: int = 1, killed: bool = False) -> dict[str, Any]:
    """The script in one process or several; what it printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if killed:
        assert done.returncode == -9, done.stderr
        return {}
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def close(a: dict[str, Any], b: dict[str, Any]) -> bool:
    pairs = [(x[k], y[k]) for x, y in zip(a["losses"], b["losses"], strict=True) for k in x]
    return all(x == pytest.approx(y, rel=1e-4) for x, y in [*pairs, (a["norm"], b["norm"])])


@pytest.mark.parametrize("options", [["--balance", "fixed"], [], ["--intervene", "gradual"]], ids=" ".join)
def test_processes(tmp_path: Path, options: list[str]) -> None:
    """Two processes with half of each batch have the losses and weights of one process with the whole."""
    one = run("--out", str(tmp_path / "one"), *options)
    two = run("--out", str(tmp_path / "two"), "--batch", "4", *options, processes=2)
    assert (one["world"], two["world"]) == (1, 2)
    assert len(one["losses"]) == 6
    assert close(one, two)


@pytest.mark.parametrize("options", [[], ["--intervene", "gradual"]], ids=" ".join)
def test_accumulation(tmp_path: Path, options: list[str]) -> None:
    """Two half batches make the step of a whole one, and so does activation checkpointing."""
    options = [*options, "--balance", "fixed"]
    one = run("--out", str(tmp_path / "one"), *options)
    two = run("--out", str(tmp_path / "two"), *options, "--batch", "4", "--accumulate", "2")
    three = run("--out", str(tmp_path / "three"), *options, "--checkpointing")
    assert close(one, two)
    assert close(one, three)


@pytest.mark.parametrize(
    ("family", "intervene", "kill"),
    [
        ("bert", [], 3),
        ("vit", [], 3),
        ("bert", ["--intervene", "stochastic"], 3),
        ("vit", ["--intervene", "gradual"], 5),
    ],
)
def test_crash(tmp_path: Path, family: str, intervene: list[str], kill: int) -> None:
    """Killed in training and resumed, with dropout, the run ends with the very bits of one that was not; with a teacher
    that intervenes too, whether killed while it does or after that."""
    options = ("--family", family, "--dropout", *intervene)
    whole = run(*options, "--out", str(tmp_path / "whole"))
    run(*options, "--out", str(tmp_path / "crashed"), "--kill", str(kill), killed=True)
    resumed = run(*options, "--out", str(tmp_path / "crashed"), "--resume")
    assert resumed["losses"] == whole["losses"]
    assert (resumed["norm"], resumed["digest"]) == (whole["norm"], whole["digest"])


# What a step learns


pair = partial(student_and_teacher, recipe="ternary-2-2-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    """All terms are finite on every kind of model, and reach every quantized weight that the batch uses in a block."""
    student, teacher, batch = pair(family)
    distiller = Distiller(parse_distill(ALL_TERMS), student, teacher)
    _, terms = distiller.forward(student, batch)
    assert set(terms) == set(ALL_TERMS.split(","))
    assert all(torch.isfinite(term) and term > 0 for term in terms.values()), terms
    balanced(terms, distiller.distill, distiller.compared).backward()
    in_blocks = [n for n, role in distiller.anatomy.roles.items() if role in ("qkv", "attention_output", "ffn")]
    learning = [student.get_submodule(name) for name in in_blocks]
    assert learning
    assert all(m.weight.grad is not None and torch.isfinite(m.weight.grad).all() for m in learning)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("family", ["bert", "vit", "llama", "t5", "mpnet"])
def test_equal(family: str) -> None:
    """A student that computes what its teacher does has no layer-wise loss."""
    teacher, batch = SUPPORTED[family]()
    student = copy.deepcopy(teacher)
    terms = ALL_TERMS + ",output"
    _, found = Distiller(parse_distill(terms), student, teacher).forward(student, batch)
    assert all(value < 1e-6 for name, value in found.items() if name != "prediction"), found


def test_against_output_attentions() -> None:
    """Terms of BERT are those computed from the outputs that transformers itself gives, padding left out."""
    student, teacher, batch = pair("bert")
    with torch.no_grad():
        _, terms = Distiller(parse_distill("hidden,map"), student, teacher).forward(student, batch)
        a, b = (m(**batch, output_hidden_states=True, output_attentions=True) for m in (student, teacher))
    length = batch["attention_mask"].sum(1).tolist()
    hidden = sum(
        torch.stack([F.mse_loss(x[i, :n], y[i, :n]) for i, n in enumerate(length)]).mean()
        for x, y in zip(a.hidden_states, b.hidden_states, strict=True)
    )
    maps = sum(
        torch.stack(
            [
                F.kl_div(x[i, :, :n, :n].log(), y[i, :, :n, :n], reduction="none").sum(-1).mean()
                for i, n in enumerate(length)
            ]
        ).mean()
        for x, y in zip(a.attentions, b.attentions, strict=True)
    )
    torch.testing.assert_close(terms["hidden"], hidden, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms["map"], maps, rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "mpnet"])
def test_padding(family: str) -> None:
    """More padding changes no term."""
    student, teacher, batch = pair(family, recipe="w8a8")
    calibrate(student, [batch])
    distiller = Distiller(parse_distill(ALL_TERMS), student, teacher)
    if family in ("gpt2", "llama"):
        batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    more = {k: F.pad(v, (0, 5), value=-100 if k == "labels" else 0) for k, v in batch.items()}
    if family == "t5":  # the encoder's tokens are padded
        more["decoder_input_ids"] = batch["decoder_input_ids"]
    with torch.no_grad():
        plain, padded = (distiller.forward(student, b)[1] for b in (batch, more))
    for name in plain:
        torch.testing.assert_close(padded[name], plain[name], rtol=1e-3, atol=1e-6, msg=name)


def test_padded() -> None:
    """With padding counted, hidden states and scores are the plain means of the published code; maps are as ever."""
    student, teacher, batch = pair("bert")
    found, tokens = {}, batch["input_ids"].shape[1]
    for padded in (0, tokens, 4 * tokens, tokens - 1):
        with torch.no_grad():
            distiller = Distiller(parse_distill("hidden,score,map", padded=padded), student, teacher)
            with refused(InputError, f"--padded {padded} is too few") if padded == tokens - 1 else nullcontext():
                _, found[padded] = distiller.forward(student, batch)
    recorded = []
    for model in (student, teacher):
        with torch.no_grad(), recording(model, "score") as taps:
            hidden = model(**batch, output_hidden_states=True).hidden_states
        recorded.append((hidden, [torch.where(s <= -1e2, 0.0, s) for s in taps["score"]]))
    expected = {
        name: sum(F.mse_loss(x, y) for x, y in zip(*pairs, strict=True))
        for name, pairs in zip(("hidden", "score"), zip(*recorded, strict=True), strict=True)
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[tokens][name], value, rtol=1e-5, atol=0)
        assert found[tokens][name] != found[0][name]
    torch.testing.assert_close(found[4 * tokens]["score"], found[tokens]["score"] / 4)
    assert found[tokens]["hidden"] == found[4 * tokens]["hidden"]
    assert found[tokens]["map"] == found[0]["map"]


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2"])
def test_floors(family: str) -> None:
    """A term's floor is what a recipe without weights gives, its start what the student gives; quantizers and modes are
    as before. A student that does not start from its teacher's weights has none."""
    student, teacher, batch = pair(family)
    rules = [r for r in load_recipe("ternary-2-2-8").rules if r.roles != ("embedding",)]
    activations = copy.deepcopy(teacher)
    simulate(
        activations,
        Recipe(name="activations", rules=tuple(r.model_copy(update={"weight": None}) for r in rules)),
        batch,
    )
    distiller = Distiller(parse_distill("prediction,hidden,score"), student, teacher)
    with torch.no_grad():
        _, start = distiller.forward(student, batch)
        _, floor = Distiller(distiller.distill, activations, copy.deepcopy(teacher)).forward(activations, batch)
    student.train()
    found = distiller.floors(batch)
    assert student.training
    assert found == {name: {"floor": float(floor[name]), "start": float(start[name])} for name in start}
    assert 0 < found["score"]["floor"] < found["score"]["start"]
    with torch.no_grad():
        _, again = distiller.forward(student.eval(), batch)
    assert again == start
    with torch.no_grad():
        next(student.parameters()).add_(1e-3)
    assert distiller.floors(batch) == {}


def test_layers() -> None:
    """Single layers add up to all layers; hidden states are always all of them."""
    student, teacher, batch = pair("bert")

    def terms(layers: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
        distill = parse_distill("map,output,hidden", layers=layers)
        with torch.no_grad():
            return Distiller(distill, student, teacher).forward(student, batch)[1]

    every, first, last = terms(None), terms((0,)), terms((-1,))
    for name in ("map", "output"):
        torch.testing.assert_close(first[name] + last[name], every[name])
        assert first[name] != last[name]
    assert first["hidden"] == every["hidden"]
    with refused(InputError, "block 7", "blocks 0 to 1"):
        terms((7,))


def test_mapping() -> None:
    """A student of fewer blocks is refused, and served with a mapping."""
    teacher, batch = SUPPORTED["bert"]()
    torch.manual_seed(1)
    short = hf.BertForSequenceClassification(hf.BertConfig(**(TEXT | {"num_hidden_layers": 1}), num_labels=3)).eval()
    with refused(ModelError, "1 blocks", "2", "mapping"):
        Distiller(parse_distill("map"), short, teacher)
    distiller = Distiller(parse_distill("map,hidden", mapping={0: 1}), short, teacher)
    _, terms = distiller.forward(short, batch)
    with torch.no_grad():
        x, y = (m(**batch, output_hidden_states=True).hidden_states for m in (short, teacher))
    n = batch["attention_mask"].sum(1).tolist()
    expected = sum(
        torch.stack([F.mse_loss(a[i, :k], b[i, :k]) for i, k in enumerate(n)]).mean()
        for a, b in ((x[0], y[0]), (x[1], y[2]))
    )
    torch.testing.assert_close(terms["hidden"].detach(), expected, rtol=1e-5, atol=0)
    with refused(InputError, "block 5 of the teacher", "0 to 1"):
        Distiller(parse_distill("map", mapping={0: 5}), short, teacher)
    with refused(InputError, "--mapping says nothing with the terms prediction"):
        Distiller(parse_distill("prediction", mapping={0: 1}), short, teacher)


def test_balance() -> None:
    """Balanced terms count by their weights and how many tensors they compare, in whatever units; fixed ones as they
    are."""
    terms = {"map": torch.tensor(4.0, requires_grad=True), "output": torch.tensor(0.01, requires_grad=True)}
    weights = {"map": 0.3, "output": 0.7}
    loss = balanced(terms, Distill(weights, balance="auto"), {"map": 2})
    assert loss.item() == pytest.approx(2 * 0.3 + 0.7)
    loss.backward()
    assert [t.grad.item() * t.item() for t in terms.values()] == pytest.approx([0.6, 0.7])
    assert balanced(terms, Distill(weights, balance="fixed"), {"map": 2}).item() == pytest.approx(0.3 * 4 + 0.7 * 0.01)


def test_logged_loss(tmp_path: Path) -> None:
    """Whatever the balance, the logged loss is the sum of the logged terms by their weights, and so is that of an
    evaluation, which tells a better student from a worse one."""
    for balance in ("auto", "fixed"):
        distill = parse_distill("prediction,hidden=2,map=0.5", balance=balance)
        running = trainer(tmp_path / balance, distill=distill, logging_steps=1, max_steps=3, learning_rate=1e-2)
        before = running.evaluate()["eval_loss"]
        running.train()
        logs = [entry for entry in running.state.log_history if "loss" in entry]
        assert len(logs) == 3
        for entry in logs:
            assert entry["loss"] == pytest.approx(sum(w * entry[f"loss_{n}"] for n, w in distill.terms.items()))
        assert running.evaluate()["eval_loss"] < before
        rows = [{k: v for k, v in row.items() if k != "labels"} for row in running.eval_dataset]
        assert len(rows) > 0
        found = running.predict(rows)
        assert found.metrics["test_loss"] == pytest.approx(running.evaluate()["eval_loss"])  # labels or not
        assert found.label_ids is None


def test_compared() -> None:
    """A term's count is that of the tensors it compares: a prediction, each block, what the first one reads, and the
    chosen layers."""
    student, teacher, batch = pair("bert")
    distiller = Distiller(parse_distill("map", layers=(-1,)), student, teacher)
    distiller.forward(student, batch)
    assert distiller.compared == {"hidden": 1 + student.config.num_hidden_layers, "map": 1}


def test_a_given_decoder_input() -> None:
    """Tokens that a decoder is given to begin with have no label, and are no padding: the task loss is the model's."""
    student, teacher, batch = pair("bart")
    ids = batch["input_ids"]
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 3, -100)
    batch = {"input_ids": ids, "decoder_input_ids": ids, "labels": labels}
    _, terms = Distiller(parse_distill("truth"), student, teacher).forward(student, batch)
    torch.testing.assert_close(terms["truth"], student(**batch).loss)


@pytest.mark.parametrize(
    "teacher",
    [
        hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4, n_positions=16)),
        hf.XLNetLMHeadModel(hf.XLNetConfig(vocab_size=99, d_model=32, n_layer=1, n_head=4, d_inner=48)),
    ],
    ids=lambda model: model.config.model_type,
)
def test_tokens_with_a_label(teacher: hf.PreTrainedModel) -> None:
    """Of a language model those outputs are distilled that its own loss compares with a label: of the token after, or
    of the token itself."""
    student = copy.deepcopy(teacher.eval())
    simulate(student, "w8a8-token")
    ids = torch.arange(5, 15).view(1, 10)
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(10) != 5, -100)}
    out, terms = Distiller(parse_distill("prediction,truth"), student, teacher).forward(student, batch)
    taught = [torch.autograd.grad(terms[n], out.logits, retain_graph=True)[0] for n in ("prediction", "truth")]
    assert torch.equal(*(grad.abs().sum((0, 2)).nonzero() for grad in taught))


@pytest.mark.parametrize("kind", [hf.T5ForConditionalGeneration, hf.T5ForQuestionAnswering])
def test_padding_of_a_decoder(kind: Any) -> None:
    """More padding of labels, or of texts that are the decoder's too, changes no term."""
    config = hf.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    teacher = kind(config).eval()
    student = copy.deepcopy(teacher)
    weights_only = Recipe(name="weights", rules=(Rule(roles=("qkv", "ffn"), weight=Format(kind="ternary")),))
    ids = torch.randint(5, 99, (2, 8))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind is hf.T5ForConditionalGeneration:
        batch["labels"] = ids[:, :6].contiguous()
    simulate(student, weights_only, batch)
    distiller = Distiller(parse_distill("prediction,hidden,score,map,output"), student, teacher)
    grown = {
        name: F.pad(x, (0, 5), value=-100 if name == "labels" else 0)
        for name, x in batch.items()
        if name == "labels" or "labels" not in batch
    }
    with torch.no_grad():
        found = [distiller.forward(student, b)[1] for b in (batch, batch | grown)]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


# Checkpoints, and what is refused


def trainer(folder: Path, family: str = "bert", distill: Distill | None = None, **arguments: Any) -> QATTrainer:
    falling = iter(range(9, 0, -1))  # the first checkpoint is the best
    metrics = {"compute_metrics": lambda _: {"falling": next(falling)}}
    return small_trainer(folder, pair(family), {"max_steps": 2} | arguments, distill=distill, **metrics)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_checkpoint(tmp_path: Path, family: str) -> None:
    """A checkpoint of the trainer is a simulated model that loads by itself; nothing of the teacher is in it."""
    running = trainer(tmp_path / "run", family, save_strategy="steps", save_steps=2)
    running.train()
    _, batch = SUPPORTED[family]()
    running.model.eval()
    loaded = load(tmp_path / "run" / "checkpoint-2")
    assert same(outputs(loaded, batch), outputs(running.model, batch))
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in running.model.parameters())
    assert not any("teacher" in name for name in running.model.state_dict())


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_best(tmp_path: Path, family: str) -> None:
    """The best checkpoint is loaded at the end, weights and all."""
    running = trainer(
        tmp_path / "run",
        family,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="falling",
    )
    running.train()
    best = load(running.state.best_model_checkpoint)
    _, batch = SUPPORTED[family]()
    assert running.state.best_model_checkpoint.endswith("checkpoint-1")
    assert same(outputs(best, batch), outputs(running.model.eval(), batch))


def test_not_finite(tmp_path: Path) -> None:
    """A loss that is no longer finite stops the run, with the step, the term and the weight."""
    running = trainer(tmp_path / "run")
    for step in (2, 10):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
    with torch.no_grad():
        running.model.bert.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    with refused(ModelError, "step 1", "layer.1.output.dense.weight", "learning rate", "checkpoint-10"):
        running.train()


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student that is not simulated, split weights, terms that do not exist, other widths: refused in one line."""
    teacher, batch = SUPPORTED["bert"]()
    args = hf.TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True)
    with refused(ModelError, "not simulated"):
        QATTrainer(copy.deepcopy(teacher), args, teacher=teacher)
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with refused(InputError, "use_reentrant=False"):
        trainer(tmp_path / "reentrant", **reentrant)
    with refused(InputError, "split weights", "torchrun"):
        trainer(tmp_path / "fsdp", fsdp=True)
    with monkeypatch.context() as patch, refused(InputError, "one process on CPUs", "torchrun"):
        patch.setenv("ACCELERATE_USE_CPU", "True")  # as `accelerate launch --cpu --num_processes 2` does
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.delenv("RANK", raising=False)
        trainer(tmp_path / "cpus")
    with refused(InputError, "'maps'", "did you mean map?"):
        parse_distill("maps")
    with refused(InputError, "map=x", "map=0.5"):
        parse_distill("map=x")
    with refused(InputError, "weight -1"):
        parse_distill("map=-1")
    with refused(InputError, "nothing to learn"):
        parse_distill("")
    with refused(InputError, "need a teacher"):
        Distiller(parse_distill("map"), teacher)
    torch.manual_seed(0)
    wide = hf.BertForSequenceClassification(hf.BertConfig(**(TEXT | {"hidden_size": 64}), num_labels=3)).eval()
    distiller = Distiller(parse_distill("hidden"), copy.deepcopy(teacher), wide)
    with refused(ModelError, "hidden", "(2, 12, 32)", "(2, 12, 64)"):
        distiller.forward(distiller.student, batch)


def test_saved_student(tmp_path: Path) -> None:
    """What was trained packs and loads like any simulated model."""
    running = trainer(tmp_path / "run")
    running.train()
    _, batch = SUPPORTED["bert"]()
    student = running.model.eval()
    expected = outputs(student, batch)
    save(pack(student), tmp_path / "packed")
    assert same(outputs(load(tmp_path / "packed"), batch), expected)
