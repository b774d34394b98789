"""Mixed precision: a width for each attention and each FFN, least sensitivity for a given size [VT eq. 17-18].

The sum of sensitivities and the size are both sums over parts, so the best choice is a multiple-choice knapsack. It is
solved exactly, for all sizes at once: states that are larger and no better than another are dropped part by part.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bittern.anatomy import Batch, Block
from bittern.attention import Site, Taps, recording
from bittern.errors import InputError, ModelError
from bittern.layers import QuantLayer, as_float, fake_quants, weight_matrix
from bittern.options import Mixed, Sensitivity
from bittern.ptq.calibrate import calibrate
from bittern.ptq.capture import padding_mask
from bittern.ptq.methods import Method
from bittern.ptq.solve import Solved
from bittern.ptq.stream import Call
from bittern.quantizers import find_scale
from bittern.recipe import Format

Part = Literal["attention", "ffn"]
PartOf = Mapping[str, Part]  # of a block, by names of modules
SAMPLES = 32  # at least, as far as there are
MAX_OUTPUT = 1 << 22  # entries of each output of a batch by which widths are compared


def check_mixed(method: Method) -> None:
    """Raise InputError if the method cannot serve mixed precision."""
    if method.inputs == "sequential":
        why = "whose widths mixed precision chooses only in the end; use a method with parallel inputs"
        raise InputError(f"method {method.name} calibrates each block on the quantized ones before it, {why}")


# Parts of a block


def block_parts(block: Block) -> dict[str, Part]:
    """Layers and attention modules of a block by the part whose width they have."""
    parts: dict[str, Part] = {}
    for attention in block.attentions:
        names = (attention.name, *attention.inputs, *((attention.output,) if attention.output else ()))
        parts |= dict.fromkeys(names, "attention")
    return parts | dict.fromkeys((*block.ffn_in, *((block.ffn_out,) if block.ffn_out else ())), "ffn")


def part_of(name: str, parts: PartOf) -> Part | None:
    """The part that a module or parameter belongs to, by its full name."""
    while name and name not in parts:
        name = name.rpartition(".")[0]
    return parts.get(name)


def widen(module: nn.Module, unit: str, parts: PartOf, bits: int) -> None:
    """Give every uniform format of a block's parts this width, and weights the scales of their extremes at it."""
    for name, quantizer in fake_quants(module):
        if quantizer.format.kind == "uniform" and part_of(f"{unit}.{name}", parts) is not None:
            quantizer.format = quantizer.format.model_copy(update={"bits": bits})
            owner = module.get_submodule(name.rpartition(".")[0])
            if quantizer.format.range == "static" and name.endswith("weight_quantizer"):
                quantizer.set_scale(*find_scale(weight_matrix(owner), quantizer.format, quantizer.name))


# Sensitivity: how much a part suffers from its own quantization, the rest being float


def sensitivities(calls: list[Call], sizes: Sequence[int], parts: PartOf, measure: Sensitivity) -> dict[Part, float]:
    """Return Ω of each part at its present formats [VT eq. 18], or the relative error that it leaves in the output."""
    totals, seen = dict[Part, float].fromkeys(parts.values(), 0.0), 0
    for call in calls:
        if seen >= SAMPLES:
            break
        size = sizes[call.batch]
        seen += size
        out, taps = _run(call, parts, None)
        for part in totals:
            changed_out, changed = _run(call, parts, part)
            if measure == "relative":
                totals[part] += relative_sensitivity(out, changed_out) * size
            else:
                point: Literal["map", "ffn"] = "map" if part == "attention" else "ffn"
                totals[part] += sum(map(paper_sensitivity, taps[point], changed[point])) * size
    return {part: total / seen for part, total in totals.items()}


