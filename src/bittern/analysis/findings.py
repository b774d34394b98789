"""What a quantized model lost, where, and what to try, in plain sentences: of the whole and of its worst blocks."""

import math
from collections.abc import Collection, Iterable, Mapping
from statistics import median
from typing import Any, Literal

from bittern.analysis.charts import short
from bittern.data.evaluate import LOWER_IS_BETTER
from bittern.recipe import Rule

Level = Literal["kept", "small", "large", "collapse"]
LEVELS: dict[Level, tuple[float, str]] = {  # the relative loss that it begins with, and how it is said
    "kept": (-float("inf"), "Less than 1 % was lost"),
    "small": (0.01, "A little was lost"),
    "large": (0.05, "Much was lost"),
    "collapse": (0.25, "The model collapsed"),
}
OF_THE_TEACHER = ("agreement", "similarity")  # metrics that are 1 for the float model itself
NOT_JUDGED = (*OF_THE_TEACHER, "logits_error", "boxes_error", "max_difference")  # where the data has labels
CLASSES = {  # of tensors: the fields of a rule that give their formats
    "weights": ("weight",),
    "inputs of layers": ("input",),
    "query and key": ("query", "key"),
    "map and value": ("map", "value"),
}
STANDS_OUT = 2.0  # times the median divergence of heads
MOST_BLOCKS = 3  # that are named
NEGLIGIBLE = 1e-3  # relative squared error of the output
WIDE, NARROW = 8, 2  # bits that rarely cost anything; bits of weights that need training


def verdict(
    before: Mapping[str, float],
    after: Mapping[str, float],
    formats: Iterable[Rule],
    how: str,
    *,
    learned: Collection[str] = (),
    where: str = "",
    blamed: str = "",
) -> dict[str, Any] | None:
    """Judge a quantized model by its metrics: the `level` of what was lost, the `metric` that tells, how much was
    `lost`, relative, and a `text` for people, with what to try. None without metrics.

    before, after: metrics of the float and of the quantized model, as `data.evaluate.metrics` gives them; agreement
    with the float model counts only where no other metric does. formats: values of `layers.formats` of the quantized
    model. how: what made it, `quantize`, `ptq` or `qat`; learned: the terms of its distillation. where: the place of
    the error, if it is known, such as “most of it in block 3”; blamed: the one of CLASSES that most of it comes from.
    """
    before = dict.fromkeys(OF_THE_TEACHER, 1.0) | dict(before)
    names = [name for name in after if name in before and name not in NOT_JUDGED]
    lost = {name: _lost(name, before[name], after[name]) for name in names or OF_THE_TEACHER if name in after}
    if not lost:
        return None
    levels = {name: sum(value >= start for start, _ in LEVELS.values()) for name, value in lost.items()}
    metric = max(levels, key=lambda name: levels[name])  # the first of those that fare worst
    level: Level = list(LEVELS)[levels[metric] - 1]
    text = f"{LEVELS[level][1]}: {metric.replace('_', ' ')} {before[metric]:.4f} in float, {after[metric]:.4f} now"
    if level != "kept":
        text += f"{where and f'; {where}'}. What to try: {advice(formats, how, learned, blamed=blamed)}"
    return {"level": level, "metric": metric, "lost": lost[metric], "text": text.removesuffix(".") + "."}


def _lost(metric: str, before: float, after: float) -> float:
    """Return the loss relative to the better value; one near 0 (of a correlation) counts as 0.1. NaN: all is lost."""
    if math.isnan(after):
        return 1.0
    return 1 - before / max(after, 1e-12) if metric in LOWER_IS_BETTER else (before - after) / max(before, 0.1)


def advice(
    formats: Iterable[Rule],
    how: str,
    learned: Collection[str] = (),
    *,
    blamed: str = "",
    block: str = "",
    by_attention: bool = False,
) -> str:
    """Say what to try next with a model, or a `block` of it, by its formats and by what made it (see `verdict`).

    by_attention: the block's maps are far from the teacher's.
    """
    given = [(field, fmt.bits) for rule in formats for field, fmt in rule.formats.items()]
    bits = {name: min((b for f, b in given if f in fields), default=WIDE) for name, fields in CLASSES.items()}
    narrow = [name for name in CLASSES if bits[name] < WIDE]
    narrow = [blamed] if blamed in narrow else narrow
    weights = bits["weights"]
    if block and narrow:
        wider = f"a first rule of the recipe with modules: “{block}.*” and 8 bits for {', '.join(narrow)}"
    elif block:
        wider = f"a first rule of the recipe with modules: “{block}.*” and no formats, which keeps it in float"
    elif narrow:
        recipe = "w8a8" if "weights" in narrow and weights >= 4 else "w4a8"
        wider = f"a recipe with more bits for {', '.join(narrow)}, such as {recipe}"
    else:
        wider = "float for the block that bittern analyze names first"
    if how == "qat":
        term = "map" if by_attention else "output"
        more = ",".join(f"{t}=2" if t == term else t for t in learned)
        give = f"more weight for the term {term} (--distill {more})"
        first = f"longer training, or {give if term in learned else f'the term {term} too (--distill unified)'}"
    elif weights <= NARROW:
        first = f"training (bittern qat), which weights of {weights} bits need"
    elif how == "ptq" and narrow:
        first = "more bits where they count (bittern ptq --target)"
    elif how == "ptq" or (not narrow and block):
        return f"{wider}."
    else:
        first = "better scales (bittern ptq)"
    return f"{first}; else {wider}."


