"""One model type through the whole of Bittern: float, simulated, calibrated, packed, saved, loaded, trained, searched.

Each step is right, or refused with a reason; anything else is a crash, and so is an answer that is wrong.
"""

import copy
import re
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from batches import candidates
from tiny import build
from torch import Tensor, nn

import bittern
from bittern import native
from bittern.deploy import blocks
from bittern.deploy.packed import PackedLayer
from bittern.errors import BitternError
from bittern.ptq import quantize

Say = Callable[[dict[str, Any]], None]
# Layers, and whether head sizes that a class computes are given: the first that the type can be built with.
SIZES = ((2, False), (4, False), (2, True), (4, True), (8, True))


class WrongError(Exception):
    """A wrong answer that nobody was told of."""


def examine(kind: str, say: Say, ptq: bool = True, head: str | None = None) -> None:
    """Take a type through all steps, and say what came of each as it ends, and facts of the model.

    head: of the model, such as MASKED_LM; the one that the type is most used with, if none is given.
    """

    def step(name: str, action: Callable[[], Any]) -> Any:
        """The action's result, in a tuple; None if there is none."""
        say({"began": name})
        try:
            result = (action(),)
        except BitternError as error:
            say({"step": name, "outcome": "refused", "text": str(error)})
            return None
        except Exception as error:
            ours = [f for f in traceback.extract_tb(error.__traceback__) if "bittern" in Path(f.filename).parts]
            where = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
            text = (str(error).strip().splitlines() or [""])[0][:200]
            say({"step": name, "outcome": "crash", "text": f"{type(error).__name__}: {text}{where}"})
            return None
        say({"step": name, "outcome": "ok"})
        return result

    for deep, explicit in SIZES:
        made = step("build", partial(build, kind, deep, explicit, head))
        ran = made and step("float", partial(first_batch, made[0][0], kind))
        if ran:
            break
    else:
        return
    (model, cls), (batch, expected) = made[0], ran[0]
    original = copy.deepcopy(model)
    say({"class": type(model).__name__})

    def simulated() -> Any:
        model.requires_grad_(False)  # as packed models are: PyTorch's own attention then rounds in another way
        report = bittern.simulate(model, "w8a8", batch)
        total, done = (sum(x.weights for x in layers) for layers in (report.layers, report.quantized))
        say({"share": done / max(total, 1), "attentions": len(report.anatomy.attentions), "notes": report.notes[1:]})

    def calibrated() -> dict[str, Tensor]:
        bittern.calibrate(model, [copied(batch)])
        return finite(run(model, batch), expected, "simulated")

    def packed() -> dict[str, Tensor]:
        bittern.pack(model)
        with native.disabled():
            plain = run(model, batch)
        equal(simulated_out[0], plain, "packed without kernels differs from simulated")
        for _ in range(2):  # the second time by whole blocks
            error, noise = distance(plain, run(model, batch)), distance(expected, plain)
            if not error <= max(1e-2, 0.5 * noise):
                if not error <= 3 * (rounding := distance(plain, shaken(model, batch))):
                    raise WrongError(f"kernels differ by {error:.1e}, quantization by {noise:.1e}")
                say({"remark": f"hard choices: kernels differ by {error:.1e}, and so do last bits, by {rounding:.1e}"})
        turned = {k: v.flip(0) if isinstance(v, Tensor) else v for k, v in batch.items()}
        for given in (batch, turned, batch):
            try:
                with mock.patch.object(blocks, "watched", return_value=True):
                    written = run(model, given)
            except Exception as error:  # not all models take each batch the other way round
                if given is batch:
                    raise
                say({"remark": f"the batch turned round is not taken: {error!r}"})
                continue
            for _ in range(3):
                equal(written, run(model, given), "from a tape differs from as it is written")
        tapes = [tape for known in vars(model).get("_tapes", {}).values() for tape in known]
        say({"remark": f"tapes: {sum(map(bool, tapes))} of {len(tapes)}"})
        return plain

    def saved() -> None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                bittern.save(model, f"{folder}/m")
                again = cls.from_pretrained(f"{folder}/m").eval()
                for tensor in (*again.parameters(), *again.buffers()):
                    if type(tensor.data) is Tensor:  # a file has it at any address, which moves sums by a last bit
                        tensor.data = tensor.data.clone()
                with native.disabled():
                    equal(packed_out[0], run(again, batch), "loaded differs from saved")
            except Exception as error:
                try:  # whether transformers itself keeps it
                    original.save_pretrained(f"{folder}/float")
                    kept = not difference(expected, run(cls.from_pretrained(f"{folder}/float").eval(), batch))
                except Exception:
                    kept = False
                if kept:
                    raise error
                say({"remark": "transformers itself does not load what it saves of the float model"})

    if step("simulate", simulated):
        simulated_out = step("calibrate", calibrated)
        packed_out = simulated_out and step("pack", packed)
        if packed_out:
            step("save", saved)
    step("train", lambda: train(original, batch))
    if ptq:
        step("ptq", lambda: search(original, batch, expected))


