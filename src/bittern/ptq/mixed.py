"""How much a block's attention or FFN suffers from its own quantization, the rest being float."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from bittern.anatomy import Block
from bittern.attention import Site, recording
from bittern.layers import fake_quants
from bittern.ptq.allocate import paper_sensitivity, relative_sensitivity
from bittern.ptq.stream import Call

Part = Literal["attention", "ffn"]
Sensitivity = Literal["relative", "paper"]
SAMPLES = 32  # at least, as far as there are


def block_parts(block: Block) -> dict[str, Part]:
    """Layers and attention modules of a block by the part whose width they have."""
    parts: dict[str, Part] = {}
    for attention in block.attentions:
        names = (attention.name, *attention.inputs, *((attention.output,) if attention.output else ()))
        parts |= dict.fromkeys(names, "attention")
    return parts | dict.fromkeys((*block.ffn_in, *((block.ffn_out,) if block.ffn_out else ())), "ffn")


def part_of(name: str, parts: Mapping[str, Part]) -> Part | None:
    """The part that a module or parameter belongs to, by its full name."""
    while name:
        if name in parts:
            return parts[name]
        name = name.rpartition(".")[0]
    return None


def sensitivities(
    calls: Sequence[Call], sizes: Sequence[int], parts: Mapping[str, Part], measure: Sensitivity
) -> dict[str, float]:
    """Ω of each part at the present formats [VT eq. 18], or the relative error that it leaves in the block's output."""
    few, seen = [], 0
    for call in calls:
        few.append(call)
        seen += sizes[call.batch]
        if seen >= SAMPLES:
            break
    result: dict[str, float] = {}
    for part in dict.fromkeys(parts.values()):
        total = 0.0
        for call in few:
            with _only(call, parts, None):
                out, maps, ffn = _run(call)
            with _only(call, parts, part):
                changed, changed_maps, changed_ffn = _run(call)
            if measure == "relative":
                total += relative_sensitivity(out, changed) * sizes[call.batch]
            elif part == "attention":
                total += sum(map(paper_sensitivity, maps, changed_maps)) * sizes[call.batch]
            else:
                total += sum(map(paper_sensitivity, ffn, changed_ffn)) * sizes[call.batch]
        result[part] = total / seen
    return result


def _run(call: Call) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The block's output, its attention maps, and what its FFN gives."""
    with recording([m for m in call.module.modules() if isinstance(m, Site)], "map", "ffn") as taps:
        out = call.run()
    return (out[0] if isinstance(out, tuple) else out), taps["map"], taps["ffn"]


@contextmanager
def _only(call: Call, parts: Mapping[str, Part], part: Part | None) -> Iterator[None]:
    """Quantize one part of a block; the rest, or all of it, computes in float."""
    quantizers = {f"{call.unit}.{name}": q for name, q in fake_quants(call.module)}
    was = {name: q.bypass for name, q in quantizers.items()}
    try:
        for name, quantizer in quantizers.items():
            quantizer.bypass = part is None or part_of(name, parts) != part
        yield
    finally:
        for name, quantizer in quantizers.items():
            quantizer.bypass = was[name]


def widen(module: nn.Module, unit: str, parts: Mapping[str, Part], bits: int) -> None:
    """Give every uniform format of a block's parts this width."""
    for name, quantizer in fake_quants(module):
        if quantizer.format.kind == "uniform" and part_of(f"{unit}.{name}", parts) is not None:
            quantizer.format = quantizer.format.model_copy(update={"bits": bits})


def weights_of(module: nn.Module, unit: str, parts: Mapping[str, Part], part: Part) -> int:
    """How many weights a part has."""
    return sum(
        p.numel()
        for name, p in module.named_parameters()
        if name.endswith("weight") and p.dim() > 1 and part_of(f"{unit}.{name}", parts) == part
    )
