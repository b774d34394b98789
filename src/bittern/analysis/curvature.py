"""Sharpness of the loss around a student's weights [TI]: top eigenvalues and trace of the Hessian, and a 2-D slice.

A loss here is a function of a dict of parameters, as `torch.func.functional_call` takes them, so nothing is ever
written into a model. Quantizers pass gradients straight through, once and twice: the Hessian is that of the loss as a
function of the quantized weights, at the point where they are. Models need Bittern's attention (`attention.attach`):
torch's fused ones have no second derivative.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import compress
from timeit import timeit
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from bittern.analysis.pair import Pair
from bittern.deploy.packed import PACKED, PackedLayer
from bittern.errors import InputError, need
from bittern.options import Curvature
from bittern.progress import Track
from bittern.qat.losses import prediction_loss, squared_loss
from bittern.recorded import out_tokens

PRODUCTS = 30  # with the Hessian that Lanczos takes, about
SURFACE = 2  # mini-batches whose mean loss makes the surface
Parameters = Mapping[str, Tensor]
Loss = Callable[[Parameters], Tensor]
Batches = Sequence[Mapping[str, Any]]
MakePart = Callable[[str, Callable[[], Any]], Any]


def trainable(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose parameters are float and of full size: packed weights decoded, activations quantized as before."""
    model = copy.deepcopy(model)
    simulated = {packed: quant for quant, packed in PACKED.items()}
    packed = sorted((m for m in model.modules() if isinstance(m, PackedLayer)), key=lambda layer: len(layer.owner))
    for layer in packed:
        layer.weight = layer.owner[0].weight if layer.owner else nn.Parameter(layer.weight.clone())
    for layer in packed:
        for name in ("weight_codes", "weight_scale", "weight_offset"):
            delattr(layer, name)
        layer.__class__ = simulated[type(layer)]  # type: ignore[assignment]
        layer.weight_quantizer = None  # type: ignore[assignment]
    return model.requires_grad_(True)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def prediction_loss_of(model: PreTrainedModel, teacher: PreTrainedModel, batch: Mapping[str, Any]) -> Loss:
    """Return how far the predictions for a batch are from the teacher's: needs no labels.

    Soft cross-entropy of logits; squared error of one logit, or of the embeddings of an encoder without a head.
    """
    given = {k: v for k, v in batch.items() if k != "labels" or teacher.config.is_encoder_decoder}
    with torch.no_grad():
        out = teacher(**given)
    key = "last_hidden_state" if out.get("logits") is None else "logits"
    expected, rows = out[key].float(), out_tokens(batch, out[key])
    compare = squared_loss if key != "logits" or expected.shape[-1] == 1 else prediction_loss

    def loss(parameters: Parameters) -> Tensor:
        return compare(functional_call(model, dict(parameters), (), given)[key], expected, rows=rows)

    return loss


class Hessian:
    """Hessian of a loss at some parameters, as a linear map of flat vectors."""

    def __init__(self, loss: Loss, parameters: Parameters):
        self.parameters = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
        value = loss(self.parameters)
        found = torch.autograd.grad(value, list(self.parameters.values()), create_graph=True, allow_unused=True)
        curved = [g is not None and g.requires_grad for g in found]  # the rest has no second derivative
        self.used = list(compress(self.parameters.values(), curved))
        self.gradient = torch.cat([g.flatten() for g in compress(found, curved)])
        self.size = len(self.gradient)

    def product(self, vector: Tensor) -> Tensor:
        """H · v, by a second backward through the same graph."""
        v = vector.to(self.gradient)
        found = torch.autograd.grad(self.gradient, self.used, v, retain_graph=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])


def top_eigenvalues(hessian: Hessian, count: int = 5, seed: int = 0, tolerance: float = 1e-2) -> list[float]:
    """The eigenvalues of largest magnitude, largest first, by scipy's Lanczos over Hessian-vector products."""
    if not 0 < count < hessian.size:
        raise InputError(f"cannot find {count} eigenvalues of {hessian.size} parameters; ask for fewer")

    def matvec(v: np.ndarray) -> np.ndarray:
        return hessian.product(torch.from_numpy(v.ravel())).cpu().numpy()

    # Few Lanczos vectors, in the model's precision: each is as large as the model.
    dtype, kept = hessian.gradient.detach().cpu().numpy().dtype, min(hessian.size, max(2 * count + 1, 10))
    linalg = need("scipy.sparse.linalg")
    operator = linalg.LinearOperator((hessian.size, hessian.size), matvec=matvec, dtype=dtype)
    start = np.random.default_rng(seed).standard_normal(hessian.size).astype(dtype)
    values = linalg.eigsh(operator, k=count, which="LM", v0=start, ncv=kept, tol=tolerance, return_eigenvectors=False)
    return sorted((float(v) for v in values), reverse=True)


