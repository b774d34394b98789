"""Files that are damaged or made to harm: each gives one line of an error, or the answer of the intact file. Nothing
crashes, hangs, takes memory without bounds or reaches outside of its folder."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import string
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import world
import yaml
from intact import prepare
from world import Ended, Process, bits, strays, typed

from bittern import native
from bittern.data import load_data
from bittern.data.evaluate import predict
from bittern.deploy.bench import _source
from bittern.deploy.files import digest
from bittern.deploy.store import inspect, load
from bittern.errors import BitternError, ModelError
from bittern.layers import simulate
from bittern.ptq.calibrate import calibrate
from bittern.qat.training import read_baseline
from bittern.recipe import load_recipe
from families import SUPPORTED

Trial = tuple[str, Callable[[], str]]
MEMORY, SECONDS = 96 << 20, 30  # beyond twice what the intact file takes; of computing, in one trial
CANARY = "../canary"
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    10**9,
    10**12,
    10**18,
    -(10**18),
    0.5,
    1e308,
    float("nan"),
    float("inf"),
]
ODD += [
    "",
    "x",
    "x" * 5000,
    "\x00",
    "ü\ud7ff",
    CANARY,
    "/etc/passwd",
    "../" * 9 + "etc/passwd",
    "__import__('os')",
    [],
    {},
]
ODD += [
    [1] * 999,
    {"a": {"b": [None]}},
    [[[[[]]]]],
    "10",
    "float64",
    "torch.float16",
    "!!python/object/apply:os.system [id]",
]
DEEP = "[" * 100_000


# ---- changes


def damage(data: bytes, dice: random.Random) -> bytes:
    """Change bytes: flipped, inserted, deleted, zeroed, doubled, cut off, or a letter or digit for another."""
    if not data:
        return dice.randbytes(9)
    at, length = dice.randrange(len(data)), dice.randint(1, 40)
    head, part, tail = data[:at], data[at : at + length], data[at + length :]
    kind = dice.choice(
        ["flip", "insert", "delete", "zero", "double", "cut", "exchange", "exchange", "exchange", "none"]
    )
    letters = [i for i, byte in enumerate(data[:4096]) if chr(byte) in string.ascii_letters + string.digits]
    if kind == "exchange" and letters:
        at = dice.choice(letters)
        alike = string.digits if chr(data[at]).isdigit() else string.ascii_letters
        return data[:at] + dice.choice(alike).encode() + data[at + 1 :]
    return {
        "flip": head + bytes([part[0] ^ 1 << dice.randrange(8)]) + data[at + 1 :],
        "insert": head + dice.randbytes(length) + data[at:],
        "delete": head + tail,
        "zero": head + bytes(len(part)) + tail,
        "double": head + part + data[at:],
        "cut": head,
    }.get(kind, b"")


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of everything inside JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(value, key) for key, _ in items] + [place for _, inner in items for place in places(inner)]


def change(value: Any, dice: random.Random) -> Any:
    """Change JSON in one to three places: another value, another name, one less, or two exchanged."""
    for _ in range(dice.choice((1, 1, 2, 3))):
        found = places(value)
        if not found:
            return dice.choice(ODD)
        (inner, key), (other, name) = dice.choice(found), dice.choice(found)
        kind = dice.choice(["set", "set", "set", "delete", "rename", "swap", "number", "wrap"])
        try:
            if kind == "set":
                inner[key] = dice.choice(ODD)
            elif kind == "delete":
                del inner[key]
            elif kind == "rename" and isinstance(inner, dict):
                inner[dice.choice([f"{key}x", key[:-1], "", "a.b.weight"])] = inner.pop(key)
            elif kind == "swap":
                inner[key], other[name] = other[name], inner[key]
            elif kind == "number" and isinstance(inner[key], int | float):
                inner[key] = dice.choice(
                    [-inner[key], inner[key] + 1, inner[key] * 10**6, 2 * inner[key], inner[key] / 2]
                )
            else:
                inner[key] = [inner[key]] if dice.random() < 0.5 else {"a": inner[key]}
        except (KeyError, IndexError, TypeError):  # what was inside of what has been replaced
            continue
    return value


def change_json(file: Path, dice: random.Random) -> None:
    if dice.random() < 0.02:
        file.write_text(dice.choice([DEEP, '{"a":' * 100_000, "", "null", "[]", "1e999", '{"a": 1, "a": 2}']))
    elif dice.random() < 0.3:
        file.write_bytes(damage(file.read_bytes(), dice))
    else:
        try:
            text = json.dumps(change(json.loads(file.read_text()), dice))
        except (ValueError, RecursionError):  # two that hold each other
            text = "{}"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))


def change_header(file: Path, dice: random.Random) -> None:
    """Change a safetensors file: its header as JSON, the length of that, or bytes anywhere."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    kind = dice.choice(["json", "json", "length", "header", "tensors", "claim"])
    if kind == "length":
        length = dice.choice([0, 1, start, len(data), 2**40, 2**63, 2**64 - 1, start - 9, start - 7])
        file.write_bytes(length.to_bytes(8, "little") + data[8:])
    elif kind == "header":
        file.write_bytes(damage(data[:start], dice) + data[start:])
    elif kind == "tensors":
        file.write_bytes(data[:start] + damage(data[start:], dice))
    else:
        header = json.loads(data[8:start])
        if kind == "claim":  # a terabyte
            name = dice.choice([name for name in header if name != "__metadata__"])
            header[name]["shape"] = dice.choice([[2**40], [2**20, 2**20], [2**62, 4], [0, 2**60]])
            if dice.random() < 0.5:
                header[name]["data_offsets"] = [0, 2**42]
        else:
            header = change(header, dice)
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        text = text.ljust(start - 8) if len(text) < start - 8 else text
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def change_model(folder: Path, dice: random.Random) -> None:
    weights = sorted(folder.glob("*.safetensors"))
    if dice.random() < 0.6:
        change_header(dice.choice(weights), dice)
    else:
        names = ("config.json", "config.json", "model.safetensors.index.json", "generation_config.json")
        change_json(dice.choice([folder / n for n in names if (folder / n).exists()]), dice)


