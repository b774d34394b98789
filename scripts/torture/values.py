"""Numbers that no model expects, and tensors of other types and places: the answer is right, or refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from kills import Trial
from world import Process

from bittern import native
from bittern.deploy.checkpoint import pack
from bittern.deploy.store import load, save
from bittern.errors import BitternError
from bittern.layers import simulate
from bittern.ptq import quantize
from bittern.ptq.calibrate import calibrate
from families import SUPPORTED

FAMILIES = ("bert", "vit", "gpt2", "llama", "t5", "swin", "deberta_v2")
RECIPES = ("w8a8", "w4a8", "vt-w4a4", "ternary", "ternary-2-2-8")


def output(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found = model(**batch)
    names = ("logits", "last_hidden_state")
    tensor: torch.Tensor = next(v for n, v in found.items() if isinstance(v, torch.Tensor) and n in names)
    return tensor


def near(a: torch.Tensor, b: torch.Tensor, limit: float, least: float = 1e-30) -> None:
    """The same, NaN and infinities where the other has them. least: norm below which a difference is none."""
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a.isinf(), b.isinf()):
        finite = [f"{tuple(t.shape)}, {int(t.isfinite().sum())} finite" for t in (a, b)]
        raise AssertionError(f"NaN, infinity or shape differ: {', '.join(finite)}")
    ok = a.isfinite() & b.isfinite()
    if ok.any():
        error = (a[ok].double() - b[ok].double()).norm() / b[ok].double().norm().clamp(min=least)
        if error > limit:
            raise AssertionError(f"off by {error:.2e}")


def three(
    name: str, recipe: str, change: Callable[[Any], None] = lambda model: None
) -> tuple[Any, Any, dict[str, Any]]:
    """A simulated and a packed model of the same weights, and their batch."""
    models = []
    for _ in range(2):
        model, batch = SUPPORTED[name]()
        with torch.no_grad():
            change(model)
        simulate(model, recipe, batch)
        calibrate(model, [batch])
        models.append(model)
    return models[0], pack(models[1]), batch


def check(simulated: Any, packed: Any, batch: dict[str, Any], least: float = 1e-3) -> None:
    """Without kernels bit for bit; with them near, as codes tip over by rounding.

    Where finite inputs make PyTorch's own norms overflow, the kernels may still have the right answer.
    """
    expected = output(simulated, batch)
    with native.disabled():
        near(output(packed, batch), expected, 0.0)
    finite = all(v.isfinite().all() for v in batch.values() if v.is_floating_point())
    if expected.isfinite().all() or not finite:
        near(output(packed, batch), expected, 0.2, least)


def inputs(name: str, recipe: str, dice: random.Random) -> None:
    """NaN, infinity, denormals, constants and extreme sizes among the inputs."""
    simulated, packed, batch = three(name, recipe)
    key = next((k for k in ("pixel_values", "inputs_embeds") if k in batch), None)
    if key is None:
        embed = simulated.get_input_embeddings()
        ids = batch.pop("input_ids")
        batch["inputs_embeds"] = torch.nn.functional.embedding(ids, torch.randn(embed.weight.shape))
        key = "inputs_embeds"
    x = batch[key]
    least = 1e-2 * float(
        output(simulated, batch).norm()
    )  # norms make a thousand times more of what rounding leaves of 0
    for value in (float("nan"), float("inf"), -float("inf"), 1e-40, 1e30, 1e-30, 3e38, 0.0):
        some = x.clone()
        some.view(-1)[dice.randrange(x.numel())] = value
        for changed in (some, torch.full_like(x, value)):
            check(simulated, packed, batch | {key: changed}, least)


def weights(name: str, recipe: str, dice: random.Random) -> None:
    """Constant, zero, denormal and extreme weights; those that are not finite are refused."""

    def scaled(factor: float) -> Callable[[Any], None]:
        def change(model: Any) -> None:
            layer = dice_layer(model)
            layer.weight.mul_(factor)

        return change

    def filled(value: float) -> Callable[[Any], None]:
        return lambda model: dice_layer(model).weight.fill_(value)

    state = dice.getstate()

    def dice_layer(model: Any) -> Any:
        dice.setstate(state)
        return dice.choice([m for m in model.modules() if isinstance(m, torch.nn.Linear)])

    for change in (*map(scaled, (1e30, 1e-30, 1e-42, 0.0)), *map(filled, (0.0, 1.0, -1e-20, 1e-45))):
        check(*three(name, recipe, change))
    for value in (float("nan"), float("inf")):
        try:
            three(name, recipe, filled(value))
        except BitternError:
            continue
        raise AssertionError(f"weights of {value} were not refused")


def sizes(name: str, recipe: str, dice: random.Random) -> None:
    """Empty batches, one sample, one token, the longest text."""
    simulated, packed, batch = three(name, recipe)
    length = getattr(simulated.config, "max_position_embeddings", None) or 64
    found = [{k: v[:1] for k, v in batch.items()}, {k: v[:0] for k, v in batch.items()}]
    if "input_ids" in batch and "decoder_input_ids" not in batch:
        found.append({k: v[:, :1] for k, v in batch.items()})
        found.append({k: v[:, :1].repeat(1, length) for k, v in batch.items()})
        found.append({k: v[:1, :0] for k, v in batch.items()})
    for changed in found:
        try:
            expected = output(simulated, changed)
        except (RuntimeError, IndexError, ValueError) as error:  # PyTorch's own refusal
            try:
                output(packed, changed)
            except (RuntimeError, IndexError, ValueError):
                continue
            if not output(packed, changed).numel():
                continue  # of no tokens nothing, which PyTorch's views cannot say
            raise AssertionError("packed accepts what the simulated model refuses") from error
        with native.disabled():
            near(output(packed, changed), expected, 0.0)
        near(output(packed, changed), expected, 0.2)


def tokens(name: str, recipe: str, dice: random.Random) -> None:
    """Token ids that are negative or too large are refused, as by the float model."""
    _, packed, batch = three(name, recipe)
    if "input_ids" not in batch:
        return
    for value in (-1, -(2**40), 99, 10**9):
        ids = batch["input_ids"].clone()
        ids[0, 3] = value
        try:
            output(packed, batch | {"input_ids": ids})
        except (IndexError, RuntimeError, ValueError):
            continue
        raise AssertionError(f"token {value} was taken for one")


def types(name: str, recipe: str, dice: random.Random) -> None:
    """bfloat16 and float16 models, and other default types."""
    _, packed, batch = three(name, recipe)
    expected = output(packed, batch)
    for dtype in (torch.bfloat16, torch.float16):
        _, again, _ = three(name, recipe)
        low = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        found = output(again.to(dtype), low)
        if not found.isfinite().all():
            raise AssertionError(f"{dtype}: not finite")
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        torch.set_default_dtype(dtype)
        try:
            near(output(packed, batch), expected, 1e-5)
        finally:
            torch.set_default_dtype(torch.float32)


def devices(name: str, recipe: str, dice: random.Random) -> None:
    """On the meta device there are shapes and no answers; a model comes back from no place without weights."""
    simulated, _, batch = three(name, recipe)
    shape = output(simulated, batch).shape
    meta = {k: v.to("meta") for k, v in batch.items()}
    try:
        found = output(simulated.to("meta"), meta)
    except (RuntimeError, NotImplementedError, BitternError):
        return
    if found.device.type != "meta" or found.shape != shape:
        raise AssertionError("an answer out of nothing")


def saved(name: str, recipe: str, dice: random.Random) -> None:
    """With another default type a model is saved and loaded to the same bits; PTQ's searches stand extreme layers."""
    import tempfile

    _, packed, batch = three(name, recipe)
    expected = output(packed, batch)
    with tempfile.TemporaryDirectory() as folder:
        torch.set_default_dtype(torch.float64)
        save(packed, Path(folder) / "out")
        near(output(load(Path(folder) / "out"), batch), expected, 0.0)


