"""Attention recovery by layer and head, and errors by depth, in one pass over the data [KD], [TI]."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bittern.analysis import recovery
from bittern.analysis.pair import Call, Pair, output_weight, site_of
from bittern.analysis.tokens import Kinds
from bittern.anatomy import Anatomy
from bittern.attention import Point, Taps, recording, replace
from bittern.errors import InputError
from bittern.progress import Track, silent
from bittern.qat.distill import attention_output

INTERVENTIONS: tuple[Point, ...] = ("map", "context", "output")  # TI-M, TI-C, TI-O
ALL = "all"


class Means:
    """Sums of values of samples by name; a sample that has none (NaN) does not count."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, values: Tensor) -> None:
        """values: (samples, …)."""
        there = ~values.isnan()
        new = values.double().nan_to_num().sum(0).cpu(), there.sum(0).cpu()
        old = self.sums.get(name)
        self.sums[name] = new if old is None else (old[0] + new[0], old[1] + new[1])

    def take(self, *prefix: str) -> dict[str, Any]:
        """Means of the names that begin so, as numbers and lists; None where no sample had a value."""
        start = "/".join(prefix) + "/"
        return {
            n.removeprefix(start): numbers(total / count)
            for n, (total, count) in self.sums.items()
            if n.startswith(start)
        }


def numbers(x: Tensor) -> Any:
    """A tensor as JSON can hold it: no NaN."""
    if x.dim():
        return [numbers(row) for row in x]
    value = float(x)
    return None if math.isnan(value) else float(f"{value:.6g}")


