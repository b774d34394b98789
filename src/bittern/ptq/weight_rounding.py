"""Which codes a weight gets, given the inputs of its layer: better outputs than from each weight's nearest code.

Weights W are (rows, columns): O = XWᵀ. Inputs X (samples, columns) appear only in products, so that no cost grows with
their number: `gram` = X̂ᵀX̂ of the inputs that the layer will see, `cross` = X̂ᵀX of those and the float ones (left
out: gram). All minimise ‖XWᵀ − X̂Ŵᵀ‖², which is separate for every row, and return Ŵ = code · scale (+ offset) in
float32, in which `encode` finds the codes again, with their format and scale: what `Method.rounding` gives. Sums and
factorizations are in float64; nothing is random.
"""

import torch
from torch import Tensor

from bittern.errors import ModelError, RecipeError
from bittern.ptq.clips import Scale
from bittern.quantizers import _nonzero, _units, check_finite, code_range, decode, find_scale
from bittern.recipe import Format

Rounded = tuple[Tensor, Format, Scale]  # Ŵ, its format and its scale
BLOCK_COLUMNS = 128  # columns whose effect on the others is applied at once, by one matrix product


def _checked(weight: Tensor, gram: Tensor | None, cross: Tensor | None) -> Tensor:
    """The weight in float64, after everything that could be wrong."""
    if weight.dim() != 2:
        raise ModelError(f"a weight has the shape {tuple(weight.shape)}; expected (rows, columns), so flatten it")
    columns = weight.shape[1]
    check_finite(weight, "a weight")
    for x, what in ((gram, "gram of a weight"), (cross, "cross of a weight")):
        if x is not None and x.shape != (columns, columns):
            raise ModelError(f"{what} has the shape {tuple(x.shape)}; expected ({columns}, {columns})")
        if x is not None:
            check_finite(x, what)
    return weight.detach().double()


def _without_clip(fmt: Format, **changes: object) -> Format:
    """A clip is for training: codes that are chosen by inputs may lie beyond it, and would not survive `encode`."""
    if fmt.kind != "uniform":
        raise RecipeError(f"codes are chosen by inputs for kind: uniform, got {fmt}")
    return fmt.model_copy(update={"clip": None, **changes})


def _full(scale: Tensor | None, weight: Tensor, fmt: Format) -> Tensor:
    """A scale (or an offset, 0 for none) for every weight: (rows, columns) in float64."""
    if scale is None:
        return torch.zeros_like(weight, dtype=torch.float64)
    return scale.double().expand_as(_units(weight, fmt)).reshape(weight.shape)


def _drift(w: Tensor, gram: Tensor, cross: Tensor | None) -> Tensor:
    """W (XᵀX̂ − X̂ᵀX̂): what float outputs differ by from those of quantized inputs, seen through the latter."""
    return torch.zeros_like(w) if cross is None else w @ (cross.double().t() - gram)


def output_error(weight: Tensor, quantized: Tensor, gram: Tensor, cross: Tensor | None = None) -> Tensor:
    """Return ‖Xw − X̂ŵ‖² of each row, less what it is for ŵ = w: (rows,) in float64. Without `cross`: ‖X(w − ŵ)‖²."""
    w, gram = weight.detach().double(), gram.double()
    change = quantized.double() - w
    return ((change @ gram - 2 * _drift(w, gram, cross)) * change).sum(-1)


def ridge(weight: Tensor, gram: Tensor, cross: Tensor, damp: float) -> Tensor:
    """Return the float weight that best gives the float outputs from quantized inputs (ERQ, Zhong et al. 2024).

    argmin ‖XWᵀ − X̂W*ᵀ‖² + λ‖W* − W‖², with λ = damp · the mean of gram's diagonal.
    """
    w, gram = _checked(weight, gram, cross), gram.double()
    return (w + torch.cholesky_solve(_drift(w, gram, cross).t(), _factor(gram, damp)).t()).float()


def _factor(gram: Tensor, damp: float) -> Tensor:
    """Lower Cholesky factor of gram + λ, with 1 for inputs that are always zero; λ grows until there is one."""
    diagonal = gram.diagonal()
    alive = diagonal[diagonal > 0]
    mean = alive.mean() if len(alive) else diagonal.new_ones(())
    factor: Tensor
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + torch.diag(torch.where(diagonal > 0, damp * mean, mean)))
        if not failed:
            return factor
        damp = max(10 * damp, 1e-8)


# GPTQ


