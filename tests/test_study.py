"""The whole analysis: from folders to a report, going on after a crash to the same numbers, and its refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from bittern import jobs, load, save, simulate
from bittern.analysis import curvature, study
from bittern.analysis.study import analyze
from bittern.demo import DIGITS
from bittern.errors import CheckpointError, InputError, ModelError
from bittern.options import Curvature
from families import SUPPORTED
from helpers import refused
from material import WORDS, command, save_text_model, succeed, tree, write_tables

FAST = {"samples": 12, "subset": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed image model, text models packed and simulated, a decoder, and texts."""
    place = tmp_path_factory.mktemp("analysis")
    jobs.quantize(DIGITS, "ternary-2-2-8", place / "vit")
    save_text_model(place / "bert")
    jobs.quantize(place / "bert", "ternary-2-2-8", place / "packed")
    simulated = load(place / "bert")
    simulate(simulated, "ternary-2-2-8")
    save(simulated, place / "simulated", processors_from=place / "bert")
    decoder, _ = SUPPORTED["llama"]()
    decoder.save_pretrained(place / "llama")
    words = hf.AutoTokenizer.from_pretrained(place / "bert").backend_tokenizer  # as of GPT-2, which has no [CLS]
    hf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[PAD]").save_pretrained(place / "llama")
    jobs.quantize(place / "llama", "ternary-2-2-8", place / "small-llama")
    write_tables(place / "texts", sentence=[" ".join(WORDS[4 : 6 + i % 9]) for i in range(12)], label=[0, 1, 2] * 4)
    return place


def without_time(result: dict[str, Any]) -> dict[str, Any]:
    """A result but for the seconds in it, and the paths of what was looked at."""
    for student in result["students"]:
        for name in ("speed", "path", "name", "holds"):
            del student[name]
    return result


@pytest.mark.parametrize("student", ["packed", "simulated"])
def test_texts(place: Path, tmp_path: Path, student: str) -> None:
    """Packed and simulated students of texts give the same numbers, by class of token, and maps with their tokens."""
    result = analyze(place / student, place / "bert", str(place / "texts"), tmp_path / "out", **FAST)
    kept = json.loads((tmp_path / "out" / "report.json").read_text())
    assert kept | {"out": str(tmp_path / "out")} == json.loads(json.dumps(result))
    attention = result["students"][0]["compare"]["attentions"][0]
    assert set(attention["gen"]) == {"all", "[CLS]", "[SEP]", "other"}
    sample = result["shown"][0]
    assert sample["tokens"][0] == "[CLS]"
    assert sample["shape"] == [2, 4, len(sample["tokens"]), len(sample["tokens"])]
    other = "simulated" if student == "packed" else "packed"
    same = analyze(place / other, place / "bert", str(place / "texts"), tmp_path / "other", **FAST)
    assert without_time(same)["students"][0]["compare"] == without_time(result)["students"][0]["compare"]
    assert not (tmp_path / "out.work").exists()


def test_decoder(place: Path, tmp_path: Path) -> None:
    """A language model is analyzed too: its blocks of tokens, its perplexity, causal maps, the first token's class."""
    result = analyze(
        place / "small-llama",
        place / "llama",
        str(place / "texts"),
        tmp_path / "out",
        max_length=10,
        curvature=Curvature(1, 1, 2, 3),
        **FAST,
    )
    student = result["students"][0]
    assert "perplexity" in student["metrics"]
    assert "first" in student["compare"]["attentions"][0]["gen"]
    assert len(student["blocks"]) == 4
    assert all(block["error"] > 0 for block in student["blocks"])
    assert len(student["curvature"]["surface"]["loss"]) == 3


