"""Training runs from end to end: every kind of model and data, crashes, and what is refused before the first step."""

import json
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from scipy.stats import spearmanr

import bittern
from bittern import jobs
from bittern.data import load_data
from bittern.demo import DIGITS
from bittern.deploy.journal import seal
from bittern.errors import InputError, ModelError
from bittern.options import Intervention, Training, parse_distill
from bittern.qat.optimizer import BertAdam
from bittern.qat.training import ByLength, collator, first_step, last_checkpoint, read_baseline, train
from families import SUPPORTED
from helpers import refused, same
from material import LABELS, SENTENCE, TEXTS, command, save_text_model, write_tables

QUICK = Training(steps=6, batch_size=8, learning_rate=1e-3, evaluations=2)
BERT = "prediction,hidden,map,output"


def teach(source: Path, out: Path, data: Any, terms: str = BERT, **options: Any) -> dict[str, Any]:
    training = options.pop("training", QUICK)
    return jobs.qat(
        source, "ternary-2-2-8", out, data=str(data), distill=parse_distill(terms), training=training, **options
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tables(tmp_path_factory.mktemp("data") / "texts", text=TEXTS, label=LABELS)


def test_digits(tmp_path: Path) -> None:
    """Two epochs with a teacher give ternary weights most of their accuracy back, and the packed file has it."""
    training = Training(epochs=2, batch_size=64, learning_rate=1e-3, evaluations=2)
    result = teach(DIGITS, tmp_path / "out", "digits", "unified", training=training)
    assert result["float"]["accuracy"] > 0.98
    assert result["qat"]["history"][0]["eval_accuracy"] < 0.85  # as it was before the first step
    assert result["packed"]["accuracy"] == pytest.approx(result["qat"]["best"])
    assert result["packed"]["accuracy"] > 0.95
    assert result["max_error_simulated_packed"] == 0
    assert result["float_bytes"] > 6 * result["file"]
    assert result["peak_memory"] > 1e8
    assert not (tmp_path / "out.work").exists()
    report = json.loads((tmp_path / "out" / "bittern.json").read_text())
    assert report["qat"] == result["qat"]
    assert report["distill"]["terms"] == {"prediction": 1, "hidden": 1, "map": 1, "output": 1}


def test_the_best_is_kept(tmp_path: Path, bert: Path, texts: Path) -> None:
    """The packed model is that of the best evaluation, here not the last one, since the rate is far too high."""
    training = replace(QUICK, steps=12, learning_rate=0.3, evaluations=6)
    result = teach(bert, tmp_path / "out", texts, training=training)
    found = [e["eval_accuracy"] for e in result["qat"]["history"] if "eval_accuracy" in e]
    assert len(found) == 7  # one before the first step
    assert result["packed"]["accuracy"] == pytest.approx(max(found[1:]))
    assert result["qat"]["best"] == max(found[1:])


def test_best_by_loss(tmp_path: Path, bert: Path, texts: Path) -> None:
    """The best evaluation may be that of the least loss, which falls as the student learns."""
    training = replace(QUICK, steps=12, evaluations=4, metric="loss")
    result = teach(bert, tmp_path / "out", texts, training=training)
    found = [e["eval_loss"] for e in result["qat"]["history"] if "eval_loss" in e]
    assert len(found) == 5
    assert found[-1] < found[0]
    assert result["qat"]["best"] == min(found[1:])


def test_as_published(tmp_path: Path, bert: Path, texts: Path) -> None:
    """The published optimizer trains with its own clipping only, from the command too; its losses are named by `ti`."""
    line = f"bittern qat {bert} --data {texts} -r ternary-2-2-8 -o {tmp_path / 'out'} --steps 6 --batch-size 8 --json"
    published = "--optimizer bertadam --lr 1e-3 --distill ti --padded 16 --balance fixed --intervene gradual"
    done = command(f"{line} {published} --intervene-steps 3")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["training"]["optimizer"] == "bertadam"
    assert result["distill"]["padded"] == 16
    assert list(result["distill"]["terms"]) == ["prediction", "hidden", "score", "output"]
    student = bittern.load(bert)
    bittern.simulate(student, "ternary-2-2-8")
    data = load_data(str(texts), student, bert, split="train")
    assert data is not None
    for optimizer, kind, norm in (("bertadam", BertAdam, 0.0), ("adamw", torch.optim.AdamW, 1.0)):
        used: list[Any] = []
        training = replace(QUICK, optimizer=optimizer, metric="loss")

        def measure(used: list[Any] = used) -> dict[str, float]:
            frame = sys._getframe(1)
            used.append(frame.f_locals["self"])
            return {}

        train(student, bittern.load(bert), data, measure, parse_distill("map"), training, tmp_path / optimizer)
        assert used[-1].args.max_grad_norm == norm
        assert isinstance(getattr(used[-1].optimizer, "optimizer", used[-1].optimizer), kind)


def test_floors(tmp_path: Path, bert: Path, texts: Path) -> None:
    """Before the first step what quantized activations alone cost is told of each term, and a warning names the terms
    of which it is most; what is kept of the run has both."""
    clipped = tmp_path / "clipped.yaml"
    clipped.write_text(
        "name: clipped\nrules: [{roles: [qkv, ffn], weight: {bits: 8, granularity: row}, input: {bits: 8, clip: 0.1}}]"
    )
    heard: list[tuple[int, dict[str, float]]] = []
    options: dict[str, Any] = {"data": str(texts), "distill": parse_distill("prediction,hidden,map"), "training": QUICK}
    with pytest.warns(UserWarning, match=r"most of the first loss: hidden \(.* of .*\), map .* a clip") as warned:
        result = jobs.qat(
            bert, clipped, tmp_path / "out", on_step=lambda step, _, logs: heard.append((step, dict(logs))), **options
        )
    assert len(str(warned[0].message).splitlines()) == 1
    floors = result["qat"]["floors"]
    assert list(floors) == ["prediction", "hidden", "map"]
    step, told = heard[0]
    assert (step, told["floor_map"], told["start_map"]) == (0, floors["map"]["floor"], floors["map"]["start"])
    line = f"bittern qat {bert} --data {texts} -r ternary -o {tmp_path / 'other'} --steps 2 --batch-size 8"
    done = command(line)
    assert done.code == 0
    found = re.search(r"quantized activations alone make of the first losses: .*hidden (\S+) of ([^,\s]+)", done.err)
    assert found is not None
    assert 0 < float(found[1]) < float(found[2]) / 10
    assert "most of the first loss" not in done.err
    assert re.search(r"kept float: .*\n\d\d\.\d% of [\d,]+ weights are quantized", done.out)


def test_patience(tmp_path: Path, bert: Path, texts: Path) -> None:
    """A run that is no longer better stops early."""
    training = replace(QUICK, steps=40, learning_rate=1e-9, evaluations=20, patience=2)
    assert teach(bert, tmp_path / "out", texts, training=training)["qat"]["steps"] < 40
    taught = teach(bert, tmp_path / "taught", texts, training=training, intervention=Intervention("gradual", steps=20))
    assert 20 < taught["qat"]["steps"] < 40  # not while the teacher stands in


def test_last_weights(tmp_path: Path, bert: Path, texts: Path) -> None:
    """Where the last weights are kept and not the best ones, the report says so."""
    training = replace(QUICK, learning_rate=0.3, evaluations=6, arguments={"load_best_model_at_end": False})
    result = teach(bert, tmp_path / "out", texts, training=training)
    assert result["qat"]["best_step"] == 0
    assert result["packed"]["accuracy"] == pytest.approx(result["qat"]["history"][-2]["eval_accuracy"])
    known = {entry["step"]: entry["eval_accuracy"] for entry in result["qat"]["history"] if "eval_accuracy" in entry}
    baseline = read_baseline(tmp_path / "out")
    assert known[baseline["best_step"]] == baseline["best"]


def test_own_metric(tmp_path: Path, bert: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric of one's own that a Training chooses by is one that is measured."""
    (tmp_path / "sizes.py").write_text("def largest(output, data):\n    return float(output.abs().max())\n")
    monkeypatch.chdir(tmp_path)
    result = teach(bert, tmp_path / "out", texts, training=replace(QUICK, metric="sizes:largest"))
    assert result["qat"]["metric"] == "sizes:largest"
    assert result["qat"]["best"] == pytest.approx(result["packed"]["sizes:largest"])


def test_order_of_epochs(tmp_path: Path, bert: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each epoch has an order of its own, also where accelerate tells the sampler none: of several processes."""
    monkeypatch.setattr("accelerate.data_loader.DataLoaderShard.set_epoch", lambda *_: None)
    student = bittern.load(bert)
    bittern.simulate(student, "ternary")
    data, seen = load_data(str(texts), student, bert, split="train"), []
    assert data is not None
    collate = data.collate
    watched = replace(data, collate=lambda rows: seen.append(tuple(rows)) or collate(rows))
    steps = 2 * (len(data) // 8)
    training = replace(QUICK, steps=steps, evaluations=1, metric="x")
    train(student, None, watched, lambda: {"x": 0.0}, parse_distill("truth"), training, tmp_path)
    first, second = (seen[-steps:][k : k + steps // 2] for k in (0, steps // 2))
    assert first != second


def test_refused_first_batch(tmp_path: Path, bert: Path, texts: Path) -> None:
    """A run that is refused on its first batch leaves nothing of the teacher in the student."""
    teacher, student = bittern.load(bert), bittern.load(bert)
    bittern.simulate(student, "ternary")
    data = load_data(str(texts), student, bert, split="train")
    assert data is not None
    batch = data.collate(data.rows[:8])
    with torch.no_grad():
        before = student(**batch).logits
    for distill, message in (
        (parse_distill("map", layers=(9,)), "layers names block 9"),
        (parse_distill("map", layers=(1,), mapping={0: 0}), "compares nothing"),
    ):
        with refused(InputError, message):
            train(student, teacher, data, dict, distill, QUICK, tmp_path, intervention=Intervention("context", steps=2))
        with torch.no_grad():
            assert torch.equal(student(**batch).logits, before)


KINDS: dict[str, tuple[dict[str, Any], str, str]] = {  # columns, terms, the metric that decides
    "classes": ({"text": TEXTS, "label": LABELS}, BERT + ",truth", "accuracy"),
    "pairs": ({"sentence1": TEXTS, "sentence2": TEXTS[::-1], "label": LABELS}, BERT, "accuracy"),
    "no labels": ({"text": TEXTS}, BERT, "agreement"),
    "no teacher": ({"text": TEXTS, "label": LABELS}, "none", "accuracy"),
    "all terms": ({"text": TEXTS}, BERT + ",score,self_output,context,value_relation,query_relation", "agreement"),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_data(tmp_path: Path, bert: Path, name: str) -> None:
    """Tables with and without labels, with one text or two, train a student that equals its packed file."""
    columns, terms, metric = KINDS[name]
    result = teach(bert, tmp_path / "out", write_tables(tmp_path / "data", **columns), terms)
    assert result["qat"]["metric"] == metric
    assert result["qat"]["steps"] == 6
    assert result["packed"][metric] == pytest.approx(result["qat"]["best"])
    assert result["max_error_simulated_packed"] == 0


def test_regression(tmp_path: Path, bert: Path) -> None:
    """A head of one number learns from fractions, and is measured by correlation."""
    config = hf.AutoConfig.from_pretrained(bert, num_labels=1)
    student = hf.BertForSequenceClassification(config)
    student.save_pretrained(tmp_path / "model")
    hf.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "model")
    data = write_tables(tmp_path / "data", text=TEXTS, label=[len(t) / 7 for t in TEXTS])
    result = teach(tmp_path / "model", tmp_path / "out", data, "prediction,truth,hidden")
    assert result["qat"]["metric"] == "pearson"
    assert result["packed"]["pearson"] == pytest.approx(result["qat"]["best"], abs=1e-4)
    packed = bittern.load(tmp_path / "out")  # whose scales depend on what is in a batch
    test = load_data(str(data), student, tmp_path / "model", split="test", batch_size=QUICK.batch_size)
    assert test is not None
    with torch.no_grad():
        output = torch.cat([packed(**batch).logits for batch in test]).flatten()
    assert result["packed"]["spearman"] == pytest.approx(spearmanr(output, [len(t) for t in TEXTS]).statistic)


def test_encoder(tmp_path: Path) -> None:
    """An encoder without a head learns what its layers show, and is measured by similarities."""
    source = save_text_model(tmp_path / "model", head=False)
    data = write_tables(tmp_path / "data", text=TEXTS, label=LABELS)
    assert teach(source, tmp_path / "out", data, "hidden,map,output")["qat"]["metric"] == "similarity"
    with refused(InputError, "BertModel has no logits for the term prediction", "hidden,map,output"):
        teach(source, tmp_path / "other", data, "unified")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_language_model(tmp_path: Path, bert: Path, family: str) -> None:
    """A decoder learns token by token from plain text in blocks, and is measured by perplexity: lower is better."""
    model, _ = SUPPORTED[family]()
    model.save_pretrained(tmp_path / "model")
    hf.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "data" / f"{split}.txt").write_text("\n".join([SENTENCE] * 40))
    result = teach(tmp_path / "model", tmp_path / "out", tmp_path / "data", "prediction,hidden,truth", max_length=16)
    found = [e["eval_perplexity"] for e in result["qat"]["history"] if "eval_perplexity" in e]
    assert result["qat"]["metric"] == "perplexity"
    assert result["qat"]["best"] == min(found[1:])
    assert result["packed"]["perplexity"] == pytest.approx(min(found[1:]), rel=1e-4)


def test_one_part(tmp_path: Path, bert: Path) -> None:
    """Of data with one part only a tenth is held out, and not trained on."""
    data = write_tables(tmp_path / "data", text=TEXTS, label=LABELS) / "train.parquet"
    assert teach(bert, tmp_path / "out", data)["samples"] == 4
    whole = load_data(str(data), bittern.load(bert), bert, split="train")
    assert whole is not None
    rest, held_out = whole.split(4, seed=1)
    assert (len(rest), len(held_out)) == (36, 4)
    assert sorted([*rest.rows, *held_out.rows]) == sorted(whole.rows)
    assert rest.labels is not None
    assert [LABELS[TEXTS.index(row[0])] for row in rest.rows] == rest.labels.tolist()


def test_shallow_student(tmp_path: Path, bert: Path, texts: Path) -> None:
    """A student of one block learns from the block that the mapping names; without a mapping it is refused."""
    config = hf.AutoConfig.from_pretrained(bert, num_hidden_layers=1)
    hf.BertForSequenceClassification(config).save_pretrained(tmp_path / "student")
    hf.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "student")
    with refused(ModelError, "the student has 1 blocks", "mapping="):
        teach(bert, tmp_path / "out", texts, student=tmp_path / "student")
    result = jobs.qat(
        bert,
        "ternary-2-2-8",
        tmp_path / "out",
        data=str(texts),
        distill=parse_distill("unified", mapping={0: 1}),
        training=QUICK,
        student=tmp_path / "student",
        force=True,
    )
    assert result["qat"]["steps"] == 6


# Crashes


def qat(out: Path, *options: str) -> list[str]:
    command = "qat {} --data digits -r ternary-2-2-8 --steps 24 --evaluations 6 --batch-size 32 --lr 1e-3 --json"
    return [sys.executable, "-m", "bittern", *command.format(DIGITS).split(), "-o", str(out), *options]


def test_crash(tmp_path: Path) -> None:
    """Killed in training and resumed, the command writes the very file of one that was not; other options are refused,
    and so is starting anew, unless forced."""
    subprocess.run(qat(tmp_path / "whole"), check=True, capture_output=True)
    process = subprocess.Popen(qat(tmp_path / "out"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and last_checkpoint(tmp_path / "out.work") is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    line = " ".join(["bittern", *qat(tmp_path / "out")[3:]])
    assert "holds an unfinished run, up to checkpoint-" in command(line).err
    assert "no such folder" in command(f"{line.replace(str(DIGITS), 'nowhere')} --force").err  # and nothing is dropped
    assert last_checkpoint(tmp_path / "out.work") is not None
    assert "another training" in command(f"{line} --resume --seed 1").err
    partial = tmp_path / "out.work" / "checkpoint-99"  # killed while it was written
    partial.mkdir()
    (partial / "trainer_state.json").write_text('{"global_step": 9')
    assert command(f"{line} --resume").code == 0
    found = [sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest() for name in ("whole", "out")]
    assert found[0] == found[1]
    assert not (tmp_path / "out.work").exists()


def test_a_moved_run(tmp_path: Path) -> None:
    """A run that was killed goes on in another place, with its best checkpoint, to the same bits."""
    ends = "--lr 1 --steps 12 --evaluations 6"  # the later, the worse
    subprocess.run([*qat(tmp_path / "whole"), *ends.split()], check=True, capture_output=True)
    process = subprocess.Popen([*qat(tmp_path / "a" / "out"), *ends.split()], stdout=subprocess.DEVNULL)
    while process.poll() is None and last_checkpoint(tmp_path / "a" / "out.work") is None:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (tmp_path / "a").rename(tmp_path / "b")
    subprocess.run([*qat(tmp_path / "b" / "out"), *ends.split(), "--resume"], check=True, capture_output=True)
    whole, moved = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "b/out"))
    assert same(whole, moved)
    runs = [json.loads((tmp_path / name / "bittern.json").read_text())["qat"]["history"] for name in ("whole", "b/out")]
    steps = [[(e["step"], e.get("loss"), e.get("eval_accuracy")) for e in history] for history in runs]
    assert steps[0] == steps[1]


INTERRUPTED: dict[str, tuple[dict[str, Any], int, str]] = {  # options, the last checkpoint, a file that is damaged
    "between logs": ({"steps": 14}, 7, ""),
    "at its last step": ({"steps": 6}, 6, ""),
    "while patience runs out": ({"steps": 40, "learning_rate": 1e-9, "evaluations": 20, "patience": 2}, 4, ""),
    "when it did": ({"steps": 40, "learning_rate": 1e-9, "evaluations": 20, "patience": 2}, 6, ""),
    "the newest is damaged": ({"steps": 6}, 6, "checkpoint-6/training_args.bin"),
    "the best is damaged": ({"steps": 6, "learning_rate": 1e-9}, 6, "checkpoint-3/model.safetensors"),
}


@pytest.mark.parametrize("name", INTERRUPTED)
def test_interrupted(tmp_path: Path, bert: Path, texts: Path, name: str) -> None:
    """Wherever a run ended, and where its folder lies now, it goes on to the weights and the history of one that was
    not disturbed: no step too many, nothing logged otherwise, no evaluation without progress forgotten."""
    options, last, damaged = INTERRUPTED[name]
    training = replace(QUICK, **options)
    whole = teach(bert, tmp_path / "whole", texts, training=training)["qat"]

    def interrupt(*_: Any) -> None:
        found = last_checkpoint(tmp_path / "a" / "out.work")
        if found and found.name == f"checkpoint-{last}":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teach(bert, tmp_path / "a" / "out", texts, training=training, on_step=interrupt)
    (tmp_path / "a").rename(tmp_path / "b")
    if damaged:
        file = tmp_path / "b" / "out.work" / damaged
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    resumed = teach(bert, tmp_path / "b" / "out", texts, training=training, resume=True)["qat"]
    for run in (whole, resumed):
        run["history"] = [{k: v for k, v in e.items() if not k.startswith("train_")} for e in run["history"]]
        run["seconds"] = 0
    assert resumed == whole
    assert same(*(load_file(tmp_path / out / "model.safetensors") for out in ("whole", "b/out")))


def test_processes(tmp_path: Path) -> None:
    """Two processes share each epoch between them, and the first one writes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *qat(tmp_path / "out")[1:]]
    done = subprocess.run([sys.executable, *launcher], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["qat"]["history"][-1]["epoch"] == pytest.approx(24 * 2 * 32 / 1437, rel=0.05)
    assert result["max_error_simulated_packed"] == 0
    assert bittern.inspect(tmp_path / "out")["state"] == "packed"
    assert not (tmp_path / "out.work").exists()


def test_intervention(tmp_path: Path) -> None:
    """The command tells what the teacher did when, and how many steps that saved against a run without it."""
    options = "--data digits -r ternary-2-2-8 --evaluations 8 --batch-size 32 --lr 1e-3"
    plain, out = tmp_path / "plain", tmp_path / "out"
    assert command(f"bittern qat {DIGITS} {options} --steps 16 -o {plain}").code == 0
    ran = command(
        f"bittern qat {DIGITS} {options} --steps 48 --intervene gradual --intervene-steps 12 --plain {plain} -o {out}"
    )
    assert ran.code == 0
    assert "step 6 of 48, map" in ran.err
    assert "step 18 of 48, alone" in ran.err
    report = json.loads((out / "bittern.json").read_text())
    spans = [(p["name"], p["from"], p["to"]) for p in report["qat"]["phases"]]
    assert spans == [("output", 0, 2), ("context", 2, 4), ("map", 4, 12), ("alone", 12, 48)]
    assert report["intervention"] == {"schedule": "gradual", "steps": 12, "scope": "all", "seed": 0}
    reference = json.loads((plain / "bittern.json").read_text())["qat"]
    curve = {e["step"]: e["eval_accuracy"] for e in report["qat"]["history"] if "eval_accuracy" in e}
    reached = next(step for step, accuracy in curve.items() if accuracy >= reference["best"])
    assert report["plain"]["reached"] == reached
    assert f"this run was there at step {reached}: {reference['best_step'] / reached:.1f} times" in ran.out
    again = f"bittern qat {DIGITS} {options} --steps 16 -o {tmp_path / 'again'}"
    assert "holds no finished run" in command(f"{again} --intervene map --plain {tmp_path}").err
    (plain / "bittern.json").write_text("[" * 100_000)
    assert "holds no finished run" in command(f"{again} --intervene map --plain {plain}").err
    assert "give --intervene" in command(f"{again} --plain {plain}").err
    assert "16 steps of 16" in command(f"{again} --intervene map --intervene-steps 16").err
    assert "'maps'" in command(f"{again} --intervene maps").err


def test_first_step() -> None:
    """The first evaluation at least as good as a value: higher is better, of perplexity lower."""
    history = [{"step": s, "eval_accuracy": a, "eval_perplexity": 1 / a} for s, a in ((0, 0.1), (5, 0.5), (9, 0.7))]
    history.insert(1, {"step": 3, "loss": 1.0})
    assert [first_step(history, "accuracy", v) for v in (0.1, 0.5, 0.6, 0.8)] == [0, 5, 9, None]
    assert [first_step(history, "perplexity", v) for v in (10, 2, 1.9, 1)] == [0, 5, 9, None]


def test_last_checkpoint(tmp_path: Path) -> None:
    """The newest one, by number, of those that are whole, as the best one by then must be: one that was cut short,
    damaged or robbed of a file since is passed over, and so the run goes on to the same bits."""
    assert last_checkpoint(tmp_path / "nowhere") is None
    for step in (9, 10, 11, 12, 13):
        (folder := tmp_path / f"checkpoint-{step}").mkdir()
        for name in ("trainer_state.json", "optimizer.pt"):
            (folder / name).write_text('{"best_global_step": 9}')
        if step < 13:  # killed before
            seal(folder)
    (tmp_path / "checkpoint-12" / "optimizer.pt").write_text("{!")
    (tmp_path / "checkpoint-11" / "optimizer.pt").unlink()
    found = last_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "checkpoint-10"
    (tmp_path / "checkpoint-9" / "optimizer.pt").unlink()
    assert last_checkpoint(tmp_path) is None  # the best of that run would be missing at its end


# Batches


@pytest.mark.parametrize("count", [1000, 1007, 15, 7])
def test_by_length(count: int) -> None:
    """Each sample comes once an epoch, in an order that its seed then decides; batches are of like lengths, and do not
    go from long texts to short ones."""
    lengths = torch.randint(1, 100, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    seeds = iter((0, 1, 2, 0))
    sampler = ByLength(lengths, 10, lambda: next(seeds))
    orders = [list(sampler) for _ in range(4)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert orders[0] == orders[3]
    batches = [[lengths[i] for i in orders[0][k : k + 10]] for k in range(0, count, 10)]
    if count >= 1000:
        assert len({tuple(order) for order in orders}) == 3
        assert sum(max(b) - min(b) for b in batches) / len(batches) < 20  # about 80 in a random order
        means = torch.tensor([[sum(b) / 10 for b in batches[:50]], range(50)])
        assert abs(torch.corrcoef(means)[0, 1]) < 0.5  # near -1 as transformers has them


def test_labels_of_a_batch(bert: Path, texts: Path) -> None:
    """A batch has the labels of its rows, whatever their order."""
    model = bittern.load(bert)
    data = load_data(str(texts), model, bert, split="train")
    assert data is not None
    batch = collator(data, model)([7, 2, 30])
    assert batch["labels"].tolist() == [LABELS[i] for i in (7, 2, 30)]
    assert torch.equal(batch["input_ids"], data.collate([data.rows[i] for i in (7, 2, 30)])["input_ids"])


# What is refused


def test_refused(tmp_path: Path, bert: Path, texts: Path) -> None:
    """Options and data that do not fit are told in one line before the first step, and leave no output."""
    unlabelled = write_tables(tmp_path / "unlabelled", text=TEXTS)
    out = tmp_path / "out"
    with refused(InputError, "a batch of 64 is larger than the data, 40 samples"):
        teach(bert, out, texts, training=replace(QUICK, batch_size=64))
    with refused(InputError, "has no labels, which the term truth needs"):
        teach(bert, out, unlabelled, "truth")
    with refused(InputError, "no metric 'mcc' to choose by; there are accuracy, agreement"):
        teach(bert, out, texts, training=replace(QUICK, metric="mcc"))
    with refused(InputError, "has no 'fp17'", "did you mean fp16?"):
        teach(bert, out, texts, training=replace(QUICK, arguments={"fp17": True}))
    with refused(InputError, "save_steps cannot be set: the option evaluations decides it"):
        teach(bert, out, texts, training=replace(QUICK, arguments={"save_steps": 3}))
    with refused(InputError, "max_steps cannot be set: the option steps decides it"):
        teach(bert, out, texts, training=replace(QUICK, arguments={"max_steps": 3}))
    with refused(InputError, "label_smoothing_factor cannot be set: the option distill decides it"):
        teach(bert, out, texts, training=replace(QUICK, arguments={"label_smoothing_factor": 0.1}))
    with refused(InputError, "warmup is 1", "below 1"):
        Training(warmup=1.0)
    with refused(InputError, "optimizer is 'lion'", "adamw or bertadam"):
        Training(optimizer="lion")  # type: ignore[arg-type]
    with refused(InputError, "two optimizers"):
        teach(bert, out, texts, training=replace(QUICK, optimizer="bertadam", arguments={"optim": "adafactor"}))
    assert not out.exists()


def test_full_disk(tmp_path: Path, bert: Path, texts: Path) -> None:
    """Where the model still fits on the disk and the optimizer's state does not, that is told in one line."""
    room = 2 * (bert / "model.safetensors").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with refused(InputError, "cannot write to", "out.work", "the disk may be full"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            teach(bert, tmp_path / "out", texts)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()


def test_other_student(tmp_path: Path, bert: Path, texts: Path) -> None:
    """A student with another vocabulary, other words or other classes than its teacher is refused."""
    other = tmp_path / "other"
    for change, message in (({"num_labels": 2}, "num_labels 2"), ({"vocab_size": 50}, "vocab_size 50")):
        config = hf.AutoConfig.from_pretrained(bert, **change)
        hf.BertForSequenceClassification(config).save_pretrained(other)
        with refused(InputError, message, "they must agree"):
            teach(bert, tmp_path / "out", texts, student=other)
    bittern.load(bert).save_pretrained(other)
    tokenizer = json.loads((bert / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["marsh"] = tokenizer["model"]["vocab"].pop("reeds")
    hf.AutoTokenizer.from_pretrained(bert).save_pretrained(other)
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with refused(InputError, "different tokenizers", "'marsh'"):
        teach(bert, tmp_path / "out", texts, student=other)
