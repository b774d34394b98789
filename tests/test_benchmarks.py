"""Benchmark scripts run with the library as it is, and the engines that they compare with compute the same model."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bittern
from families import SUPPORTED
from helpers import quantized

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
LIBRARIES = ("assets.py", "training.py")  # what scripts share


@pytest.fixture(autouse=True)
def among_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])


@pytest.mark.parametrize("script", sorted(p.name for p in SCRIPTS.glob("*.py") if p.name not in LIBRARIES))
def test_scripts_answer_help(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every script finds what it imports, and says what it does."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    assert ended.value.code in (0, None)
    assert "usage" in capsys.readouterr().out


class UnderstoodError(Exception):
    """A script has understood its command, and would begin."""


@pytest.mark.parametrize("page", sorted(path.name for path in (SCRIPTS.parent / "docs").glob("*.md")))
def test_commands_that_documents_name(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command that a document gives for a figure is one that its script takes, names of variants too."""
    from kd import distill_of
    from ti import intervention_of

    read = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser) -> None:
        options = read(self)
        if script.endswith("/kd.py"):
            assert all(distill_of(variant) for variant in options.variants)
        elif script.endswith(("/ti.py", "/plateau.py")):
            assert all(v == "plain" or intervention_of(v, 0) for v in options.variants)
        raise UnderstoodError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    text = (SCRIPTS.parent / "docs" / page).read_text().replace("\\\n", " ")
    for command in re.findall(r"\bpython\s+((?:benchmarks|scripts)/\w+\.py[^`\n]*)", text):
        script, *words = shlex.split(command.replace("$n", "6"), comments=True)
        monkeypatch.setattr(sys, "argv", [script, *words])
        with pytest.raises(UnderstoodError):
            runpy.run_path(str(SCRIPTS.parent / script), run_name="__main__")


def test_tables_have_their_commands() -> None:
    """A command makes each file whose table is in docs/results.md."""
    page = (SCRIPTS.parent / "docs" / "results.md").read_text()
    words = {word for line in re.findall(r"<!-- table: \w+ (.+) -->", page) for word in line.split()}
    names = {word for word in words if not word.isdigit()}
    loops = {n for numbers in re.findall(r"for n in ([\d ]+); do", page) for n in numbers.split()}
    made = "".join(page.replace("$n", n) for n in loops)
    assert not [name for name in sorted(names) if f"/{name}.json" not in made]


def test_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every engine gets a time, a ratio and, where it has a file, its size."""
    bittern.save(quantized("bert", "w8a8")[0], tmp_path / "packed")
    bittern.save(SUPPORTED["bert"]()[0], tmp_path / "float")
    options = ["--against", str(tmp_path / "float"), "--rounds", "2", "--length", "8", "--threads", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["engines.py", str(tmp_path / "packed"), *options])
    runpy.run_path(str(SCRIPTS / "engines.py"), run_name="__main__")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["engines"]
    rivals = ["onnxruntime float32", "onnxruntime int8", "openvino float32", "openvino int8", "ctranslate2 int8"]
    assert list(found) == ["bittern", "torch float32", *rivals]
    assert all(engine["latency_ms"] > 0 and engine["times_ours"] > 0 for engine in found.values())
    assert all(engine["file"] > 0 for name, engine in found.items() if name != "ctranslate2 int8")


def test_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine generates, with each cache that it has."""
    options = ["--hidden", "64", "--layers", "1", "--prompt", "4", "--new", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["generation.py", *options, "--json", str(tmp_path / "out.json")])
    runpy.run_path(str(SCRIPTS / "generation.py"), run_name="__main__")
    found = json.loads((tmp_path / "out.json").read_text())["tokens_per_second"]
    ours = ["pytorch float32", "bittern ternary", "bittern w4a8", "bittern w8a8"]
    ways = ["dynamic cache", "static cache", "plain loop"]
    expected = {f"{name}, {way}" for name in ours for way in ways} | {"onnxruntime float32", "onnxruntime int8"}
    assert found.keys() == expected
    assert all(speed > 0 for speed in found.values())