def _run(call: Call, parts: PartOf, part: Part | None) -> tuple[Tensor, Taps]:
    """Run a block with one part quantized and the rest, or all of it, in float: its output, maps and FFN output."""
    sites = [m for m in call.module.modules() if isinstance(m, Site)]
    with as_float(call.module), recording(sites, "map", "ffn") as taps:
        for name, quantizer in fake_quants(call.module):
            is_other = part is None or part_of(f"{call.unit}.{name}", parts) != part
            quantizer.bypass = is_other or quantizer.needs_scale  # which it gets by extremes, in the end
        out = call.run()
    return tree_leaves(out)[0], taps


def nuclear_norm(matrices: Tensor) -> Tensor:
    """Sum the singular values of each matrix (…, rows, columns), through the smaller Gram matrix in float64."""
    x = matrices.double()
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
    norms: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum(-1)
    return norms


def paper_sensitivity(out: Tensor, changed: Tensor) -> float:
    """Return ‖Y‖_* · ‖Ŷ - Y‖², each summed over the heads of a sample, mean over samples [VT eq. 18]. out, changed:
    (samples, …, rows, columns): attention maps, or outputs of the FFN."""
    norms = nuclear_norm(out).flatten(1).sum(1) if out.dim() > 3 else nuclear_norm(out)
    return float((norms * (changed - out).double().square().flatten(1).sum(1)).mean())


def relative_sensitivity(out: Tensor, changed: Tensor) -> float:
    """Return ‖Ŷ - Y‖²/‖Y‖² of outputs (samples, …), mean over samples: of a block's, one unit for attention and FFN."""
    power = out.double().square().flatten(1).sum(1).clamp(min=1e-30)
    return float(((changed - out).double().square().flatten(1).sum(1) / power).mean())


