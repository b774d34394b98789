"""Checkpoints through transformers' own saving and loading: the same outputs, or a refusal."""

import json
import random
import shutil
import string
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import bittern
from bittern import is_packed, is_simulated, load, pack, restore, save, simulate
from bittern.deploy import checkpoint
from bittern.deploy.checkpoint import config_digest, mark
from bittern.deploy.files import digest
from bittern.deploy.store import compare_outputs
from bittern.errors import BitternError, CheckpointError
from bittern.layers import QuantLayer, formats
from bittern.recipe import Format, Recipe, Rule
from families import SUPPORTED, TEXT, Batch, family, text
from helpers import outputs, quantized, refused, same

states = pytest.mark.parametrize("packed", [True, False], ids=["packed", "simulated"])
WEIGHTS = "model.safetensors"
W4 = Format(bits=4, granularity="row", range="static")
EVERYTHING = Recipe(name="everything", rules=(Rule(weight=Format(bits=8, granularity="row"), input=None),))


def marked(name: str, recipe: str | Recipe = "w8a8", packed: bool = True) -> tuple[hf.PreTrainedModel, Batch]:
    """A quantized model that `save_pretrained` knows as ours."""
    model, batch = quantized(name, recipe, packed)
    return model if packed else mark(model, "simulated"), batch


def reload(model: hf.PreTrainedModel, folder: Path) -> hf.PreTrainedModel:
    """The model that a folder holds, whose keys must fit without rest."""
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    compare_outputs(again, folder)
    return again


# There and back


STATES = {False: lambda model: mark(model, "simulated"), True: pack}


@pytest.mark.parametrize("recipe", ["w8a8", "ternary-2-2-8"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_save_and_load(name: str, recipe: str, tmp_path: Path) -> None:
    """Simulated or packed, what is saved and loaded gives what was simulated, bit for bit, in the same formats."""
    model, batch = quantized(name, recipe, packed=False)
    expected = outputs(model, batch)
    for packed, prepare in STATES.items():
        prepare(model).save_pretrained(tmp_path / str(packed))
        again = reload(model, tmp_path / str(packed))
        assert same(outputs(again, batch), expected)
        assert formats(again) == formats(model)
        assert (is_packed(again), again.config.quantization_config.recipe) == (packed, recipe)


SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
MASKED: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**TEXT)),
    "distilbert": lambda: hf.DistilBertForMaskedLM(hf.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4)),
    "electra": lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**TEXT, embedding_size=16)),
    "albert": lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**TEXT, embedding_size=16)),
    "modernbert": lambda: hf.ModernBertForMaskedLM(hf.ModernBertConfig(**TEXT, **SPECIAL, decoder_bias=True)),
    "nomic": lambda: hf.NomicBertModel(hf.NomicBertConfig(**TEXT)),  # transformers saves its Q, K and V as one
}


@states
@pytest.mark.parametrize("name", MASKED)
def test_tied_bias_and_fused_weights(name: str, packed: bool, tmp_path: Path) -> None:
    """A tied head keeps each entry of its bias, and weights that transformers renames, merges or splits in files come
    back as they were."""
    model, batch = family(lambda: (MASKED[name](), text()))()
    simulate(model, "w8a8", batch)
    bittern.calibrate(model, [batch])
    expected = outputs(model, batch)
    STATES[packed](model).save_pretrained(tmp_path / "once")
    again = reload(model, tmp_path / "once")
    assert same(outputs(again, batch), expected)
    again.tie_weights(recompute_mapping=False)
    save(again, tmp_path / "twice")
    assert same(outputs(load(tmp_path / "twice"), batch), expected)


