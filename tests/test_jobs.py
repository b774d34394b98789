"""Whole jobs: the figures they report are those of the files they write, and the same seed gives the same file."""

import os
import shutil
from collections.abc import Callable
from contextvars import Context
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor

import bittern
from bittern import jobs, native
from bittern.analysis.study import analyze
from bittern.data import digits
from bittern.demo import DIGITS
from bittern.deploy.files import reserved
from bittern.deploy.onnx.export import export
from bittern.errors import InputError
from bittern.options import Distill, Training
from bittern.recipe import recipe_names
from families import SUPPORTED, VISION
from helpers import refused
from material import LABELS, TEXTS, command, save_text_model, tree, write_tables

BATCH = 32


@torch.no_grad()
def run(model: hf.PreTrainedModel, batches: list[dict[str, Tensor]], output: str = "logits") -> np.ndarray:
    """What the model gives for all batches."""
    return torch.cat([model(**batch)[output] for batch in batches]).numpy()


def image_batches(images: Tensor) -> list[dict[str, Tensor]]:
    return [{"pixel_values": part} for part in images.split(BATCH)]


NOT_SERVED: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "multiple choice": lambda: hf.BertForMultipleChoice(SUPPORTED["bert"]()[0].config),
    "CTC": lambda: hf.Wav2Vec2ForCTC(
        hf.Wav2Vec2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, conv_dim=[8] * 7)
    ),
    "seq2seq": lambda: SUPPORTED["bart"]()[0],
    "speech": lambda: SUPPORTED["whisper"]()[0],
    "segmentation": lambda: hf.BeitForSemanticSegmentation(
        hf.BeitConfig(**VISION | {"num_hidden_layers": 4}, out_indices=[1, 2, 3, 4])
    ),
    "image and text": lambda: SUPPORTED["clip"]()[0],
    "boxes of a text": lambda: hf.OwlViTForObjectDetection(
        hf.OwlViTConfig(text_config={"num_hidden_layers": 1}, vision_config=VISION)
    ),
}


@pytest.mark.parametrize("head", NOT_SERVED)
def test_heads_that_are_not_served(head: str, tmp_path: Path) -> None:
    """A model with a head that no job measures is refused as that, in one line, before its data is even looked for."""
    model = NOT_SERVED[head]()
    model.save_pretrained(tmp_path / "model")
    for line in ("eval {} --data nowhere", "qat {} --recipe w8a8 --data nowhere --out {}-out"):
        ran = command("bittern " + line.format(*[tmp_path / "model"] * 2))
        assert (ran.code, ran.out) == (1, "")
        told = [line for line in ran.err.splitlines() if line.startswith("error: ")]
        assert len(told) == 1
        assert told[0].startswith(f"error: {type(model).__name__} cannot be evaluated")


def test_heads_that_are_only_quantized(tmp_path: Path) -> None:
    """Data with a test part is refused for a model that no job measures, with what to give instead."""
    NOT_SERVED["segmentation"]().save_pretrained(tmp_path / "beit")
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "beit")
    for part in ("train", "test"):
        (tmp_path / "images" / part / "a").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / part / "a" / "0.png")
    with refused(InputError, "BeitForSemanticSegmentation cannot be evaluated", "without a validation or test part"):
        jobs.ptq(tmp_path / "beit", "w8a8", tmp_path / "out", data=str(tmp_path / "images"))
    shutil.rmtree(tmp_path / "images" / "test")
    jobs.ptq(tmp_path / "beit", "w8a8", tmp_path / "out", data=str(tmp_path / "images"))
    assert (tmp_path / "out" / "bittern.json").exists()


@pytest.fixture(scope="module", params=recipe_names())
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """A recipe, where the digits model was written packed by it, and what `quantize` returned."""
    out = tmp_path_factory.mktemp("job") / "out"
    with native.disabled():  # as in the tests that use it
        return request.param, out, jobs.quantize(DIGITS, request.param, out, data="digits", batch_size=BATCH)


Job = tuple[str, Path, dict[str, Any]]


def test_metrics(job: Job) -> None:
    """Accuracy, agreement and difference are those that numpy finds in the outputs of the float and the packed file."""
    _, out, result = job
    images, labels = digits("test")
    outputs = [run(bittern.load(folder), image_batches(images)) for folder in (DIGITS, out)]
    classes = [output.argmax(-1) for output in outputs]
    assert result["samples"] == len(labels) == 360
    for key, output, chosen in zip(("float", "packed"), outputs, classes, strict=True):
        among = (np.argsort(output)[:, -5:] == labels.numpy()[:, None]).any(1)
        assert result[key] == {
            "accuracy": pytest.approx(np.mean(chosen == labels.numpy())),
            "top5": pytest.approx(np.mean(among)),
            "agreement": pytest.approx(np.mean(chosen == classes[0])),
            "max_difference": np.abs(output - outputs[0]).max(),
        }
    assert result["max_error_simulated_packed"] == 0


