"""Compare an exported file with the simulated model: inputs, outputs, and the error that rounding explains.

The file and the simulated model round at different places: the file computes attention in float, and its runtime may
round inputs of layers on another grid (a range per tensor found at run time, or per block of inputs). So the file is
measured against three models in PyTorch with the same weights: the *simulated* one; the *exact* one, which has all
clips and rounds no activation; and the *reference*, which rounds as the file does. Two implementations of the same
rounding drift apart by up to the rounding itself, layer by layer, since an activation near a boundary may fall on
either side of it; but they stay equally far from the exact model, as far as so few samples tell: the ratio of two such
distances over n samples scatters by about 1/√n. So the file may be `SLACK` (1 + 3/√n) times as far from the exact model
as the reference, plus `FLOAT_NOISE`. Its distance from the simulated model is then at most that plus the simulated
model's own distance from the exact one.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from math import isnan, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bittern.dry_run import dummy_batch
from bittern.errors import ModelError, one_line

SLACK = 1.5
FLOAT_NOISE = 1e-4  # relative: float32 sums in another order, through all layers
INPUTS = (
    *("input_ids", "attention_mask", "token_type_ids", "pixel_values", "pixel_mask"),
    *("input_features", "decoder_input_ids"),
)
HEADS, BODIES = ("logits", "pred_boxes"), ("last_hidden_state", "pooler_output", "image_embeds", "text_embeds")

Outputs = dict[str, list[Tensor]]  # by name, batch by batch


def made_up(model: PreTrainedModel, samples: int, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Make random inputs of every kind that the model takes; the second half of two or more texts is padded.
    Raises ModelError if the inputs are unusual."""
    random, batch = torch.Generator().manual_seed(seed), {}
    for name, values in dummy_batch(model, samples, length).items():
        if values.is_floating_point():
            batch[name] = torch.randn(values.shape, generator=random)
        else:
            vocabulary = model.config.get_text_config().vocab_size
            batch[name] = torch.randint(min(5, vocabulary - 1), vocabulary, values.shape, generator=random)
    if "attention_mask" in (batch := complete(model, batch)):
        batch["attention_mask"][(samples + 1) // 2 :, length - length // 4 :] = 0
    return batch


def complete(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs that the file has, in order, with masks of ones and token types of zeros where they lack."""
    takes, found = inspect.signature(model.forward).parameters, dict(batch)
    if "input_ids" in found:
        found.setdefault("attention_mask", torch.ones_like(found["input_ids"]))
        if getattr(model.config, "type_vocab_size", 0) > 1:
            found.setdefault("token_type_ids", torch.zeros_like(found["input_ids"]))
        else:
            found.pop("token_type_ids", None)
    if "pixel_values" in found:
        images = found["pixel_values"]
        found.setdefault("pixel_mask", torch.ones(images.shape[0], *images.shape[2:], dtype=torch.int64))
    return {name: found[name] for name in INPUTS if name in found and name in takes}


@torch.no_grad()
def run_model(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Outputs:
    """Run the model on all batches; keep the outputs that a file of it has. Raises ModelError if there are none."""
    found: Outputs = {}
    for batch in batches:
        out = model(**batch, return_dict=True)
        for name in HEADS if out.get("logits") is not None else BODIES:
            if isinstance(out.get(name), Tensor):
                found.setdefault(name, []).append(out[name])
    if not found:
        raise ModelError(f"{type(model).__name__} gives none of {', '.join(HEADS + BODIES)}; nothing can be exported")
    return found


def session(file: str | Path, threads: int = 0, optimized: str | Path | None = None) -> Any:
    """Open a file in onnxruntime on the CPU. threads: 0 for all; optimized: where to write the graph that it makes of
    the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run_file(file: str | Path, names: Sequence[str], batches: Iterable[Mapping[str, Tensor]]) -> Outputs:
    """Run the file in onnxruntime on all batches. Raises ModelError if it cannot be run."""
    found: Outputs = {name: [] for name in names}
    with one_line(ModelError, "onnxruntime cannot run the exported file"):
        running = session(file, torch.get_num_threads())
        for batch in batches:
            given = {name: values.numpy() for name, values in batch.items()}
            for name, values in zip(names, running.run(list(names), given), strict=True):
                found[name].append(torch.from_numpy(values))
    return found


def measure_parity(file: Outputs, simulated: Outputs, exact: Outputs, reference: Outputs) -> dict[str, Any]:
    """Measure how far the outputs of the file are from those of the three models, over all samples.

    Errors are relative, in the 2-norm; of several outputs the worst counts. error, largest, agreement: of the file and
    the simulated model: the error, the largest difference of one output, and the share of samples (tokens, queries)
    with the same class, if there are classes. drift: of the file from the reference. simulated, file, twin: of the
    simulated model, the file and the reference from the exact model; limit: what `file` may be.
    """

    def apart(a: Outputs, b: Outputs, name: str) -> float:
        x, y = (torch.cat([t.double().flatten() for t in outputs[name]]) for outputs in (a, b))
        return float((x - y).norm() / y.norm().clamp_(min=1e-30))

    off = [(apart(file, exact, name), apart(reference, exact, name)) for name in simulated]
    samples = sum(len(batch) for batch in next(iter(file.values())))
    slack = SLACK * (1 + 3 / sqrt(samples))
    own, explained = max(off, key=lambda pair: (isnan(pair[0]), pair[0] - slack * pair[1]))
    pairs = list(zip(file["logits"], simulated["logits"], strict=True)) if "logits" in file else []
    chosen = [(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in pairs if a.shape[-1] > 1]
    gaps = ((a - b).abs().max().item() for n in simulated for a, b in zip(file[n], simulated[n], strict=True))
    return {
        "samples": samples,
        "error": max(apart(file, simulated, name) for name in simulated),
        "largest": max(gaps),
        "agreement": torch.cat(chosen).float().mean().item() if chosen else None,
        "drift": max(apart(file, reference, name) for name in simulated),
        "simulated": max(apart(simulated, exact, name) for name in simulated),
        "file": own,
        "twin": explained,
        "limit": slack * explained + FLOAT_NOISE,
    }


def check_parity(parity: Mapping[str, Any]) -> None:
    """Raise ModelError if the file is further from the exact model than its arithmetic explains."""
    if not parity["file"] <= parity["limit"]:
        raise ModelError(
            f"the exported file computes something else: its relative error is {parity['file']:.2e}, and its "
            f"arithmetic explains {parity['limit']:.2e}; it was not kept. If 8-bit weights saturate on this processor "
            "(x86 without VNNI), export with --safe"
        )
