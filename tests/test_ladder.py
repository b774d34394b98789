"""`compress`: the ladder, what is within the limit, how sure that is, and what a second call repeats."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

import bittern
from bittern.analysis.report import write_page
from bittern.data import Data, evaluate, load_splits
from bittern.data.evaluate import metrics, predict
from bittern.demo import DIGITS
from bittern.deploy.journal import Journal
from bittern.errors import BitternError, InputError
from bittern.ladder import (
    LADDER,
    Rung,
    Workshop,
    choose_rung,
    climb,
    compress,
    interval,
    paired_loss,
)
from bittern.layers import formats, simulate
from bittern.recipe import keep_wide, load_recipe, with_bits
from families import SUPPORTED, TEXT

Z95 = 1.6448536  # 95 % of a normal distribution lie below
SHORT = ((Rung("w8a8", "extremes", "w8a8"),), (Rung("w4a8", "extremes"),), (Rung("w2a8", "extremes", bits=2),))


@pytest.fixture(scope="module")
def digits() -> tuple[PreTrainedModel, Data]:
    """The ViT of the demo, and its test data."""
    model = bittern.load(DIGITS)
    _, test = load_splits("digits", model, DIGITS)
    assert test is not None
    return model, test


def outputs(classes: Iterable[int]) -> torch.Tensor:
    """Logits that choose these of ten classes."""
    return torch.nn.functional.one_hot(torch.tensor(list(classes)), 10).float()


def test_loss_of_pairs(digits: tuple[PreTrainedModel, Data]) -> None:
    """Of 100 samples, 6 lost and 2 won: 4 points, and the adjusted interval of Agresti and Min (2005)."""
    model, test = digits
    data = replace(test.subset(100), labels=torch.zeros(100, dtype=torch.long))
    reference = outputs([1, 1] + [0] * 98)  # the first two are wrong
    output = outputs([0, 0] + [0] * 92 + [1] * 6)
    loss = paired_loss("accuracy", model, data, output, reference)
    lost, won, n = 6.5, 2.5, 102.0  # half a sample more in each cell of the table
    error = math.sqrt(lost + won - (lost - won) ** 2 / n) / n
    ends = {"at_most": 4 + 100 * Z95 * error, "at_least": 4 - 100 * Z95 * error}
    assert loss == pytest.approx({"points": 4.0, "error": 100 * error, "samples": 100, **ends})
    same = paired_loss("accuracy", model, data, reference, reference)
    assert (same["points"], same["error"]) == (
        0,
        pytest.approx(100 / 102),
    )  # no difference on few samples is not certainty


def test_loss_by_bootstrap(digits: tuple[PreTrainedModel, Data]) -> None:
    """For a mean over samples the bootstrap's standard error is the textbook's, and lower perplexity is better."""
    data = digits[1].subset(200)
    model, _ = SUPPORTED["gpt2"]()
    draw = torch.Generator().manual_seed(1)
    reference = torch.rand(200, 5, 2, generator=draw)
    output = reference + 0.1 * torch.rand(200, 5, 2, generator=draw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "metrics", lambda model, data, out: {"perplexity": out[..., 0].mean().exp().item()})
        loss = paired_loss("perplexity", model, data, output, reference)
    gaps = (output - reference)[..., 0].mean(1)
    ratio = gaps.mean().exp().item()
    assert loss["points"] == pytest.approx(100 * (ratio - 1), rel=1e-4)
    assert loss["error"] == pytest.approx(100 * ratio * gaps.std().item() / math.sqrt(200), rel=0.15)


def token_data(task: str) -> tuple[PreTrainedModel, Data, torch.Tensor, torch.Tensor]:
    """A model that tells of tokens, 40 texts of 5 tokens, and two outputs for them, the second of which is better."""
    heads = {"answers": hf.BertForQuestionAnswering, "masked": hf.BertForMaskedLM}
    config = hf.BertConfig(**TEXT, num_labels=2)
    answer = {"spans": [(2 * t, 2 * t + 1) for t in range(5)], "context": "v w x y z", "answers": ["w"]}
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (40, 5), generator=draw)
    rows: list[dict[str, Any]] = [{"input_ids": [5, 6, 7, 8, 9], "labels": own.tolist()} for own in labels]
    if task == "answers":
        rows = [{"input_ids": row["input_ids"], "start_positions": 1, **answer} for row in rows]
    right = torch.nn.functional.one_hot(labels.flatten(), 2).float()
    if task == "answers":
        right = torch.tensor([[0.0, 1, 0, 0, 0]] * 40).flatten().unsqueeze(-1).expand(200, 2)  # start and end
    if task == "masked":
        right = torch.stack([torch.zeros(200), labels.flatten().float()], -1)
    worse, better = (right + spread * torch.rand(200, 2, generator=draw) for spread in (3, 1.5))
    model = heads.get(task, hf.BertForTokenClassification)(config).eval()
    return model, Data(task, rows, None, lambda rows: {}, 8), worse, better


@pytest.mark.parametrize(
    ("task", "metric"),
    [("tags", "accuracy"), ("tags", "agreement"), ("answers", "exact_match"), ("masked", "perplexity")],
)
def test_loss_of_tokens(task: str, metric: str) -> None:
    """Where a model tells of tokens, its loss is that of the metric, and its standard error that of whole texts."""
    model, data, worse, better = token_data(task)
    loss = paired_loss(metric, model, data, worse, better)
    before, after = (metrics(model, data, output, better)[metric] for output in (better, worse))
    points = after / before - 1 if metric == "perplexity" else before - after
    assert points > 0
    assert loss["points"] == pytest.approx(100 * points)
    texts = [
        [metrics(model, data.take([i]), o[5 * i : 5 * i + 5], better[5 * i : 5 * i + 5])[metric] for i in range(40)]
        for o in (worse, better)
    ]
    texts = [[math.log(value) for value in values] if metric == "perplexity" else values for values in texts]
    spread = torch.tensor(texts).diff(dim=0).std().item() / math.sqrt(40)
    assert loss["error"] == pytest.approx(100 * spread * (after / before if metric == "perplexity" else 1), rel=0.15)


def test_loss_of_several_labels() -> None:
    """The accuracy of a classifier with several labels is that of all of them, not of the largest logit."""
    model = hf.BertForSequenceClassification(
        hf.BertConfig(**TEXT, num_labels=3, problem_type="multi_label_classification")
    )
    labels = torch.tensor([[1.0, 1, 0]] * 20)
    data = Data("several", [("a",)] * 20, labels, lambda rows: {}, 8)
    right, wrong = 2 * labels - 1, torch.tensor([[1.0, -1, -1]] * 20)  # whose largest logit is right
    assert paired_loss("accuracy", model, data, wrong, right)["points"] == 100
    unlabelled = replace(data, labels=None)
    assert paired_loss("agreement", model, unlabelled, wrong, right)["points"] == pytest.approx(100 / 3)


class Bench(Workshop):
    """A workshop that makes nothing, and measures what it is told."""

    def __init__(self, losses: dict[str, float], minutes: float = 0) -> None:
        self.losses, self.minutes, self.made = losses, minutes, list[str]()

    def make(self, rung: Rung) -> None:
        self.made.append(rung.name)

    def measure(self, rung: Rung) -> dict[str, Any]:
        return {"rung": rung.name, **interval(self.losses[rung.name], 0.2, 100)}


def steps(*names: str) -> list[list[Rung]]:
    """A ladder from names of rungs: of one step separated by spaces; capitals are trained."""
    return [[Rung(n, "train" if n.isupper() else "search") for n in step.split()] for step in names]


@pytest.mark.parametrize(
    ("ladder", "losses", "made"),
    [
        (steps("a b", "c", "d"), {"a": 0.5, "c": 0.7, "d": 0.9}, "acd"),  # the first of a step is enough
        (steps("a b", "c"), {"a": 0.9, "b": 0.1, "c": 0.2}, "abc"),  # not within one standard error: 1.1
        (steps("a", "b", "c", "T"), {"a": 0.0, "b": 1.4, "c": 0.0, "T": 0.5}, "abT"),  # fails clearly: only training
        (steps("a", "b", "c"), {"a": 0.0, "b": 1.2, "c": 3.0}, "abc"),  # fails, not clearly
    ],
)
def test_climb(ladder: list[list[Rung]], losses: dict[str, float], made: str, tmp_path: Path) -> None:
    """Rungs are tried from safe to small, until one fails clearly; what was measured is not made again."""
    bench, journal = Bench(losses), Journal(tmp_path / "rungs", {"model": "x"})
    rows = list(climb(ladder, bench, journal, 1.0))
    assert "".join(row["rung"] for row in rows) == "".join(bench.made) == made
    assert all(row["within"] == (losses[row["rung"]] + 0.2 <= 1) for row in rows)
    again = Bench(losses)
    assert list(climb(ladder, again, Journal(tmp_path / "rungs", {"model": "x"}), 1.0)) == rows
    assert again.made == []


def test_keep_makes_one_rung(tmp_path: Path) -> None:
    """A rung to keep is made alone: though another one of its step is enough, a larger one failed, or nothing was
    measured yet; what was measured before is shown too."""
    ladder, losses = steps("a b", "c", "d e"), {"a": 0.5, "b": 0.4, "c": 9.0, "d": 9.5, "e": 9.1}
    journal = Journal(tmp_path / "rungs", {"model": "x"})
    for keep, made, shown in (("b", "b", "b"), (None, "ac", "ac"), ("e", "e", "abce"), ("e", "", "abce")):
        bench = Bench(losses)
        rows = list(climb(ladder, bench, journal, 1.0, keep))
        assert ("".join(bench.made), "".join(row["rung"] for row in rows)) == (made, shown)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"ladder": [[Rung("a", "search"), Rung("b", "search")], [Rung("a", "search", bits=3)]]},
            "two rungs of one name",
        ),
        ({"ladder": [[Rung("../a", "search")]]}, "whose name is none of a folder"),
        ({"ladder": [[Rung("a", "train")]]}, "no rung without --train"),
        ({"ladder": [[Rung("a", "search", "w8a8", bits=3)]]}, "no weights of 4 bits that could have 3"),
        ({"keep": "ternary"}, "no rung 'ternary' to keep; .*; trained ones with --train only"),
        ({"max_loss": math.inf}, "--max-loss is inf"),
        ({"max_loss": -1.0}, "--max-loss is -1"),
        ({"train_minutes": math.inf}, "--train inf"),
    ],
)
def test_what_no_ladder_can_be(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    """Ladders and limits that make no sense are refused in one line, before any rung is made."""
    with pytest.raises(BitternError, match=told):
        compress(DIGITS, tmp_path / "out", data="digits", **options)
    assert not list(tmp_path.glob("out.rungs/*/"))


def test_foreign_rungs(tmp_path: Path) -> None:
    """A folder of other files where rungs would be kept is refused before anything is read."""
    (tmp_path / "out.rungs").mkdir()
    (tmp_path / "out.rungs" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"out\.rungs holds files but no job\.json"):
        compress(tmp_path / "no-model", tmp_path / "out", data="digits")


def test_estimate_of_what_is_left(tmp_path: Path) -> None:
    """The estimate before the work names only the rungs that are not measured yet."""
    told: list[Any] = []
    for limit in (9.0, 8.0):
        compress(
            DIGITS,
            tmp_path / "out",
            data="digits",
            ladder=SHORT[:1],
            max_loss=limit,
            force=True,
            on_estimate=told.append,
        )
    assert [list(seconds) for seconds in told] == [["w8a8"], []]


def test_rungs_that_are_deleted_meanwhile(tmp_path: Path) -> None:
    """Rungs that are made after somebody deleted their folder are known by the next call."""
    bench, known = Bench({"a": 0.5, "b": 0.6}), {"model": "x"}
    rows = climb(steps("a", "b"), bench, Journal(tmp_path / "rungs", known), 1.0)
    next(rows)
    shutil.rmtree(tmp_path / "rungs")
    (tmp_path / "rungs" / "b").mkdir(parents=True)  # as by the rung that was being made
    next(rows)
    kept = Journal(tmp_path / "rungs", known)
    assert kept.load("a") is None
    assert kept.load("b") is not None


def test_rungs_that_are_others_now(tmp_path: Path) -> None:
    """A rung of one's own that is another by the same name, by its options or its recipe's file, is made anew."""
    recipe, losses = tmp_path / "own.yaml", {"a": 0.5}
    for text, rung in (
        ("name: own\nrules:\n  - weight: {bits: 8}\n", Rung("a", "search", str(recipe))),
        ("name: own\nrules:\n  - weight: {bits: 4}\n", Rung("a", "search", str(recipe))),
        ("name: own\nrules:\n  - weight: {bits: 4}\n", Rung("a", "search", str(recipe), bits=5)),
    ):
        recipe.write_text(text)
        for made in (["a"], []):
            bench = Bench(losses)
            list(climb([[rung]], bench, Journal(tmp_path / "rungs", {"model": "x"}), 1.0))
            assert bench.made == made


def test_limits_that_the_data_cannot_tell(tmp_path: Path) -> None:
    """Too few samples for a limit are told of before work; metrics of which nothing can be lost are refused."""
    told = "180 samples to choose by are too few for a limit of 0.1: even a rung that changes no answer may lose 0.55"
    with pytest.warns(UserWarning, match=told), pytest.raises(InputError, match="no rung is within"):
        compress(DIGITS, tmp_path / "out", data="digits", ladder=SHORT[2:], max_loss=0.1)
    with pytest.raises(InputError, match="no share of max_difference can be lost, which is 0 for the float model"):
        compress(DIGITS, tmp_path / "other", data="digits", metric="max_difference")
    with pytest.raises(InputError, match="no metric 'top2'"):
        compress(DIGITS, tmp_path / "other", data="digits", metric="top2")


def test_choose() -> None:
    """The goal decides between rungs within the limit on both halves; none is an error that names the nearest."""
    table = [("a", 100, 1.1, True), ("b", 40, 1.25, True), ("c", 35, 1.05, True), ("d", 10, 9.0, False)]
    rows = [{"rung": n, "file": f, "faster": t, "within": w, "points": 1.0, "error": 0.1} for n, f, t, w in table]
    for row, busy in zip(rows, (1.0, 4.0, 2.0, 1.0), strict=True):
        row["latency_ms"] = busy / row["faster"]  # it was measured while the machine had other work
    other = {"a": 1.0, "b": 1.2, "c": 0.9, "d": 0.0}

    def again(row: dict[str, Any]) -> dict[str, Any]:
        return interval(other[row["rung"]], 0.1, 50)

    def chosen(limit: float) -> list[str]:
        goals = "size", "speed", "balanced"
        return [choose_rung(copy.deepcopy(rows), goal, limit, again)[0]["rung"] for goal in goals]

    assert chosen(1.2) == ["c", "b", "b"]
    assert chosen(1.0) == ["c", "a", "c"]  # b loses more on the other half
    _, why, loss = choose_rung(tried := copy.deepcopy(rows), "speed", 1.0, again)
    assert [row["rung"] for row in tried if not row["within"]] == ["b", "d"]
    assert why.endswith("of 4 measured; on the other half b loses 1.20")
    assert loss["at_most"] == pytest.approx(1.0 + 1.96 * 0.1, abs=1e-4)  # the second look
    assert choose_rung(rows, "size", 1.0, again)[2]["at_most"] == pytest.approx(0.9 + Z95 * 0.1, abs=1e-4)
    told = r"on both halves .* \(on the other c loses 0\.90, b loses 1\.20\); nearest is c, 0\.90 ± 0\.10: give more"
    with pytest.raises(InputError, match=told):  # not d, whose loss is known on one half only
        choose_rung(rows[1:], "size", 0.85, again)
    with pytest.raises(InputError, match=r"nearest is d, 1\.00 ± 0\.10: raise --max-loss"):
        choose_rung(rows[3:], "size", 0.5, again)
    with pytest.raises(InputError, match=r"1\.00 ± 0\.10: give more labelled data, raise --max-loss"):
        choose_rung(rows[3:], "size", 1.05, again)  # loses no more than that, but is not sure to


def test_recipes(digits: tuple[PreTrainedModel, Data]) -> None:
    """Other widths and wide blocks change weights of 4 bits only, and of the blocks that are named."""
    model = bittern.load(DIGITS)
    blocks = [block.name for block in bittern.read_anatomy(model).blocks]
    simulate(model, keep_wide(with_bits(load_recipe("w4a8"), 3, "w3a8"), blocks[:1], "wide"))
    widths = {name: rule.weight.bits for name, rule in formats(model).items() if rule.weight}
    inside = {name for name in widths if name.startswith(f"{blocks[0]}.")}
    assert inside
    assert all(widths[name] == 8 for name in inside)
    rest = {bits for name, bits in widths.items() if name not in inside and any(name.startswith(b) for b in blocks)}
    assert rest == {3}


def test_ladder_is_sound() -> None:
    """Names of rungs are unique, and every recipe is there."""
    rungs = [rung for step in LADDER for rung in step]
    assert len({rung.name for rung in rungs}) == len(rungs)
    for rung in rungs:
        load_recipe(rung.recipe)


def test_compress(tmp_path: Path, digits: tuple[PreTrainedModel, Data], monkeypatch: pytest.MonkeyPatch) -> None:
    """The written model is the chosen rung, measured on fresh data; another goal or limit makes nothing anew."""
    seen: list[str] = []
    options: dict[str, Any] = {"data": "digits", "ladder": SHORT, "on_rung": lambda row: seen.append(row["rung"])}
    result = compress(DIGITS, tmp_path / "out", max_loss=3, goal="size", **options)
    assert seen[:2] == ["w8a8", "w4a8"]
    assert (result["chosen"], result["how"], result["origin"]) == ("w4a8", "quantize", "test part")
    assert json.loads((tmp_path / "out" / "bittern.json").read_text()).items() <= result.items()
    assert f"accuracy {result['rows'][1]['accuracy']:.4f}, of" in (tmp_path / "out" / "README.md").read_text()
    page = (tmp_path / "out" / "compress.html").read_text()
    assert all(page.count(f'href="#{rung}"') == 2 and page.count(f'id="{rung}"') == 1 for rung in seen)
    model, test = digits
    choice, fresh = test.split(180, 0)
    packed, row = bittern.load(tmp_path / "out"), result["rows"][1]
    assert row["accuracy"] == metrics(packed, choice, predict(packed, choice))["accuracy"]
    accuracies = [metrics(m, fresh, predict(m, fresh))["accuracy"] for m in (model, packed)]
    assert result["fresh"]["points"] == pytest.approx(100 * (accuracies[0] - accuracies[1]), abs=1e-4)
    monkeypatch.setattr(Workshop, "make", None)  # whoever makes a rung fails
    kept = compress(DIGITS, tmp_path / "out", max_loss=2, keep="w8a8", force=True, **options)
    assert (kept["chosen"], bittern.inspect(tmp_path / "out")["recipe"]) == ("w8a8", "w8a8")


def test_page_escapes(tmp_path: Path) -> None:
    """Names of models and rungs are text in the page, whatever they hold."""
    row = {"rung": "<b>", "within": True, "points": 0.5, "error": 0.1, "file": 10, "smaller": 2.0, "bits": 4.0}
    row |= {"accuracy": 0.9, "latency_ms": 1.0, "faster": 2.0}
    fresh = {"samples": 10, "points": 0.5, "at_most": 2.0, "at_least": -1.0}
    result = {"source": "<script>", "metric": "accuracy", "float": 0.9, "float_bytes": 20, "max_loss": 1.0, "why": ""}
    write_page(result | {"rows": [row], "chosen": "<b>", "fresh": fresh}, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "<b>" not in page
    assert "too little data to be sure" in page


def test_page_of_far_losses(tmp_path: Path) -> None:
    """A rung that loses all, or gives no number, lies at the upper end of the plots, and presses no other together."""
    rows = [
        {"rung": name, "within": points < 1, "points": points, "error": 0.1, "file": 10 + i, "smaller": 2.0}
        | {"bits": 4.0, "accuracy": 0.9, "latency_ms": 1.0, "faster": 2.0}
        for i, (name, points) in enumerate({"a": 0.0, "b": 0.9, "far": 80.0, "none": math.nan}.items())
    ]
    fresh = {"samples": 10, "points": 0.5, "at_most": 2.0, "at_least": -1.0}
    result = {"source": "x", "metric": "accuracy", "float": 0.9, "float_bytes": 20, "max_loss": 1.0, "why": ""}
    write_page(result | {"rows": rows, "chosen": "a", "fresh": fresh}, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    a, b, far, none = (float(y) for y in re.findall(r'cy="([\d.]+)"', page)[:4])
    assert 22 <= far == none < b < a < 240
    assert a - b > 40
    assert "far ↑ 80" in page
    assert "none ↑ nan" in page


def test_trained_rung(tmp_path: Path) -> None:
    """A rung that is trained has ternary weights, and keeps to the minutes that it is given."""
    short = ((Rung("ternary", "train", "ternary"),),)
    result = compress(DIGITS, tmp_path / "out", data="digits", ladder=short, train_minutes=0.02, keep="ternary")
    assert result["chosen"] == "ternary"
    assert result["rows"][0]["bits"] < 2.1
    with pytest.raises(InputError, match="no rung 'ternary' to keep"):
        compress(DIGITS, tmp_path / "other", data="digits", ladder=short, keep="ternary")
