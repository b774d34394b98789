"""Attention recovery by layer and head, errors by depth and nuclear norms, in passes over the data [KD], [TI]."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bittern.analysis import recovery
from bittern.analysis.pair import AttentionRun, Pair, output_weight, real_tokens, site_of
from bittern.analysis.tokens import Kinds
from bittern.anatomy import Anatomy
from bittern.attention import Point, Taps, recording, replace
from bittern.errors import InputError
from bittern.progress import Track, silent
from bittern.ptq.mixed import nuclear_norm
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
        found = {name: sums for name, sums in self.sums.items() if name.startswith(start)}
        return {name.removeprefix(start): numbers(total / count) for name, (total, count) in found.items()}


def numbers(x: Tensor) -> Any:
    """Return a tensor as JSON can hold it: numbers of six digits in lists, None for NaN."""
    if x.dim():
        return [numbers(row) for row in x]
    value = float(x)
    return None if math.isnan(value) else float(f"{value:.6g}")


@torch.no_grad()
def compare(
    pair: Pair, batches: Iterable[Mapping[str, Any]], kinds: Kinds | None = None, *, top: int = 5, track: Track = silent
) -> dict[str, Any]:
    """Measure all of attention recovery, as JSON can hold it; means over samples.

    attentions: of each attention module in order, values by head: `cover` and its `cover_floor`, `ranking_sum` (as in
    the figure of [KD]) and `ranking` (per pair), `divergence`, `first_student` and `first_teacher` (ranking ratio of
    the first token), and by class of token `gen`, `norm` and `prop`, with `summed` over heads. depth: relative errors
    by block, plain and with the teacher's signals put in. extremes: of the attention output Y.
    """
    means, samples = Means(), 0
    runs: list[AttentionRun] = []
    heads: list[int] = []
    y_point = output_point(pair.anatomy)
    points = dict.fromkeys(("map", "value", "hidden", "embedding", *INTERVENTIONS, y_point))
    for batch in track(batches, "comparing"):
        batch = {k: v.to(pair.student.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        own, shown = pair.record(batch, *points)
        runs, heads = pair.runs(own), [maps.shape[1] for maps in own["map"]]
        samples += len(next(v for v in batch.values() if isinstance(v, Tensor)))
        for i, run in enumerate(runs):
            classes = _classes(kinds, batch, own["map"][i])
            for name, values in _recovery(pair, run, i, own, shown, classes, len(kinds.names) if kinds else 0, top):
                means.add(f"attention/{i}/{name}", values)
        _add_errors(means, "plain", own, shown, runs)
        _add_extremes(means, y_point, own, shown, runs)
        _add_intervened(means, pair, batch, shown, runs)
    if not samples:
        raise InputError("there is nothing to compare: the data is empty")
    attentions = [
        {"name": run.name, "block": run.block, "cross": run.cross, "heads": count}
        | _by_kind(means.take("attention", str(i)), kinds.names if kinds else ())
        for i, (run, count) in enumerate(zip(runs, heads, strict=True))
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
    """Turn lists by head and class into lists by head for each class that there is."""
    for name in ("gen", "norm", "prop", "summed"):
        if name in found:
            rows = found[name] if isinstance(found[name][0], list) else [found[name]]
            by_name = zip((ALL, *names), zip(*rows, strict=True), strict=False)
            found[name] = {kind: list(values) for kind, values in by_name if None not in values}
    return found


def _classes(kinds: Kinds | None, batch: Mapping[str, Any], maps: Tensor) -> Tensor | None:
    """The class of each key (samples, keys); None where keys are not the tokens of the samples."""
    found = kinds.of(batch, maps.shape[-1]) if kinds else None
    return found if found is not None and len(found) == len(maps) else None


def _recovery(
    pair: Pair, run: AttentionRun, i: int, own: Taps, shown: Taps, classes: Tensor | None, kinds: int, top: int
) -> Iterator[tuple[str, Tensor]]:
    """Names and values (samples, heads) or (samples, heads, classes), all keys before each class, of the i-th run."""
    student, teacher, seen = own["map"][i], shown["map"][i], run.seen
    yield "cover", recovery.cover_length_ratio(student, teacher, seen, top)
    yield "cover_floor", recovery.cover_length_ratio(teacher, teacher, seen, top)
    total, pairs = recovery.ranking_loss(student, teacher, seen)
    yield "ranking_sum", total
    yield "ranking", total / pairs.clamp(min=1)
    yield "divergence", recovery.divergence(student, teacher, seen)
    yield "first_student", recovery.ranking_ratio(student, seen)
    yield "first_teacher", recovery.ranking_ratio(teacher, seen)

    def distance(x: Tensor, y: Tensor, where: Tensor) -> Tensor:
        overall = recovery.distance(x, y, where)
        return overall if classes is None else torch.cat([overall, recovery.distance(x, y, where, classes, kinds)], -1)

    yield "gen", distance(student, teacher, seen)
    norms = [_propagated(m, pair.anatomies[m], taps, i) for m, taps in ((pair.student, own), (pair.teacher, shown))]
    if norms[0] is not None and norms[1] is not None:
        (f, alpha_f, summed), (f_shown, alpha_f_shown, summed_shown) = norms[0], norms[1]
        yield "norm", distance(f, f_shown, seen.any(2, keepdim=True))
        yield "prop", distance(alpha_f, alpha_f_shown, seen)
        yield "summed", distance(summed, summed_shown, seen)[:, 0]  # (samples, classes)


def _propagated(model: nn.Module, anatomy: Anatomy, taps: Taps, i: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """‖f(x)‖, ‖αf(x)‖ and ‖Σ αf(x)‖ over heads, f and α as the model multiplies them; None without a W_O."""
    name = taps.names["map"][i]
    site, w_o = site_of(model, name), output_weight(model, anatomy, name)
    if w_o is None:
        return None
    value, alpha = site.quantize("value", taps["value"][i]), site.quantize("map", taps["map"][i])
    value = value.repeat_interleave(alpha.shape[1] // value.shape[1], 1)  # (samples, heads, keys, head dim)
    f = recovery.transformed_norms(value, w_o).unsqueeze(2)  # (samples, heads, 1, keys)
    return f, alpha * f, recovery.summed_norms(alpha, value, w_o).unsqueeze(1)  # (samples, 1, queries, keys)


def output_point(anatomy: Anatomy) -> Point:
    """Where Y is; W_O's own output where no sum with the residual is seen."""
    return attention_output(anatomy) if all(a.norm_reads_residual for a in anatomy.attentions) else "output"