def test_ctranslate2_runs_the_same_model(tmp_path: Path) -> None:
    """CTranslate2 computes the encoder that it is given, but for its rounding to int8, and no model but BERT."""
    from engines import ctranslate2_engine

    model, batch = SUPPORTED["bert"]()
    batch = {key: value[:1] for key, value in batch.items()}  # the sample without padding
    out: Any = ctranslate2_engine(model, batch, tmp_path)["ctranslate2 int8"]()
    found = torch.from_numpy(np.array(out.last_hidden_state))
    with torch.no_grad():
        expected = model.base_model(**batch).last_hidden_state
    assert (found - expected).norm() < 0.1 * expected.norm()
    assert not hasattr(model.config, "position_embedding_type")
    model, batch = SUPPORTED["vit"]()
    assert ctranslate2_engine(model, batch, tmp_path) == {}


def test_plateau(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each length is a training of its own, done once; the table tells ratios of lengths, the figure shows them."""
    model = Path(bittern.__file__).parent / "assets" / "digits-vit"
    out, figure = tmp_path / "plateau.json", tmp_path / "plateau.svg"
    grid = ["digits", "--lengths", "2", "4", "--samples", "32", "--test-samples", "32", "--seeds", "0"]
    options = [*grid, "--variants", "plain", "gradual-1", "--optimizer", "bertadam", "--evaluations", "1"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["plateau.py", str(model), *options, "--out", str(out)])
        runpy.run_path(str(SCRIPTS / "plateau.py"), run_name="__main__")
    known = json.loads(out.read_text())
    assert [(row["variant"], row["steps"]) for row in known["rows"]] == [
        (variant, steps) for steps in (2, 4) for variant in ("plain", "gradual-1")
    ]
    assert "steps" not in known
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["plateau.py", "--table", str(out), "--figure", str(figure)])
    runpy.run_path(str(SCRIPTS / "plateau.py"), run_name="__main__")
    assert "| divergence | plain |" in capsys.readouterr().out
    assert "<svg" in figure.read_text()


def test_stopped_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training of a grid that was stopped goes on from its last evaluation, and leaves no checkpoints at its end."""
    import kd

    out, measured, calls = tmp_path / "kd.json", kd.metrics, []
    argv = ["kd.py", str(Path(bittern.__file__).parent / "assets" / "digits-vit"), "digits", "--out", str(out)]
    argv += ["--samples", "32", "--test-samples", "32", "--seeds", "0", "--steps", "6", "--evaluations", "3"]
    monkeypatch.setattr(sys, "argv", [*argv, "--variants", "map"])

    def metrics(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # the teacher's, and after 0, 2 and 4 steps
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(kd, "metrics", metrics)
    with pytest.raises(KeyboardInterrupt):
        kd.main()
    kd.main()
    assert len(calls) == 4 + 3  # the teacher's, and after 4 and 6 steps
    [row] = json.loads(out.read_text())["rows"]
    assert [step for step, _ in row["curve"]] == [0, 2, 4, 6]
    assert not list((tmp_path / "kd").iterdir())
    monkeypatch.setattr(sys, "argv", [*argv, "--variants", "map", "--batch-size", "16"])
    with pytest.raises(SystemExit, match=r"holds other runs: batch_size 32, not 16\. Choose another --out"):
        kd.main()
    shown = kd.course(out).splitlines()
    assert shown[0] == "| variant | seed | steps | 0 | 2 | 4 | 6 |"
    assert [line.split(" | ")[2] for line in shown[2:]] == ["accuracy", "divergence"]


def test_errors_by_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any training each signal of the teacher brings what the blocks give nearer to the teacher's."""
    model = Path(bittern.__file__).parent / "assets" / "digits-vit"
    out = tmp_path / "errors.json"
    monkeypatch.setattr(sys, "argv", ["ti.py", str(model), "digits", "--errors", "--out", str(out)])
    runpy.run_path(str(SCRIPTS / "ti.py"), run_name="__main__")
    found = json.loads(out.read_text())
    assert found.keys() == {"alone", "output", "context", "map"}
    assert all(found[mode][-1] < found["alone"][-1] for mode in ("output", "context", "map"))


def test_length_for() -> None:
    """The length that a curve needs lies between two lengths by their logarithms; none that it has not is invented."""
    from plateau import length_for

    curve = [(100, 0.4), (200, 0.2), (400, 0.1)]
    assert length_for(curve, 0.5, -1) == 100
    assert length_for(curve, 0.15, -1) == pytest.approx(200 * 2**0.5)
    assert length_for(curve, 0.1, -1) == pytest.approx(400)
    assert length_for(curve, 0.05, -1) is None
