"""Folders that hold models: all of a save or nothing, sizes, and what is refused."""

import errno
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bittern import inspect, is_packed, is_simulated, load, pack, save, simulate
from bittern.deploy.files import atomic_folder, check_output
from bittern.deploy.store import compare_outputs, measure
from bittern.errors import BitternError, CheckpointError, InputError, ModelError
from bittern.layers import formats
from bittern.recipe import Format, Recipe, Rule
from families import SUPPORTED
from helpers import outputs, quantized, refused, same
from material import save_text_model, tree

WEIGHTS = "model.safetensors"


def small(packed: bool) -> hf.PreTrainedModel:
    """A model of one layer; packed and float ones differ."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = hf.BertModel(hf.BertConfig(**sizes, vocab_size=16, max_position_embeddings=16)).eval()
    if packed:
        simulate(model, "ternary-2-2-8")
        pack(model)
    return model


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder that holds a packed model, alone in its parent."""
    save(small(packed=True), tmp_path / "parent" / "out")
    return tmp_path / "parent" / "out"


@contextmanager
def kept(out: Path) -> Iterator[None]:
    """After the block everything around the folder is as it was: the same files, and no temporary ones."""
    before = tree(out.parent)
    yield
    assert tree(out.parent) == before


# Saving


@pytest.mark.parametrize("state", ["float", "simulated", "packed"])
def test_save_and_load(state: str, tmp_path: Path) -> None:
    """A saved model loads as it was, in eval mode and float32, from a folder whose parents were made."""
    model, batch = SUPPORTED["bert"]() if state == "float" else quantized("bert", packed=state == "packed")
    out = tmp_path / "a" / "b" / "out"
    save(model.train(), out)
    again = load(str(out))
    if state != "float":
        compare_outputs(again, out)
    assert type(again) is type(model)
    assert not again.training
    assert again.dtype == torch.float32
    assert (is_packed(again), is_simulated(again)) == (state == "packed", state != "float")
    assert formats(again) == formats(model)
    assert same(outputs(again, batch), outputs(model.eval(), batch))
    assert sorted(f.name for f in out.parent.iterdir()) == ["out"]


def test_float16_loads_as_float32(tmp_path: Path) -> None:
    """A model in half precision loads in float32, with the same values."""
    model = small(packed=False).half()
    save(model, tmp_path)
    again = load(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert all(torch.equal(a, b.float()) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_shards_and_report(tmp_path: Path) -> None:
    """Shards have the size asked for, and a report is bittern.json."""
    save(small(packed=False), tmp_path / "out", max_shard_size="2KB", report={"recipe": "none", "accuracy": 0.5})
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "out" / "bittern.json").read_text()) == {"recipe": "none", "accuracy": 0.5}
    load(tmp_path / "out")


@pytest.mark.parametrize("shard", ["50GB", "2KB"])
def test_same_bytes(shard: str, tmp_path: Path) -> None:
    """The same model gives the same bytes each time, in files that all may read."""
    for name in ("a", "b"):
        save(small(packed=True), tmp_path / name, max_shard_size=shard)
    files = {name: {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("a", "b")}
    assert files["a"] == files["b"]
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "a").iterdir()} == {0o644}
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o755


def test_processors_are_kept(tmp_path: Path) -> None:
    """The tokenizer or image processor of the source travels with the model, and none is made up, which is said."""
    text = save_text_model(tmp_path / "text")
    images = tmp_path / "images"
    hf.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(images)
    bare = tmp_path / "bare"
    save(small(packed=False), bare)
    names = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
    found = {}
    for source in (text, images, bare, tmp_path / "nowhere"):
        out = tmp_path / f"from_{source.name}"
        with nullcontext() if source == text else pytest.warns(UserWarning, match=f"{out} has no tokenizer: {source}"):
            save(small(packed=True), out, processors_from=source)
        found[source.name] = [(tmp_path / f"from_{source.name}" / name).exists() for name in names]
    assert found == {
        "text": [True, True, False],
        "images": [False, False, True],
        "bare": [False, False, False],
        "nowhere": [False, False, False],
    }
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "from_text").tokenize("a bittern") == ["a", "bittern"]


