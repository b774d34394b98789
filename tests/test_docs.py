"""What the documents show is run as it stands: commands, Python and recipes; and their links lead somewhere."""

import os
import re
import runpy
import shlex
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bittern import demo, jobs
from bittern.recipe import Recipe, load_recipe, recipe_names
from material import TEXTS, command, save_text_model, write_tables

ROOT = Path(__file__).parents[1]
RUNNABLE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *RUNNABLE[1:]]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


class Block(NamedTuple):
    """A fenced block: its file and line, its language, and its text."""

    place: str
    language: str
    text: str


def blocks(*languages: str) -> Iterator[Block]:
    """The fenced blocks of all documents that are to be run, in order."""
    for path in RUNNABLE:
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


def test_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands and all Python of the documents run, in order, in one empty folder."""
    monkeypatch.chdir(tmp_path)
    texts, labels = clear_texts(save_text_model(Path("my-bert")))  # what the pages call the reader's own
    write_tables(Path("reviews"), text=texts, label=labels)
    shown = list(blocks("sh", "python"))
    names: dict[str, dict[str, Any]] = defaultdict(lambda: {"__name__": "document"})  # a page goes on where it was
    # The demo's own test measures; here it only has to leave its files: one step of training, no fresh processes.
    monkeypatch.setattr(demo, "TRAINING", replace(demo.TRAINING, steps=1))
    monkeypatch.setattr(demo, "_start_check", lambda packed, data, other: (packed, data, other))
    monkeypatch.setattr(demo, "_finish_check", lambda job: jobs.evaluate(job[0], job[1], against=job[2]))
    assert {block.language for block in shown} == {"sh", "python"}
    for block in shown:
        if block.language == "sh":
            for line in block.text.replace("\\\n", " ").splitlines():
                check_line(line, block.place)
        else:
            exec(compile(block.text, block.place, "exec"), names[block.place.partition(":")[0]])


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