@pytest.mark.parametrize("name", SUPPORTED)
def test_shards_and_saving_again(name: str, tmp_path: Path) -> None:
    """Sharded, with the names of the model or of the original, and saved again, a checkpoint stays the same."""
    model, batch = quantized(name, "w4a8", packed=False)
    expected = outputs(model, batch)
    for packed, prepare in STATES.items():
        shards, whole = (tmp_path / f"{kind} {packed}" for kind in ("shards", "whole"))
        prepare(model).save_pretrained(shards, max_shard_size="10KB", save_original_format=False)
        assert len(list(shards.glob("*.safetensors"))) > 1
        reload(model, shards).save_pretrained(whole)
        assert [f.name for f in whole.glob("*.safetensors")] == [WEIGHTS]
        again = load(whole)
        assert type(again) is type(model)
        assert same(outputs(again, batch), expected)


BASES = {"bert": hf.AutoModelForSequenceClassification, "vit": hf.AutoModelForImageClassification}


@states
@pytest.mark.parametrize("recipe", ["w8a8", EVERYTHING], ids=lambda r: getattr(r, "name", r))
@pytest.mark.parametrize("name", BASES)
def test_base_from_head(name: str, recipe: str | Recipe, packed: bool, tmp_path: Path) -> None:
    """The class without a head loads from a checkpoint with one, quantized head or not, with the same hidden states."""
    model, batch = marked(name, recipe, packed)
    model.save_pretrained(tmp_path)
    base, info = hf.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    expected = outputs(getattr(model, model.base_model_prefix), batch)["last_hidden_state"]
    assert torch.equal(outputs(base, batch)["last_hidden_state"], expected)
    assert all("pooler" in key for key in info["missing_keys"])  # ViT's classifier has none
    assert all("classifier" in key for key in info["unexpected_keys"])


@states
@pytest.mark.parametrize("name", BASES)
def test_head_from_base(name: str, packed: bool, tmp_path: Path) -> None:
    """A class with a head loads from a checkpoint without one: the hidden states are the same, the head is new."""
    head, batch = SUPPORTED[name]()
    base = getattr(head, head.base_model_prefix)
    simulate(base, "w8a8", batch)
    bittern.calibrate(base, [batch])
    save(pack(base) if packed else base, tmp_path)
    expected = outputs(base, batch)["last_hidden_state"]
    again, info = BASES[name].from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert torch.equal(outputs(getattr(again, head.base_model_prefix), batch)["last_hidden_state"], expected)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert outputs(again, batch)["logits"].shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "base", "head"),
    [("gpt2", hf.GPT2Model, hf.GPT2LMHeadModel), ("bart", hf.BartModel, hf.BartForConditionalGeneration)],
)
def test_tied_head_from_base(name: str, base: Any, head: Any, tmp_path: Path) -> None:
    """A head that is tied to an embedding of which the checkpoint holds the codes uses them."""
    model, batch = SUPPORTED[name]()
    model = base(model.config).eval()
    simulate(model, "w8a8", batch)
    bittern.calibrate(model, [batch])
    save(pack(model), tmp_path)
    again = head.from_pretrained(tmp_path)
    hidden = outputs(model, batch)["last_hidden_state"]
    expected = F.linear(hidden, model.get_input_embeddings().unpacked())
    assert torch.equal(outputs(again, batch)["logits"], expected)


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "clip"])
def test_bfloat16(name: str, tmp_path: Path) -> None:
    """Loaded as bfloat16, codes stay bytes and scales float32; saved and loaded again, the type is the checkpoint's."""
    model, batch = marked(name)
    model.save_pretrained(tmp_path / "float32")
    model = type(model).from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for key, tensor in model.state_dict().items():
        last = key.rpartition(".")[-1]
        kinds = {"weight_codes": torch.uint8} | dict.fromkeys(("weight_scale", "scale", "offset"), torch.float32)
        assert tensor.dtype == kinds.get(last, torch.bfloat16)
    model.save_pretrained(tmp_path / "bfloat16")
    again = reload(model, tmp_path / "bfloat16")
    assert again.dtype == torch.bfloat16
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    assert same(outputs(again, batch), outputs(model, batch))
    assert load(tmp_path / "bfloat16").dtype == torch.float32


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_tied_scales_apart(name: str, tmp_path: Path) -> None:
    """A checkpoint keeps two sets of codes for one weight where its layers have different scales; the other layers that
    are tied to it have those of the first."""
    static = Format(bits=4, granularity="row", range="static")
    model, batch = quantized(name, Recipe(name="apart", rules=(Rule(weight=static),)), packed=False)
    model.lm_head.weight_quantizer.scale *= 1.5
    expected = outputs(model, batch)
    pack(model).save_pretrained(tmp_path)
    assert same(outputs(reload(model, tmp_path), batch), expected)


