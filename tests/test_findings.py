"""The sentences about a quantized model: what was lost, where, and advice that fits how it was made."""

from typing import Any

import pytest

from bittern.analysis.findings import advice, measured, place_of_loss, verdict, worst_blocks
from bittern.recipe import Rule, load_recipe

Case = tuple[dict[str, float], dict[str, float]]


def rules(recipe: str) -> list[Rule]:
    """The rules of a ready-made recipe, as the formats of modules that follow them."""
    return list(load_recipe(recipe).rules)


@pytest.mark.parametrize(
    ("metrics", "level", "metric"),
    [
        (({"accuracy": 0.97}, {"accuracy": 0.97}), "kept", "accuracy"),
        (({"accuracy": 0.97}, {"accuracy": 0.98}), "kept", "accuracy"),
        (({"accuracy": 0.97}, {"accuracy": 0.95}), "small", "accuracy"),
        (({"accuracy": 0.97}, {"accuracy": 0.85}), "large", "accuracy"),
        (({"accuracy": 0.97}, {"accuracy": 0.52}), "collapse", "accuracy"),
        (({"accuracy": 0.83, "mcc": 0.58}, {"accuracy": 0.69, "mcc": 0.0}), "collapse", "mcc"),  # one class for all
        (({"accuracy": 0.9, "mcc": 0.8}, {"accuracy": 0.9, "mcc": 0.799}), "kept", "accuracy"),
        (({"mcc": 0.02}, {"mcc": 0.01}), "large", "mcc"),  # not half of it: the float model itself is at chance
        (({"perplexity": 20.0}, {"perplexity": 20.1}), "kept", "perplexity"),
        (({"perplexity": 20.0}, {"perplexity": 900.0}), "collapse", "perplexity"),
        (({"accuracy": 0.9, "agreement": 1.0}, {"accuracy": 0.9, "agreement": 0.5}), "kept", "accuracy"),
        (({}, {"agreement": 0.5, "max_difference": 9.0}), "collapse", "agreement"),
        (({"pearson": 0.9}, {"pearson": float("nan")}), "collapse", "pearson"),
        (({"similarity": 1.0}, {"similarity": 0.97}), "small", "similarity"),
    ],
)
def test_levels(metrics: Case, level: str, metric: str) -> None:
    """A loss is judged by the task's metrics, the agreement with float where there are none, and says the numbers."""
    before, after = metrics
    found = verdict(before, after, rules("w4a4"), "quantize")
    assert found is not None
    assert (found["level"], found["metric"]) == (level, metric)
    assert f"{after[metric]:.4f} now" in found["text"]
    assert ("What to try" in found["text"]) == (level != "kept")
    assert found["text"].endswith(".")
    assert "\n" not in found["text"]


def test_no_metric() -> None:
    """Without any metric that tells there is no verdict, rather than a good one."""
    assert verdict({}, {"max_difference": 3.0}, rules("w8a8"), "ptq") is None


def test_place() -> None:
    """The sentence names the place of the error, and the advice the formats that are to blame for it."""
    text = verdict(
        {"accuracy": 0.97},
        {"accuracy": 0.52},
        rules("w4a4"),
        "ptq",
        where="most of it in block 3",
        blamed="inputs of layers",
    )
    assert text is not None
    assert text["text"] == (
        "The model collapsed: accuracy 0.9700 in float, 0.5200 now; most of it in block 3. What to try: more bits "
        "where they count (bittern ptq --target); else a recipe with more bits for inputs of layers, such as w4a8."
    )


@pytest.mark.parametrize(
    ("recipe", "how", "wanted", "unwanted"),
    [
        ("w8a8", "quantize", "bittern ptq", "more bits"),
        ("w8a8", "ptq", "float for the block", "more bits"),
        ("w8a8", "qat", "--distill unified", "more bits"),
        ("vt-w8a8", "ptq", "float for the block", "more bits"),
        ("w6a6", "quantize", "bittern ptq", "bittern qat"),
        ("w6a6", "ptq", "--target", "bittern qat"),
        ("w4a8", "ptq", "more bits for weights, such as w8a8", "inputs"),
        (
            "w4a4",
            "quantize",
            "more bits for weights, inputs of layers, query and key, map and value, such as w8a8",
            "bittern qat",
        ),
        ("ternary-2-2-8", "quantize", "training (bittern qat), which weights of 2 bits need", "bittern ptq"),
        ("ternary-2-2-8", "ptq", "training (bittern qat), which weights of 2 bits need", "--target"),
        ("ternary-2-2-8", "qat", "more bits for weights, such as w4a8", "which weights of 2 bits need"),
        ("ternary-2-2-8", "", "training (bittern qat)", "bittern ptq"),
    ],
)
def test_advice(recipe: str, how: str, wanted: str, unwanted: str) -> None:
    """Advice fits the formats and what made the model: nothing that it has already, nothing that cannot help."""
    found = advice(rules(recipe), how)
    assert wanted in found
    assert unwanted not in found
    of_block = advice(rules(recipe), how, block="b.1")
    assert "“b.1.*”" in of_block
    assert ("no formats, which keeps it in float" in of_block) == ("w8a8" in recipe)