def test_sizes(job: Job) -> None:
    """Bytes and bits are those of the file: all of it, and codes with scales over the weights they stand for."""
    _, out, result = job
    stored, floats = load_file(out / "model.safetensors"), load_file(DIGITS / "model.safetensors")
    packed = [name.removesuffix(".weight_codes") for name in stored if name.endswith(".weight_codes")]
    weights = sum(floats[f"{name}.weight"].numel() for name in packed)
    size = sum(t.nbytes for key, t in stored.items() if key.rpartition(".weight_")[0] in packed)
    assert result["bits"] == pytest.approx(8 * size / weights)
    assert result["file"] == (out / "model.safetensors").stat().st_size
    assert result["float32"] == sum(4 * t.numel() for t in floats.values())
    assert result["float_bytes"] == (DIGITS / "model.safetensors").stat().st_size


def test_modules(job: Job) -> None:
    """The counted modules are those with a format in the file, and the listed ones hold what is left."""
    name, out, result = job
    stored = load_file(out / "model.safetensors")
    assert result["recipe"] == name
    assert result["quantized"] == sum(key.endswith(".format_index") for key in stored)
    packed = {module for module, layer in bittern.load(out).named_modules() if hasattr(layer, "weight_codes")}
    with_parameters = {key.rpartition(".")[0] for key, _ in bittern.load(DIGITS).named_parameters()}
    kept = {module["name"] for module in result["kept_float"]}
    assert kept == with_parameters - packed
    assert len(packed) == sum(key.endswith(".weight_codes") for key in stored)


def test_by_hand(job: Job) -> None:
    """The packed file gives bit for bit what simulate, calibrate and pack give by hand."""
    name, out, _ = job
    images, _ = digits("train")
    drawn = np.random.default_rng(0).permutation(len(images))[:128]
    model = bittern.load(DIGITS)
    bittern.simulate(model, name)
    bittern.calibrate(model, image_batches(images[drawn]))
    test = image_batches(digits("test")[0])
    simulated = run(model, test)
    assert np.array_equal(run(bittern.pack(model), test), simulated)
    assert np.array_equal(run(bittern.load(out), test), simulated)
    loaded = hf.AutoModelForImageClassification.from_pretrained(out)
    assert np.array_equal(run(loaded, test), simulated)


def test_seed(tmp_path: Path) -> None:
    """The same seed writes the same bytes, however often, and another seed draws other samples for calibration."""
    files = []
    for i, seed in enumerate([1] * 8 + [2]):
        jobs.quantize(DIGITS, "w8a8", tmp_path / str(i), data="digits", samples=40, seed=seed)
        files.append(sha256((tmp_path / str(i) / "model.safetensors").read_bytes()).hexdigest())
    assert len(set(files[:8])) == 1
    assert files[8] != files[0]


# Texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with train.parquet and validation.parquet."""
    return str(write_tables(tmp_path_factory.mktemp("texts") / "data", text=TEXTS, label=LABELS))