def compensate(
    weight: Tensor, fmt: Format, scale: Scale, gram: Tensor, cross: Tensor | None = None, damp: float = 0.05
) -> Rounded:
    """Round each column to its nearest codes; the columns to come make up for its error (GPTQ, Frantar et al. 2023).

    Columns of large inputs come first. damp: share of the mean of gram's diagonal that is added to it, which fewer
    samples than columns need. With `cross` the weight is first replaced by its `ridge` solution, which leaves exactly
    this problem (the aim of GPTAQ's asymmetric calibration). Inputs that are always zero get the nearest code.

    Two inputs that go together, one row of weights 0.4 and 0.4: the first becomes 0, and the second takes over what
    the outputs lost, 0.4 + 0.4 · 1.8/1.64 = 0.84, before it becomes 1. The nearest codes, 0 and 0, lose far more.

    >>> x = torch.tensor([[1.0, 0.8], [1.0, 1.0]])  # (samples, columns)
    >>> weight, fmt = torch.tensor([[0.4, 0.4]]), Format(bits=4, granularity="row", range="static")
    >>> codes, _, _ = compensate(weight, fmt, (torch.tensor([[1.0]]), None), x.T @ x, damp=0)
    >>> codes
    tensor([[0., 1.]])
    >>> [round(float(output_error(weight, w, x.T @ x)), 3) for w in (codes, weight.round())]
    [0.046, 1.158]
    """
    fmt, w = _without_clip(fmt), _checked(weight, gram, cross)
    if cross is not None:
        w = ridge(weight, gram, cross, damp).double()
    places = gram.double().diagonal().argsort(descending=True, stable=True)
    # With H = U Uᵀ, U upper triangular (the Cholesky factor of H back to front), H⁻¹ = RᵀR for R = U⁻¹.
    back = places.flip(0)
    upper = _factor(gram.double()[back][:, back], damp).flip(0, 1)
    inverse = torch.linalg.solve_triangular(upper, torch.eye(len(upper)).to(upper), upper=True)
    low, high = code_range(fmt)
    # Columns of the weight as rows, which are contiguous.
    rest = (w - _full(scale[1], weight, fmt)).t()[places]
    steps = _full(scale[0], weight, fmt).t()[places]
    codes = torch.empty_like(rest)
    pivots = inverse.diagonal().tolist()
    for i in range(0, len(rest), BLOCK_COLUMNS):
        j = min(i + BLOCK_COLUMNS, len(rest))
        errors = torch.empty_like(rest[i:j])
        for k in range(i, j):
            codes[k] = (rest[k] / steps[k]).round_().clamp_(low, high)
            errors[k - i] = (rest[k] - codes[k] * steps[k]) / pivots[k]
            rest[k + 1 : j].addr_(inverse[k, k + 1 : j], errors[k - i], alpha=-1)
        rest[j:].addmm_(inverse[i:j, j:].t(), errors, alpha=-1)
    return decode(codes[places.argsort()].t().contiguous(), fmt, *scale), fmt, scale


# AdaRound

ZETA, GAMMA = 1.1, -0.1  # the sigmoid is stretched beyond 0 and 1, so that it reaches them


def adaround(
    weight: Tensor,
    fmt: Format,
    scale: Scale,
    gram: Tensor,
    cross: Tensor | None = None,
    steps: int = 1000,
    rate: float = 1e-2,
    strength: float = 3.0,
) -> Rounded:
    """Learn to round each weight down or up, for the whole layer (AdaRound, Nagel et al. 2020, eq. 25 without f).

    Minimises ‖XWᵀ − X̂Ŵᵀ‖² + strength · Σ 1 − |2h − 1|^β over h = clip(1.2 σ(V) − 0.1, 0, 1) by Adam, from h = the
    fraction of w / scale; β falls from 20 to 2 after a fifth of the steps, which are without the sum. The squares are
    in units of scale² times the mean of gram's diagonal: `strength` means the same for every layer (the published 0.01
    is 1 to 10 of these). A row that would end worse than with its nearest codes keeps those.
    """
    fmt, w, gram64 = _without_clip(fmt), _checked(weight, gram, cross), gram.double()
    low, high = code_range(fmt)
    unit = _full(scale[0], weight, fmt)
    ratios = (w - _full(scale[1], weight, fmt)) / unit
    size = unit.square().mean(-1, keepdim=True).sqrt()  # of the steps of a row
    power = gram64.diagonal().mean().clamp(min=1e-300)
    drift, g = (_drift(w, gram64, cross) / (size * power)).float(), (gram64 / power).float()
    floor = ratios.floor()
    fraction, unit = (ratios - floor).float(), (unit / size).float()
    free = unit * ((floor >= low) & (floor < high))  # beyond the range both choices are its end
    floor, nearest, ratios = floor.float(), ratios.round().float(), ratios.float()
    v = -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)
    optimizer, warm = torch.optim.Adam([v], lr=rate), steps // 5
    for step in range(steps):
        s = torch.sigmoid(v)
        h = (s * (ZETA - GAMMA) + GAMMA).clamp_(0, 1)
        change = ((floor + h).clamp_(low, high) - ratios) * unit
        slope = (change @ g - drift) * 2 * free
        if step >= warm:
            beta = 20 - 18 * (step - warm) / (steps - warm)
            middle = 2 * h - 1
            slope -= 2 * strength * beta * middle.abs().pow_(beta - 1).copysign_(middle)
        v.grad = slope * s * (1 - s) * ((h > 0) & (h < 1))
        optimizer.step()
    learned = floor + (v >= 0)
    found, plain = (decode(codes.clamp_(low, high), fmt, *scale) for codes in (learned, nearest))
    better = output_error(weight, found, gram, cross) < output_error(weight, plain, gram, cross)
    return torch.where(better[:, None], found, plain), fmt, scale