def trace(hessian: Hessian, probes: int = 10, seed: int = 0) -> tuple[float, float]:
    """Hutchinson's estimate of the trace, mean of vᵀHv over vectors of random signs, and its standard error."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(probes):
        v = torch.randint(0, 2, (hessian.size,), generator=generator).to(hessian.gradient) * 2 - 1
        found.append(float(v.double() @ hessian.product(v).double()))
    return float(np.mean(found)), float(np.std(found, ddof=1) / np.sqrt(probes)) if probes > 1 else float("nan")


def filter_normalised(parameters: Parameters, seed: int) -> dict[str, Tensor]:
    """A random direction; each filter (row of a weight) has the weight's norm, biases and norms 0 (Li et al. 2018)."""
    generator = torch.Generator().manual_seed(seed)

    def direction(p: Tensor) -> Tensor:
        if p.dim() < 2:
            return torch.zeros_like(p)
        d = torch.randn(p.shape, generator=generator).to(p)
        size, own = (torch.linalg.vector_norm(x, dim=[*range(1, p.dim())], keepdim=True) for x in (p, d))
        return d.mul(size / own.clamp(min=1e-12))

    return {name: direction(p) for name, p in parameters.items()}


def surface_row(
    losses: Sequence[Loss], parameters: Parameters, b: float, steps: Sequence[float], seed: int = 0
) -> list[float]:
    """Mean loss at parameters + a·d₁ + b·d₂ for each step a; d₁, d₂ are filter-normalised random directions."""
    first, second = (filter_normalised(parameters, seed + i) for i in (0, 1))
    found = []
    for a in steps:
        moved = {n: p + a * first[n] + b * second[n] for n, p in parameters.items()}
        # With gradients enabled, but none asked for: layers do not keep their quantized weight, which is another here.
        with torch.enable_grad():
            found.append(float(np.mean([float(loss(moved)) for loss in losses])))
    return found


def measure_curvature(
    options: Curvature, pair: Pair, batches: Batches, seed: int, part: MakePart, track: Track
) -> dict[str, Any]:
    """Return spectra of mini-batches, the trace of the first one, and the loss surface, of a pair's student.

    part: makes each part of this name, or returns it as it was made before.
    """
    model = trainable(pair.student)
    parameters = parameters_of(model)
    losses = [prediction_loss_of(model, pair.teacher, batch) for batch in batches[: max(options.batches, SURFACE)]]

    def spectrum(batch: int) -> dict[str, Any]:
        hessian = Hessian(losses[batch], parameters)
        found = {"eigenvalues": top_eigenvalues(hessian, options.eigenvalues, seed)}
        return found | ({"trace": trace(hessian, options.probes, seed)} if batch == 0 else {})

    numbers = range(min(options.batches, len(losses)))
    spectra = [part(f"spectrum-{b}", partial(spectrum, b)) for b in track(numbers, "spectrum")]
    steps = np.linspace(-options.span, options.span, options.grid).tolist()
    rows = [
        part(f"surface-{n}", partial(surface_row, losses[:SURFACE], parameters, b, steps, seed))
        for n, b in track(list(enumerate(steps)), "loss surface")
    ]
    return {
        "spectra": [found["eigenvalues"] for found in spectra],
        "trace": spectra[0]["trace"],
        "surface": {"steps": steps, "loss": rows},
    }


def estimate_curvature(options: Curvature, pair: Pair, batch: Mapping[str, Any]) -> float:
    """Estimate the seconds that `measure_curvature` will take, from one product with the Hessian and one loss."""
    model = trainable(pair.student)
    loss = prediction_loss_of(model, pair.teacher, batch)
    hessian = Hessian(loss, parameters_of(model))
    product = timeit(lambda: hessian.product(torch.ones(hessian.size)), number=1)
    with torch.no_grad():
        value = timeit(lambda: loss(hessian.parameters), number=1)
    return product * (options.batches * PRODUCTS + options.probes) + value * options.grid**2 * SURFACE
