"""Two models side by side: the float teacher and its quantized student, run on the same batches and recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bittern.anatomy import Anatomy
from bittern.attention import NAME, Point, Site, Taps, attach, recording
from bittern.deploy.packed import PackedLayer
from bittern.errors import ModelError
from bittern.layers import QuantLayer, anatomy_of, weight_matrix
from bittern.qat.distill import token_masks


@dataclass(frozen=True)
class AttentionRun:
    """One run of one attention module. block: number of its block in order of execution; seen: what may be attended
    (samples, 1, queries, keys); rows: real queries (samples, queries)."""

    name: str
    block: int
    cross: bool
    seen: Tensor
    rows: Tensor


class Pair:
    """A teacher and a student of the same depth and heads; packed, simulated or float. Raises ModelError otherwise.

    Both get Bittern's attention; nothing else in them is changed.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel):
        self.student, self.teacher = student, teacher
        self.anatomies = {}
        for model in (student, teacher):
            self.anatomies[model] = anatomy_of(model)
            attach(model, self.anatomies[model])
            model.eval()
        depths = [len(self.anatomies[m].attentions) for m in (student, teacher)]
        if depths[0] != depths[1]:
            raise ModelError(f"the student has {depths[0]} attention modules, the teacher {depths[1]}; they must agree")

    @property
    def anatomy(self) -> Anatomy:
        """The student's structure."""
        return self.anatomies[self.student]

    def record(self, batch: Mapping[str, Any], *points: Point) -> tuple[Taps, Taps]:
        """Run both on a batch; return what the student and what the teacher has at the points."""
        with recording(self.student, *points) as own:
            self.student(**batch)
        with recording(self.teacher, *points) as shown:
            self.teacher(**batch)
        for point in points:
            for name, x, y in zip(own.names[point], own[point], shown[point], strict=True):
                if x.shape != y.shape and point != "value":  # whose heads may be fewer
                    raise ModelError(
                        f"{point} of {name}: the student has the shape {tuple(x.shape)}, the teacher {tuple(y.shape)}; "
                        "they must have the same heads and widths"
                    )
        return own, shown

    def runs(self, taps: Taps) -> list[AttentionRun]:
        """The runs of attention modules in the student's recorded maps, in order."""
        anatomy = self.anatomy
        index = {a.name: (i, a.cross) for i, block in enumerate(anatomy.blocks) for a in block.attentions}
        rows, counts, found = token_masks(taps.masks, anatomy), Counter[str](), []
        for name, maps, (_, mask) in zip(taps.names["map"], taps["map"], taps.masks, strict=True):
            block, cross = index[name]
            seen = torch.ones_like(maps[:, :1], dtype=torch.bool)  # (samples, 1, queries, keys)
            given = None if mask is None else mask if mask.dtype == torch.bool else mask > -1e4
            if given is not None and given.dim() == 4 and len(given) in (1, len(maps)):
                seen = seen & given.any(1, keepdim=True)  # BEiT and Swin give a bias by head instead of a mask
            real = rows.get((name, "queries"))
            if real is None or real.shape[-1] != maps.shape[2] or len(real) not in (1, len(maps)):
                real = torch.ones_like(maps[:, 0, :, 0], dtype=torch.bool)
            real = real.expand(len(maps), -1)  # (samples, queries)
            block += counts[name] * len(anatomy.blocks)  # a block that runs again (ALBERT) counts as the next one
            counts[name] += 1
            found.append(AttentionRun(name, block, cross, seen & real[:, None, :, None], real))
        return found


def real_tokens(runs: Iterable[AttentionRun], name: str, x: Tensor) -> Tensor:
    """True where a token of x (samples, tokens, …), recorded at an attention module, is real: (samples, tokens).

    All are where x is not laid out as the module's queries.
    """
    rows = next((run.rows for run in runs if run.name == name), None)
    if rows is not None and rows.shape == x.shape[:2]:
        return rows
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


def output_weight(model: nn.Module, anatomy: Anatomy, name: str) -> Tensor | None:
    """Return the values of W_O of an attention module as they are used (out, heads · head dim); None without one."""
    output = next(a.output for a in anatomy.attentions if a.name == name)
    layer = None if output is None else model.get_submodule(output)
    if isinstance(layer, PackedLayer):
        return layer.unpacked()
    if isinstance(layer, QuantLayer):
        return layer.quantized_weight()
    return None if layer is None else weight_matrix(layer)


def site_of(model: nn.Module, name: str) -> Site:
    site = model.get_submodule(f"{name}.{NAME}")
    assert isinstance(site, Site)
    return site