def text_batches(folder: Path) -> list[dict[str, Tensor]]:
    """All texts in batches, by the tokenizer of a model folder."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    parts = [TEXTS[at : at + BATCH] for at in range(0, len(TEXTS), BATCH)]
    return [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in parts]


def test_text_classifier(tmp_path: Path, texts: str) -> None:
    """A text classifier with its tokenizer goes from folder and table to a packed folder that serves as it stands."""
    source, out = save_text_model(tmp_path / "bert"), tmp_path / "out"
    result = jobs.quantize(source, "w8a8", out, data=texts)
    outputs = [run(bittern.load(folder), text_batches(folder)) for folder in (source, out)]
    classes = [output.argmax(-1) for output in outputs]
    assert result["float"]["accuracy"] == pytest.approx(np.mean(classes[0] == LABELS))
    assert result["packed"] == {
        "accuracy": pytest.approx(np.mean(classes[1] == LABELS)),
        "agreement": pytest.approx(np.mean(classes[1] == classes[0])),
        "max_difference": np.abs(outputs[1] - outputs[0]).max(),
    }
    assert result["packed"]["agreement"] > 0.9
    assert result["max_error_simulated_packed"] == 0
    evaluated = jobs.evaluate(out, texts, against=source)
    assert {key: evaluated[key] for key in result["packed"]} == result["packed"]


def test_encoder(tmp_path: Path, texts: str) -> None:
    """An encoder without a head is measured by the rank correlation of its sentences' similarities."""
    source, out = save_text_model(tmp_path / "encoder", head=False), tmp_path / "out"
    result = jobs.quantize(source, "w8a8", out, data=texts)
    pairs = []
    for folder in (source, out):
        model, rows = bittern.load(folder), []
        for batch in text_batches(source):
            hidden, mask = run(model, [batch], "last_hidden_state"), batch["attention_mask"].numpy()
            rows += [states[seen == 1].mean(0) for states, seen in zip(hidden, mask, strict=True)]
        embeddings = np.stack(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
        pairs.append((embeddings @ embeddings.T)[np.triu_indices(len(TEXTS), 1)])
    assert result["packed"].keys() == {"similarity", "max_difference"}
    assert result["packed"]["similarity"] == pytest.approx(spearmanr(*pairs).statistic, abs=1e-4)
    assert result["packed"]["similarity"] > 0.98
    assert result["max_error_simulated_packed"] == 0
    assert jobs.evaluate(out, texts, against=source)["similarity"] == result["packed"]["similarity"]


def test_one_table(tmp_path: Path, texts: str) -> None:
    """A table that is all there is calibrates, and no accuracy is claimed; `evaluate` uses it whole."""
    source, table = save_text_model(tmp_path / "bert"), f"{texts}/train.parquet"
    result = jobs.quantize(source, "w8a8", tmp_path / "out", data=table)
    assert not result.keys() & {"float", "packed", "samples", "max_error_simulated_packed"}
    assert jobs.evaluate(tmp_path / "out", table)["samples"] == len(TEXTS)


@pytest.mark.kernels
def test_packed_as_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed model is measured with the kernels that serve its users, and the result names them."""
    measured: list[Tensor] = []

    def metrics(model: Any, data: Any, output: Tensor, reference: Any) -> dict[str, float]:
        measured.append(output)
        return {"mean": output.mean().item()}

    monkeypatch.setattr(jobs, "metrics", metrics)
    result = jobs.quantize(DIGITS, "w8a8", tmp_path / "out", data="digits", batch_size=BATCH)
    model, batches = bittern.load(tmp_path / "out"), image_batches(digits("test")[0])
    used = run(model, batches)
    assert np.array_equal(measured[-1].numpy(), used)
    assert result["packed"] == {"mean": measured[-1].mean().item()}
    assert result["kernels"] == (native.engine()[0] or "none")
    assert result["max_error_simulated_packed"] == 0
    with native.disabled():
        assert np.array_equal(run(model, batches), used) == (result["kernels"] == "none")


# A recipe that is no file, progress, and training


def test_recipe_object(tmp_path: Path) -> None:
    """A Recipe made in Python serves like one by name, and data is not needed where no scale is static."""
    rule = bittern.Rule(roles=("ffn",), weight=bittern.Format(kind="binary"))
    result = jobs.quantize(DIGITS, bittern.Recipe(name="made", rules=(rule,)), tmp_path / "out")
    assert (result["recipe"], result["quantized"]) == ("made", 8)
    assert 1 < result["bits"] < 1.1


def test_track(tmp_path: Path) -> None:
    """`track` is told of each long step, in order, and sees every batch."""
    seen: dict[str, int] = {}

    def track(items: Any, description: str) -> Any:
        for item in items:
            seen[description] = seen.get(description, 0) + 1
            yield item

    jobs.quantize(DIGITS, "w8a8", tmp_path / "out", data="digits", samples=64, batch_size=BATCH, track=track)
    steps = ("float", 12), ("calibrating", 2), ("simulated", 12), ("checking", 12)
    assert tuple(seen.items()) == steps


def test_no_split_to_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source with neither train nor test is refused by name."""
    monkeypatch.setattr("bittern.data.load.load_data", lambda *_, **__: None)
    with pytest.raises(bittern.InputError, match="odd has no train, validation or test split"):
        jobs.evaluate(DIGITS, "odd")


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the last step fails, what is on disk is as before."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    jobs.quantize(DIGITS, "ternary-2-2-8", tmp_path / "out")
    before = tree(tmp_path)
    monkeypatch.setattr(hf.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(bittern.InputError, match=r"out: No space left on device"):
        jobs.quantize(DIGITS, "ternary-2-2-8", tmp_path / "out", force=True)
    assert tree(tmp_path) == before


def test_source_inside_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model below the output, or the output itself, is not overwritten: forced or not, it is refused before work."""
    monkeypatch.setattr(jobs, "load", lambda *_: pytest.fail("the model was loaded first"))
    run = tmp_path / "run"
    for source in (run, run / "checkpoint-500"):
        shutil.copytree(DIGITS, source)
    for source in (run, run / "checkpoint-500"):
        with pytest.raises(bittern.InputError, match="which is read"):
            jobs.quantize(source, "ternary-2-2-8", run, force=True)
    with pytest.raises(bittern.InputError, match=r"config\.json, which no run of Bittern wrote"):
        jobs.quantize(DIGITS, "ternary-2-2-8", run, force=True)


# Two at once


@pytest.mark.parametrize(
    "job",
    [
        lambda out: jobs.quantize("m", "w8a8", out),
        lambda out: jobs.ptq("m", "w8a8", out, data="d"),
        lambda out: jobs.qat("m", "w8a8", out, data="d", distill=Distill(), training=Training()),
        lambda out: bittern.compress("m", out, data="d"),
        lambda out: analyze("m", "m", "d", out),
        lambda out: export("m", out),
        lambda out: export("m", out.with_suffix(".onnx")),
    ],
    ids=["quantize", "ptq", "qat", "compress", "analyze", "export", "export to a file"],
)
def test_two_at_once(tmp_path: Path, job: Callable[[Path], Any]) -> None:
    """Each job refuses an output that another one is writing at once, before it loads anything, and says who does."""
    with (
        reserved(tmp_path / "out"),
        reserved(tmp_path / "out.onnx"),
        refused(InputError, f"is being written by process {os.getpid()}"),
    ):
        Context().run(job, tmp_path / "out")