def model_outputs(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """Return each float output of a model on each batch as (rows, columns), without padding; of very many rows a part.
    Raises ModelError if there is none."""
    found = []
    for batch in batches:
        out = model(**batch)
        for value in out.values() if isinstance(out, Mapping) else out:
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
                valid = padding_mask(batch, value.shape[:2]) if value.dim() == 3 else None
                rows = value.reshape(-1, value.shape[-1]) if valid is None else value[valid]
                found.append(rows[:: 1 + rows.numel() // MAX_OUTPUT].float().clone())
    if not found:
        raise ModelError(f"{type(model).__name__} gives no float outputs, by which widths could be compared")
    return found


def output_divergence(outputs: Sequence[Tensor], changed: Sequence[Tensor]) -> float:
    """Return ‖Ŷ - Y‖²/‖Y‖² of a model's outputs, mean over outputs and batches, without what is infinite in Y."""
    total = 0.0
    for out, other in zip(outputs, changed, strict=True):
        finite = out.isfinite()
        total += relative_sensitivity(out[finite][None], other[finite][None]) / len(outputs)
    return math.inf if math.isnan(total) else total


# Solutions and their allocation


@dataclass
class Solution:
    """A unit solved at one width: what changed of its tensors, the formats of its quantizers, and what to report. With
    mixed precision, parts: of a block, by module; sensitivity: of each part."""

    unit: str
    tensors: dict[str, Tensor]
    formats: dict[str, dict[str, Any]]
    solved: list[dict[str, Any]]
    unclear: list[str]
    parts: dict[str, Part]
    sensitivity: dict[Part, float]

    def put(self, model: nn.Module, *parts: Part | None) -> list[Solved]:
        """Give the unit, or some parts of it (None: what is in none), what was found; return what to report of it."""

        def is_own(name: str) -> bool:
            return not parts or part_of(name, self.parts) in parts

        module = model.get_submodule(self.unit)
        device = next(module.parameters()).device
        for name, quantizer in fake_quants(module):
            if is_own(f"{self.unit}.{name}"):
                quantizer.format = Format.model_validate(self.formats[name])
                for kind in ("scale", "offset"):
                    tensor = self.tensors.get(f"{name}.{kind}")
                    setattr(quantizer, kind, None if tensor is None else tensor.to(device, copy=True))
        for name, parameter in module.named_parameters():
            if name in self.tensors and is_own(f"{self.unit}.{name}"):
                parameter.detach().copy_(self.tensors[name])
        for layer in module.modules():
            if isinstance(layer, QuantLayer):
                layer._kept = None
        return [Solved(**solved) for solved in self.solved if is_own(solved["name"])]

    def weights(self, model: nn.Module, part: Part) -> int:
        """Count the weights of a part."""
        parameters = model.get_submodule(self.unit).named_parameters()
        matrices = ((name, p) for name, p in parameters if name.endswith("weight") and p.dim() > 1)
        return sum(p.numel() for name, p in matrices if part_of(f"{self.unit}.{name}", self.parts) == part)


@dataclass(frozen=True)
class Choice:
    """A point of the Pareto frontier. size: bits of all weights; bits: of each part."""

    size: int
    sensitivity: float
    bits: dict[str, int]


def frontier(sensitivity: Mapping[str, Mapping[int, float]], weights: Mapping[str, int]) -> list[Choice]:
    """Return all choices of bits that no other beats in both size and sensitivity, by size.

    sensitivity: part → bits → Ω. weights: part → how many.

    >>> points = frontier({"attention": {4: 9.0, 8: 1.0}, "ffn": {4: 2.0, 8: 1.0}}, {"attention": 10, "ffn": 20})
    >>> [(point.size, point.sensitivity) for point in points]
    [(120, 11.0), (160, 3.0), (240, 2.0)]
    >>> choose_bits(points, {"attention": 10, "ffn": 20}, target=6).bits
    {'attention': 8, 'ffn': 4}
    """
    states: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for part, options in sensitivity.items():
        grown = sorted(
            (size + weights[part] * bits, total + omega, (*chosen, bits))
            for size, total, chosen in states
            for bits, omega in options.items()
        )
        states, best = [], float("inf")
        for state in grown:
            if state[1] < best:
                best = state[1]
                states.append(state)
    return [Choice(size, total, dict(zip(sensitivity, chosen, strict=True))) for size, total, chosen in states]


def choose_bits(points: Sequence[Choice], weights: Mapping[str, int], target: float) -> Choice:
    """Return the least sensitive point of at most `target` bits a weight on average; InputError if there is none."""
    total = sum(weights.values())
    if not (fitting := [point for point in points if point.size <= target * total]):
        least = f"the smallest has {points[0].size / total:.2f}"
        raise InputError(f"no choice of bits has {target:g} bits a weight or fewer; {least}")
    return fitting[-1]


def allocate(
    model: nn.Module, batches: Sequence[Batch], blocks: list[dict[int, Solution]], mixed: Mixed, reference: list[Tensor]
) -> tuple[list[Solved], dict[str, int], list[Choice], dict[str, float]]:
    """Choose the bits of each part for the target, and put what was found with them into the model.

    Sums of what parts lose by themselves may mislead, so the choice has to give better outputs than the one width that
    is no larger. blocks: their solutions by width; reference: the outputs in float. Returns what to report of the
    parts, the bits of each, all best choices, and the divergence of the outputs with mixed and with uniform widths.
    """
    width = max(bits for bits in mixed.bits if bits <= mixed.target)
    owners = {f"{w[width].unit}.{part}": (part, w) for w in blocks for part in w[width].sensitivity}
    sensitivity = {n: {bits: s.sensitivity[part] for bits, s in w.items()} for n, (part, w) in owners.items()}
    weights = {name: w[width].weights(model, part) for name, (part, w) in owners.items()}
    points = frontier(sensitivity, weights)
    choices = {"mixed": choose_bits(points, weights, mixed.target).bits, f"{width} bits": dict.fromkeys(weights, width)}

    def put(bits: Mapping[str, int]) -> list[Solved]:
        solved = [s for name, (part, widths) in owners.items() for s in widths[bits[name]].put(model, part)]
        calibrate(model, batches)
        return solved

    divergence: dict[str, float] = {}
    for name, bits in choices.items():
        put(bits)
        divergence[name] = output_divergence(reference, model_outputs(model, batches))
    chosen = choices[min(choices, key=divergence.__getitem__)]
    return put(chosen), chosen, points, divergence