def test_resumes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before its last spectrum, the same call goes on there, without a second pass, to the same numbers."""
    options = FAST | {"curvature": Curvature(2, 2, 2, 3)}
    whole = analyze(place / "vit", DIGITS, "digits", tmp_path / "whole", **options)
    seen: list[float] = []
    top_eigenvalues = curvature.top_eigenvalues

    def dies(hessian: curvature.Hessian, *arguments: int) -> list[float]:
        seen.append(float(hessian.gradient.detach().norm()))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return top_eigenvalues(hessian, *arguments)

    monkeypatch.setattr(curvature, "top_eigenvalues", dies)
    monkeypatch.setattr(study, "MINI_BATCH", 8)
    with pytest.raises(KeyboardInterrupt):
        analyze(place / "vit", DIGITS, "digits", tmp_path / "out", **options)
    assert len(seen) == 2
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(study, "compare", lambda *_, **__: pytest.fail("compared again"))
    monkeypatch.setattr(study._Study, "estimate", lambda self: {})
    result = analyze(place / "vit", DIGITS, "digits", tmp_path / "out", **options)
    assert (len(seen), seen[2]) == (3, pytest.approx(seen[1]))  # the second mini-batch again, not the first
    assert seen[0] != pytest.approx(seen[1])
    own, expected = (r["students"][0]["compare"] for r in (result, whole))
    assert own == expected


def test_other_job(place: Path, tmp_path: Path) -> None:
    """What another analysis left unfinished is not mixed with this one, and the message names what differs."""
    job = study._Study([place / "vit"], DIGITS, "digits", tmp_path / "out", 12, 4, 0, None, study.silent, {})
    job.journal.part("0-compare", lambda: {"anything": 1})
    with refused(InputError, "unfinished run", "another data"):
        analyze(place / "vit", DIGITS, "digits", tmp_path / "out", samples=9, subset=4)


def test_estimate(place: Path, tmp_path: Path) -> None:
    """Before it starts the job tells about how long each part will take."""
    told: list[dict[str, float]] = []
    analyze(
        place / "vit",
        DIGITS,
        "digits",
        tmp_path / "out",
        on_estimate=lambda s: told.append(dict(s)),
        curvature=Curvature(1, 1, 2, 3),
        **FAST,
    )
    assert len(told) == 1
    assert list(told[0]) == ["comparing", "sensitivity", "curvature"]
    assert min(told[0].values()) > 0


def test_models_and_folders_stay(place: Path, tmp_path: Path) -> None:
    """Nothing in the folders of the models changes."""
    before = tree(place)
    analyze(place / "vit", DIGITS, "digits", tmp_path / "out", curvature=Curvature(1, 1, 2, 3), **FAST)
    assert tree(place) == before


def test_overwriting(place: Path, tmp_path: Path) -> None:
    """A report is overwritten by force only, and nothing else than a report at all."""
    analyze(place / "vit", DIGITS, "digits", tmp_path / "out", **FAST)
    with refused(InputError, "exists", "--force"):
        analyze(place / "vit", DIGITS, "digits", tmp_path / "out", **FAST)
    analyze(place / "vit", DIGITS, "digits", tmp_path / "out", force=True, **FAST)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with refused(InputError, "thesis.txt", "no run of Bittern wrote"):
        analyze(place / "vit", DIGITS, "digits", tmp_path / "mine", force=True, **FAST)


def test_refusals(place: Path, tmp_path: Path) -> None:
    """Another kind of model, other data, no such folder and a damaged file of the run: one line, before any work."""
    out = tmp_path / "out"
    with refused(ModelError, "ViTForImageClassification", "BertForSequenceClassification"):
        analyze(place / "vit", place / "bert", str(place / "texts"), out, **FAST)
    with refused(InputError, "digits", "images"):
        analyze(place / "packed", place / "bert", "digits", out, **FAST)
    with refused(InputError, "no such folder"):
        analyze(place / "nothing", place / "bert", str(place / "texts"), out, **FAST)
    with refused(ModelError, f"teacher {place / 'vit'} is quantized", f"{DIGITS} is not", "swapped"):
        analyze(DIGITS, place / "vit", "digits", out, **FAST)
    with refused(ModelError, "is quantized; give the float model"):
        analyze(place / "vit", place / "vit", "digits", out, **FAST)
    with refused(ModelError, "is not quantized"):
        analyze(DIGITS, DIGITS, "digits", out, **FAST)
    shutil.copytree(place / "vit", tmp_path / "damaged")
    (tmp_path / "damaged" / "bittern.json").write_text("{")
    with refused(CheckpointError, "bittern.json"):
        analyze(tmp_path / "damaged", DIGITS, "digits", out, **FAST)
    assert not out.exists()


def test_command(place: Path, tmp_path: Path) -> None:
    """The command prints what stands out and where the report is; an even grid is refused."""
    line = (
        f"bittern analyze {place / 'vit'} --teacher {DIGITS} --data digits --samples 12 --few 4 -o {tmp_path / 'out'}"
    )
    printed = succeed(line)
    assert "1. vit.layers." in printed
    assert "report.html" in printed
    assert (tmp_path / "out" / "report.html").is_file()
    as_json = json.loads(succeed(line + " --force --json"))
    assert as_json["samples"] == 12
    ran = command(line + " --force --curvature --grid 4")
    assert (ran.code, len(ran.err.splitlines())) == (1, 1)
    assert "odd" in ran.err
