"""Post-training quantization from end to end: one streamed forward, in which every unit is solved and kept."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bittern import layers
from bittern.anatomy import Anatomy, Batch
from bittern.attention import Site
from bittern.deploy.files import digest
from bittern.deploy.journal import Journal
from bittern.errors import InputError
from bittern.options import Mixed
from bittern.progress import Track, peak_memory, silent
from bittern.ptq import mixed as precision
from bittern.ptq.calibrate import calibrate
from bittern.ptq.capture import Captured, capture, size_of, unit_layers
from bittern.ptq.clips import omse_scale
from bittern.ptq.methods import Method, find_method
from bittern.ptq.mixed import Choice, Solution, allocate, block_parts, check_mixed, model_outputs, sensitivities
from bittern.ptq.solve import Solved, searchable, solve_attention, solve_layers
from bittern.ptq.stream import Call, stream
from bittern.quantizers import find_scale
from bittern.recipe import Recipe, load_recipe
from bittern.simulation import Simulation


@dataclass
class Result:
    """The result of `quantize`.

    solved: every layer and product. by_extremes: what no search reaches, set from its smallest and largest value.
    With mixed precision, bits: of each part of a block; frontier: all best choices by their sensitivities; divergence:
    of the model's outputs with the mixed and with the uniform widths, of which the better are taken.
    seconds: by phase. peak_memory: in bytes.
    """

    simulation: Simulation
    method: Method
    samples: int
    solved: list[Solved] = field(default_factory=list)
    by_extremes: list[str] = field(default_factory=list)
    bits: dict[str, int] = field(default_factory=dict)
    frontier: list[Choice] = field(default_factory=list)
    divergence: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0

    def to_dict(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name not in ("simulation", "method")}
        own |= {name: [asdict(one) for one in own[name]] for name in ("solved", "frontier")}
        own |= {"seconds": {phase: round(seconds, 3) for phase, seconds in self.seconds.items()}}
        return {"method": self.method.name, "inputs": self.method.inputs} | own


@dataclass
class _State:
    """State that all units of one call share."""

    model: PreTrainedModel
    batches: list[dict[str, Any]]
    sizes: list[int]
    method: Method
    mixed: Mixed | None
    seed: int
    journal: Journal | None
    anatomy: Anatomy
    tied: set[str]  # layers whose weight another shares
    seconds: dict[str, float] = field(default_factory=dict)

    def forward(self, calls: Sequence[Call], in_float: bool) -> None:
        """Set the outputs of a unit's calls."""
        with self.clock("forward"), layers.as_float(calls[0].module) if in_float else nullcontext():
            for call in calls:
                call.output = call.run()

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@torch.no_grad()
def quantize(
    model: PreTrainedModel,
    recipe: str | Recipe,
    batches: Iterable[Batch],
    *,
    method: str | Method = "bittern",
    mixed: Mixed | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    track: Track = silent,
) -> Result:
    """Simulate a float model by `recipe`, in place, with scales, biases and weights that `method` finds on `batches`.

    mixed: a width of its own for each attention and each FFN, or one for all if that is better. folder: where finished
    units are kept; the same call on the same model after a crash goes on there, to the same bits. seed: of the rows
    that are kept of very large inputs. Raises InputError, ModelError and RecipeError.
    """
    recipe, method = load_recipe(recipe), find_method(method)
    given = [{k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches]
    if not given:
        raise InputError("calibration got no batches; give at least one")
    sizes = [size_of(batch) for batch in given]
    if mixed is not None:
        check_mixed(method)
    journal = None if folder is None else Journal(folder, _job(model, recipe, given, method, mixed, seed))
    model.eval()
    start = time.perf_counter()
    simulation = layers.simulate(model, recipe, given[0])
    tied = layers.tied_layers(model, simulation.anatomy.roles)
    run = _State(model, given, sizes, method, mixed, seed, journal, simulation.anatomy, {*tied, *tied.values()})
    result = Result(simulation, method, sum(sizes))
    _solve_without_data(model, method)
    run.seconds["embeddings"] = time.perf_counter() - start
    with run.clock("forward"), layers.as_float(model):
        reference = model_outputs(model, given) if mixed is not None else []
    pending: list[dict[int, Solution]] = []  # blocks that wait for their widths
    for widths in _stream(run, track):
        *_, last = widths.values()
        result.by_extremes += last.unclear
        solved = last.put(model)
        if 0 in widths:  # one solution at a time in memory
            result.solved += solved
        else:
            result.solved += last.put(model, None)
            pending.append(widths)
    unset = [q.name for _, q in layers.fake_quants(model) if q.needs_scale]
    named = tuple(f"{name}." for name in result.by_extremes)
    result.by_extremes += [name for name in unset if not name.startswith(named)]
    if mixed is not None:
        with run.clock("allocation"):
            solved, result.bits, result.frontier, result.divergence = allocate(model, given, pending, mixed, reference)
        result.solved += solved
    with run.clock("extremes"):
        calibrate(model, given)
    result.simulation = layers.describe(model)
    result.seconds, result.peak_memory = run.seconds, peak_memory()
    return result


def _job(
    model: nn.Module, recipe: Recipe, batches: Sequence[Batch], method: Method, mixed: Mixed | None, seed: int
) -> dict[str, Any]:
    """Return the facts that a run depends on: another of these gives other bits."""
    named = ((f"{i} {k}", batch[k]) for i, batch in enumerate(batches) for k in sorted(batch))
    return {
        "model": digest(sorted(model.state_dict().items())),
        "data": digest((name, tensor) for name, tensor in named if isinstance(tensor, Tensor)),
        "recipe": recipe.model_dump(mode="json", exclude_defaults=True),
        "method": method.name,
        "method options": asdict(method),
        "inputs": method.inputs,
        "mixed precision": mixed and asdict(mixed),
        "seed": seed,
    }


def _stream(run: _State, track: Track) -> Iterator[dict[int, Solution]]:
    """Solve unit by unit, as the model runs them; yield what was found by width (0: the recipe's). One that runs more
    than once is solved once, on the inputs of all its runs, when the last one comes; till then it computes in float.
    """
    units = _units(run.model, run.anatomy)
    parallel, number = run.method.inputs == "parallel", 0
    left: Counter[str] = Counter()  # runs of each unit to come
    with layers.as_float(run.model):
        for unit, calls in stream(run.model, units, run.batches[:1]):
            left[unit] += 1
            run.forward(calls, in_float=True)
    held: dict[str, list[Call]] = defaultdict(list)
    steps = stream(run.model, units, run.batches)
    with closing(steps), layers.as_float(run.model) if parallel else nullcontext():
        for _ in track(range(left.total()), "calibrating"):
            with run.clock("forward"):
                unit, calls = next(steps)
            held[unit] += calls
            left[unit] -= 1
            if left[unit]:
                run.forward(calls, in_float=True)
                continue
            number += 1
            yield _solve_unit(run, held.pop(unit), number)
            if not parallel:
                run.forward(calls, in_float=False)


def _solve_unit(run: _State, calls: list[Call], number: int) -> dict[int, Solution]:
    """Return what is found for a unit, by width, and set the output of its calls."""
    unit, module = calls[0].unit, calls[0].module
    block = next((b for b in run.anatomy.blocks if b.name == unit), None)
    parts = block_parts(block) if block is not None and run.mixed is not None else {}
    widths = run.mixed.bits if run.mixed and parts else (0,)
    files = {bits: f"{number:03}-{unit}" + f"@{bits}" * bool(bits) for bits in widths}
    kept = {bits: run.journal.load(file) for bits, file in files.items()} if run.journal else {}
    if kept and None not in kept.values():
        run.forward(calls, in_float=True)
        return {bits: Solution(unit, part[0], **part[1]) for bits, part in kept.items() if part}
    with run.clock("forward"):
        captured = capture(calls, run.batches, run.sizes, run.seed)
    for group in captured.inputs:
        if group.norm is not None and (part := precision.part_of(group.layers[0], parts)) is not None:
            parts[f"{unit}.{group.norm}"] = part
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    changed: set[str] = set()
    found: dict[int, Solution] = {}
    for bits in files:
        for name, parameter in module.named_parameters() if found else ():
            parameter.detach().copy_(before[name])
        if bits:
            precision.widen(module, unit, parts, bits)
        with run.clock("search"):
            solved = _solve(run, unit, module, captured)
        with run.clock("sensitivity"):
            omega = sensitivities(calls, run.sizes, parts, run.mixed.sensitivity) if run.mixed and parts else {}
        tensors = {n: p.detach().clone() for n, p in module.named_parameters()}
        changed |= {n for n, p in tensors.items() if not torch.equal(p, before[n])}
        tensors |= {n: b.clone() for n, b in module.named_buffers() if n.endswith((".scale", ".offset"))}
        formats = {n: q.format.model_dump(mode="json", exclude_defaults=True) for n, q in layers.fake_quants(module)}
        found[bits] = Solution(unit, tensors, formats, [asdict(s) for s in solved], captured.unclear, parts, omega)
    for bits, file in files.items():
        for name in before.keys() - changed:
            del found[bits].tensors[name]
        if run.journal:
            with run.clock("disk"):
                notes = vars(found[bits]).copy()
                run.journal.save(file, notes.pop("tensors"), {k: v for k, v in notes.items() if k != "unit"})
    return found


def _solve(run: _State, unit: str, module: nn.Module, captured: Captured) -> list[Solved]:
    inside, sites = unit_layers(unit, module), {m.name: m for m in module.modules() if isinstance(m, Site)}
    solved = []
    for group in captured.inputs:
        norm = module.get_submodule(group.norm) if group.norm is not None and run.method.folds else None
        solved += solve_layers({n: inside[n] for n in group.layers}, group.x, group.sample, run.method, run.tied, norm)
    for name, heads in captured.heads.items():
        solved += solve_attention(sites[name], heads, run.method)
    return solved


def _units(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Outermost blocks with something to solve, and quantized layers outside of them; the model has their order."""
    blocks = [block.name for block in anatomy.blocks]
    inside = tuple(f"{block}." for block in blocks)
    outside = [n for n, m in model.named_modules() if isinstance(m, layers.QuantLayer) and not n.startswith(inside)]
    units = []
    for name in (*outside, *blocks):
        module = model.get_submodule(name)
        has_products = any(isinstance(m, Site) and m.formats for m in module.modules())
        if name not in anatomy.idle and (has_products or unit_layers(name, module)):
            units.append(name)
    return [name for name in units if not name.startswith(tuple(f"{unit}." for unit in units))]


def _solve_without_data(model: nn.Module, method: Method) -> None:
    """Weights of embeddings and of experts: the scale that is nearest to the weight itself, for want of a product, or
    of enough rows that choose the same expert. At 8 bits and more it is nearly that of the extremes, which they have.
    """
    kinds = layers.QuantEmbedding | layers.QuantExpertsLinear
    for module in model.modules():
        quantizer = module.weight_quantizer if isinstance(module, kinds) else None
        if quantizer is not None and searchable(quantizer):
            nearest = omse_scale if quantizer.format.bits < 8 else find_scale
            clip = method.weight_clip if method.space is None else nearest
            quantizer.set_scale(*clip(layers.weight_matrix(module).detach().float(), quantizer.format))