ADAPTERS: dict[str, list[Any]] = {
    "peft_type": ["IA3", "LOHA", "OFT", "VERA", "PROMPT_TUNING", "LN_TUNING", "BITFIT"],
    "target_modules": ["all-linear", ["classifier"], ["query", "dense"], ".*", ["LayerNorm"], ["word_embeddings"]],
    "modules_to_save": [["classifier"], ["query"], ["bert"]],
    "bias": ["all", "lora_only"],
    "use_dora": [True],
    "init_lora_weights": ["pissa", "olora", "loftq", "gaussian"],
    "trainable_token_indices": [[1], {"word_embeddings": [1]}],
    "layer_replication": [[[0, 2], [1, 2]]],
    "base_model_name_or_path": [CANARY, "/etc", "bert-base-uncased"],
    "auto_mapping": [{"base_model_class": "system", "parent_library": "os"}],
}


def change_adapter(folder: Path, dice: random.Random) -> None:
    """Change its tensors, its configuration anywhere, or to another kind of adapter."""
    file = folder / "adapter_config.json"
    if dice.random() < 0.4:
        change_header(folder / "adapter_model.safetensors", dice)
    elif dice.random() < 0.5:
        change_json(file, dice)
    else:
        chosen = {name: dice.choice(ADAPTERS[name]) for name in dice.sample([*ADAPTERS], dice.choice((1, 1, 2)))}
        file.write_text(json.dumps(json.loads(file.read_text()) | chosen))


def exchange(folder: Path, dice: random.Random, other: Path) -> None:
    """Take a file from another model, or drop one."""
    name = dice.choice(["config.json", "model.safetensors"])
    if dice.random() < 0.2:
        (folder / name).unlink()
    else:
        shutil.copy(other / name, folder / name)