def test_restored_model_saves_as_float(tmp_path: Path) -> None:
    """A model that was saved while it was simulated and then restored is a float model again when it is saved."""
    model, batch = SUPPORTED["bert"]()
    expected = outputs(model, batch)
    simulate(model, "ternary-2-2-8", batch)
    save(model, tmp_path / "simulated")
    restore(model)
    save(model, tmp_path / "float")
    assert "quantization_config" not in read_config(tmp_path / "float")
    again = load(tmp_path / "float")
    assert not is_simulated(again)
    assert same(outputs(again, batch), expected)


def test_keys_not_saved(tmp_path: Path) -> None:
    """Keys that a class of model does not save are no part of the checksum."""
    model, batch = marked("bert")
    model._keys_to_ignore_on_save = {"classifier.bias"}
    nn.init.zeros_(model.classifier.bias)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.bias"}
    nn.init.zeros_(again.classifier.bias)
    assert same(outputs(again, batch), outputs(model, batch))


# What the files hold


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Bytes of a safetensors file before its tensors, and its header."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return 8 + size, json.loads(data[8 : 8 + size])


@states
def test_config(packed: bool, tmp_path: Path) -> None:
    """config.json names method, format version, state and recipe, and lists each combination of formats once."""
    model, _ = marked("bert", "ternary-2-2-8", packed)
    model.save_pretrained(tmp_path)
    config = read_config(tmp_path)["quantization_config"]
    assert config.pop("bittern_version")
    activation, ternary = {"clip": 2.5}, {"kind": "ternary", "bits": 2, "clip": 2.5}
    formats = config.pop("formats")
    expected = [
        {"weight": ternary | {"granularity": "row"}},
        {"weight": ternary, "input": activation},
        dict.fromkeys(("query", "key", "value", "map"), activation),
    ]
    assert len(formats) == len(expected)
    assert {Rule(**f) for f in formats} == {Rule(**f) for f in expected}
    state = "packed" if packed else "simulated"
    assert config == {"quant_method": "bittern", "format_version": 1, "state": state, "recipe": "ternary-2-2-8"}


