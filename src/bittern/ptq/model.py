"""Post-training quantization from end to end: one streamed forward, in which every unit is solved and kept."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bittern.anatomy import Anatomy
from bittern.attention import Site
from bittern.deploy.files import Journal, digest
from bittern.errors import InputError, ModelError
from bittern.layers import (
    QuantEmbedding,
    QuantLayer,
    Simulation,
    as_float,
    describe,
    fake_quants,
    simulate,
    weight_matrix,
)
from bittern.options import Mixed
from bittern.progress import Track, peak_memory, silent
from bittern.ptq.calibrate import calibrate
from bittern.ptq.capture import Captured, capture, unit_layers
from bittern.ptq.clips import omse_scale
from bittern.ptq.methods import Method, find_method
from bittern.ptq.mixed import (
    Choice,
    Part,
    block_parts,
    check_mixed,
    choose_bits,
    frontier,
    sensitivities,
    weights_of,
    widen,
)
from bittern.ptq.operands import searchable
from bittern.ptq.search import Space
from bittern.ptq.solution import Found, Solution, from_tensors, named_quantizers, put, to_tensors
from bittern.ptq.solve import Solved, solve_attention, solve_layers
from bittern.ptq.stream import Call, stream
from bittern.quantizers import find_scale
from bittern.recipe import Recipe, load_recipe


@dataclass
class Result:
    """The result of `quantize`.

    solved: every layer and product. by_extremes: what no search reaches, set from its smallest and largest value.
    bits, frontier: with mixed precision, of each part of a block. seconds: by phase. peak_memory: in bytes.
    """

    simulation: Simulation
    method: Method
    samples: int
    solved: list[Solved] = field(default_factory=list)
    by_extremes: list[str] = field(default_factory=list)
    bits: dict[str, int] = field(default_factory=dict)
    frontier: list[Choice] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method.name,
            "inputs": self.method.inputs,
            "samples": self.samples,
            "solved": [asdict(s) for s in self.solved],
            "by_extremes": self.by_extremes,
            "bits": self.bits,
            "frontier": [asdict(point) for point in self.frontier],
            "seconds": {phase: round(seconds, 3) for phase, seconds in self.seconds.items()},
            "peak_memory": self.peak_memory,
        }


@dataclass
class _Run:
    """State that all units of one call share."""

    model: PreTrainedModel
    batches: list[dict[str, Any]]
    sizes: list[int]
    method: Method
    mixed: Mixed | None
    seed: int
    journal: Journal | None
    anatomy: Anatomy
    tied: frozenset[str]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def parts(self, unit: str) -> dict[str, Part]:
        """Return the parts of a block, for mixed precision."""
        block = next((b for b in self.anatomy.blocks if b.name == unit), None)
        return block_parts(block) if block is not None and self.mixed is not None else {}


@torch.no_grad()
def quantize(
    model: PreTrainedModel,
    recipe: str | Recipe,
    batches: Iterable[Mapping[str, Any]],
    *,
    method: str | Method = "bittern",
    mixed: Mixed | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    track: Track = silent,
) -> Result:
    """Simulate a float model by `recipe`, in place, with scales, biases and weights that `method` finds on `batches`.

    mixed: a width of its own for each attention and each FFN. folder: where finished units are kept; the same call on
    the same model after a crash goes on there, to the same bits. seed: of the rows that are kept of very large inputs.
    Raises InputError, ModelError and RecipeError.
    """
    recipe, method = load_recipe(recipe), find_method(method)
    device = model.device
    given = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches]
    if not given:
        raise InputError("calibration got no batches; give at least one")
    sizes = [_samples(batch) for batch in given]
    if mixed is not None:
        check_mixed(method)
    journal = None if folder is None else Journal(folder, _job(model, recipe, given, method, mixed, seed))
    model.eval()
    start = time.perf_counter()
    simulation = simulate(model, recipe, given[0])
    run = _Run(model, given, sizes, method, mixed, seed, journal, simulation.anatomy, _tied(model))
    result = Result(simulation, method, sum(sizes))
    _solve_without_data(model, method)
    run.seconds["embeddings"] = time.perf_counter() - start
    if mixed is None:  # one solution at a time in memory
        for solution in _stream(run, track):
            result.solved += solution.settle(model, {})
    else:
        found = list(_stream(run, track))
        with run.clock("allocation"):
            result.bits, result.frontier = _allocate(run, found, mixed)
        for solution in found:
            result.solved += solution.settle(model, result.bits)
    with run.clock("extremes"):
        result.by_extremes = [q.name for _, q in fake_quants(model) if q.format.range == "static" and q.scale is None]
        calibrate(model, given)
    result.simulation = describe(model)
    result.seconds, result.peak_memory = run.seconds, peak_memory()
    return result


def _job(
    model: nn.Module,
    recipe: Recipe,
    batches: Sequence[Mapping[str, Any]],
    method: Method,
    mixed: Mixed | None,
    seed: int,
) -> dict[str, Any]:
    """Return the facts that a run depends on: another of these gives other bits."""
    named = ((f"{i} {k}", batch[k]) for i, batch in enumerate(batches) for k in sorted(batch))
    return {
        "model": digest(sorted(model.state_dict().items())),
        "data": digest((name, tensor) for name, tensor in named if isinstance(tensor, Tensor)),
        "recipe": recipe.model_dump(mode="json", exclude_defaults=True),
        "method": method.name,
        "method options": {
            name: getattr(value, "__qualname__", None) or (asdict(value) if isinstance(value, Space) else value)
            for name, value in vars(method).items()
        },
        "inputs": method.inputs,
        "mixed precision": None if mixed is None else asdict(mixed),
        "seed": seed,
    }


def _stream(run: _Run, track: Track) -> Iterator[Solution]:
    """Solve unit by unit, in the order in which the model runs them."""
    units = _units(run.model, run.anatomy)
    parallel, done = run.method.inputs == "parallel", set[str]()
    steps = stream(run.model, units, run.batches)
    with closing(steps), as_float(run.model) if parallel else nullcontext():
        for _ in track(range(len(units)), "calibrating"):
            with run.clock("forward"):
                step = next(steps, None)
            if step is None:
                break
            unit, calls = step
            if unit in done:
                raise ModelError(
                    f"{unit} runs more than once in a forward, as in ALBERT; a search would fit its first run only: "
                    "use `bittern quantize`, which takes scales from extremes"
                )
            done.add(unit)
            yield _solve_unit(run, calls, len(done))
            if not parallel:
                with run.clock("forward"):
                    for call in calls:
                        call.output = call.run()


def _solve_unit(run: _Run, calls: list[Call], number: int) -> Solution:
    unit, module = calls[0].unit, calls[0].module
    name = f"{number:03}-{unit}"
    kept = run.journal.load(name) if run.journal else None
    if kept is not None:
        solution = from_tensors(unit, *kept)
        with run.clock("forward"), as_float(module):
            for call in calls:
                call.output = call.run()
        if not solution.parts:
            put(module, solution.found[0], solution.found[0].names())
        return solution
    with run.clock("forward"):
        captured = capture(calls, run.batches, run.sizes, run.seed)
    parts = run.parts(unit)
    for group in captured.inputs:
        if parts and group.norm is not None:
            parts[f"{unit}.{group.norm}"] = parts[group.layers[0]]
    solution = Solution(unit, {}, parts)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    for bits in run.mixed.bits if run.mixed and parts else (0,):
        with run.clock("search"):
            if bits:
                widen(module, unit, parts, bits)
            solved = _solve(run, unit, module, captured)
        sensitivity = {}
        if bits and run.mixed:
            with run.clock("sensitivity"):
                sensitivity = sensitivities(calls, run.sizes, parts, run.mixed.sensitivity)
        changed = {n: p.detach().clone() for n, p in module.named_parameters() if not torch.equal(p, before[n])}
        scales = {n: b.clone() for n, b in module.named_buffers() if n.endswith((".scale", ".offset"))}
        formats = {n: q.format.model_dump(mode="json", exclude_defaults=True) for n, q in named_quantizers(module)}
        solution.found[bits] = Found(changed | scales, formats, [asdict(s) for s in solved], sensitivity)
        if bits:
            for n, p in module.named_parameters():
                p.detach().copy_(before[n])
    if run.journal:
        with run.clock("disk"):
            run.journal.save(name, *to_tensors(solution))
    return solution


def _solve(run: _Run, unit: str, module: nn.Module, captured: Captured) -> list[Solved]:
    layers, sites = unit_layers(unit, module), {m.name: m for m in module.modules() if isinstance(m, Site)}
    solved = []
    for group in captured.inputs:
        chosen = {n: layers[n] for n in group.layers}
        norm = module.get_submodule(group.norm) if group.norm is not None and run.method.folds else None
        solved += solve_layers(chosen, group.x, group.sample, run.method, run.tied, norm)
    for name, heads in captured.heads.items():
        solved += solve_attention(sites[name], heads, run.method)
    return solved


def _allocate(run: _Run, solutions: Sequence[Solution], mixed: Mixed) -> tuple[dict[str, int], list[Choice]]:
    """Bits of each part for the target, and all other best choices."""
    sensitivity: dict[str, dict[int, float]] = {}
    weights: dict[str, int] = {}
    for solution in solutions:
        for part in dict.fromkeys(solution.parts.values()):
            name = f"{solution.unit}.{part}"
            sensitivity[name] = {bits: found.sensitivity[part] for bits, found in solution.found.items()}
            weights[name] = weights_of(run.model.get_submodule(solution.unit), solution.unit, solution.parts, part)
    points = frontier(sensitivity, weights)
    return choose_bits(points, weights, mixed.target).bits, points


def _units(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Blocks, and the quantized layers outside of them, in no order: the model runs them in its own."""
    blocks = [block.name for block in anatomy.blocks]
    outside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantLayer)
        and not isinstance(module, QuantEmbedding)
        and name not in anatomy.idle
        and not any(name.startswith(f"{block}.") for block in blocks)
        and unit_layers(name, module)
    ]
    return [*outside, *(b for b in blocks if _has_work(b, model.get_submodule(b)))]