def searched(name: str, recipe: str, dice: random.Random) -> None:
    """PTQ on constant, tiny and huge layers ends with finite scales, or is refused."""
    for method in ("omse", "vt", "bittern"):
        for factor in (0.0, 1e-30, 1e18):
            model, batch = SUPPORTED[name]()
            layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
            with torch.no_grad():
                dice.choice(layers).weight.mul_(factor)
            try:
                quantize(model, recipe, [batch], method=method)  # type: ignore[arg-type]
            except BitternError:
                continue
            if not output(model, batch).isfinite().all():
                raise AssertionError(f"{method}, weights times {factor:g}: not finite")


def trials(work: Path, seed: int) -> Iterator[Trial]:
    for turn in range(1 << 30):
        for way in (inputs, weights, sizes, tokens, types, devices, saved, searched):
            for name in FAMILIES:
                dice = random.Random(f"{seed} {turn} {way.__name__} {name}")
                recipe = "w8a8" if way is searched else RECIPES[turn % len(RECIPES)]

                def run(way: Any = way, name: str = name, recipe: str = recipe, dice: random.Random = dice) -> str:
                    def work_on() -> None:
                        try:
                            way(name, recipe, dice)
                        except BitternError as error:
                            print(f"\nerror: {error}")

                    ended = Process(work_on).wait(100)
                    return "" if ended.code == 0 and not ended.signal else str(ended)

                yield f"{way.__name__}: {name} {recipe} {turn}", run