def test_output_that_exists(out: Path) -> None:
    """An output that exists is refused, and replaced if forced, with no file of the old one left."""
    save(small(packed=True), out, max_shard_size="2KB", force=True)
    with kept(out), refused(InputError, str(out), "exists", "--force"):
        save(small(packed=False), out)
    save(small(packed=False), out, force=True)
    assert not is_packed(load(out))
    assert [f.name for f in out.glob("*.safetensors")] == [WEIGHTS]
    assert [f.name for f in out.parent.iterdir()] == ["out"]


def test_empty_output(tmp_path: Path) -> None:
    """An empty folder is no obstacle."""
    (tmp_path / "out").mkdir()
    save(small(packed=True), tmp_path / "out")
    assert is_packed(load(tmp_path / "out"))


def test_output_that_is_no_model(out: Path) -> None:
    """A folder that holds what no run wrote is not replaced, forced or not."""
    (out / "notes.txt").touch()
    for force in (False, True):
        with kept(out), pytest.raises(InputError, match="exists" if not force else "notes.txt, which no run"):
            save(small(packed=False), out, force=force)


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("out/config.json", "config.json is a file; give a folder"),
        ("out/config.json/below", "cannot write to"),
        ("x" * 300, "File name too long"),
    ],
    ids=["file", "below a file", "long name"],
)
def test_output_that_cannot_be(out: Path, place: str, part: str, force: bool) -> None:
    """A path at or below a file, or with too long a name, is refused."""
    with kept(out), refused(InputError, str(out.parent), part):
        save(small(packed=False), out.parent / place, force=force)


def test_check_output(out: Path) -> None:
    """What would be refused is refused beforehand, and the check itself makes nothing."""
    with kept(out):
        check_output(out, force=True)
        check_output(out.parent / "new" / "below", force=False)
        for place, force in ((out, False), (out / WEIGHTS, True), (out / WEIGHTS / "below", True)):
            with pytest.raises(InputError):
                check_output(place, force)


class AnyError(Exception):
    """Nothing that the library knows."""