# Bit-Split


def bit_split(
    weight: Tensor,
    fmt: Format,
    _: Scale | None = None,
    gram: Tensor | None = None,
    cross: Tensor | None = None,
    epochs: int = 20,
) -> Rounded:
    """Round to sums of ternary bit planes, found one plane at a time (Bit-Split and Stitching, Wang et al. 2020).

    w ≈ scale · Σ 2^k B_k with B_k in {-1, 0, 1}, k < bits - 1. First on weights: the best scale for the planes and
    each plane for the others, in turn. Then, with `gram`, the same on outputs, each plane by coordinate descent, from
    the first stage or from the nearest codes by extremes, whichever has the better outputs in a row; both only improve.
    Whatever scales the format has, it becomes symmetric, with scales per row, (rows, 1), of the method's own. (The
    paper's 100 epochs gain 0.1 % over 20.)
    """
    fmt = _without_clip(fmt, granularity="row", group_size=None, scheme="symmetric")
    w = _checked(weight, gram, cross)
    scale = find_scale(weight, fmt)[0].double()
    codes = (w / scale).round_()
    digits = torch.stack([(codes.abs() / 2**k).floor_().remainder_(2) for k in range(fmt.bits - 1)])
    nearest = (digits * codes.sign(), scale)  # planes, lowest first (bits - 1, rows, columns), and scale
    planes, scale = _split_weights(w, *nearest, epochs)
    if gram is not None:
        gram = gram.double()
        target = _drift(w, gram, cross) + w @ gram  # W XᵀX̂
        planes, scale = _split_outputs(target, gram, nearest, (planes, scale), epochs)
    scale = _nonzero(scale.float())
    return decode(_stitch(planes).float(), fmt, scale), fmt, (scale, None)


def _stitch(planes: Tensor) -> Tensor:
    return sum((plane * 2**k for k, plane in enumerate(planes)), start=torch.zeros_like(planes[0]))


def _split_weights(w: Tensor, planes: Tensor, scale: Tensor, epochs: int) -> tuple[Tensor, Tensor]:
    planes = planes.clone()
    for _ in range(epochs):
        codes = _stitch(planes)
        before, size = codes, codes.square().sum(-1, keepdim=True)
        scale = torch.where(size > 0, (w * codes).sum(-1, keepdim=True) / size, scale)
        for k in reversed(range(len(planes))):
            others = codes - planes[k] * 2**k
            planes[k] = ((w / scale - others) / 2**k).round_().clamp_(-1, 1)
            codes = others + planes[k] * 2**k
        if torch.equal(codes, before):
            break
    return planes, scale


def _split_outputs(
    target: Tensor, gram: Tensor, nearest: tuple[Tensor, Tensor], first: tuple[Tensor, Tensor], epochs: int
) -> tuple[Tensor, Tensor]:
    """Coordinate descent on scale² q G qᵀ − 2 scale q · target, for all rows at once."""

    def loss(planes: Tensor, scale: Tensor) -> Tensor:
        values = _stitch(planes) * scale
        return ((values @ gram - 2 * target) * values).sum(-1, keepdim=True)

    better = loss(*first) <= loss(*nearest)
    planes = torch.where(better, first[0], nearest[0]).transpose(1, 2).contiguous()  # columns as rows: contiguous
    scale, target = torch.where(better, first[1], nearest[1]).t(), target.t().contiguous()
    diagonal = gram.diagonal().tolist()
    for _ in range(epochs):
        codes, changed = _stitch(planes), False
        through = gram @ codes
        along, size = (codes * target).sum(0, keepdim=True), (codes * through).sum(0, keepdim=True)
        scale = torch.where((along > 0) & (size > 0), along / size, scale)
        slope = through * scale - target  # half the gradient
        for k in reversed(range(len(planes))):
            step = scale[0] * 2**k
            for i in range(0, len(codes), BLOCK_COLUMNS):
                block, plane = slice(i, i + BLOCK_COLUMNS), planes[k]
                before, local, near = plane[block].clone(), slope[block].clone(), gram[block, block]
                for n in range(len(local)):
                    if diagonal[i + n] > 0:
                        curve = step * diagonal[i + n]
                        plane[i + n] = new = (before[n] - local[n] / curve).round_().clamp_(-1, 1)
                        local[n + 1 :].addr_(near[n, n + 1 :], (new - before[n]).mul_(step))
                if (moved := (plane[block] - before) * step).any():
                    slope.addmm_(gram[:, block], moved)
                    changed = True
        if not changed:
            break
    return planes.transpose(1, 2), scale.t()
