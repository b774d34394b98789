"""What the documents show is run as it stands: commands, Python and recipes; and their links lead somewhere."""

import json
import os
import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import transformers as hf
from huggingface_hub import HfApi, RepoUrl
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bittern import demo, jobs
from bittern.recipe import Recipe, load_recipe, recipe_names
from families import SUPPORTED
from material import TEXTS, command, save_text_model, write_tables

ROOT = Path(__file__).parents[1]
RUNNABLE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *RUNNABLE[1:]]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


class Block(NamedTuple):
    """A fenced block: its file and line, its language, and its text."""

    place: str
    language: str
    text: str


def blocks(*languages: str, of: Path | None = None) -> Iterator[Block]:
    """The fenced blocks of a document, or of all that are to be run, in order."""
    for path in RUNNABLE if of is None else [of]:
        text = path.read_text()
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if match[1] in languages:
                line = text.count("\n", 0, match.start()) + 1
                yield Block(f"{path.relative_to(ROOT)}:{line}", match[1], match[2])


def check_line(line: str, place: str) -> None:
    """A line of a shell block: a command of ours, which must end well, or a target of the Makefile."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["make"]:
        assert set(words[1:]) <= TARGETS, f"{place}: no such target: {line}"
    elif words:
        assert words[0] == "bittern", f"{place}: neither bittern nor make: {line}"
        ran = command(line)
        assert ran.code == 0, f"{place}: {line}\n{ran.err}"


def clear_texts(folder: Path) -> tuple[list[str], list[int]]:
    """Texts of which a model is surest, over and over, and its own classes: 8 bits lose none, on whatever machine."""
    model, tokenizer = (auto.from_pretrained(folder) for auto in (AutoModelForSequenceClassification, AutoTokenizer))
    logits = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    best = logits.topk(2).values
    surest = (best[:, 0] - best[:, 1]).argsort(descending=True)[:10]
    return [TEXTS[i] for i in surest] * 40, logits.argmax(-1)[surest].tolist() * 40


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages call the reader's own: models by their task, texts and photos."""
    folder = tmp_path_factory.mktemp("examples")
    texts, labels = clear_texts(save_text_model(folder / "my-bert"))
    write_tables(folder / "reviews", text=texts, label=labels)
    config = hf.AutoConfig.from_pretrained(folder / "my-bert")
    context, answer = "a bittern booms at dawn", {"text": ["at dawn"], "answer_start": [16]}
    write_tables(folder / "questions", question=["a day"] * 20, context=[context] * 20, answers=[answer] * 20)
    for name, kind in (("my-tagger", hf.BertForTokenClassification), ("my-masked", hf.BertForMaskedLM)):
        kind(config).save_pretrained(save_text_model(folder / name))
    config.num_labels = 2
    hf.BertForQuestionAnswering(config).save_pretrained(save_text_model(folder / "my-reader"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "my-masked")
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(folder / "my-masked")
    pooling = Pooling(config.hidden_size, "mean")
    parts = [Transformer(str(save_text_model(folder / "encoder", head=False))), pooling, Normalize()]
    SentenceTransformer(modules=parts).save(str(folder / "my-encoder"))
    SUPPORTED["vit"]()[0].save_pretrained(folder / "my-vit")
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "my-vit")
    for split, kind, i in product(("train", "validation"), ("LABEL_0", "LABEL_1"), range(4)):
        place = folder / "photos" / split / kind
        place.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 20 + 40 * i).convert("RGB").save(place / f"{i}.png")
    return folder


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_run(path: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands and all Python of a document run, in order, in a folder with the reader's own models and data."""
    shutil.copytree(examples, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, Any] = {"__name__": "document"}
    # The demo's own test measures; here it only has to leave its files: one step of training, no fresh processes.
    monkeypatch.setattr(demo, "TRAINING", replace(demo.TRAINING, steps=1))
    later = SimpleNamespace(submit=lambda check, *args: SimpleNamespace(result=lambda: check(*args)))
    monkeypatch.setattr(demo, "ThreadPoolExecutor", lambda _: nullcontext(later))
    monkeypatch.setattr(demo, "_check", lambda packed, data, other: jobs.evaluate(packed, data, against=other))
    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **_: RepoUrl(f"https://huggingface.co/{repo_id}"))
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **_: "")  # there is no network
    for block in blocks("sh", "python", of=path):
        if block.language == "sh":
            for line in block.text.replace("\\\n", " ").splitlines():
                check_line(line, block.place)
        elif file := re.match(r"# (\w+\.py)\n", block.text):  # a module of the reader's own
            Path(file[1]).write_text(block.text)
        else:
            exec(compile(block.text, block.place, "exec"), names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of each notebook runs from top to bottom; none holds outputs, which would grow old."""
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    names: dict[str, Any] = {"__name__": "notebook"}
    for i, cell in enumerate(cells):
        assert cell["outputs"] == []
        exec(compile("".join(cell["source"]), f"{path.name}, cell {i}", "exec"), names)


def test_recipes_are_valid() -> None:
    """Each recipe that a document shows is one: roles, keys and formats are known, and it survives a round trip."""
    shown = [block for block in blocks("yaml") if re.search("^rules:", block.text, re.MULTILINE)]
    assert shown
    for block in shown:
        recipe = Recipe.from_yaml(block.text, block.place)
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_readme_names_the_recipes() -> None:
    """The README lists the recipes that there are."""
    listed = re.search(r"Recipes: (.*?), or your own", (ROOT / "README.md").read_text(), re.DOTALL)
    assert listed
    assert sorted(re.findall("`(.*?)`", listed[1])) == recipe_names()
    assert all(load_recipe(name).name == name for name in recipe_names())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path: Path) -> None:
    """Every relative link points to a file that exists."""
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    relative = [target.partition("#")[0] for target in targets if not re.match(r"\w+:|#", target)]
    missing = [target for target in relative if not os.path.exists(path.parent / target)]
    assert not missing


def test_tables_of_results() -> None:
    """The tables of docs/results.md are those that the benchmarks' JSON files give: `make results` writes them."""
    made = runpy.run_path(str(ROOT / "scripts" / "results.py"))
    page = (ROOT / "docs" / "results.md").read_text()
    assert page.count("<!-- table:") > 15
    assert made["filled"](page) == page


@pytest.mark.parametrize("name", ["concepts.md", "results.md"])
def test_documents_exist(name: str) -> None:
    """The documents that the README leads to are there."""
    assert (ROOT / "docs" / name).is_file()
    assert f"(docs/{name})" in (ROOT / "README.md").read_text()