@pytest.mark.parametrize("error", [AnyError("no"), ValueError("no"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("exists", [True, False], ids=["replacing", "new"])
def test_interrupted(out: Path, exists: bool, error: BaseException) -> None:
    """Whatever ends the block early goes through, leaves no temporary file and keeps the old output."""
    place = out if exists else out.parent / "new"

    def save_half() -> None:
        with atomic_folder(place, force=True) as folder:
            small(packed=False).save_pretrained(folder)
            raise error

    with kept(out), pytest.raises(type(error)):
        save_half()
    assert place.exists() == exists


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("no space")], ids=repr
)
def test_full_disk(out: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up while a model is written is told in one line, and the old output stays."""
    model = small(packed=False)

    def fail(folder: Path, **_: Any) -> None:
        (folder / WEIGHTS).write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(model, "save_pretrained", fail)
    with kept(out), refused(InputError, f"cannot write {out}", "o space"):
        save(model, out, force=True)


def test_file_that_grows_too_large(out: Path) -> None:
    """A file that the system refuses to let grow is told in one line, and the old output stays."""
    model = small(packed=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with kept(out), refused(InputError, f"cannot write {out}"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            save(model, out, force=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that has no room for even a folder is told in one line."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.mkdtemp", fail)
    with refused(InputError, f"cannot write to {tmp_path}", "No space left on device"):
        save(small(packed=False), tmp_path / "out")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at", [1, 2])
def test_renaming_fails(out: Path, at: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the new folder cannot take the old one's place, the old one is there again."""
    rename, calls = Path.rename, []

    def fail(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == at:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with kept(out), pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt):
        save(small(packed=False), out, force=True)


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from bittern.deploy.store import save
from test_store import small

old, new, out = (Path(name) for name in sys.argv[1:])
parent = out.parent
model = small(packed=False)
save(model, new)


def content(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()} if folder.exists() else None


def killed_at(last):
    seen = 0

    def hook(event, given):
        nonlocal seen
        if event.startswith(("open", "os.", "shutil.")) and any(str(parent) in str(x) for x in given):
            seen += 1
            if seen > last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(model, out, force=True)


names = {str(content(old)): "old", str(content(new)): "new", str(None): "none"}
for last in range(1000):
    shutil.rmtree(parent, ignore_errors=True)
    shutil.copytree(old, out)
    child = os.fork()
    if child == 0:
        try:
            killed_at(last)
            os._exit(0)
        finally:
            os._exit(1)
    ended = os.waitpid(child, 0)[1]
    print(names.get(str(content(out)), "mixed"))
    if ended == 0:
        break
    assert os.WTERMSIG(ended) == signal.SIGKILL
"""


def test_killed(out: Path, tmp_path: Path) -> None:
    """A process that is killed before any of the file operations of a save leaves the old output or the new one."""
    folders = [out, tmp_path / "new", tmp_path / "elsewhere" / "out"]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", KILLED, *map(str, folders)]
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300, env=environment)
    states = done.stdout.split()
    assert len(states) > 10
    assert states.count("none") <= 1  # between two renames there is none for a moment
    assert states == sorted(states, key=["old", "none", "new"].index)
    assert [is_packed(load(folder)) for folder in folders] == [True, False, False]


# Loading


def write_config(folder: Path, **config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def change_config(folder: Path, **config: Any) -> None:
    write_config(folder, **json.loads((folder / "config.json").read_text()) | config)


def spoil_weights(folder: Path, value: float) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["encoder.layer.0.output.dense.weight"][2, 3] = value
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


SPOILED: dict[str, tuple[Callable[[Path], Any], type[BitternError], str]] = {
    "missing": (shutil.rmtree, InputError, "no such folder"),
    "file": (lambda f: (shutil.rmtree(f), f.touch()), InputError, "is a file; expected the folder"),
    "empty": (lambda f: (shutil.rmtree(f), f.mkdir()), InputError, "is empty; expected a folder with config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointError, "has no config.json"),
    "config is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        CheckpointError,
        "config.json cannot be read",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), CheckpointError, "cannot be read as JSON"),
    "no model_type": (lambda f: write_config(f, hidden_size=8), ModelError, "names no model_type"),
    "unknown model_type": (lambda f: change_config(f, model_type="bitternet"), CheckpointError, "bitternet"),
    "strange model_type": (lambda f: change_config(f, model_type=["bert"]), CheckpointError, "cannot load"),
    "strange value": (lambda f: change_config(f, hidden_size="eight"), CheckpointError, "cannot load"),
    "strange class": (lambda f: change_config(f, architectures=["pipeline"]), CheckpointError, "cannot load"),
    "no model": (lambda f: change_config(f, architectures=["BertConfig"]), ModelError, "expected a Hugging Face"),
    "foreign quantization": (
        lambda f: change_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        CheckpointError,
        "cannot load",
    ),
    "other sizes": (lambda f: change_config(f, intermediate_size=9), CheckpointError, "cannot load"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), CheckpointError, "holds no .safetensors file"),
    "pickled weights": (pickle_weights, CheckpointError, "holds no .safetensors file; Bittern loads nothing else"),
    "no safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"weights"), CheckpointError, "truncated or damaged"),
    "weights are a folder": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
        CheckpointError,
        "truncated or damaged",
    ),
    "truncated": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
        CheckpointError,
        "truncated or damaged",
    ),
    "NaN": (lambda f: spoil_weights(f, torch.nan), ModelError, "encoder.layer.0.output.dense.weight holds NaN"),
    "infinite": (lambda f: spoil_weights(f, torch.inf), ModelError, "encoder.layer.0.output.dense.weight holds NaN"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_folder_that_does_not_load(case: str, tmp_path: Path) -> None:
    """A folder that holds no sound model is refused in one line, as what it is."""
    spoil, kind, part = SPOILED[case]
    save(small(packed=False), tmp_path / "model")
    spoil(tmp_path / "model")
    for action in (load, inspect):
        with refused(kind, str(tmp_path / "model") if "truncated" not in part and kind is not ModelError else "", part):
            action(tmp_path / "model")


@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2", "t5"])
def test_config_of_a_giant(kind: str, tmp_path: Path) -> None:
    """Whatever size a config.json asks for, it gets no memory and no time that its files do not explain."""
    SUPPORTED[kind]()[0].save_pretrained(tmp_path)
    load(tmp_path)
    config, before = (
        json.loads((tmp_path / "config.json").read_text()),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )
    numbers = [name for name, value in config.items() if isinstance(value, int) and not isinstance(value, bool)]
    refusals = []
    for name, value in itertools.product([*numbers, "num_labels"], (10**5, 10**9)):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: config.get(name, 1) * value}))
        try:
            load(tmp_path)
        except CheckpointError as error:
            refusals.append(str(error))
    assert all(text.startswith((f"cannot load {tmp_path}: ", f"{tmp_path}/config.json asks for ")) for text in refusals)
    assert len([text for text in refusals if "larger model than the files beside it hold" in text]) >= 6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # kilobytes


@pytest.mark.parametrize(
    "path", ["", ".", "nowhere", "./no/where", "~/nowhere", "no/where/at/all", "x" * 300, "a\x00b", "nobody/nothing"]
)
def test_path_that_is_none(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is neither a folder nor a model of the hub is refused."""
    monkeypatch.chdir(tmp_path)
    with refused(InputError, path):
        load(path)


def test_one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is asked once for a name that is no folder, and its answer is one line."""
    asked: list[str] = []

    def fail(_: Any, name: str, **__: Any) -> None:
        asked.append(name)
        raise ConnectionError("no route to host")

    monkeypatch.setattr("bittern.deploy.store.HfApi.model_info", fail)
    with refused(InputError, "no such folder: bert-base-uncasde; nor can the hub give it: no route to host"):
        load("bert-base-uncasde")
    assert asked == ["bert-base-uncasde"]


def test_hub_name_that_is_cached(tmp_path: Path) -> None:
    """A name of the hub, of one word too, loads from the cache where the hub cannot be reached."""
    repo, revision = tmp_path / "hub" / "models--bert-base-uncased", "a" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    SUPPORTED["bert"]()[0].save_pretrained(repo / "snapshots" / revision)
    code = "import bittern; print(type(bittern.load('bert-base-uncased')).__name__)"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://localhost:9", "HF_HUB_OFFLINE": "0"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout == "BertForSequenceClassification\n", ran.stderr
    assert "Retry" not in ran.stderr


def test_not_a_transformer(tmp_path: Path) -> None:
    """A model of transformers without attention loads, since it may be float; it is quantizing that refuses it."""
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_channels=3)
    hf.ResNetModel(config).save_pretrained(tmp_path)
    model = load(tmp_path)
    with pytest.raises(ModelError):
        simulate(model, "w8a8")


# Sizes


def header(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each tensor in a folder, by the headers of its files."""
    found: dict[str, tuple[str, list[int]]] = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        entries = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        found |= {k: (v["dtype"], v["shape"]) for k, v in entries.items() if k != "__metadata__"}
    return found


W3 = Recipe(name="w3", rules=(Rule(roles=("embedding", "qkv", "ffn"), weight=Format(bits=3, scheme="asymmetric")),))
RECIPES = [
    "w8a8",
    "w4a8",
    "ternary-2-2-8",
    W3,
]


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: getattr(r, "name", r))
@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "bart"])
def test_measure(name: str, recipe: str | Recipe, shard: str, tmp_path: Path) -> None:
    """Sizes of a packed model are the sums over its files' tensors and over those of the float model."""
    float_model, _ = SUPPORTED[name]()
    model, _ = quantized(name, recipe)
    save(model, tmp_path, max_shard_size=shard)
    size = measure(load(tmp_path), tmp_path)
    assert size == measure(model, tmp_path)
    assert size.file == sum(f.stat().st_size for f in tmp_path.iterdir() if f.suffix == ".safetensors")
    assert size.float32 == 4 * sum(p.numel() for p in float_model.parameters())
    tensors = header(tmp_path)
    widths = {"U8": 1, "F32": 4}
    stored = {
        key: widths[kind] * prod(shape)
        for key, (kind, shape) in tensors.items()
        if key.rpartition(".")[-1] in ("weight_codes", "weight_scale", "weight_offset")
    }
    owners = {key.rpartition(".")[0] for key in stored}
    weights = sum(module.weight.numel() for n, module in float_model.named_modules() if n in modules_of(owners, model))
    assert size.bits == pytest.approx(8 * sum(stored.values()) / weights)


