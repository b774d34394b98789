"""Two models side by side: the float teacher and its quantized student, run on the same batches and recorded."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bittern.anatomy import Batch
from bittern.attention import Point, Taps, attach, recording
from bittern.deploy.packed import PackedLayer
from bittern.errors import ModelError
from bittern.layers import QuantLayer, anatomy_of, weight_matrix
from bittern.recorded import attended, by_place, check_shapes, real_tokens, token_masks


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
        self.student, self.teacher, self.anatomy = student, teacher, anatomy_of(student)  # the student's
        for model in (student, teacher):
            attach(model, anatomy_of(model))
            model.eval()
        depths = [len(anatomy_of(m).attentions) for m in (student, teacher)]
        if depths[0] != depths[1]:
            raise ModelError(f"the student has {depths[0]} attention modules, the teacher {depths[1]}; they must agree")

    def record(self, batch: Batch, *points: Point) -> tuple[Taps, Taps]:
        """Run both on a batch; return what the student and what the teacher has at the points."""
        with recording(self.student, *points) as own:
            self.student(**batch)
        with recording(self.teacher, *points) as shown:
            self.teacher(**batch)
        for point in points:
            for name, x, y in zip(own.names[point], own[point], shown[point], strict=True):
                if point != "value":  # whose heads may be fewer
                    check_shapes(point, name, x, y)
        return own, shown

    def runs(self, taps: Taps) -> list[AttentionRun]:
        """The runs of attention modules in the student's recorded maps, in order."""
        masks, places = token_masks(taps.masks, self.anatomy), by_place(taps, self.anatomy, "map")
        cross = {a.name for a in self.anatomy.attentions if a.cross}
        found = []
        for ((block, _), (name, maps)), (_, mask) in zip(places.items(), taps.masks, strict=True):
            samples, _, queries, _ = maps.shape
            seen = torch.ones_like(maps[:, :1], dtype=torch.bool)  # (samples, 1, queries, keys)
            if (given := attended(mask)) is not None and given.dim() == 4 and len(given) in (1, samples):
                seen = seen & given.any(1, keepdim=True)  # BEiT and Swin give a bias by head instead of a mask
            real = real_tokens(masks, name, samples, queries)
            real = seen.new_ones(samples, queries) if real is None else real
            found.append(AttentionRun(name, block, name in cross, seen & real[:, None, :, None], real))
        return found


def output_weight(model: nn.Module, name: str | None) -> Tensor | None:
    """Return the values of the W_O of this name as they are used (out, heads · head dim); None without one."""
    layer = None if name is None else model.get_submodule(name)
    if isinstance(layer, PackedLayer):
        return layer.unpacked()
    if isinstance(layer, QuantLayer):
        return layer.quantized_weight()
    return None if layer is None else weight_matrix(layer)