def test_advice_of_training() -> None:
    """A term that the student did not learn by is added; one that it did gets more weight."""
    learned = ["prediction", "map"]
    assert "the term output too (--distill unified)" in advice(rules("ternary-2-2-8"), "qat", learned)
    more = advice(rules("ternary-2-2-8"), "qat", learned, block="b.1", by_attention=True)
    assert "more weight for the term map (--distill prediction,map=2)" in more


def student_of(**changes: Any) -> dict[str, Any]:
    """What an analysis found of a student with four blocks, the second of which attends to other things."""
    return {
        "how": "ptq",
        "learned": [],
        "blocks": [{"name": f"b.{i}", "error": e} for i, e in enumerate((0.1, 0.4, 0.0, 0.0002))]
        + [{"name": "embeddings, stem and head", "error": 0.01}, {"name": "all", "error": 0.5}],
        "classes": [{"name": n, "error": e} for n, e in (("weights", 0.1), ("inputs of layers", 0.4), ("all", 0.5))],
        "compare": {
            "attentions": [
                {"block": i, "divergence": d} for i, d in enumerate(([0.12, 0.1], [0.1, 0.9], [0.1, 0.1], [0.1, 0.02]))
            ]
        },
    } | changes


def test_worst_blocks() -> None:
    """The worst blocks come by their own error; a head is said to stand out only if it does; a trifle needs nothing."""
    formats = {"b.1.query": rules("w8a8")[-2], "b.0.query": rules("w4a8")[-2], "b.10.x": rules("w4a4")[-2]}
    worst = worst_blocks(student_of(), formats)
    assert [(b["name"], b["block"], b["layer"], b["head"]) for b in worst] == [
        ("b.1", 1, 1, 1),
        ("b.0", 0, 0, 0),
        ("b.3", 3, 3, 0),
    ]
    assert "head 1 is furthest from the teacher's, 9.0 × the median" in worst[0]["found"]
    assert all("none of its heads stands out" in b["found"] for b in worst[1:])
    assert "keeps it in float" in worst[0]["advice"]
    assert "8 bits for weights" in worst[1]["advice"]
    assert worst[2]["advice"].startswith("nothing")
    # in a decoder with two attention modules in each block, and in one whose block runs twice
    both = [{"block": b, "divergence": d} for b, d in ((0, [0.1]), (0, [0.1]), (1, [0.1]), (1, [0.9]))]
    assert worst_blocks(student_of(compare={"attentions": both}), {})[0]["layer"] == 3
    twice = [{"block": b, "divergence": [d]} for b, d in enumerate((0.1, 0.1, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1))]
    assert worst_blocks(student_of(compare={"attentions": twice}), {})[0]["layer"] == 5


def test_place_of_loss() -> None:
    """One block, the rest or no place in particular; weights or the activations that cost most."""
    assert place_of_loss(student_of()) == ("most of it in block 1, mostly from inputs of layers", "inputs of layers")
    even = [{"name": str(i), "error": 0.1} for i in range(6)]
    by_weights = [
        {"name": "weights", "error": 0.3},
        {"name": "query and key", "error": 0.4},
        {"name": "all", "error": 0.5},
    ]
    assert place_of_loss(student_of(blocks=even, classes=by_weights)) == (
        "all over the blocks, mostly from weights",
        "weights",
    )
    rest = [*even[:2], {"name": "embeddings, stem and head", "error": 9.0}, even[0]]
    assert place_of_loss(student_of(blocks=rest))[0].startswith("most of it in the embeddings, stem and head")


def test_measured() -> None:
    """Metrics are those of all test data where each run measured them on as many samples, else of the analysis."""
    of_run = {"samples": 360, "float": {"accuracy": 0.9}, "packed": {"accuracy": 0.8}}
    own = {"metrics": {"accuracy": 0.5}}
    result = {"samples": 64, "teacher": {"metrics": {"accuracy": 0.6}}, "students": [own | {"run": of_run}]}
    assert measured(result) == (360, {"accuracy": 0.9}, [{"accuracy": 0.8}])
    result["students"] = [own | {"run": of_run}, own | {"run": {}}]
    assert measured(result) == (64, {"accuracy": 0.6}, [{"accuracy": 0.5}, {"accuracy": 0.5}])
