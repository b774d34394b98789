"""Post-training methods: the published ones as they are, and what measures best here, as data."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from bittern.errors import no_such
from bittern.options import find_own
from bittern.ptq import clips
from bittern.ptq.clips import Scale
from bittern.ptq.search import Space
from bittern.ptq.weight_rounding import Rounded, adaround, bit_split, compensate
from bittern.quantizers import code_range, fake_quantize, find_scale
from bittern.recipe import Format

FindScale = Callable[[Tensor, Format], Scale]
Rounding = Callable[[Tensor, Format, Scale, Tensor, Tensor], Rounded]


@dataclass(frozen=True)
class Method:
    """A way to find scales, biases and rounded weights.

    weight_clip, activation_clip: scales from a tensor alone, where the search starts or what stays without one.
    space: what is searched, if anything. ranking, margin: γ and θ of the ranking loss [VT eq. 12]; 0 leaves it out.
    rounding: chooses values and format of a weight from (weight, format, scale, X̂ᵀX̂, X̂ᵀX).
    folds: exponents of the ranges of a norm's channels that may move into the weights after it; 1 is RepQ-ViT, 0.5
    SmoothQuant; the one with the least output error is taken, 0 included.
    inputs: a block reads what the float model gives (`parallel`), or what the quantized blocks before it give.
    """

    name: str
    weight_clip: FindScale = find_scale
    activation_clip: FindScale = find_scale
    space: Space | None = None
    ranking: float = 0.0
    margin: float = 0.2
    correct_bias: bool = False
    rounding: Rounding | None = None
    folds: tuple[float, ...] = ()
    inputs: Literal["parallel", "sequential"] = "parallel"


def split_outliers(weight: Tensor, fmt: Format, scale: Scale, gram: Tensor, cross: Tensor) -> Rounded:
    """OCS: both halves of a split channel read the same input, so the sum of their codes is stored, in one bit more."""
    values, found, _ = clips.ocs(weight, fmt)
    return values, fmt.model_copy(update={"bits": fmt.bits + 1}), (found, None)


def correct_weight(weight: Tensor, fmt: Format, scale: Scale, gram: Tensor, cross: Tensor) -> Rounded:
    """ACIQ's bias correction: mean and deviation of each row are the float ones again."""
    values, gain, shift = clips.aciq_correct(weight, fake_quantize(weight, fmt, *scale))
    low = scale[0] * code_range(fmt)[0] if scale[1] is None else scale[1]
    if fmt.granularity == "group":
        gain, shift = gain.unsqueeze(-1), shift.unsqueeze(-1)
    unit = "row" if fmt.granularity == "tensor" else fmt.granularity
    fmt = fmt.model_copy(update={"granularity": unit, "scheme": "asymmetric"})
    return values, fmt, (gain * scale[0], gain * (low + shift))


VT = Method("vt", space=Space(), ranking=0.1, correct_bias=True)  # [VT 4.1]: α 0.5, β 1.2, γ 0.1, θ 0.2, 20 rounds
OURS = Space("mse", low=0.1, candidates=45, rounds=3, slack=0.01, ends=True)  # steps of 0.025, 1 among them
METHODS = {
    m.name: m
    for m in (
        Method("minmax"),
        Method("percentile", activation_clip=clips.percentile_scale),
        Method("omse", clips.omse_scale, clips.omse_scale),
        Method("aciq", clips.aciq_scale, clips.aciq_scale, rounding=correct_weight),
        Method("ocs", activation_clip=clips.omse_scale, rounding=split_outliers),
        Method("easyquant", space=Space("cosine"), inputs="sequential"),
        Method("bit-split", activation_clip=clips.omse_scale, rounding=bit_split),
        Method("adaround", clips.omse_scale, clips.omse_scale, rounding=adaround, inputs="sequential"),
        replace(VT, name="vt-similarity", ranking=0.0, correct_bias=False),
        replace(VT, name="vt-ranking", correct_bias=False),
        replace(VT, name="vt-bias", ranking=0.0),
        VT,
        Method("search", space=OURS, correct_bias=True),
        Method("bittern", space=OURS, correct_bias=True, rounding=compensate, folds=(0.5, 1.0)),
    )
}


def find_method(name: str | Method) -> Method:
    """Return a method by name, or by the `module:name` of one's own. Raises InputError with the names there are."""
    method = find_own(name) if isinstance(name, str) and ":" in name else name
    if isinstance(method, Method):
        return method
    if name not in METHODS:
        raise no_such("method", str(name), METHODS)
    return METHODS[str(name)]