def modules_of(names: set[str], model: hf.PreTrainedModel) -> set[str]:
    """In-model names of the layers whose codes a file holds (ViT's are renamed in it): one for each set of codes."""
    found = {n for n, m in model.named_modules() if getattr(m, "weight_codes", None) is not None}
    assert len(found) == len(names)
    return found


@pytest.mark.parametrize("state", ["float", "simulated"])
def test_measure_without_codes(state: str, tmp_path: Path) -> None:
    """A float or simulated model has 32 bits a weight, and the size of its float parameters."""
    model, batch = SUPPORTED["vit"]()
    expected = 4 * sum(p.numel() for p in model.parameters())
    if state == "simulated":
        simulate(model, "ternary-2-2-8", batch)
    save(model, tmp_path)
    size = measure(load(tmp_path), tmp_path)
    assert (size.bits, size.float32) == (32.0, expected)
    assert size.file == (tmp_path / WEIGHTS).stat().st_size > expected


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_inspect_packed(name: str, tmp_path: Path) -> None:
    """The listing of a packed model has each quantized module with its formats, all others, and the file's counts."""
    model, batch = SUPPORTED[name]()
    simulation = simulate(model, "ternary-2-2-8", batch)
    norms = {n for n, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    save(pack(model), tmp_path)
    found = inspect(tmp_path)
    assert (found["architecture"], found["state"], found["recipe"]) == (type(model).__name__, "packed", "ternary-2-2-8")
    assert (found["model"], found["format_version"], found["tensors"]) == (str(tmp_path), 1, len(header(tmp_path)))
    assert {key: found[key] for key in ("file", "float32", "bits")} == vars(measure(model, tmp_path))
    listed = {m["name"].removesuffix(".bittern"): m for m in found["modules"]}
    assert listed.keys() == {layer.name for layer in simulation.quantized}
    for layer in simulation.quantized:
        formats = {p: listed[layer.name][p] for p in ("query", "key", "value", "map") if p in listed[layer.name]}
        assert layer.attention == ", ".join(f"{point} {fmt}" for point, fmt in formats.items())
        assert (listed[layer.name].get("weight", ""), listed[layer.name].get("input", "")) == (
            layer.weight,
            layer.input,
        )
    rest = {m["name"]: m for m in found["kept_float"]}
    assert norms <= rest.keys()
    assert rest.keys() == {layer.name for layer in simulation.kept_float}
    assert all(m["parameters"] == sum(p.numel() for p in model.get_submodule(n).parameters()) for n, m in rest.items())


def test_inspect_simulated(tmp_path: Path) -> None:
    """The listing of a simulated model has no quantizers among what stayed float, static scales or not."""
    static = Format(bits=4, granularity="row", range="static")
    model, _ = quantized("vit", Recipe(name="static", rules=(Rule(roles=("qkv",), weight=static),)), packed=False)
    save(model, tmp_path)
    found = inspect(tmp_path)
    assert (found["state"], found["recipe"], found["bits"]) == ("simulated", "static", 32.0)
    assert len(found["modules"]) == 6
    assert {m["weight"] for m in found["modules"]} == {str(static)}
    assert not any("quantizer" in m["name"] for m in found["kept_float"])


def test_inspect_float(tmp_path: Path) -> None:
    """The listing of a float model has no quantized module, no recipe and no format version."""
    model = small(packed=False)
    save(model, tmp_path)
    found = inspect(tmp_path)
    assert (found["state"], found["recipe"], found["format_version"], found["modules"]) == ("float", "", None, [])
    assert sum(m["parameters"] for m in found["kept_float"]) * 4 == found["float32"]


@pytest.mark.parametrize("name", ["classifier.weight", "bert.pooler.dense.bias"])
def test_weights_that_are_not_there(tmp_path: Path, name: str) -> None:
    """A float model whose file lacks a weight is refused, for transformers would make one up; a pooler is named."""
    model, _ = SUPPORTED["bert"]()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["other"] = tensors.pop(name)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    if "pooler" in name:
        with pytest.warns(UserWarning, match=rf"holds no weights {name}"):
            load(tmp_path)
    else:
        with refused(CheckpointError, str(tmp_path), name, "would be random"):
            load(tmp_path)


@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_model(tmp_path: Path, known: bool) -> None:
    """Code that lies beside a model does not run unless the caller says so."""
    model, _ = SUPPORTED["bert"]()
    model.save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit\n")
    maps = {"AutoConfig": "code.C", "AutoModel": "code.M", "AutoModelForSequenceClassification": "code.M"}
    change_config(tmp_path, auto_map=maps, **({} if known else {"model_type": "of-its-own"}))
    with suppress(CheckpointError) if known else refused(CheckpointError, str(tmp_path)):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()
