"""Outputs of a model for a fixed batch, kept in its file: whoever loads it can see that it still computes the same.

Checksums show that a file is whole; this shows that what was loaded from it, by whatever version of transformers, runs
as what was saved. Activations are not quantized here: without rounding between layers every machine gives the same
outputs up to float32's own noise. Static scales are compared beside the outputs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bittern import native
from bittern.dry_run import dummy_batch, evaluating
from bittern.errors import CheckpointError
from bittern.layers import as_float, fake_quants

KEPT, MOST_SCALES = 32, 1000  # numbers of each output, and of static scales, as logarithms, and offsets in steps
TOLERANCE, COARSE = 1e-3, 0.1  # of a number or of the output's root mean square, whichever is larger; in 16 bits


def make(model: PreTrainedModel) -> dict[str, Any] | None:
    """Run the model on made-up inputs; return them and some of its outputs as JSON. None if none can be made up."""
    try:
        # Whole numbers as they are; of others the shape, since they always run from -1 to 1.
        made = dummy_batch(model).items()
        batch = {n: {"shape": list(t.shape)} if t.is_floating_point() else t.tolist() for n, t in made}
        return {"class": type(model).__name__, "inputs": batch, "outputs": _run(model, batch)}
    except Exception:  # whatever the model's own code raises for inputs that it does not take
        return None


def check(model: PreTrainedModel, probe: Mapping[str, Any]) -> float:
    """Compare a loaded model with what `make` found when it was saved; return the largest difference, relative.

    Raises CheckpointError if an output is another one.
    """
    found, worst = _run(model, probe["inputs"]), 0.0
    for name, expected in probe["outputs"].items():
        given = found.get(name, {"shape": None})
        if given["shape"] != expected["shape"]:
            raise CheckpointError(f"the loaded model gives {name} of shape {given['shape']}, saved {expected['shape']}")
        saved, now = (torch.tensor(x["values"], dtype=torch.float64) for x in (expected, given))
        size = saved.abs().clamp(min=max(expected["rms"], 1e-12))
        apart = max(((now - saved).abs() / size).max().item(), abs(given["rms"] / max(expected["rms"], 1e-12) - 1))
        if not apart <= (TOLERANCE if model.dtype == torch.float32 else COARSE):
            raise CheckpointError(
                f"the loaded model is not the one that was saved: {name} differs by {apart:.1e}, relative; "
                "please report this with the versions of bittern, torch and transformers"
            )
        worst = max(worst, apart)
    return worst


def _from_json(value: Any, model: PreTrainedModel) -> Tensor:
    if not isinstance(value, dict):
        return torch.tensor(value, device=model.device)
    return torch.linspace(-1, 1, torch.Size(value["shape"]).numel()).view(value["shape"]).to(model.device, model.dtype)


@torch.no_grad()
@native.disabled()
def _run(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    with as_float(model), evaluating(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for models that draw numbers
        out = model(**{name: _from_json(value, model) for name, value in inputs.items()}, return_dict=True)
    found = {name: value for name, value in out.items() if isinstance(value, Tensor)}
    kept = {name: _numbers(tensor, KEPT) for name, tensor in found.items() if tensor.numel()}
    scaled = [(q.scale, q.offset) for _, q in fake_quants(model) if q.scale is not None]
    scales = [part for s, o in scaled for part in (s.log2().flatten(), *(() if o is None else ((o / s).flatten(),)))]
    return kept | ({"scales": _numbers(torch.cat(scales), MOST_SCALES)} if scales else {})


def _numbers(tensor: Tensor, kept: int) -> dict[str, Any]:
    """Some numbers of a tensor, at even distances, and their root mean square."""
    flat = tensor.detach().cpu().double().flatten().nan_to_num(0, 0, 0).clamp(-1e4, 1e4)  # masked logits are infinite
    places = torch.linspace(0, len(flat) - 1, min(kept, len(flat))).long()
    rms = flat.square().mean().sqrt().item()
    return {"shape": list(tensor.shape), "rms": rms, "values": [float(f"{x:.7g}") for x in flat[places].tolist()]}
