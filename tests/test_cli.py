"""The commands as a user types them: what they print, write and refuse, and how they end."""

import inspect
import io
import itertools
import json
import math
import os
import platform
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import redirect_stderr
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image

import bittern
from bittern import jobs, show
from bittern.cli import commands, main
from bittern.data import load_data
from bittern.demo import DIGITS
from bittern.deploy.journal import Journal
from bittern.errors import ModelError
from bittern.recipe import load_recipe, recipe_names
from material import LABELS, TEXTS, command, save_text_model, succeed, tree, write_tables

OWN_RECIPE = """
name: own
rules:
  - modules: "vit.layers.0.*"
  - roles: [qkv, ffn]
    weight: {kind: ternary, granularity: row}
    input: {bits: 8}
"""
BAD_RECIPES = {
    "typo.yaml": "name: t\nrules:\n  - roles: [ffn]\n    wieght: {bits: 8}\n",
    "glob.yaml": "name: t\nrules:\n  - modules: 'vit.layer.0.*'\n    weight: {bits: 8}\n",
    "group.yaml": "name: t\nrules:\n  - weight: {bits: 8, granularity: group, group_size: 7}\n",
}


def damage(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """The model with one weight that is no number."""
    with torch.no_grad():
        model.vit.layers[1].mlp.fc1.weight[3, 5] = float("nan")
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user may have it: models, data and recipes, good and bad."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(DIGITS, place / "vit")
    hf.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(place / "vit")
    save_text_model(place / "bert")
    save_text_model(place / "encoder", head=False)
    damage(bittern.load(DIGITS)).save_pretrained(place / "nan")
    jobs.quantize(DIGITS, "ternary-2-2-8", place / "packed")
    (place / "empty").mkdir()
    for folder, file, text in (("foreign", "config.json", '{"layers": 3}'), ("notes", "todo.txt", "water the reeds")):
        (place / folder).mkdir()
        (place / folder / file).write_text(text)
    for file, text in (
        BAD_RECIPES | {"own.yaml": OWN_RECIPE, "damaged.parquet": "PAR1, or so", "data.docx": ""}
    ).items():
        (place / file).write_text(text)
    write_tables(place / "texts", text=TEXTS, label=LABELS)
    write_tables(place / "renamed", words=TEXTS, kind=LABELS)
    write_tables(place / "unlabelled", text=TEXTS)
    write_tables(place / "more-classes", text=TEXTS, label=[label + 4 for label in LABELS])
    write_tables(place / "no-rows", text=TEXTS[:0], label=LABELS[:0])
    write_tables(place / "images", image=[Image.new("L", (8, 8))] * 3, label=[3, 9, 12])
    return place


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user is in the folder, so that all names are relative."""
    monkeypatch.chdir(place)
    return place


# The main job: quantize, inspect, eval, eval --against


@pytest.fixture(scope="module")
def job(place: Path) -> dict[str, Any]:
    """What `quantize --json` prints for digits and w8a8."""
    return one_object(succeed(f"bittern quantize {place}/vit --recipe w8a8 --data digits --out {place}/w8a8 --json"))


def one_object(text: str) -> dict[str, Any]:
    """The JSON object that is all of the text."""
    assert text.count("\n") == 1
    value = json.loads(text)
    assert isinstance(value, dict)
    return value


@pytest.mark.kernels
def test_quantize_json(place: Path, job: dict[str, Any], tmp_path: Path) -> None:
    """`quantize --json` prints what the library returns for the same arguments, and the file gives the same outputs."""
    result = jobs.quantize(place / "vit", "w8a8", tmp_path / "same", data="digits")
    assert job == result | {"out": f"{place}/w8a8"}
    assert job["float"]["accuracy"] > 0.97
    assert job["packed"]["agreement"] > 0.98
    assert job["max_error_simulated_packed"] == 0
    assert job["file"] < job["float_bytes"] / 2.5


@pytest.mark.usefixtures("job")
def test_inspect_json(place: Path) -> None:
    """`inspect --json` prints what `bittern.inspect` returns."""
    result = one_object(succeed(f"bittern inspect {place}/w8a8 --json"))
    assert result == bittern.inspect(f"{place}/w8a8")
    known = (result[name] for name in ("state", "recipe", "architecture"))
    assert tuple(known) == ("packed", "w8a8", "ViTForImageClassification")


@pytest.mark.kernels
def test_eval_json(place: Path, job: dict[str, Any]) -> None:
    """`eval --json`, with and without `--against`, finds the figures that `quantize` measured."""
    alone = one_object(succeed(f"bittern eval {place}/w8a8 --data digits --json"))
    assert alone["accuracy"] == job["packed"]["accuracy"]
    assert {key: alone[key] for key in ("samples", "file", "bits")} == {k: job[k] for k in ("samples", "file", "bits")}
    both = one_object(succeed(f"bittern eval {place}/w8a8 --data digits --against {place}/vit --json"))
    assert both == alone | job["packed"] | {"against": f"{place}/vit"}


@pytest.mark.kernels
def test_printed_figures(inside: Path, job: dict[str, Any]) -> None:
    """Without `--json` each command prints the same figures for people, and the command that comes next."""
    accuracy, agreement = f"{job['packed']['accuracy']:.4f}", f"{job['packed']['agreement']:.4f}"
    size, bits = f"{job['file'] / 1e3:.1f} kB", f"{job['bits']:.2f}"

    text = succeed("bittern quantize vit --recipe w8a8 --data digits --out w8a8 --force")
    assert all(part in text for part in (accuracy, agreement, size, bits, "29 modules quantized", "inspect w8a8"))
    text = succeed("bittern inspect w8a8")
    assert all(part in text for part in (size, bits, "packed by w8a8", "8-bit per row", "classifier", "9 LayerNorm"))
    assert accuracy in succeed("bittern eval w8a8 --data digits")
    text = succeed("bittern eval w8a8 --data digits --against vit")
    assert all(part in text for part in (accuracy, agreement, "against", "vit"))


def test_what_was_read(inside: Path, tmp_path: Path) -> None:
    """Which part and columns of the data were read is told; what may be labels is not left out in silence."""
    assert one_object(succeed("bittern eval bert --data texts --json"))["origin"] == (
        "validation.parquet: text, labels of label"
    )
    hidden = tmp_path / "hidden"
    write_tables(hidden, text=TEXTS, kind=LABELS)
    told = f"{hidden}: no column of labels was found; there is kind (choose with --label-column)"
    with pytest.warns(UserWarning, match=re.escape(told)):
        text = succeed(f"bittern quantize bert --recipe w8a8 --data {hidden} --out {tmp_path}/out")
    assert "Measured on 40 samples of" in text
    assert "validation.parquet: text." in text


def test_bits_of_half_a_model(inside: Path, tmp_path: Path) -> None:
    """A model whose files have 16 bits is said to have them, and what is made of it is compared with these files."""
    bittern.load("bert").half().save_pretrained(tmp_path / "half")
    shutil.copy("bert/tokenizer.json", tmp_path / "half")
    shutil.copy("bert/tokenizer_config.json", tmp_path / "half")
    assert one_object(succeed(f"bittern eval {tmp_path}/half --data texts --json"))["bits"] == 16
    text = succeed(f"bittern quantize {tmp_path}/half --recipe w8a8 --data texts --out {tmp_path}/out")
    assert re.search(r"bits per quantized weight +│ +16 │", text)


def test_a_real_process(place: Path, tmp_path: Path, job: dict[str, Any]) -> None:
    """The installed `bittern`, in a process of its own, prints the same JSON and nothing else."""
    program = Path(sys.executable).with_name("bittern")
    arguments = ["quantize", f"{place}/vit", "-r", "w8a8", "--data", "digits", "-o", "out", "--json"]
    ran = subprocess.run([program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert one_object(ran.stdout) == job | {"out": "out"}


# Recipes, options and what is written


@pytest.mark.parametrize("recipe", recipe_names())
def test_ready_made_recipes(inside: Path, tmp_path: Path, recipe: str) -> None:
    """Every recipe works by its name, and the file is smaller than the float model."""
    result = one_object(succeed(f"bittern quantize vit -r {recipe} --data digits -o {tmp_path}/out --json"))
    assert result["recipe"] == recipe
    assert result["max_error_simulated_packed"] == 0
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == result["file"] < result["float_bytes"] / 2


def test_own_recipe(inside: Path, tmp_path: Path) -> None:
    """A recipe of one's own is given by its path, and its first rule keeps the first block in float."""
    succeed(f"bittern quantize vit -r own.yaml -o {tmp_path}/out")
    result = one_object(succeed(f"bittern inspect {tmp_path}/out --json"))
    names = [module["name"] for module in result["modules"]]
    assert result["recipe"] == "own"
    assert len(names) == 15
    assert not any(".layers.0." in name for name in names)
    assert {module["weight"] for module in result["modules"]} == {"ternary per row"}


def test_columns(inside: Path, tmp_path: Path) -> None:
    """Columns of other names are chosen by `--columns` and `--label-column`, with the same result."""
    known = succeed(f"bittern quantize bert -r w8a8 --data texts -o {tmp_path}/a --batch-size 10 --json")
    options = "--columns words --label-column kind --batch-size 10 --json"
    renamed = succeed(f"bittern quantize bert -r w8a8 --data renamed -o {tmp_path}/a --force {options}")
    origin = "validation.parquet: words, labels of kind"
    assert one_object(renamed) == one_object(known) | {"data": "renamed", "origin": origin}
    assert "accuracy" in one_object(
        succeed("bittern eval bert --data renamed --columns words --label-column kind --json")
    )


def test_report_beside_the_model(inside: Path, tmp_path: Path) -> None:
    """bittern.json holds what it takes to do it again: recipe, seed, versions, and which data it was."""
    succeed(f"bittern quantize vit -r w6a6 --data digits --samples 50 --seed 3 -o {tmp_path}/out")
    report = json.loads((tmp_path / "out" / "bittern.json").read_text())
    assert bittern.Recipe.from_dict(report["recipe"]) == load_recipe("w6a6")
    assert report["seed"] == 3
    packages = {name: version(name) for name in ("bittern", "torch", "transformers")}
    assert report["versions"] == packages | {"python": platform.python_version()}
    data = load_data("digits", bittern.load(DIGITS), DIGITS, split="train")
    assert data is not None
    drawn = data.subset(50, 3).fingerprint()
    assert report["calibration"] == {"data": "digits", "samples": 50, "sha256": drawn}
    assert drawn not in (data.subset(50, 4).fingerprint(), data.subset(51, 3).fingerprint())
    assert report["samples"] == 360
    assert {layer["name"] for layer in report["layers"]} >= {"classifier", "vit.layers.3.mlp.fc2"}


def test_without_data(inside: Path, tmp_path: Path) -> None:
    """A recipe without static scales needs no data, and the command says why no accuracy was measured."""
    text = succeed(f"bittern quantize vit -r ternary-2-2-8 -o {tmp_path}/out")
    assert "No accuracy was measured: no data was given; add --data" in text
    assert json.loads((tmp_path / "out" / "bittern.json").read_text())["calibration"] is None


def test_force_replaces(inside: Path, tmp_path: Path) -> None:
    """With --force the old model is gone, all of it, and nothing stands beside the new one."""
    shutil.copytree("packed", tmp_path / "out")
    succeed(f"bittern quantize vit -r w4a8 --data digits -o {tmp_path}/out --force")
    files = {"bittern.json", "config.json", "model.safetensors", "preprocessor_config.json"}
    written = files | {".bittern-files.json", "README.md"}
    assert tree(tmp_path).keys() == {"out", *(f"out/{name}" for name in written)}
    assert bittern.inspect(tmp_path / "out")["recipe"] == "w4a8"


def documented(command: str) -> dict[str, str]:
    """Arguments and options of a command by its help: flags with the kind of value, what is said of default and limits.

    Fails if one of them has no text that says what it is for.
    """
    found = {}
    page = re.split(r"^(?:Arguments|Options):$", succeed(f"bittern {command} --help"), maxsplit=1, flags=re.MULTILINE)[
        1
    ]
    for entry in re.findall(r"^  (\S.*(?:\n {4,}.*)*)", page, re.MULTILINE):
        head, text = (" ".join(part.split()) for part in re.split(r" {2,}", entry, maxsplit=1))
        facts = re.search(r" ?\[([^]]*)\]$", text)
        assert len(text) - len(facts[0] if facts else "") > 5, f"{command} {head} has no help"
        found[head] = facts[1] if facts else ""
    return found


def test_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--help` names all commands, and of each all arguments and options as they always were."""
    monkeypatch.setenv("COLUMNS", "80")
    known = json.loads((Path(__file__).parent / "data" / "command_line.json").read_text())
    names = re.findall(r"^  ([a-z]+)  ", succeed("bittern --help").partition("Commands:")[2], re.MULTILINE)
    assert {name: documented(name) for name in names} == known


def test_completion() -> None:
    """A shell completes commands and options, as `bittern --install-completion` sets it up, without torch."""
    for typed, wanted in (("bittern qat --interv", "--intervene\n"), ("bittern comp", "compress\n")):
        asked = {"_BITTERN_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
        program = Path(sys.executable).with_name("bittern")
        ran = subprocess.run([program], env=os.environ | asked, capture_output=True, text=True, check=False)
        assert ran.stdout.startswith(wanted), ran.stderr


@pytest.mark.parametrize(
    "name", ["demo", "compress", "quantize", "ptq", "qat", "evaluate", "inspect", "analyze", "export", "bench"]
)
def test_defaults(name: str) -> None:
    """Each option of a command is a parameter of its job, and has the same default."""
    run = getattr(commands, name)
    module, _, function = run.job.partition(":")
    job = inspect.signature(getattr(import_module(f"bittern.{module}"), function)).parameters
    for parameter in inspect.signature(run.options).parameters.values():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            assert parameter.default == job[parameter.name].default, parameter


@pytest.mark.parametrize("line", ["--help", "--version", "qat --help", "quantize vit --recipe w8a8"])
@pytest.mark.parametrize(
    "program", [[str(Path(sys.executable).with_name("bittern"))], [sys.executable, "-m", "bittern"]]
)
def test_help_without_torch(program: list[str], line: str) -> None:
    """Help, the version and what is typed wrongly are told at once: neither torch nor transformers is loaded."""
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    ran = subprocess.run([*program, *line.split()], env=environment, capture_output=True, text=True, check=False)
    modules = {row.rpartition("|")[2].strip() for row in ran.stderr.splitlines()}
    assert "bittern.cli.commands" in modules
    assert not modules & {"torch", "transformers", "numpy"}
    if line == "--version":
        assert ran.stdout == f"bittern {bittern.__version__}\n"


def test_modules_of_ones_own(tmp_path: Path) -> None:
    """A module that a command imports by its name finds in `bittern` all that other programs find there."""
    (tmp_path / "mine.py").write_text(
        f"from bittern import {', '.join(bittern.__all__)}\n\ndef term(x, y, rows): ...\n"
    )
    line = "qat nowhere --recipe w8a8 --data digits --out out --distill mine:term"
    ran = subprocess.run(
        [sys.executable, "-m", "bittern", *line.split()], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr.partition(":")[0]) == (1, "error")
    assert "no such folder: nowhere" in ran.stderr


# What is refused: one line that names what was given and what to do

BAD = {
    "no model": ("quantize missing -r w8a8 -o out --data digits", "no such folder: missing"),
    "no model below a folder": ("quantize models/missing -r w8a8 -o out --data digits", "models/missing", "folder"),
    "empty folder": ("quantize empty -r w8a8 -o out --data digits", "empty is empty", "config.json"),
    "not a Transformer": ("quantize foreign -r w8a8 -o out --data digits", "foreign/config.json", "Transformer"),
    "folder of other things": ("quantize notes -r w8a8 -o out --data digits", "notes has no config.json"),
    "model as a file": ("quantize vit/model.safetensors -r w8a8 -o out", "vit/model.safetensors is a file", "folder"),
    "NaN weights": ("quantize nan -r w8a8 -o out --data digits", "vit.layers.1.mlp.fc1.weight holds NaN"),
    "packed already": ("quantize packed -r w8a8 -o out --data digits", "packed is quantized already", "float model"),
    "labels of texts": ("quantize bert -r w8a8 -o out --data more-classes", "more-classes has the classes 4, 5, 6"),
    "labels of images": (
        "quantize vit -r w8a8 -o out --data images",
        "images has the classes",
        "none of which is '12'",
    ),
    "sentences for images": ("quantize vit -r w8a8 -o out --data sentences", "sentences are texts", "ViTFor"),
    "images for texts": ("quantize bert -r w8a8 -o out --data digits", "digits are 8×8 images", "BertFor"),
    "table of another kind": ("quantize vit -r w8a8 -o out --data texts", "texts has the columns text, label", "image"),
    "no data": ("quantize vit -r w8a8 -o out --data nowhere", "'nowhere'", "a folder"),
    "no table": ("quantize bert -r w8a8 -o out --data nowhere/train.csv", "'nowhere/train.csv'", "a folder"),
    "no rows": ("quantize bert -r w8a8 -o out --data no-rows", "no-rows", "rows"),
    "unknown kind of file": ("quantize bert -r w8a8 -o out --data data.docx", "data.docx is a .docx file", ".parquet"),
    "no such column": ("quantize bert -r w8a8 -o out --data renamed", "the columns words, kind", "--columns"),
    "static without data": ("quantize vit -r w8a8 -o out", "w8a8 has static activation scales", "--data"),
    "no recipe": ("quantize vit -r w8a9 -o out --data digits", "no recipe 'w8a9'", "w8a8", "YAML"),
    "no recipe file": ("quantize vit -r mine.yaml -o out --data digits", "no recipe 'mine.yaml'", "YAML"),
    "unknown key": ("quantize vit -r typo.yaml -o out --data digits", "typo.yaml", "'wieght'", "known: ", "weight"),
    "glob of nothing": ("quantize vit -r glob.yaml -o out --data digits", "'vit.layer.0.*' matches", "vit.layers.0."),
    "group that divides nothing": ("quantize vit -r group.yaml -o out --data digits", "group_size 7", "use a divisor"),
    "output below a file": ("quantize vit -r w8a8 -o own.yaml/out --data digits", "own.yaml", "another output"),
    "output is a file": ("quantize vit -r w8a8 -o own.yaml --data digits --force", "own.yaml is a file", "folder"),
    "output exists": ("quantize vit -r w8a8 -o packed --data digits", "packed exists", "--force"),
    "output is no model": ("quantize vit -r w8a8 -o notes --data digits --force", "notes holds", "another output"),
    "JSON asked for": ("quantize vit -r w8a8 -o packed --data digits --json", "packed exists"),
    "eval, no model": ("eval missing --data digits", "no such folder: missing"),
    "eval, no labels": ("eval bert --data unlabelled", "unlabelled has no labels", "--against"),
    "eval, no classes": ("eval encoder --data texts", "BertModel, which has no classes", "--against"),
    "eval, no other model": ("eval bert --data texts --against missing", "no such folder: missing"),
    "eval, against a model of images": ("eval bert --data texts --against vit", "vit cannot read texts as bert does"),
    "eval, against another task": ("eval bert --data texts --against encoder", "BertModel, gives outputs", "same task"),
    "eval, no data": ("eval bert --data nowhere", "'nowhere'", "a folder"),
    "inspect, no model": ("inspect missing", "no such folder: missing"),
    "inspect, empty folder": ("inspect empty", "empty is empty", "config.json"),
    "ptq, no method": ("ptq vit -r w8a8 -o out --data digits -m easyquan", "no method 'easyquan'", "mean easyquant?"),
    "ptq, target": ("ptq vit -r w8a8 -o out --data digits --target 3.5", "no choice from 4, 5, 6, 7, 8 bits", "3.5"),
    "ptq, target too high": ("ptq vit -r w8a8 -o out --data digits --target 99", "no choice from 4, 5, 6, 7, 8", "99"),
    "ptq, bits": ("ptq vit -r w8a8 -o out --data digits --target 6 --bits 4,six", "whole numbers", "'4,six'"),
    "ptq, wide": ("ptq vit -r w8a8 -o out --data digits --target 6 --bits 4,16", "must be 2 to 12, got 4, 16"),
    "ptq, sensitivity": ("ptq vit -r w8a8 -o out --data digits --target 6 --sensitivity x", "relative or paper", "'x'"),
    "ptq, sequential": ("ptq vit -r w8a8 -o out --data digits -m easyquant --target 6", "easyquant", "parallel"),
    "ptq, no recipe": ("ptq vit -r w8a9 -o out --data digits", "no recipe 'w8a9'", "w8a8", "YAML"),
    "ptq, no data": ("ptq vit -r w8a8 -o out --data nowhere", "'nowhere'", "a folder"),
    "ptq, output exists": ("ptq vit -r w8a8 -o packed --data digits", "packed exists", "--force"),
    "qat, no recipe": ("qat vit -r w8a9 -o out --data digits", "no recipe 'w8a9'", "w8a8", "YAML"),
    "qat, no data": ("qat vit -r w8a8 -o out --data nowhere", "'nowhere'", "a folder"),
    "qat, output exists": ("qat vit -r w8a8 -o packed --data digits", "packed exists", "--force"),
    "qat, no such term": ("qat vit -r w8a8 -o out --data digits --distill maps", "no distillation term 'maps'", "map?"),
    "qat, bad mapping": ("qat vit -r w8a8 -o out --data digits --mapping 1", "mapping is '1'", "0:1,1:3"),
    "qat, bad layers": ("qat vit -r w8a8 -o out --data digits --layers x", "layers is 'x'", "whole numbers"),
    "qat, no setting": ("qat vit -r w8a8 -o out --data digits --set fp16", "--set fp16", "NAME=VALUE"),
    "qat, bad setting": (
        "qat vit -r w8a8 -o out --data digits --set num_train_epochs=abc",
        "cannot be 'abc'",
        "number",
    ),
    "qat, unknown setting": ("qat vit -r w8a8 -o out --data digits --set optimizer=x", "has no 'optimizer'", "optim?"),
    "qat, decided setting": (
        "qat vit -r w8a8 -o out --data digits --set save_steps=2",
        "evaluations decides",
    ),
    "brackets": ("eval 'no [such] folder/[/x]' --data digits", "no such folder: no [such] folder/[/x]"),
    "qat, no epochs": ("qat vit -r w8a8 -o out --data digits --epochs 0", "epochs is 0", "more than 0"),
    "qat, quantized teacher": ("qat packed -r w8a8 -o out --data digits", "quantized already", "float model"),
    "qat, another kind of student": (
        "qat vit -r w8a8 -o out --data digits --student bert",
        "bert reads input_ids",
        "vit reads pixel_values",
    ),
    "eval, no metric": ("eval bert --data texts --metric top2", "no metric 'top2'", "there are accuracy"),
    "eval, loss": ("eval bert --data texts --metric loss", "no metric 'loss'", "there are accuracy"),
    "quantize, no metric": ("quantize bert -r w8a8 -o out --data texts --metric mcc", "no metric 'mcc'", "accuracy"),
    "quantize, no own metric": ("quantize bert -r w8a8 -o out --data texts --metric no:where", "no no:where"),
    "bits without target": ("ptq vit -r w8a8 -o out --data digits --bits 4,6", "--bits says nothing without --target"),
    "paper without target": ("ptq vit -r w8a8 -o out --data digits --sensitivity paper", "nothing without --target"),
    "steps without intervention": (
        "qat vit -r w8a8 -o out --data digits --intervene-steps 9",
        "--intervene-steps says nothing without --intervene",
    ),
    "grid without curvature": (
        "analyze packed --teacher vit -o out --data digits --grid 9",
        "--grid says nothing without --curvature",
    ),
    "metric without data": ("export packed -o out --metric f1", "--metric says nothing without --data"),
    "columns without data": (
        "export packed -o out --columns a,b --max-length 9",
        "--columns, --max-length say nothing",
    ),
    "quantize, samples without data": ("quantize vit -r ternary -o out --samples 9", "--samples says nothing without"),
    "quantize, labels without data": ("quantize vit -r ternary -o out --labels order", "--labels says nothing without"),
    "metric of an export": ("export packed -o out --data digits --metric f1", "--metric says nothing in an export"),
    "form of a float model": ("export vit -o out --form nbits --safe", "--form, --safe say nothing of a float model"),
    "form of an own format": (
        "export vit -o out --to json:dumps --form nbits",
        "--form says nothing with --to json:dumps",
    ),
    "data of an own format": ("export vit -o out --to json:dumps --data digits", "--data says nothing with --to json:"),
    "length of images": ("bench packed --length 9", "--length says nothing of a model that reads no texts"),
    "temperature of no map": (
        "qat vit -r w8a8 -o out --data digits --distill prediction --map-temperature 2 --layers 0",
        "--map-temperature, --layers say nothing with the terms prediction",
    ),
    "no demo": ("demo penguins", "no demo 'penguins'", "digits, minilm or all"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(inside: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str) -> None:
    """A bad input ends with exit code 1 and one line that says what and what to do, before work, without a trace."""
    line, *parts = BAD[name]
    before = tree(inside)
    for step in ("predict", "calibrate", "pack", "save"):
        monkeypatch.setattr(jobs, step, lambda *_, step=step, **__: pytest.fail(f"{step} ran first"))
    ran = command(f"bittern {line}")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert all(part in ran.err for part in parts), ran.err
    assert tree(inside) == before
    assert capfd.readouterr() == ("", "")  # past sys.stdout and sys.stderr


@pytest.mark.parametrize("name", [name for name in BAD if name.startswith("output")])
def test_output_is_checked_first(inside: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """An output that cannot be written is refused before the model is even loaded."""
    monkeypatch.setattr(jobs, "load", lambda *_: pytest.fail("the model was loaded first"))
    assert command(f"bittern {BAD[name][0]}").code == 1


def test_a_real_refusal(place: Path) -> None:
    """In a process of its own, too, a bad input is one line on stderr: no warnings, no logs of libraries."""
    arguments = ["-m", "bittern", "eval", "bert", "--data", "damaged.parquet"]
    ran = subprocess.run([sys.executable, *arguments], cwd=place, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("error: cannot read data from 'damaged.parquet'")
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("quantize vit --recipe w8a8", "--out"),
        ("quantize vit --out out", "--recipe"),
        ("quantize vit -r w8a8 -o out --samples 0", "--samples"),
        ("quantize vit -r w8a8 -o out --batch-size many", "--batch-size"),
        ("quantize vit -r w8a8 -o out --bits 3", "--bits"),
        ("eval vit", "--data"),
        ("inspect", "MODEL"),
        ("quantise vit", "quantize"),
    ],
)
def test_usage(inside: Path, line: str, part: str) -> None:
    """A command that is typed wrongly ends with exit code 2 and says which part is meant."""
    before = tree(inside)
    ran = command(f"bittern {line}")
    assert (ran.code, ran.out) == (2, "")
    assert part in ran.err.splitlines()[-1]
    assert "Traceback" not in ran.err
    assert tree(inside) == before


# What a terminal cannot show, and what is no known error


def test_ascii(place: Path, tmp_path: Path) -> None:
    """Where the terminal knows no Unicode a command prints plain letters, and ends as it does elsewhere."""
    line = f"-m bittern quantize vit -r ternary-2-2-8 --data digits -o {tmp_path}/out"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    arguments = [sys.executable, *line.split()]
    ran = subprocess.run(arguments, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.isascii()
    assert "max error simulated-packed" in ran.stdout


def test_brackets(inside: Path, tmp_path: Path) -> None:
    """Brackets in paths are what they are: in messages, in tables, in what comes next, and in a hint to install."""
    out = tmp_path / "a[b" / "c]" / "[/red]"
    text = succeed(f"bittern quantize vit -r ternary-2-2-8 -o '{out}'")
    assert f"Wrote {out}. Next: bittern inspect {out}" in text
    assert bittern.inspect(out)["state"] == "packed"


def test_warning(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning is one line for people: without the place in the source that gave it."""
    monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)  # which the command changes
    monkeypatch.setattr(jobs, "predict", lambda *_: warnings.warn("slow\nhere", stacklevel=1) or torch.eye(10)[:, :10])
    monkeypatch.setattr(jobs, "metrics", lambda *_: {})
    monkeypatch.setattr(jobs, "check_classes", lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr("warnings.showwarning", lambda *given: sys.stderr.write(warnings.formatwarning(*given[:4])))
        assert command("bittern eval vit --data digits").err == "warning: slow here\n"


def test_json_without_numbers(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no number is null in JSON, which has no NaN."""
    monkeypatch.setattr(jobs, "evaluate", lambda *_, **__: {"similarity": math.nan, "rows": [{"perplexity": math.inf}]})
    assert json.loads(succeed("bittern eval vit --data digits --json"), parse_constant=pytest.fail) == {
        "similarity": None,
        "rows": [{"perplexity": None}],
    }


def test_missing_extra(inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint to install an extra names the extra."""
    monkeypatch.setattr("bittern.deploy.onnx.export.find_spec", lambda _: None)
    assert "pip install bittern[onnx]" in command(f"bittern export packed -o {tmp_path}/out.onnx").err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError()])
def test_out_of_memory(inside: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Where there is not enough memory, one line says so and what to do."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(jobs, "predict", fail)
    ran = command("bittern eval vit --data digits")
    assert ran.code == 1
    assert re.fullmatch("error: out of memory .*; give a smaller --batch-size, .*\n", ran.err)


def test_collapse(inside: Path, tmp_path: Path) -> None:
    """A model that lost much is said to have, with what to try; one that lost nothing gets no advice."""
    lost = succeed(f"bittern quantize vit -r ternary-2-2-8 --data digits -o {tmp_path}/ternary")
    assert re.search(r"lost: accuracy 0\.98\d+ in float, 0\.\d+ now\. What to try: \w+", lost)
    kept = succeed(f"bittern quantize vit -r w8a8 --data digits -o {tmp_path}/w8a8")
    assert "Less than 1 % was lost: accuracy" in kept
    assert "What to try" not in kept


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long work tells where it is, in a line now and then, if stderr is no terminal; short work is silent."""
    clock = itertools.count(0.0, 20.0)
    monkeypatch.setattr("bittern.show.time.monotonic", lambda: next(clock))
    with redirect_stderr(io.StringIO()) as err:
        assert list(show.track(["a", "b", "c", "d"], "reading [x]")) == ["a", "b", "c", "d"]
    assert err.getvalue().splitlines() == ["reading [x]: 2 of 4", "reading [x]: 4 of 4"]


# ptq


def test_ptq_json(inside: Path, tmp_path: Path) -> None:
    """`ptq --json` prints losses before and after, seconds and memory; the file gives what was simulated."""
    result = one_object(succeed(f"bittern ptq vit --data digits -r w8a8 -m omse --samples 20 -o {tmp_path}/out --json"))
    found = result["ptq"]
    assert (found["method"], found["inputs"], found["samples"], found["bits"]) == ("omse", "parallel", 20, {})
    assert len(found["solved"]) == 33
    assert all({"name", "before", "after", "rounds", "scales", "folded"} == s.keys() for s in found["solved"])
    assert all(0 <= s["after"] < 0.01 for s in found["solved"])
    assert found["peak_memory"] > 1e7
    assert all(seconds >= 0 for seconds in found["seconds"].values())
    assert result["packed"]["agreement"] > 0.98
    assert result["max_error_simulated_packed"] == 0
    assert json.loads((tmp_path / "out" / "bittern.json").read_text())["ptq"] == found
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ptq_mixed(inside: Path, tmp_path: Path) -> None:
    """With a target the widths are printed and in the JSON, and the file has that many bits a weight, and scales."""
    line = f"bittern ptq vit --data digits -r w8a8 -m minmax --samples 16 --target 5 --bits 4,6 -o {tmp_path}"
    found = one_object(succeed(f"{line}/a --json"))["ptq"]
    assert set(found["bits"].values()) == {4, 6}
    assert len(found["bits"]) == 8
    assert len(found["frontier"]) > 8
    printed = succeed(f"{line}/b")
    chosen = " ".join(f"{part} {bits}" for part, bits in found["bits"].items())
    assert f"bits: {chosen}" in printed
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_ptq_of_fewer_samples(inside: Path, tmp_path: Path) -> None:
    """Where the data has fewer samples than asked for, all are used, and their number is told."""
    line = f"bittern ptq bert --data texts -r w8a8 -m minmax --samples 500 -o {tmp_path}"
    assert one_object(succeed(f"{line}/a --json"))["ptq"]["samples"] == len(TEXTS)
    assert f"method minmax, {len(TEXTS)} samples" in succeed(f"{line}/b")


def test_ptq_goes_on(inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a crash the same command goes on and prints the same; another recipe is refused; no work folder is left."""
    line = "bittern ptq vit --data digits -m omse --samples 16 -r {} -o {} --json"
    save = Journal.save
    saved: list[str] = []

    def crash(journal: Journal, part: str, tensors: Any, notes: Any) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(part)
        save(journal, part, tensors, notes)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "save", crash)
        assert command(line.format("w4a8", tmp_path / "out")).code == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.work"]
    ran = command(line.format("w8a8", tmp_path / "out"))
    assert (ran.code, ran.out) == (1, "")
    assert "another recipe" in ran.err
    results = [one_object(succeed(line.format("w4a8", tmp_path / name))) for name in ("out", "fresh")]
    for result in results:
        for key in ("seconds", "peak_memory"):
            del result["ptq"][key]
        del result["out"]
    assert results[0] == results[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out"]
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "fresh")}) == 1


# Ctrl-C


@pytest.mark.parametrize(
    "step", ["jobs.load", "jobs.calibrate", "jobs.pack", "deploy.store.copy_companions", "deploy.files._replace"]
)
@pytest.mark.parametrize("out", ["out", "packed"])
def test_interrupted(inside: Path, monkeypatch: pytest.MonkeyPatch, step: str, out: str) -> None:
    """Ctrl-C at any step exits with 130, leaves nothing behind, and an output to replace stays as it was."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = tree(inside)
    monkeypatch.setattr(f"bittern.{step}", interrupt)
    ran = command(f"bittern quantize vit -r w8a8 --data digits -o {out} --force")
    assert (ran.code, ran.out) == (130, "")
    assert ran.err == "interrupted; nothing was left half-written\n"
    assert tree(inside) == before


def read(terminal: int) -> bytes:
    """What was written to a terminal; nothing once its other side is closed."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_interruption_of_the_start(place: Path) -> None:
    """Ctrl-C while libraries are still being imported is one line, too."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bittern", "inspect", f"{place}/vit"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (background jobs ignore it)
    )
    assert process.stderr is not None
    while "torch." not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.endswith("interrupted; nothing was left half-written\n")
    assert "Traceback" not in err


def test_an_interruption_that_others_make_an_error_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal that comes while the code of others runs, which makes an error of its own of it, ends the command."""

    def run(**_: Any) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise ModelError("torch.onnx cannot export: failed to unpack") from error

    monkeypatch.setattr(commands, "app", run)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 143
    assert capsys.readouterr().err == "interrupted; nothing was left half-written\n"


@pytest.mark.parametrize(
    ("signals", "code"),
    [([signal.SIGINT], 130), ([signal.SIGTERM], 143), ([signal.SIGINT, signal.SIGINT], 130)],
    ids=["Ctrl-C", "SIGTERM", "Ctrl-C twice"],
)
def test_a_real_interruption(place: Path, tmp_path: Path, signals: list[signal.Signals], code: int) -> None:
    """SIGINT or SIGTERM while the progress bar of a long job runs exits with 130 or 143 and leaves no file."""
    data = write_tables(tmp_path / "data", text=TEXTS * 100, label=LABELS * 100)
    ours, theirs = pty.openpty()
    arguments = ["quantize", f"{place}/bert", "-r", "w8a8", "--data", str(data), "-o", "out", "--batch-size", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bittern", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (background jobs ignore it)
    )
    os.close(theirs)
    seen = b""
    while not re.search(rb"[1-9]/4000", seen):  # the float model runs on 4,000 samples one by one
        seen += os.read(ours, 1024)
    for number in signals:
        process.send_signal(number)
    rest: list[bytes] = []
    reading = threading.Thread(target=lambda: rest.extend(iter(lambda: read(ours), b"")))  # a full terminal would block
    reading.start()
    out, _ = process.communicate(timeout=60)
    reading.join()
    os.close(ours)
    seen += b"".join(rest)
    assert (process.returncode, out) == (code, "")
    assert b"interrupted; nothing was left half-written" in seen or len(signals) == 2  # the second ends it at once
    assert b"Traceback" not in seen
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