def _has_work(name: str, module: nn.Module) -> bool:
    return bool(unit_layers(name, module)) or any(isinstance(m, Site) and m.formats for m in module.modules())


def _solve_without_data(model: nn.Module, method: Method) -> None:
    """Weights of embeddings: no product to look at, so the scale that is nearest to the weight itself.

    At 8 bits and more that is the scale of the extremes, nearly, which they have.
    """
    for module in model.modules():
        if isinstance(module, QuantEmbedding) and searchable(module.weight_quantizer):
            assert module.weight_quantizer is not None
            clip = method.weight_clip
            if method.space is not None:
                clip = omse_scale if module.weight_quantizer.format.bits < 8 else find_scale
            module.weight_quantizer.set_scale(
                *clip(weight_matrix(module).detach().float(), module.weight_quantizer.format)
            )


def _tied(model: nn.Module) -> frozenset[str]:
    """Layers whose weight another module shares."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            owners.setdefault(id(module.weight), []).append(name)
    return frozenset(name for names in owners.values() if len(names) > 1 for name in names)


def _samples(batch: Mapping[str, Any]) -> int:
    tensor = next((v for v in batch.values() if isinstance(v, Tensor) and v.dim()), None)
    if tensor is None:
        raise InputError(f"a calibration batch holds no tensors, only {', '.join(batch) or 'nothing'}")
    return len(tensor)
