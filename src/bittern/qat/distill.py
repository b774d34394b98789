"""Distillation: what a student learns from its teacher, how much of each term, at which layers."""

from collections.abc import Iterator, Mapping
from inspect import signature
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bittern.anatomy import Anatomy, Batch
from bittern.attention import Point, Taps, attach, recording
from bittern.data import task_of
from bittern.dry_run import evaluating
from bittern.errors import InputError, ModelError
from bittern.layers import QuantLayer, anatomy_of, as_float
from bittern.options import Distill, Intervention, find_own, point_of, refuse_unused
from bittern.qat import losses
from bittern.qat.intervention import Intervener
from bittern.recorded import TokenMasks, attention_output, by_place, check_shapes, out_tokens, real_tokens, token_masks


class Distiller:
    """Binds a `bittern.options.Distill` to a teacher and a student: records both, and gives the terms of a batch.

    teacher: None if only the labels teach. Both models get Bittern's attention; the teacher is frozen, and no part of
    the student. Raises ModelError or InputError, at the latest on the first batch, if the two do not fit.
    """

    def __init__(
        self,
        distill: Distill,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        intervention: Intervention | None = None,
    ):
        self.distill, self.student, self.teacher, self.intervention = distill, student, teacher, intervention
        self.anatomy = self.teacher_anatomy = anatomy_of(student)
        if not self.anatomy.attentions and (distill.layerwise or intervention):
            raise ModelError(
                f"{type(student).__name__} computes attention in code of its own that Bittern cannot reach into: there "
                "are no layers to learn from; use the terms truth and prediction"
            )
        if not (distill.layerwise or intervention):
            refuse_unused(Distill, f"with the terms {', '.join(distill.terms)} alone", mapping=distill.mapping)
        attach(student, self.anatomy)
        if distill.needs_teacher or intervention:
            if teacher is None:
                terms = f"the terms {', '.join(distill.terms)} need"
                raise InputError(f"{terms if distill.needs_teacher else 'the intervention needs'} a teacher")
            self.teacher_anatomy = anatomy_of(teacher)
            attach(teacher, self.teacher_anatomy)
            teacher.eval().requires_grad_(False)
            self._check_depth()
        if intervention:
            self.intervener = Intervener(student, self.anatomy, self.teacher_anatomy, distill.mapping)
        self.points = dict(_points(distill, self.anatomy, self.teacher_anatomy))
        self.compared: dict[str, int] = {}  # by term, how many tensors of the last batch were compared

    def _check_depth(self) -> None:
        depths = [
            [len(list(blocks)) for _, blocks in groupby(a.blocks, key=lambda b: b.stack)]
            for a in (self.anatomy, self.teacher_anatomy)
        ]
        mapping = self.distill.mapping
        if mapping is None and depths[0] != depths[1] and (self.distill.layerwise or self.intervention):
            mine, theirs = (" + ".join(map(str, d)) for d in depths)
            advice = "say which block learns from which: mapping={student block: teacher block}"
            raise ModelError(f"the student has {mine} blocks, the teacher {theirs}; {advice}")
        for pair in (mapping or {}).items():
            for block, depth, whose in zip(pair, map(sum, depths), ("student", "teacher"), strict=True):
                if not 0 <= block < depth:
                    raise InputError(f"mapping names block {block} of the {whose}, which has blocks 0 to {depth - 1}")

    def forward(self, model: nn.Module, batch: Batch, step: int | None = 0) -> tuple[Any, dict[str, Tensor]]:
        """Return the student's output and the terms of the batch. model: the student, or what wraps it.

        step: of the optimizer, which decides whether the teacher intervenes; if so, it does until `release`. None: an
        evaluation, in which it does not.
        """
        points = tuple(dict.fromkeys(p for group in self.points.values() for p in group))
        batch = _with_padding_told(self.student, batch)
        act = self.intervention.act(step) if self.intervention and step is not None else None
        if self.teacher is not None and (self.distill.needs_teacher or act):
            keep_labels = self.teacher.config.is_encoder_decoder  # which makes its decoder's inputs of them
            given = {k: v for k, v in batch.items() if k != "labels" or keep_labels}
            asked = dict.fromkeys((*points, *([act.point] if act else [])))
            with torch.no_grad(), recording(self.teacher, *asked) as shown:
                expected = self.teacher(**given)
        if act and self.intervention:
            self.intervener.begin(act, shown, self.intervention.scope, batch)
        with recording(self.student, *points) as taught:
            out = model(**batch)
        terms: dict[str, Tensor] = {}
        if "truth" in self.distill.terms:
            if out.get("loss") is None:
                raise InputError("the term truth needs labels, and the batch has none")
            terms["truth"] = out["loss"]
        if "prediction" in self.distill.terms:
            heads = [name for name in ("logits", "start_logits", "end_logits") if out.get(name) is not None]
            if not heads:
                lacks = f"{type(self.student).__name__} has no logits for the term prediction"
                raise InputError(f"{lacks}; choose others, such as hidden,map,output")
            found = [self._prediction(name, out[name], expected[name], batch) for name in heads]
            terms["prediction"] = torch.stack(found).mean()
        for name in (name for name in self.distill.terms if point_of(name) == "logits"):
            terms[name] = find_own(name)(out["logits"], expected["logits"], out_tokens(batch, out["logits"]))
        masks = token_masks(taught.masks, self.anatomy) if self.points else {}
        for term, group in self.points.items():
            found = [loss for point in group for loss in self._of_layers(term, point, taught, shown, masks)]
            if not found:
                raise InputError(f"the term {term} compares nothing: mapping and layers have no block in common")
            terms[term] = torch.stack(found).sum()  # sums over layers [KD]
            self.compared[term] = len(found)
        return out, terms

    def release(self) -> None:
        """Let the student go on alone. Call it after the backward."""
        if self.intervention:
            self.intervener.end()

    @torch.no_grad()
    def floors(self, batch: Batch) -> dict[str, dict[str, float]]:
        """Return of each term its `floor`, and its value as the student is now, at the `start`.

        The floor is what the teacher's own weights, in float, lose by quantized activations alone. Weights that depart
        from the teacher's can go below it. Empty if the student does not start from those.
        """
        mine, theirs = (dict(model.named_parameters()) if model else {} for model in (self.student, self.teacher))
        if mine.keys() != theirs.keys() or not all(torch.equal(p, theirs[name]) for name, p in mine.items()):
            return {}
        quantizers = (m.weight_quantizer for m in self.student.modules() if isinstance(m, QuantLayer))
        with evaluating(self.student):
            _, now = self.forward(self.student, batch, None)
            with as_float(nn.ModuleList(filter(None, quantizers))):
                _, least = self.forward(self.student, batch, None)
        return {name: {"floor": float(least[name]), "start": float(value)} for name, value in now.items()}

    def _prediction(self, name: str, logits: Tensor, expected: Tensor, batch: Batch) -> Tensor:
        check_shapes("prediction", name, logits, expected)
        unshifted = "xlm", "flaubert", "xlnet", "cpmant"  # whose labels are of the tokens themselves
        shifts = task_of(self.student) == "next" and self.student.config.model_type not in unshifted
        if shifts and isinstance(labels := batch.get("labels"), Tensor):
            batch = {**batch, "labels": nn.functional.pad(labels[:, 1:], (0, 1), value=-100)}  # each of the token after
        kind, mask = self.student.config.problem_type, batch.get("attention_mask")
        if logits.shape[-1] == 1 or kind == "regression":
            return losses.squared_loss(logits, expected)
        if kind == "multi_label_classification":
            return losses.labels_loss(logits, expected, self.distill.temperature)
        if name != "logits" and mask is not None:  # (batch, tokens): where an answer starts or ends, not in padding
            logits, expected = (x.masked_fill(mask == 0, -1e4) for x in (logits, expected))
        return losses.prediction_loss(logits, expected, self.distill.temperature, out_tokens(batch, logits))

    def _of_layers(self, term: str, point: Point, taught: Taps, shown: Taps, masks: TokenMasks) -> Iterator[Tensor]:
        mine, theirs = by_place(taught, self.anatomy, point), by_place(shown, self.teacher_anatomy, point)
        mapping, chosen = self.distill.mapping, None if term == "hidden" else self.distill.layers
        depth = 1 + max((block for block, _ in mine), default=-1)
        if outside := [layer for layer in chosen or () if not -depth <= layer < depth]:
            raise InputError(f"layers names block {outside[0]}; the student has blocks 0 to {depth - 1}")
        blocks = {block for block, _ in mine} if chosen is None else {layer % depth for layer in chosen}
        for (block, attention), (name, x) in mine.items():
            if block not in blocks or (mapping is not None and block >= 0 and block not in mapping):
                continue
            other = block if mapping is None or block < 0 else mapping[block]
            y = theirs[other, attention][1]
            if ":" not in term and not term.endswith("_relation"):
                check_shapes(term, name, x, y, " (relations of queries, keys and values need neither)")
            side = "keys" if point in ("key", "value") else "queries"
            yield self._loss(term, x, y, real_tokens(masks, name, len(x), x.shape[1 if x.dim() == 3 else 2], side))

    def _loss(self, term: str, x: Tensor, y: Tensor, rows: Tensor | None) -> Tensor:
        if ":" in term:
            return find_own(term)(x, y, rows)  # type: ignore[no-any-return]
        padded = 0 if term == "map" or term.endswith("_relation") else self.distill.padded
        if term == "score":
            if 0 < padded < x.shape[-1]:
                raise InputError(f"--padded {padded} is too few for a batch of {x.shape[-1]} tokens; see --max-length")
            return losses.score_loss(x, y, rows, padded)
        if term == "map":
            tau = self.distill.map_temperature
            return losses.map_loss(x, y, rows) if tau == 1 else losses.map_loss_of_scores(x, y, tau, rows)
        if term.endswith("_relation"):
            return losses.relation_loss(x, y, rows, self.distill.relations)
        if term == "context":
            x, y = x.transpose(1, 2), y.transpose(1, 2)  # (batch, tokens, heads, head dim)
        return losses.squared_loss(x, y, None if padded else rows)