@torch.no_grad()
def compare(
    pair: Pair, batches: Iterable[Mapping[str, Any]], kinds: Kinds | None = None, *, top: int = 5, track: Track = silent
) -> dict[str, Any]:
    """All of attention recovery, as JSON can hold it; means over samples.

    attentions: of each attention module in order, values by head: `cover` and its `cover_floor`, `ranking_sum` (as in
    the figure of [KD]) and `ranking` (per pair), `divergence`, `first_student` and `first_teacher` (ranking ratio of
    the first token), and by class of token `gen`, `norm` and `prop`, with `summed` over heads. depth: relative errors
    by block, plain and with the teacher's signals put in. extremes: of the attention output Y.
    """
    means, samples = Means(), 0
    heads: dict[int, tuple[Call, int]] = {}
    y_point = output_point(pair.anatomy)
    for batch in track(batches, "comparing"):
        batch = {k: v.to(pair.student.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        own, shown = pair.record(
            batch, *dict.fromkeys(("map", "value", "hidden", "embedding", *INTERVENTIONS, y_point))
        )
        calls = pair.calls(own)
        samples += len(next(v for v in batch.values() if isinstance(v, Tensor)))
        for i, call in enumerate(calls):
            heads[i] = call, own["map"][i].shape[1]
            _attention(means, f"attention/{i}", pair, call, i, (own, shown), batch, kinds, top)
        _errors(means, "plain", own, shown, calls)
        _extremes(means, y_point, own, shown, calls)
        _intervened(means, pair, batch, shown, calls)
    if not samples:
        raise InputError("there is nothing to compare: the data is empty")
    names = kinds.names if kinds else ()
    attentions = [
        {"name": call.name, "block": call.block, "cross": call.cross, "heads": count}
        | _by_kind(means.take("attention", str(i)), names)
        for i, (call, count) in heads.items()
    ]
    return {
        "samples": samples,
        "top": top,
        "attentions": attentions,
        "depth": {how: list(means.take("depth", how).values()) for how in ("plain", *INTERVENTIONS)},
        "places": list(means.take("depth", "plain")),
        "extremes": {who: means.take("extremes", who) for who in ("student", "teacher")},
    }


def _by_kind(found: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Lists by head and class as lists by head for each class that there is."""
    for name in ("gen", "norm", "prop", "summed"):
        if name in found:
            rows = found[name] if isinstance(found[name][0], list) else [found[name]]
            by_name = zip((ALL, *names), zip(*rows, strict=True), strict=False)
            found[name] = {kind: list(values) for kind, values in by_name if None not in values}
    return found


def _attention(
    means: Means,
    at: str,
    pair: Pair,
    call: Call,
    i: int,
    taps: tuple[Taps, Taps],
    batch: Mapping[str, Any],
    kinds: Kinds | None,
    top: int,
) -> None:
    student, teacher = (t["map"][i] for t in taps)
    seen = call.seen
    means.add(f"{at}/cover", recovery.cover_length_ratio(student, teacher, seen, top))
    means.add(f"{at}/cover_floor", recovery.cover_length_ratio(teacher, teacher, seen, top))
    total, pairs = recovery.ranking_loss(student, teacher, seen)
    means.add(f"{at}/ranking_sum", total)
    means.add(f"{at}/ranking", total / pairs.clamp(min=1))
    means.add(f"{at}/divergence", recovery.divergence(student, teacher, seen))
    means.add(f"{at}/first_student", recovery.ranking_ratio(student, seen))
    means.add(f"{at}/first_teacher", recovery.ranking_ratio(teacher, seen))

    classes, count = torch.zeros_like(seen[:, 0, 0], dtype=torch.long), 1
    of_keys = kinds.of(batch, student.shape[-1]) if kinds else None
    if of_keys is not None and kinds and len(of_keys) == len(student):
        classes, count = of_keys + 1, len(kinds.names) + 1

    def distance(x: Tensor, y: Tensor, where: Tensor) -> Tensor:
        everything = recovery.distance(x, y, where, torch.zeros_like(classes), 1)
        by_class = recovery.distance(x, y, where, classes - 1, count - 1) if count > 1 else everything[..., :0]
        return torch.cat([everything, by_class], -1)

    means.add(f"{at}/gen", distance(student, teacher, seen))
    own = _propagated(pair.student, pair.anatomies[pair.student], taps[0], i)
    shown = _propagated(pair.teacher, pair.anatomies[pair.teacher], taps[1], i)
    if own is None or shown is None:
        return
    for name, x, y in zip(("norm", "prop", "summed"), own, shown, strict=True):
        found = distance(x, y, seen.any(2, keepdim=True) if name == "norm" else seen)
        means.add(f"{at}/{name}", found[:, 0] if name == "summed" else found)


def _propagated(model: nn.Module, anatomy: Anatomy, taps: Taps, i: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """‖f(x)‖, ‖αf(x)‖ and ‖Σ αf(x)‖ over heads, f and α as the model multiplies them; None without a W_O."""
    name = taps.names["map"][i]
    site, w_o = site_of(model, name), output_weight(model, anatomy, name)
    if w_o is None:
        return None
    value, alpha = site.quantize("value", taps["value"][i]), site.quantize("map", taps["map"][i])
    value = value.repeat_interleave(alpha.shape[1] // value.shape[1], 1)
    f = recovery.transformed_norms(value, w_o).unsqueeze(2)
    return f, alpha * f, recovery.summed_norms(alpha, value, w_o).unsqueeze(1)


def output_point(anatomy: Anatomy) -> Point:
    """Where Y is; W_O's own output where no sum with the residual is seen."""
    return attention_output(anatomy) if all(a.norm_reads_residual for a in anatomy.attentions) else "output"


def _places(taps: Taps, calls: list[Call]) -> list[tuple[str, Tensor, Tensor | None]]:
    """Name, hidden state and real tokens of what each stack reads and each block gives, in order of depth."""
    rows = {call.name: call.rows for call in calls if not call.cross}
    found: list[tuple[str, Tensor, Tensor | None]] = []
    for point in ("embedding", "hidden"):
        for i, (name, x) in enumerate(zip(taps.names[point], taps[point], strict=True)):
            real = rows.get(name)
            fits = real is not None and x.dim() == 3 and real.shape == x.shape[:2]
            label = f"embedding{' ' + str(i + 1) if i else ''}" if point == "embedding" else f"block {i}"
            found.append((label, x, real if fits else None))
    return found


def _errors(means: Means, how: str, own: Taps, shown: Taps, calls: list[Call]) -> None:
    for (place, x, rows), (_, y, _) in zip(_places(own, calls), _places(shown, calls), strict=True):
        means.add(f"depth/{how}/{place}", recovery.relative_error(x, y, rows))


def _intervened(means: Means, pair: Pair, batch: Mapping[str, Any], shown: Taps, calls: list[Call]) -> None:
    """Errors by depth with the teacher's map, context or attention output in place of the student's [TI]."""
    for point in INTERVENTIONS:
        if len(shown[point]) != len(calls):
            continue
        given: dict[tuple[str, Point], list[Tensor]] = {}
        for call, x in zip(calls, shown[point], strict=True):  # of a block that runs more than once, each run's own
            given.setdefault((call.name, point), []).append(x)
        replace(pair.student, given)
        try:
            with recording(pair.student, "hidden", "embedding") as own:
                pair.student(**batch)
        finally:
            replace(pair.student, {})
        _errors(means, point, own, shown, calls)


def _extremes(means: Means, point: Point, own: Taps, shown: Taps, calls: list[Call]) -> None:
    """Mean over tokens of the smallest and the largest hidden unit of the attention output Y, by block."""
    rows = {call.name: call.rows for call in calls}
    for who, taps in (("student", own), ("teacher", shown)):
        for i, (name, y) in enumerate(zip(own.names[point], taps[point], strict=True)):
            real = rows[name] if rows[name].shape == y.shape[:2] else torch.ones_like(y[..., 0], dtype=torch.bool)
            for side, values in zip(("low", "high"), recovery.min_max(y), strict=True):
                means.add(f"extremes/{who}/{i} {side}", (values * real).sum(1) / real.sum(1).clamp(min=1))