WIDE = hf.BertConfig(
    hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, vocab_size=500, num_labels=3
)
WEIGHT_FORMATS = {
    "w8": (Format(bits=8, granularity="row"), lambda r, c: r * c + 4 * r),
    "w4": (Format(bits=4, granularity="row"), lambda r, c: r * c // 2 + 4 * r),
    "w4-groups": (Format(bits=4, granularity="group", group_size=32), lambda r, c: r * c // 2 + 4 * r * c // 32),
    "w3-asymmetric": (Format(bits=3, scheme="asymmetric"), lambda r, c: r * c * 3 // 8 + 8),
    "ternary": (Format(kind="ternary"), lambda r, c: r * c // 4 + 4),
    "base3": (Format(kind="ternary", storage="base3"), lambda r, c: r * -(-c // 5) + 4),
    "binary": (Format(kind="binary"), lambda r, c: r * c // 8 + 4),
}


@pytest.mark.parametrize("kind", WEIGHT_FORMATS)
def test_file_size(kind: str, tmp_path: Path) -> None:
    """A packed file is its header, the codes and scales that arithmetic says, and the float rest."""
    fmt, size = WEIGHT_FORMATS[kind]
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(WIDE).eval()
    model.save_pretrained(tmp_path / "float")
    shapes = {n: p.shape for n, p in model.named_parameters()}
    simulate(model, Recipe(name=kind, rules=(Rule(weight=fmt),)))
    layers = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, QuantLayer)]
    pack(model).save_pretrained(tmp_path / "packed")
    quantized_bytes = sum(size(*shapes[name]) for name in layers)
    rest = sum(4 * prod(shape) for name, shape in shapes.items() if name not in layers)
    extra = 4 * 2 * len(layers)  # a placeholder and a format_index each
    file = tmp_path / "packed" / WEIGHTS
    before, header = read_header(file)
    listed = sum(end - start for start, end in (t["data_offsets"] for k, t in header.items() if k != "__metadata__"))
    assert file.stat().st_size - before == listed == quantized_bytes + rest + extra
    share = sum(prod(shapes[name]) for name in layers) / sum(map(prod, shapes.values()))
    bits = 8 * quantized_bytes / sum(prod(shapes[name]) for name in layers)
    allowed = share * bits / 32 + (1 - share) + 0.02  # of the float file, with 2 % for headers, indices, placeholders
    assert file.stat().st_size < allowed * (tmp_path / "float" / WEIGHTS).stat().st_size
    if fmt.kind == "ternary":
        assert allowed < 0.1


# Another process

LOADING = """
import sys, torch
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

def load(task, folder):
    try:
        model = task.from_pretrained(folder)
    except Exception:
        return "refused"
    expected = torch.load(f"{folder}/expected.pt")
    with torch.no_grad():
        return "equal" if torch.equal(model(**expected["batch"]).logits, expected["logits"]) else "different"

folders = dict(zip((AutoModelForSequenceClassification, AutoModelForImageClassification), sys.argv[1:]))
print("bittern" in sys.modules, *(load(*pair) for pair in folders.items()))
import bittern
from bittern import native
with native.disabled():
    print(*(load(*pair) for pair in folders.items()))
"""


@pytest.mark.own_rounding
def test_fresh_process(tmp_path: Path) -> None:
    """In a new process a packed checkpoint fails to load, and after nothing more than `import bittern` it loads."""
    folders = []
    for name in ("bert", "vit"):
        model, batch = marked(name)
        folders.append(tmp_path / name)
        model.save_pretrained(folders[-1])
        torch.save({"batch": batch, "logits": outputs(model, batch)["logits"]}, folders[-1] / "expected.pt")
    command = [sys.executable, "-c", LOADING, *map(str, folders)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
    assert done.stdout.splitlines() == ["False refused refused", "equal equal"]


# Refusals

CONFIG = hf.BertConfig(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    vocab_size=16,
    max_position_embeddings=8,
    num_labels=3,
)
TINY_BATCH = {"input_ids": torch.arange(8).view(2, 4)}


@pytest.fixture(scope="module", params=["packed", "simulated"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint."""
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(CONFIG).eval()
    folder = tmp_path_factory.mktemp("original")
    model.save_pretrained(folder / "float")
    simulate(model, "w8a8", TINY_BATCH)
    bittern.calibrate(model, [TINY_BATCH])
    save(pack(model) if request.param == "packed" else model, folder / "quantized")
    return folder / "quantized"


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def both(folder: Path) -> Iterator[Callable[[], Any]]:
    """The two ways to load: ours, and that of transformers."""
    yield lambda: load(folder)
    yield lambda: hf.AutoModelForSequenceClassification.from_pretrained(folder)


def rewrite(folder: Path, checks: dict[str, Any] | None = None, **config: Any) -> None:
    """Change what the metadata or the quantization_config of a checkpoint says."""
    with safe_open(folder / WEIGHTS, "pt") as handle:
        metadata = handle.metadata()
    metadata["bittern"] = json.dumps(json.loads(metadata["bittern"]) | (checks or {}))
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata)
    changed = read_config(folder)
    changed["quantization_config"] |= config
    (folder / "config.json").write_text(json.dumps(changed))


def forge(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> None:
    """Change tensors (None removes) and quantization_config of a checkpoint, with checksums that fit."""
    state = load_file(folder / WEIGHTS) | (tensors or {})
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    rewrite(folder, **config)
    digests = [digest(sorted(state.items()))]
    checks = {"format_version": 1, "tensors": digests, "config": config_digest(read_config(folder))}
    save_file(state, folder / WEIGHTS, {"format": "pt", "bittern": json.dumps(checks)})


def test_unchanged_forgery_loads(folder: Path) -> None:
    """The tests' own way to write checksums is that of the library, so that what they change is what is refused."""
    expected = outputs(load(folder), TINY_BATCH)
    forge(folder)
    assert same(outputs(load(folder), TINY_BATCH), expected)


def test_newer_version(folder: Path) -> None:
    """A checkpoint of a newer format version is refused with the command that upgrades."""
    rewrite(folder, {"format_version": 2}, format_version=2, bittern_version="9.8.7")
    for way in both(folder):
        with refused(CheckpointError, "format version 2", "reads up to 1", "pip install -U bittern"):
            way()


@pytest.mark.parametrize("version", [0, -1, "1", 1.5, None, True, [1]], ids=repr)
def test_version_that_is_none(folder: Path, version: Any) -> None:
    """A format version that is no positive integer is refused."""
    rewrite(folder, {"format_version": version}, format_version=version)
    for way in both(folder):
        with refused(CheckpointError, f"format_version {version!r}", "damaged or foreign"):
            way()


@pytest.mark.parametrize("checks", ["", "[]", "1", "{}", '{"format_version": 1}', "[" * 100_000], ids=lambda c: c[:20])
def test_damaged_checksums(folder: Path, checks: str) -> None:
    """Checksums that cannot be read are refused."""
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "pt", "bittern": checks})
    for way in both(folder):
        with refused(CheckpointError, WEIGHTS, "damaged"):
            way()


def test_weights_of_a_float_model(folder: Path, original: Path) -> None:
    """Our config.json beside weights that are not ours is refused."""
    shutil.copy(original.parent / "float" / WEIGHTS, folder)
    for way in both(folder):
        with refused(CheckpointError, "not written by Bittern"):
            way()


def test_config_of_a_float_model(folder: Path, original: Path) -> None:
    """Our weights beside a config.json that is not ours are refused."""
    shutil.copy(original.parent / "float" / "config.json", folder)
    with refused(CheckpointError, "config.json was changed"):
        load(folder)


def test_another_class(folder: Path) -> None:
    """A class of model that has none of the checkpoint's modules is refused."""
    with refused(CheckpointError, "no quantized module of ViTModel", "another model"):
        hf.ViTModel.from_pretrained(folder)


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.001, 0.01, 0.3, 0.6, 0.9, 0.9999])
def test_truncated(folder: Path, share: float) -> None:
    """A file that ends too early is refused, wherever it ends."""
    file = folder / WEIGHTS
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    for way in both(folder):
        with refused(CheckpointError, WEIGHTS, "truncated or damaged"):
            way()


def test_missing_shard(original: Path, tmp_path: Path) -> None:
    """A checkpoint that lacks any of its shards is refused."""
    load(original).save_pretrained(tmp_path / "shards", max_shard_size="1KB")
    shards = sorted(f.name for f in (tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        folder = Path(shutil.copytree(tmp_path / "shards", tmp_path / shard))
        (folder / shard).unlink()
        for way in both(folder):
            with refused(CheckpointError, shard, "is missing"):
                way()


def test_shards_of_two_models(original: Path, tmp_path: Path) -> None:
    """A shard of another checkpoint is refused."""
    for name, factor in (("a", 1.0), ("b", 2.0)):
        model = load(original)
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(factor)
        model.save_pretrained(tmp_path / name, max_shard_size="1KB")
    for shard in (tmp_path / "b").glob("*.safetensors"):
        folder = Path(shutil.copytree(tmp_path / "a", tmp_path / shard.name))
        shutil.copy(shard, folder)
        for way in both(folder):
            with refused(CheckpointError, "do not match their checksum"):
                way()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 4),
        ("num_hidden_layers", 2),
        ("hidden_act", "relu"),
        ("layer_norm_eps", 1e-3),
        ("architectures", ["BertModel"]),
        ("dtype", "bfloat16"),
        ("id2label", {"0": "a", "1": "b", "2": "c"}),
        ("transformers_version", "5.0.0"),
        ("more", 1),
    ],
)
def test_config_changed(folder: Path, key: str, value: Any) -> None:
    """A config.json that was changed is refused."""
    (folder / "config.json").write_text(json.dumps(read_config(folder) | {key: value}))
    for way in both(folder):
        with refused(CheckpointError, "config.json was changed", "restore it"):
            way()


def test_tensors_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to load computes the checksum of the tensors once, also where only transformers is called."""
    seen: list[str] = []

    def count(tensors: Any) -> str:
        return digest((seen.append(name) or name, tensor) for name, tensor in tensors)

    monkeypatch.setattr(checkpoint, "digest", count)
    for way in both(folder):
        seen.clear()
        way()
        assert sorted(seen) == sorted(load_file(folder / WEIGHTS))


def test_config_reformatted(folder: Path) -> None:
    """Spaces and the order of keys in config.json do not matter."""
    expected = outputs(load(folder), TINY_BATCH)
    (folder / "config.json").write_text(json.dumps(dict(reversed(read_config(folder).items()))))
    assert all(same(outputs(way(), TINY_BATCH), expected) for way in both(folder))


@pytest.mark.parametrize("value", ["w8a8", ["bittern"], None, 1, {}], ids=repr)
def test_quantization_config_of_another_type(folder: Path, value: Any) -> None:
    """A quantization_config that is none is refused."""
    (folder / "config.json").write_text(json.dumps(read_config(folder) | {"quantization_config": value}))
    with refused(CheckpointError, "config.json was changed"):
        load(folder)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"state": "half"}, "state 'half'"),
        ({"more": 1, "and": 2}, "unknown entries ['and', 'more']"),
        ({"formats": []}, "outside the table of 0 formats"),
        ({"formats": [{"weight": {"bits": 13}}]}, "bits must be 1 to 12"),
        ({"formats": [{"wieght": {}}]}, "damaged or foreign"),
        ({"formats": ["w8a8"]}, "damaged or foreign"),
    ],
    ids=str,
)
def test_impossible_quantization_config(folder: Path, config: dict[str, Any], part: str) -> None:
    """A quantization_config that says what cannot be is refused, though its checksum fits."""
    forge(folder, **config)
    for way in both(folder):
        with refused(CheckpointError, part):
            way()


@pytest.mark.parametrize("original", ["packed"], indirect=True)
@pytest.mark.parametrize(
    ("name", "tensor", "part"),
    [
        ("bert.embeddings.word_embeddings.format_index", torch.tensor([-1]), "format_index -1 is outside the table"),
        ("bert.embeddings.word_embeddings.format_index", torch.tensor([99]), "format_index 99 is outside the table"),
        ("bert.embeddings.word_embeddings.weight_codes", None, "holds no codes for it"),
        ("bert.embeddings.word_embeddings.weight_codes", torch.zeros(16, 9, dtype=torch.uint8), "16 × 8 weights"),
        ("bert.embeddings.word_embeddings.weight_scale", None, "16 × 8 weights"),
        ("bert.pooler.dense.input_quantizer.scale", torch.tensor(-1.0), "a scale must be finite and positive"),
        ("bert.pooler.dense.input_quantizer.scale", torch.tensor(torch.nan), "a scale must be finite and positive"),
    ],
)
def test_impossible_tensors(folder: Path, name: str, tensor: Any, part: str) -> None:
    """Tensors that cannot be are refused, though their checksum fits."""
    assert name in load_file(folder / WEIGHTS)
    forge(folder, {name: tensor})
    for way in both(folder):
        with pytest.raises(BitternError, match=part):
            way()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"text"', "\x00", "[" * 100_000, b"\xff\xfe"], ids=lambda t: t[:9]
)
def test_unreadable_config(folder: Path, text: str | bytes) -> None:
    """A config.json that is no JSON object is refused."""
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused(CheckpointError, "config.json"):
        load(folder)


# Random damage


def damage(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed at random: flipped, inserted, deleted, zeroed, doubled, cut off, or a letter or digit exchanged."""
    at, length = rng.randrange(len(data)), rng.randint(1, 24)
    head, part, tail = data[:at], data[at : at + length], data[at + length :]
    kind = rng.choice(["flip", "insert", "delete", "zero", "double", "truncate", "exchange", "exchange", "exchange"])
    if kind == "exchange":  # which leaves JSON valid
        at = rng.choice([i for i, byte in enumerate(data) if chr(byte) in string.ascii_letters + string.digits])
        alike = string.digits if chr(data[at]).isdigit() else string.ascii_letters
        return data[:at] + rng.choice(alike).encode() + data[at + 1 :]
    return {
        "flip": head + bytes([part[0] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
        "insert": head + rng.randbytes(length) + data[at:],
        "delete": head + tail,
        "zero": head + bytes(len(part)) + tail,
        "double": head + part + data[at:],
        "truncate": head,
    }[kind]


def damages(folder: Path, count: int) -> Iterator[str]:
    """Damage the header, the tensors or the config of a checkpoint, give the control back, and repair it again."""
    rng = random.Random(0)
    weights, config = (folder / WEIGHTS).read_bytes(), (folder / "config.json").read_bytes()
    start = read_header(folder / WEIGHTS)[0]
    done = 0
    while done < count:
        part = rng.choice(["header", "tensors", "config"])
        if part == "config":
            old, new = config, damage(config, rng)
        else:
            head, rest = weights[:start], weights[start:]
            old, new = weights, damage(head, rng) + rest if part == "header" else head + damage(rest, rng)
        if new == old:
            continue
        done += 1
        file = folder / ("config.json" if part == "config" else WEIGHTS)
        file.write_bytes(new)
        yield part
        file.write_bytes(old)


@pytest.mark.parametrize(
    ("original", "direct", "count"),
    [("packed", False, 1000), ("simulated", False, 250), ("packed", True, 200)],
    indirect=["original"],
    ids=["packed", "simulated", "packed-transformers"],
)
def test_random_damage(folder: Path, direct: bool, count: int) -> None:
    """A damaged checkpoint is refused or harmless: never another output, and `load` never raises another error."""
    intact = load(folder)
    expected, given = outputs(intact, TINY_BATCH), formats(intact)
    refusals: dict[str, list[str]] = {"header": [], "tensors": [], "config": []}
    harmless: Counter[str] = Counter()
    allowed = Exception if direct else BitternError
    for part in damages(folder, count):
        try:
            model = hf.AutoModelForSequenceClassification.from_pretrained(folder) if direct else load(folder)
        except allowed as error:
            refusals[part].append(str(error))
        else:
            harmless[part] += 1
            assert type(model) is type(intact)
            assert formats(model) == given
            assert same(outputs(model, TINY_BATCH), expected)
    assert direct or not any("\n" in message for messages in refusals.values() for message in messages)
    for part, messages in refusals.items():
        assert len(messages) >= 0.9 * (len(messages) + harmless[part]) > 50
    assert sum(map(len, refusals.values())) + harmless.total() == count
