"""Attention recovery by layer and head, errors by depth and nuclear norms, in passes over the data [KD], [TI]."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bittern.analysis import recovery
from bittern.analysis.pair import AttentionRun, Pair, output_weight
from bittern.analysis.tokens import Kinds
from bittern.anatomy import Anatomy, Batch
from bittern.attention import NAME, Point, Site, Taps, recording, replace
from bittern.errors import InputError
from bittern.layers import anatomy_of
from bittern.options import SIGNALS
from bittern.progress import Track, silent
from bittern.ptq.capture import size_of
from bittern.ptq.mixed import nuclear_norm
from bittern.recorded import TokenMasks, attention_output, by_module, by_place, real_tokens, token_masks

INTERVENTIONS = SIGNALS[::-1]  # TI-M, TI-C, TI-O
ALL = "all"
Values = defaultdict[str, list[Tensor]]  # by name, of the samples of each batch (samples, …)


def means(values: Values, *prefix: str) -> dict[str, Any]:
    """Means over samples of the values whose names begin so, as numbers and lists: of NaN, None, which do not count."""
    start = "/".join(prefix) + "/"
    found = {name: torch.cat(parts) for name, parts in values.items() if name.startswith(start)}
    return {name.removeprefix(start): numbers(x.double().nanmean(0)) for name, x in found.items()}


def numbers(x: Tensor) -> Any:
    """Return a tensor as JSON can hold it: numbers of six digits in lists, None for NaN."""
    if x.dim():
        return [numbers(row) for row in x]
    value = float(x)
    return None if math.isnan(value) else float(f"{value:.6g}")


@torch.no_grad()
def compare(
    pair: Pair, batches: Iterable[Batch], kinds: Kinds | None = None, *, top: int = 5, track: Track = silent
) -> dict[str, Any]:
    """Measure all of attention recovery, as JSON can hold it; means over samples.

    attentions: of each attention module in order, values by head: `cover` and its `cover_floor`, `ranking_sum` (as in
    the figure of [KD]) and `ranking` (per pair), `divergence`, `first_student` and `first_teacher` (ranking ratio of
    the first token), and by class of token `gen`, `norm` and `prop`, with `summed` over heads. depth: relative errors
    by block, plain and with the teacher's signals put in. extremes: of the attention output Y.
    """
    found, samples = Values(list), 0
    names = kinds.names if kinds else ()
    y_point = output_point(pair.anatomy)
    points = dict.fromkeys(("map", "value", "hidden", "embedding", *INTERVENTIONS, y_point))
    for batch in track(batches, "comparing"):
        batch = {k: v.to(pair.student.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        own, shown = pair.record(batch, *points)
        runs, masks = pair.runs(own), token_masks(own.masks, pair.anatomy)
        samples += size_of(batch)
        for i, run in enumerate(runs):
            maps = own["map"][i]
            classes = kinds.of(batch, maps.shape[-1]) if kinds else None
            if classes is not None and len(classes) != len(maps):  # windows: keys are not the tokens of the samples
                classes = None
            for name, values in _recovery(pair, run, i, own, shown, classes, len(names), top):
                found[f"attention/{i}/{name}"].append(values)
        _add_errors(found, "plain", pair, own, shown, masks)
        _add_extremes(found, y_point, own, shown, masks)
        for point in INTERVENTIONS:
            if len(shown[point]) == len(runs):
                given = by_module(own.names["map"], shown[point])
                _add_errors(found, point, pair, _intervened(pair, batch, point, given), shown, masks)
    if not samples:
        raise InputError("there is nothing to compare: the data is empty")
    attentions = [
        {"name": run.name, "block": run.block, "cross": run.cross, "heads": maps.shape[1]}
        | _by_kind(means(found, "attention", str(i)), names)
        for i, (run, maps) in enumerate(zip(runs, own["map"], strict=True))
    ]
    return {
        "samples": samples,
        "top": top,
        "attentions": attentions,
        "depth": {how: list(means(found, "depth", how).values()) for how in ("plain", *INTERVENTIONS)},
        "places": list(means(found, "depth", "plain")),
        "extremes": {who: means(found, "extremes", who) for who in ("student", "teacher")},
    }


def _by_kind(found: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Turn lists by head and class into lists by head for each class that there is."""
    for name in ("gen", "norm", "prop", "summed"):
        if name in found:
            by_name = zip((ALL, *names), zip(*found[name], strict=True), strict=False)
            found[name] = {kind: list(values) for kind, values in by_name if None not in values}
    return found


def _recovery(
    pair: Pair, run: AttentionRun, i: int, own: Taps, shown: Taps, classes: Tensor | None, kinds: int, top: int
) -> Iterator[tuple[str, Tensor]]:
    """Names and values (samples, heads) or (samples, heads, classes), all keys before each class, of the i-th run."""
    student, teacher, seen = own["map"][i], shown["map"][i], run.seen
    yield "cover", recovery.cover_length_ratio(student, teacher, seen, top)
    yield "cover_floor", recovery.cover_length_ratio(teacher, teacher, seen, top)
    total, pairs = recovery.map_ranking_loss(student, teacher, seen)
    yield "ranking_sum", total
    yield "ranking", total / pairs.clamp(min=1)
    yield "divergence", recovery.divergence(student, teacher, seen)
    yield "first_student", recovery.ranking_ratio(student, seen)
    yield "first_teacher", recovery.ranking_ratio(teacher, seen)

    distance = partial(recovery.distance, classes=classes, kinds=kinds)
    yield "gen", distance(student, teacher, seen)
    both = [_propagated(m, taps, i) for m, taps in ((pair.student, own), (pair.teacher, shown))]
    if len(norms := [found for found in both if found is not None]) == 2:
        where = {"norm": seen.any(2, keepdim=True), "prop": seen, "summed": seen}
        for (name, seen_there), x, y in zip(where.items(), *norms, strict=True):
            yield name, distance(x, y, seen_there)