def first_batch(model: Any, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The first batch that the float model accepts, and what it gives."""
    errors: list[Exception] = []
    for batch in candidates(model, kind):
        try:
            out = run(model, batch)
            if not any(x.is_floating_point() for x in out.values()):
                raise RuntimeError("no float outputs")
            equal(out, run(model, batch), "the float model is not deterministic")
            return batch, out
        except Exception as error:
            errors.append(error)
    raise errors[0] if errors else RuntimeError(f"no inputs known for {model.main_input_name}")


def train(original: nn.Module, batch: dict[str, Any]) -> None:
    """One step gives a gradient to every weight that has one in float, and leaves all finite."""
    student = copy.deepcopy(original)
    bittern.simulate(student, "ternary-2-2-8", batch)  # type: ignore[arg-type]
    bittern.calibrate(student, [copied(batch)])  # type: ignore[arg-type]
    try:
        wanted = gradients(copy.deepcopy(original), batch)
    except Exception:
        return  # nor can it be trained in float
    ran: set[str] = set()
    for name, module in student.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))  # type: ignore[misc]
    lost = wanted - gradients(student, batch)
    missing = sorted(n for n in lost if "expert" not in n or {n, n.rpartition(".")[0]} & ran)  # others may be chosen
    if missing:
        raise WrongError(f"no gradient in the simulated model for {len(missing)} of {len(wanted)}: {missing[:3]}")
    if not all(torch.isfinite(p).all() for p in student.parameters()):
        raise WrongError("weights are not finite after one step")


def gradients(model: nn.Module, batch: dict[str, Any]) -> set[str]:
    """The parameters that a step of training gives a gradient to; a simulated model has layers for those of experts."""
    torch.manual_seed(4)
    out = tensors(model.train()(**copied(batch)))
    parts = [x.float().clamp(-1e4, 1e4).pow(2).mean() for x in out.values() if x.requires_grad and x.numel()]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    torch.stack(parts).sum().backward()
    optimizer.step()
    return {re.sub(r"(\.weight)+$", "", name) for name, p in model.named_parameters() if p.grad is not None}


def search(original: nn.Module, batch: dict[str, Any], expected: dict[str, Tensor]) -> None:
    model: Any = copy.deepcopy(original)
    quantize(model, "w4a8", [copied(batch)])
    finite(run(model, batch), expected, "searched")


# Outputs


def tensors(out: Any, name: str = "") -> dict[str, Tensor]:
    """All tensors of an output but its cache, by place."""
    if isinstance(out, Tensor):
        return {name: out}
    items = out.items() if isinstance(out, dict) else enumerate(out) if isinstance(out, (list, tuple)) else ()
    parts = (
        tensors(value, f"{name}.{key}") for key, value in items if "cache" not in str(key) and key != "past_key_values"
    )
    return {place: tensor for part in parts for place, tensor in part.items()}


def run(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    with torch.no_grad():
        return {name: x.clone() for name, x in tensors(model(**copied(batch))).items()}


def copied(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in batch.items()}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> str:
    """What differs; empty if nothing does."""
    if a.keys() != b.keys():
        return f"other outputs: {sorted(a.keys() ^ b.keys())[:3]}"
    for name, x in a.items():
        y = b[name]
        if x.shape != y.shape:
            return f"{name}: shapes {tuple(x.shape)} and {tuple(y.shape)}"
        if x.is_floating_point():
            x, y = torch.nan_to_num(x), torch.nan_to_num(y)
        if not torch.equal(x, y):
            return f"{name}: by {(x.float() - y.float()).abs().max():.2e} of {x.float().abs().max():.2e}"
    return ""


def equal(a: dict[str, Tensor], b: dict[str, Tensor], what: str) -> None:
    if different := difference(a, b):
        raise WrongError(f"{what}: {different}")


def shaken(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The output where all products differ in their last bits, which hard choices may make much of."""
    generator = torch.Generator().manual_seed(6)

    def shake(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        return out * (1 + 1e-6 * torch.randn(out.shape, generator=generator))

    hooks = [m.register_forward_hook(shake) for m in model.modules() if isinstance(m, PackedLayer)]
    try:
        with native.disabled():
            return run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()


def finite(out: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """The output, which is finite where the float model's is."""
    for name, x in expected.items():
        if x.is_floating_point() and torch.isfinite(x).all() and not torch.isfinite(out[name]).all():
            raise WrongError(f"the {what} model gives values that are not finite in {name}")
    return out


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The worst of all float outputs, relative."""
    worst = 0.0
    for name in a.keys() & b.keys():
        x, y = a[name], b[name]
        if x.is_floating_point() and x.shape == y.shape and x.numel():
            x, y = (torch.nan_to_num(t.double(), posinf=0, neginf=0).clamp(-1e30, 1e30) for t in (x, y))
            worst = max(worst, ((x - y).norm() / x.norm().clamp_min(1e-9)).item())
    return worst