def _with_padding_told(student: PreTrainedModel, batch: Batch) -> Batch:
    """Return the batch with a mask of what its decoder reads: its labels, or its text, which some models shift."""
    labels, name = batch.get("labels"), "decoder_attention_mask"
    if {name, "decoder_input_ids"} & batch.keys() or name not in signature(student.forward).parameters:
        return batch
    if student.can_generate() and isinstance(labels, Tensor) and labels.dim() == 2:
        return {**batch, name: (labels != -100).long()}
    return {**batch, name: batch["attention_mask"]} if {"input_ids", "attention_mask"} <= batch.keys() else batch


def weighted(terms: Mapping[str, Any], distill: Distill) -> Any:
    """Return the sum of the terms times their weights: what `fixed` descends, and what is told of any run."""
    return sum(distill.terms[name] * term for name, term in terms.items())


def balanced(
    terms: Mapping[str, Tensor], distill: Distill, compared: Mapping[str, int], means: Mapping[str, float] | None = None
) -> Tensor:
    """Return the loss of a step: the sum of the terms times their weights.

    `auto` first divides each term by its present mean over the tensors that it compares (`Distiller.compared`; 1 if not
    there): the gradient is that of Σ weight · compared · log(term), which is what uncertainty weighting (Kendall et al.
    2018) of single tensors comes to when its σ are at their minimum, alike in each term. It has no units, no state and
    nothing to learn. means: the values on all processes; the terms' own if not given.
    """
    parts = []
    for name, term in terms.items():
        factor = distill.terms[name]
        if distill.balance == "auto":
            size = means[name] if means else float(term.detach())
            factor *= compared.get(name, 1) / max(size, 1e-12)
        parts.append(term * factor)
    return torch.stack(parts).sum()


def _points(distill: Distill, student: Anatomy, teacher: Anatomy) -> Iterator[tuple[str, tuple[Point, ...]]]:
    """Yield each layer-wise term with the points that it compares: those that it is named by, but for a few."""
    points: dict[str, Any] = {"hidden": ("embedding", "hidden"), "self_output": ("output",)}  # AO, without its residual
    if distill.map_temperature != 1:
        points["map"] = ("score",)
    if "output" in distill.terms:
        points["output"] = (attention_output(student),)
        if attention_output(teacher) not in points["output"]:
            raise ModelError("term output: one of student and teacher is post-norm, the other is not")
    for term in distill.layerwise:
        own = point_of(term)
        yield term, points.get(own if own == "hidden" else term, (own or term.removesuffix("_relation"),))