# ---- what is asked of the files


def answer(folder: Path, seed: int = 0) -> str:
    torch.manual_seed(seed)
    model = load(folder)
    torch.manual_seed(0)
    name = "vit" if model.main_input_name == "pixel_values" else "bert"
    batch = SUPPORTED[name]()[1] if name == "bert" else {"pixel_values": torch.randn(2, 1, 8, 8)}
    with torch.no_grad():
        found = model(**batch)
    return digest([(n, t) for n, t in sorted(found.items()) if isinstance(t, torch.Tensor)])


def checkpoint(folder: Path) -> str:
    found = answer(folder)
    if found[0] in "01":  # now and then: it loads the model once more
        inspect(folder)
    return found


def float_model(folder: Path) -> str:
    """Any weights are a model; but those that the file lacks would differ from load to load."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = answer(folder, 1)
    if found != answer(folder, 2) and not any("they are random" in str(warning.message) for warning in told):
        raise AssertionError("weights that the file does not hold were made up, without a word")
    return ""


def adapter(folder: Path, place: Path) -> str:
    """Neither a model nor a part of one. PEFT may refuse it, or add it: then to a packed model as to the simulated one
    (but for DoRA, which reads the weights below, that are float in one), and what is below stays as it was."""
    from peft import PeftModel

    for where in (folder, folder.with_name("both")):
        if where != folder:
            shutil.copytree(place / "packed", where)
            shutil.copytree(folder, where, dirs_exist_ok=True)
        try:
            load(where)
        except ModelError:
            continue
        raise AssertionError(f"an adapter was loaded as a model, or left out: {where.name}")
    shutil.rmtree(folder.with_name("both"))
    _, batch = SUPPORTED["bert"]()
    found: list[torch.Tensor | None] = []
    with torch.no_grad(), native.disabled():
        for state in ("packed", "packed-simulated"):
            model = load(place / state)
            below = model(**batch).logits
            torch.manual_seed(0)  # what an adapter lacks, PEFT makes up
            try:
                adapted = PeftModel.from_pretrained(model, str(folder)).eval()
                found.append(adapted(**batch).logits)
            except BitternError as error:  # as it wants to change packed weights
                print(state, error)
                return ""
            except Exception as error:  # PEFT has no one kind of error
                print(state, type(error).__name__, str(error)[:200])
                found.append(None)
            else:
                if getattr(adapted.active_peft_config, "layer_replication", None):  # asks for another model
                    continue
                with adapted.disable_adapter():
                    if not torch.equal(model(**batch).logits, below):
                        raise AssertionError("the model below is another one")
    first, second = found
    if (first is None) != (second is None):
        raise AssertionError(f"added to one of a packed and a simulated model only: {found}")
    alike = first is None or second is None or torch.equal(first.nan_to_num(), second.nan_to_num())
    if not alike and not json.loads((folder / "adapter_config.json").read_text()).get("use_dora"):
        raise AssertionError(f"on a packed model another one, by up to {(first - second).abs().max()}")
    return ""


def recipe(folder: Path) -> str:
    chosen = load_recipe(folder / "recipe.yaml")
    model, batch = SUPPORTED["bert"]()
    simulate(model, chosen, batch)
    calibrate(model, [batch])
    with torch.no_grad():
        model(**batch)
    return ""


def samples(folder: Path, model_folder: Path, **options: Any) -> str:
    model = load(model_folder)
    for split in ("train", "test"):
        data = load_data(str(folder), model, model_folder, split=split, batch_size=16, **options)  # type: ignore[arg-type]
        if data is not None:
            predict(model, data)
    return ""


def scenes(folder: Path) -> str:
    from bittern.data.detection import read_scenes

    read_scenes(str(folder), "train", detector())
    return ""


def report(folder: Path) -> str:
    from bittern.analysis.study import RUN, read_json

    read_json(folder / RUN)
    found = []
    for read in (_source, read_baseline):
        try:
            read(folder)
        except BitternError as error:
            found.append(error)
    if len(found) == 2:
        raise found[0]
    return ""


@cache
def detector() -> Any:
    model = SUPPORTED["detr"]()[0]
    model.config.id2label = {0: "cat", 1: "dog", 2: "bird"}
    return model


# ---- kinds


def one_of(pattern: str, folder: Path, dice: random.Random, how: Callable[[Path, random.Random], None]) -> None:
    how(dice.choice(sorted(folder.glob(pattern))), dice)


def damage_file(file: Path, dice: random.Random) -> None:
    file.write_bytes(damage(file.read_bytes(), dice))


def change_yaml(file: Path, dice: random.Random) -> None:
    if dice.random() < 0.4:
        return damage_file(file, dice)
    try:
        text = yaml.safe_dump(change(yaml.safe_load(file.read_text()), dice), allow_unicode=True)
    except (RecursionError, yaml.YAMLError):
        text = "a: &a [*a, *a]"
    if dice.random() < 0.05:  # a billion laughs
        text = (
            "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)) + text
        )
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def change_lines(file: Path, dice: random.Random) -> None:
    if file.suffix == ".parquet" or dice.random() < 0.4:
        return damage_file(file, dice)
    if file.suffix == ".json":
        return change_json(file, dice)
    lines = file.read_text().split("\n")
    at = dice.randrange(len(lines))
    odd = str(dice.choice(ODD)).encode("utf-8", "replace").decode()
    lines[at] = dice.choice(
        ["", odd, f"{lines[at]},{odd}", lines[at] * 999, f'"{lines[at]}', lines[at].replace(",", "\t")]
    )
    file.write_text("\n".join(lines))


SHARES: dict[str, tuple[int, str, Callable[[Path, random.Random], None], str]] = {
    # how many of 100: folder, what is done to it, what is asked of it
    "packed": (17, "packed", change_model, "checkpoint"),
    "adapter": (3, "adapter", change_adapter, "adapter"),
    "packed, 4 bits": (5, "low", change_model, "checkpoint"),
    "packed, in shards": (5, "packed-shards", change_model, "checkpoint"),
    "simulated": (10, "packed-simulated", change_model, "checkpoint"),
    "float": (10, "bert", change_model, "float_model"),
    "float, in shards": (5, "shards", change_model, "float_model"),
    "float ViT": (3, "vit", change_model, "float_model"),
    "files of two models": (2, "packed", exchange, "checkpoint"),  # type: ignore[dict-item]
    "tokenizer": (3, "bert", partial(one_of, "tokenizer*.json", how=change_json), "texts"),
    "image processor": (2, "vit", partial(one_of, "preprocessor_config.json", how=change_json), "digits"),
    "recipe": (12, "recipe-*", partial(one_of, "recipe.yaml", how=change_yaml), "recipe"),
    "table": (10, "table-*", partial(one_of, "train.*", how=change_lines), "table"),
    "images": (6, "images-*", partial(one_of, "train/*/*", how=damage_file), "images"),
    "scenes": (4, "scenes", partial(one_of, "train/labels.json", how=change_json), "scenes"),
    "report": (2, "report", partial(one_of, "bittern.json", how=change_json), "report"),
    "work folder": (1, "", change_json, ""),
}


def ask(what: str, folder: Path, place: Path) -> str:
    if what in ("table", "images"):
        return samples(folder, place / ("bert" if what == "table" else "vit"))
    if what == "adapter":
        return adapter(folder, place)
    if what in ("texts", "digits"):
        data = place / "table-csv" if what == "texts" else place / "images-png"
        model = load(folder)
        found = load_data(str(data), model, folder, split="train")
        if found is not None:
            predict(model, found)
        return ""
    return str(globals()[what](folder))


def trials(work: Path, seed: int) -> Iterator[Trial]:
    world.in_a_process(lambda: prepare(work))
    names = [name for name, (share, *_) in SHARES.items() for _ in range(share)]
    for turn in range(1 << 30):
        dice = random.Random(f"{seed} {turn}")
        name = names[turn % len(names)]
        yield f"{name} {turn}", lambda dice=dice, name=name: mutate(name, work, dice)


@cache
def intact(source: Path, asked: str, place: Path) -> tuple[str, int]:
    """The answer of an intact folder, and the memory that it took."""
    ended = Process(lambda: print("answer", ask(asked, source, place))).wait()
    assert ended.code == 0, ended
    return answered(ended), ended.grown


def answered(ended: Ended) -> str:
    return ended.text.rpartition("answer ")[2].partition("\n")[0]


def mutate(name: str, work: Path, dice: random.Random) -> str:
    if name == "work folder":
        return resume(work, dice)
    _, pattern, how, asked = SHARES[name]
    place = work / "mutants"
    source = dice.choice(sorted(place.glob(pattern)))
    expected, honest = intact(source, asked, place)
    folder = work / "area" / "mutant"
    shutil.rmtree(work / "area", ignore_errors=True)
    shutil.copytree(source, folder)
    (work / "area" / "canary").mkdir()
    before = sorted(p.name for p in (work / "area").iterdir())
    if name == "files of two models":
        exchange(folder, dice, place / dice.choice(["low", "bert", "vit", "packed-simulated"]))
    else:
        how(folder, dice)

    def work_on() -> None:
        os.chdir(work / "area")
        warnings.simplefilter("ignore")
        try:
            print("answer", ask(asked, folder, place))
        except BitternError as error:
            print(f"\nerror: {error}")
            raise SystemExit(1) from None

    ended = Process(work_on, limit=4 << 30, seconds=SECONDS).wait(20 * SECONDS)  # by the clock, if it waits for ever
    if ended.signal:
        return f"{'hung' if ended.signal in (-1, signal.SIGXCPU) else f'signal {ended.signal}'}: {ended}"
    if ended.grown > 2 * honest + MEMORY and name != "adapter":  # which PEFT reads
        return f"took {ended.grown >> 20} MB, the intact file {honest >> 20}: {ended}"
    if sorted(p.name for p in (work / "area").iterdir()) != before:
        return "wrote outside of its folder"
    if ended.code == 0:
        return "" if answered(ended) == expected else f"another answer, without an error: {ended}"
    line = ended.text.rpartition("\nerror: ")[2].strip()
    return "" if ended.clean and "\n" not in line else f"no one line: {ended}"


# ---- work folders


@cache
def unfinished(work: Path, name: str) -> Path:
    """The work folder of a run that was killed near its end."""
    from kills import reference

    whole = reference(name, work)
    area = work / "unfinished" / name.replace(" ", "-")
    shutil.rmtree(area, ignore_errors=True)
    area.mkdir(parents=True)
    at = whole.operations
    while not (area / "out.work").exists() or (area / "out").exists():
        shutil.rmtree(area)
        area.mkdir()
        at -= max(1, whole.operations // 20)
        Process(typed(name, work / "world", area), world.Strike(area, world.SIGNAL, at, 9)).wait()
    return area


def resume(work: Path, dice: random.Random) -> str:
    """A file of the work folder is damaged: the command refuses it, or ends with the same bits."""
    from kills import reference

    name = dice.choice(["ptq vt", "ptq bittern", "qat", "analyze"])
    whole, area = reference(name, work), work / "area"
    source = unfinished(work, name)
    shutil.rmtree(area, ignore_errors=True)
    shutil.copytree(source, area)
    file = dice.choice(sorted(p for p in (area / "out.work").rglob("*") if p.is_file()))
    (change_header if file.suffix == ".safetensors" else change_json if file.suffix == ".json" else damage_file)(
        file, dice
    )
    ended = Process(typed(name, work / "world", area)).wait()
    if ended.code == 0 and not ended.signal:
        return "" if bits(area) == whole.bits and not strays(area) else f"other bits after damage to {file.name}"
    return "" if ended.clean else f"damage to {file.name}: {ended}"