def _propagated(model: PreTrainedModel, taps: Taps, i: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """‖f(x)‖, ‖αf(x)‖ and ‖Σ αf(x)‖ over heads, f and α as the model multiplies them; None without a W_O."""
    name = taps.names["map"][i]
    w_o = output_weight(model, next(a.output for a in anatomy_of(model).attentions if a.name == name))
    if w_o is None:
        return None
    site: Site = model.get_submodule(name)._modules[NAME]
    value, alpha = site.quantize("value", taps["value"][i]), site.quantize("map", taps["map"][i])
    value = value.repeat_interleave(alpha.shape[1] // value.shape[1], 1)  # (samples, heads, keys, head dim)
    f = recovery.transformed_norms(value, w_o).unsqueeze(2)  # (samples, heads, 1, keys)
    return f, alpha * f, recovery.summed_norms(alpha, value, w_o).unsqueeze(1)  # (samples, 1, queries, keys)


def output_point(anatomy: Anatomy) -> Point:
    """Return the point of Y; W_O's own output where no sum with the residual is seen."""
    return attention_output(anatomy) if all(a.norm_reads_residual for a in anatomy.attentions) else "output"


def _states(taps: Taps, anatomy: Anatomy) -> Iterator[tuple[str, str, Tensor]]:
    """Label, attention module and hidden states of what each stack reads and each block gives, in order of depth."""
    for i, (name, x) in enumerate(by_place(taps, anatomy, "embedding").values()):
        yield f"embedding{' ' + str(i + 1) if i else ''}", name, x
    for (block, _), (name, x) in by_place(taps, anatomy, "hidden").items():
        yield f"block {block}", name, x


def _add_errors(found: Values, how: str, pair: Pair, own: Taps, shown: Taps, masks: TokenMasks) -> None:
    states = (_states(taps, anatomy_of(m)) for taps, m in ((own, pair.student), (shown, pair.teacher)))
    for (label, name, x), (_, _, y) in zip(*states, strict=True):
        found[f"depth/{how}/{label}"].append(recovery.relative_error(x, y, real_tokens(masks, name, *x.shape[:2])))


def _intervened(pair: Pair, batch: Batch, point: Point, given: Mapping[str, Sequence[Tensor]]) -> Taps:
    """Record the student with the teacher's map, context or attention output in place of its own [TI]."""
    replace(pair.student, {(name, point): tensors for name, tensors in given.items()})
    try:
        with recording(pair.student, "hidden", "embedding") as taps:
            pair.student(**batch)
    finally:
        replace(pair.student, {})
    return taps


def _add_extremes(found: Values, point: Point, own: Taps, shown: Taps, masks: TokenMasks) -> None:
    """Mean over tokens of the smallest and the largest hidden unit of the attention output Y, by block."""
    for who, taps in (("student", own), ("teacher", shown)):
        for i, (name, y) in enumerate(zip(own.names[point], taps[point], strict=True)):
            real = _real(masks, name, y)
            for side, values in zip(("low", "high"), y.aminmax(dim=-1), strict=True):
                found[f"extremes/{who}/{i} {side}"].append((values * real).sum(1) / real.sum(1).clamp(min=1))


def _real(masks: TokenMasks, name: str, x: Tensor) -> Tensor:
    """True where a token of x (samples, tokens, …) is real."""
    real = real_tokens(masks, name, *x.shape[:2])
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real


def nuclear_norm_of_scores(query: Tensor, key: Tensor) -> Tensor:
    """Nuclear norm of QKᵀ (…, queries, keys), of rank at most the head dim: from the triangles of QR of both."""
    r_query, r_key = (torch.linalg.qr(x.double(), mode="r").R for x in (query, key))
    return nuclear_norm(r_query @ r_key.mT)


@torch.no_grad()
def nuclear_norms(pair: Pair, batches: Sequence[Batch], track: Track = silent) -> dict[str, Any]:
    """Nuclear norms [VT] of the map and of QKᵀ (sums over heads) of each attention module, and of the FFN's output by
    block, of student and teacher; padding adds nothing. Means over samples."""
    found = Values(list)
    for batch in track(batches, "nuclear norms"):
        both = pair.record(batch, "map", "query", "key", "ffn")
        runs, masks = pair.runs(both[0]), token_masks(both[0].masks, pair.anatomy)
        samples = {run.name: len(run.rows) for run in runs}
        for who, taps in zip(("student", "teacher"), both, strict=True):
            for i, run in enumerate(runs):
                real, keys = run.rows[:, None, :, None], run.seen.any(2)[:, :1, :, None]  # (samples, 1, tokens, 1)
                query, key = taps["query"][i], taps["key"][i]
                scale = query.shape[-1] ** -0.5
                key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)  # (samples, heads, keys, head dim)
                found[f"map/{who}/{i}"].append(nuclear_norm(taps["map"][i] * real).sum(1))
                found[f"scores/{who}/{i}"].append(nuclear_norm_of_scores(query * real * scale, key * keys).sum(1))
            for i, (name, x) in enumerate(zip(taps.names["ffn"], taps["ffn"], strict=True)):
                x = x.unflatten(0, (samples[name], -1)).flatten(1, -2) if x.dim() != 3 else x  # (samples, tokens, out)
                found[f"ffn/{who}/{i}"].append(nuclear_norm(x * _real(masks, name, x)[..., None]))
    return {
        what: {who: list(means(found, what, who).values()) for who in ("student", "teacher")}
        for what in ("map", "scores", "ffn")
    }