def add_findings(result: dict[str, Any], formats: Iterable[Mapping[str, Rule]]) -> None:
    """Give each student of an analysis its `verdict` and `worst` blocks. formats: of each (see `layers.formats`)."""
    _, before, after = measured(result)
    for student, own, rules in zip(result["students"], after, formats, strict=True):
        where, blamed = place_of_loss(student)
        how, learned = student["how"], student["learned"]
        student["verdict"] = verdict(before, own, rules.values(), how, learned=learned, where=where, blamed=blamed)
        student["worst"] = worst_blocks(student, rules, blamed)


def measured(result: Mapping[str, Any]) -> tuple[int, dict[str, float], list[dict[str, float]]]:
    """Return the number of samples, and metrics of the teacher and of each student on them. They are those of all of
    the test data, where the runs that made the students measured them."""
    students = result["students"]
    runs = [student["run"] for student in students]
    counts = {run.get("samples", 0) for run in runs}
    if len(counts) == 1 and all("packed" in run for run in runs):
        return counts.pop(), runs[0]["float"], [run["packed"] for run in runs]
    return result["samples"], result["teacher"]["metrics"], [student["metrics"] for student in students]


def place_of_loss(student: Mapping[str, Any]) -> tuple[str, str]:
    """Return in words where most of the error of the output comes from, and the one of CLASSES that it comes from."""
    *blocks, _ = student["blocks"]
    total = sum(block["error"] for block in blocks) or 1.0
    places = [*(f"block {i}" for i in range(len(blocks) - 1)), f"the {blocks[-1]['name']}"]
    share, place = max((block["error"] / total, place) for block, place in zip(blocks, places, strict=True))
    where = f"most of it in {place}" if share * len(blocks) >= STANDS_OUT else "all over the blocks"
    weights, *others, everything = student["classes"]
    worst = max([weights, *others], key=lambda entry: entry["error"])
    blamed = (weights if weights["error"] >= everything["error"] / 2 else worst)["name"]
    return f"{where}, mostly from {blamed}", blamed


def worst_blocks(student: Mapping[str, Any], formats: Mapping[str, Rule], blamed: str = "") -> list[dict[str, Any]]:
    """List the blocks that alone do most harm.

    Of each `name`, `block`, `error`, its `head` of largest divergence and the `layer` (attention module) of that, how
    many `times` the median divergence that is, what was `found` in a sentence, and `advice`.
    """
    blocks = [b | {"block": i} for i, b in enumerate(student["blocks"][:-2]) if b["error"] > 0]
    attentions = student["compare"]["attentions"]
    typical = median(d for a in attentions for d in a["divergence"])
    depth, found = len(student["blocks"]) - 2, []
    for block in sorted(blocks, key=lambda b: -b["error"])[:MOST_BLOCKS]:
        own = [(i, a["divergence"]) for i, a in enumerate(attentions) if a["block"] % depth == block["block"]]
        heads = ((d, i, j) for i, of_heads in own for j, d in enumerate(of_heads))
        divergence, layer, head = max(heads, default=(0.0, 0, 0))
        times = divergence / typical if typical > 0 else 0.0
        name, text = block["name"], f"alone it changes the output by {short(100 * block['error'])} % (squared error)"
        if block["error"] < NEGLIGIBLE:
            what = "nothing: that is too little to matter."
        else:
            rules = [rule for module, rule in formats.items() if module.startswith(f"{name}.")]
            how, learned, by_attention = student["how"], student["learned"], times > STANDS_OUT
            what = advice(rules, how, learned, blamed=blamed, block=name, by_attention=by_attention)
        if times > STANDS_OUT:
            text += f"; head {head} is furthest from the teacher's, {times:.1f} × the median divergence"
        else:
            text += "; none of its heads stands out"
        place = {"layer": layer, "head": head, "divergence": divergence, "times": times}
        found.append(block | place | {"found": f"{text}.", "advice": what})
    return found