def _places(taps: Taps) -> Iterator[tuple[str, str, Tensor]]:
    """Label, attention module and hidden states of what each stack reads and each block gives, in order of depth."""
    for i, (name, x) in enumerate(zip(taps.names["embedding"], taps["embedding"], strict=True)):
        yield f"embedding{' ' + str(i + 1) if i else ''}", name, x
    for i, (name, x) in enumerate(zip(taps.names["hidden"], taps["hidden"], strict=True)):
        yield f"block {i}", name, x


def _add_errors(means: Means, how: str, own: Taps, shown: Taps, runs: Sequence[AttentionRun]) -> None:
    for (place, name, x), (_, _, y) in zip(_places(own), _places(shown), strict=True):
        means.add(f"depth/{how}/{place}", recovery.relative_error(x, y, real_tokens(runs, name, x)))


def _add_intervened(
    means: Means, pair: Pair, batch: Mapping[str, Any], shown: Taps, runs: Sequence[AttentionRun]
) -> None:
    """Errors by depth with the teacher's map, context or attention output in place of the student's [TI]."""
    for point in INTERVENTIONS:
        if len(shown[point]) != len(runs):
            continue
        given: dict[tuple[str, Point], list[Tensor]] = {}
        for run, x in zip(runs, shown[point], strict=True):  # of a block that runs more than once, each run's own
            given.setdefault((run.name, point), []).append(x)
        replace(pair.student, given)
        try:
            with recording(pair.student, "hidden", "embedding") as own:
                pair.student(**batch)
        finally:
            replace(pair.student, {})
        _add_errors(means, point, own, shown, runs)


def _add_extremes(means: Means, point: Point, own: Taps, shown: Taps, runs: Sequence[AttentionRun]) -> None:
    """Mean over tokens of the smallest and the largest hidden unit of the attention output Y, by block."""
    for who, taps in (("student", own), ("teacher", shown)):
        for i, (name, y) in enumerate(zip(own.names[point], taps[point], strict=True)):
            real = real_tokens(runs, name, y)
            for side, values in zip(("low", "high"), recovery.min_max(y), strict=True):
                means.add(f"extremes/{who}/{i} {side}", (values * real).sum(1) / real.sum(1).clamp(min=1))


def nuclear_norm_of_scores(query: Tensor, key: Tensor) -> Tensor:
    """Nuclear norm of QKᵀ (…, queries, keys), of rank at most the head dim: from the triangles of QR of both."""
    r_query, r_key = (torch.linalg.qr(x.double(), mode="r").R for x in (query, key))
    return nuclear_norm(r_query @ r_key.mT)


@torch.no_grad()
def nuclear_norms(pair: Pair, batches: Sequence[Mapping[str, Any]], track: Track = silent) -> dict[str, Any]:
    """Nuclear norms [VT] of the map and of QKᵀ (sums over heads) of each attention module, and of the FFN's output by
    block, of student and teacher; padding adds nothing. Means over samples."""
    means = Means()
    for batch in track(batches, "nuclear norms"):
        both = pair.record(batch, "map", "query", "key", "ffn")
        runs = pair.runs(both[0])
        samples = {run.name: len(run.rows) for run in runs}
        for who, taps in zip(("student", "teacher"), both, strict=True):
            for i, run in enumerate(runs):
                real, keys = run.rows[:, None, :, None], run.seen.any(2)[:, :1, :, None]  # (samples, 1, tokens, 1)
                query, key = taps["query"][i], taps["key"][i]
                scale = query.shape[-1] ** -0.5
                key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)  # (samples, heads, keys, head dim)
                means.add(f"map/{who}/{i}", nuclear_norm(taps["map"][i] * real).sum(1))
                means.add(f"scores/{who}/{i}", nuclear_norm_of_scores(query * real * scale, key * keys).sum(1))
            for i, (name, x) in enumerate(zip(taps.names["ffn"], taps["ffn"], strict=True)):
                x = x.unflatten(0, (samples[name], -1)).flatten(1, -2) if x.dim() != 3 else x  # (samples, tokens, out)
                means.add(f"ffn/{who}/{i}", nuclear_norm(x * real_tokens(runs, name, x)[..., None]))
    return {
        what: {who: list(means.take(what, who).values()) for who in ("student", "teacher")}
        for what in ("map", "scores", "ffn")
    }
