"""Compress a model as far as a limit on its loss allows.

`LADDER` goes from safe to small. Each rung is packed, written, loaded again as its users load it, and measured on one
half of the test data, beside the float model. The rung that serves the goal best, among those whose loss is within the
limit, must be within it on the other half too, by which nothing was chosen; otherwise it is the next one's turn.
"""

import copy
import json
import math
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bittern import native
from bittern.analysis.ablation import block_errors
from bittern.analysis.findings import OF_THE_TEACHER
from bittern.analysis.pair import Pair
from bittern.analysis.report import write_page
from bittern.data import Data, task_of
from bittern.data.evaluate import LOWER_IS_BETTER, check_classes, check_metric, headline, metrics, predict, resampled
from bittern.deploy.bench import alternate
from bittern.deploy.checkpoint import pack
from bittern.deploy.companions import CARD, REPORT
from bittern.deploy.files import atomic_folder, check_output, digest, holds_output
from bittern.deploy.journal import Journal
from bittern.deploy.store import float_bytes, load, measure, save
from bittern.errors import InputError
from bittern.jobs import load_float, load_parts
from bittern.layers import simulate
from bittern.options import Distill, Training
from bittern.progress import OnEstimate, Track, ignore, silent
from bittern.ptq import quantize as post_training
from bittern.ptq.calibrate import calibrate
from bittern.qat.training import train
from bittern.recipe import Recipe, keep_wide, load_recipe, with_bits

Goal = Literal["size", "speed", "balanced"]
Row = dict[str, Any]  # of the table: a rung and what was measured
OnRung = Callable[[Row], None]
ROUNDS, DRAWS, DRAWN = 11, 400, 200_000  # of timing; of the bootstrap; samples in all of its draws, about
# The command that does the same; how many times a float model's forward of the calibration samples it takes, about.
HOW = {"extremes": ("quantize", 4), "search": ("ptq", 90), "train": ("qat", 90)}
PAGE = "compress.html"  # beside the model: all rungs, drawn


@dataclass(frozen=True)
class Rung:
    """One way to make a smaller model.

    how: `extremes` (scales from extremes), `search` (PTQ by the default method) or `train` (QAT of what the search
    found, with the float model as teacher). bits: of weights, in place of the recipe's 4. wide: share of the blocks,
    those that lose most by themselves, whose weights keep 8 bits.
    """

    name: str
    how: Literal["extremes", "search", "train"]
    recipe: str = "w4a8"
    bits: int | None = None
    wide: float = 0.0


Ladder = Sequence[Sequence[Rung]]
LADDER: Ladder = (  # of each step the first rung within the limit is enough
    (
        Rung("w8a8", "extremes", "w8a8"),
        Rung("w8a8-token", "extremes", "w8a8-token"),
        Rung("w8a8-searched", "search", "w8a8"),
    ),
    (Rung("w4a8", "search"), Rung("w4a8-wide", "search", wide=0.34), Rung("w6a8", "search", bits=6)),
    (Rung("w3a8", "search", bits=3), Rung("w3a8-wide", "search", bits=3, wide=0.34)),
    (Rung("w2a8", "search", bits=2),),
    (Rung("ternary", "train", "ternary"),),
)


def interval(points: float, error: float, samples: int, looks: int = 1) -> Row:
    """Return a loss with the ends of its one-sided 95 % intervals, wider (Bonferroni) after several `looks` at it."""
    reach = statistics.NormalDist().inv_cdf(1 - 0.05 / looks) * error
    return {"points": points, "error": error, "samples": samples, "at_most": points + reach, "at_least": points - reach}


def paired_loss(metric: str, model: PreTrainedModel, data: Data, output: Tensor, reference: Tensor) -> Row:
    """Return how much worse a model is than the float one by its outputs for the same samples and a metric of
    `metrics`, in points (percent for perplexity), as an `interval`.

    For the accuracy and the agreement of classes the standard error is that of Agresti and Min (2005): half a sample
    more in each cell of the table of pairs, so that no difference at all leaves some doubt. For other metrics it comes
    from a bootstrap over samples, with all of their tokens.
    """
    count = len(data)
    if metric in ("accuracy", "agreement") and task_of(model) == "classes":
        right = reference.argmax(-1) if metric == "agreement" or data.labels is None else data.labels
        hits, theirs = output.argmax(-1) == right, reference.argmax(-1) == right
        lost, won = int((theirs & ~hits).sum()), int((hits & ~theirs).sum())
        variance = lost + won + 1 - (lost - won) ** 2 / (count + 2)
        return interval(100 * (lost - won) / count, 100 * math.sqrt(variance) / (count + 2), count)

    float_output = reference if metric in OF_THE_TEACHER else None
    measures = [resampled(metric, model, data, o, float_output) for o in (output, reference)]

    def points(rows: Sequence[int]) -> float:
        worse, better = (measure(rows) for measure in measures)
        return 100 * (worse / better - 1 if metric in LOWER_IS_BETTER else better - worse)

    draw, draws = torch.Generator().manual_seed(0), max(DRAWS // 10, min(DRAWS, DRAWN // count))
    found = [points(torch.randint(count, (count,), generator=draw).tolist()) for _ in range(draws)]
    return interval(points(range(count)), statistics.stdev(found), count)


@dataclass
class Workshop:
    """All that rungs are made from and measured with. reference: outputs of the float model for `choice`."""

    source: str | Path
    folder: Path
    model: PreTrainedModel
    train: Data
    calibration: Data
    choice: Data
    reference: Tensor
    metric: str
    minutes: float
    seed: int
    track: Track

    def make(self, rung: Rung) -> None:
        """Write the packed model of a rung to its folder."""
        recipe = load_recipe(rung.recipe)
        if rung.bits:
            recipe = with_bits(recipe, rung.bits, rung.name)
        if rung.wide:
            recipe = keep_wide(recipe, self.weakest(recipe, rung.wide), rung.name)
        model, work = copy.deepcopy(self.model), self.folder / f"{rung.name}.work"
        if rung.how == "extremes":
            self.by_extremes(model, recipe)
        else:
            post_training(model, recipe, self.calibration, folder=work, seed=self.seed, track=self.track)
        if rung.how == "train":
            shutil.rmtree(work, ignore_errors=True)
            self.distill(model, work)
        pack(model)
        save(model, self.folder / rung.name, processors_from=self.source, force=True)
        shutil.rmtree(work, ignore_errors=True)

    def by_extremes(self, model: PreTrainedModel, recipe: Recipe) -> None:
        simulate(model, recipe, next(iter(self.calibration)))
        calibrate(model, self.calibration)

    def scores(self, model: PreTrainedModel) -> dict[str, float]:
        return metrics(model, self.choice, predict(model, self.choice), self.reference)

    def weakest(self, recipe: Recipe, share: float) -> list[str]:
        """Name the blocks that change the model's outputs most when they alone are quantized."""
        student = copy.deepcopy(self.model)
        self.by_extremes(student, recipe)
        *errors, _, _ = block_errors(Pair(student, copy.deepcopy(self.model)), list(self.calibration), self.track)
        ranked = sorted(errors, key=lambda row: float(row["error"]), reverse=True)
        return [row["name"] for row in ranked[: math.ceil(share * len(ranked))]]

    def distill(self, model: PreTrainedModel, work: Path) -> None:
        """Train a student for about as many minutes as are allowed; a few steps of a copy tell how long one takes.

        The learning rate falls with the width, as in μP: 1e-4 for 768, 2e-4 for 384, half of that for images, which
        served best of those tried.
        """
        images, ends = model.main_input_name == "pixel_values", dict[int, float]()
        rate = (0.0384 if images else 0.0768) / getattr(model.config, "hidden_size", 768)

        def note(step: int, *_: Any) -> None:
            ends.setdefault(step, time.perf_counter())

        def run(student: PreTrainedModel, steps: int) -> None:
            size, metric, seed = self.train.batch_size, self.metric, self.seed
            plan = Training(steps=steps, batch_size=size, learning_rate=rate, evaluations=1, metric=metric, seed=seed)
            measure, teacher = lambda: self.scores(student), copy.deepcopy(self.model)
            train(student, teacher, self.train, measure, Distill(), plan, work, on_step=note)

        run(copy.deepcopy(model), 8)
        run(model, max(8, int(60 * self.minutes * 7 / (ends[8] - ends[1]))))

    def lose(self, name: str, data: Data, reference: Tensor) -> tuple[PreTrainedModel, Tensor, Row]:
        """Load a rung as its users do, with kernels; return it, its outputs and how much worse they are."""
        packed = load(self.folder / name)
        output = predict(packed, self.track(data, f"{name}: measuring"))
        return packed, output, paired_loss(self.metric, packed, data, output, reference)

    def measure(self, rung: Rung) -> Row:
        """Measure what a rung loses, and its time in turn with the float model's."""
        packed, output, loss = self.lose(rung.name, self.choice, self.reference)
        one = next(iter(replace(self.choice, batch_size=1)))
        with torch.no_grad():
            rounds = alternate({"packed": lambda: packed(**one), "float": lambda: self.model(**one)}, ROUNDS)
        times = {name: min(seconds) for name, seconds in rounds.items()}  # what other work adds is no part of it
        size = measure(packed, self.folder / rung.name)
        return {
            "rung": rung.name,
            "how": rung.how,
            self.metric: metrics(packed, self.choice, output, self.reference)[self.metric],
            **loss,
            "bits": size.bits,
            "file": size.file,
            "smaller": float_bytes(self.model) / size.file,
            "latency_ms": 1e3 * times["packed"],
            "faster": times["float"] / times["packed"],
            "kernels": native.engine()[0] or "none",
        }


# What is to be small. A time is a share of the float model's in the same rounds: rungs are measured at other moments.
GOALS: dict[Goal, tuple[str, Callable[[Row], float]]] = {
    "size": ("the smallest", lambda row: float(row["file"])),
    "speed": ("the fastest", lambda row: 1 / float(row["faster"])),
    "balanced": ("the least size × time", lambda row: float(row["file"] / row["faster"])),
}


def journal_entry(rung: Rung, minutes: float) -> tuple[str, Row]:
    """Return the name of a rung in the journal, and all that it is made of."""
    name = f"{rung.name}-{minutes:g}" if rung.how == "train" else rung.name
    return name, asdict(rung) | {"recipe": load_recipe(rung.recipe).model_dump(mode="json")}


def climb(ladder: Ladder, workshop: Workshop, journal: Journal, limit: float, keep: str | None = None) -> Iterator[Row]:
    """Measure rung after rung, from the journal what was measured before.

    Within a step the first rung within the limit is enough. After a step whose rungs all fail clearly, by 95 %, no
    smaller rung is searched for; training may still find one. keep: the only rung that is measured if it is not yet.
    """

    def measure(rung: Rung) -> Row:
        start = time.perf_counter()
        workshop.make(rung)
        return workshop.measure(rung) | {"seconds": time.perf_counter() - start}

    failed = False
    for step in ladder:
        rows = []
        for rung in step:
            part, made_of = journal_entry(rung, workshop.minutes)
            wanted = rung.name == keep if keep else rung.how == "train" or not failed
            if not wanted and not (keep and journal.kept(part, made_of)):
                continue
            row = journal.part(part, partial(measure, rung), made_of)
            rows.append(row | {"within": row["points"] + row["error"] <= limit})
            yield rows[-1]
            if rows[-1]["within"] and not keep:
                break
        failed = failed or (bool(rows) and all(row["at_least"] > limit for row in rows))


def choose_rung(
    rows: Sequence[Row], goal: Goal, limit: float, again: Callable[[Row], Row], keep: str | None = None
) -> tuple[Row, str, Row]:
    """Return the row that serves the goal best within the limit on both halves (or `keep`), why, and its loss on the
    other half, with bounds for all looks at it; unmark rows `within` that lose more there. InputError if none holds."""
    (best, value), refused, lost = GOALS[goal], list[Row](), ""
    within = sorted((row for row in rows if (row["rung"] == keep if keep else row["within"])), key=value)
    for row in within:
        loss = again(row)
        if keep or loss["points"] <= limit:
            why = f"{best} of {len(within)} rungs within the limit of {limit:g}, of {len(rows)} measured"
            why = "asked for by --keep" if keep else why + (lost and f"; on the other half {lost}")
            return row, why, interval(loss["points"], loss["error"], loss["samples"], 1 + len(refused))
        row["within"] = False
        refused.append(row | loss)
        lost += f"{lost and ', '}{row['rung']} loses {loss['points']:.2f}"
    nearest = min(refused or rows, key=lambda row: float(row["points"]))
    more = "give more labelled data, " if nearest["points"] - nearest["error"] <= limit else ""
    both = lost and f" on both halves of the data (on the other {lost})"
    raise InputError(
        f"no rung is within the limit of {limit:g}{both}; nearest is {nearest['rung']}, {nearest['points']:.2f} ± "
        f"{nearest['error']:.2f}: {more}raise --max-loss, take it with --keep {nearest['rung']}, or allow --train"
    )


@holds_output
def compress(
    source: str | Path,
    out: str | Path,
    *,
    data: str,
    max_loss: float = 1.0,
    goal: Goal = "balanced",
    train_minutes: float = 0.0,
    keep: str | None = None,
    ladder: Ladder = LADDER,
    samples: int = 128,
    seed: int = 0,
    force: bool = False,
    on_estimate: OnEstimate = ignore,
    on_rung: OnRung = ignore,
    track: Track = silent,
    **columns: Any,
) -> dict[str, Any]:
    """Write the model that serves `goal` best among those that lose at most `max_loss` points to `out`, packed.

    The metric is the task's own, or another (see `bittern.options.Reading`, whose fields `columns` are); without labels
    it is the agreement with the float model. A rung is within the limit if its loss on one half of the test data is, by
    one standard error; one that loses more on the other half gives way to the next. goal: size, speed (of one sample)
    or balanced (the product of both). train_minutes: how long distillation may take, which alone makes ternary weights
    useful. All rungs are kept in the folder `out`.rungs: the same call after a crash, or with another limit or goal,
    measures only what is missing there. keep: name of a rung to write whatever it lost. ladder: own steps, each of
    rungs of which the first within the limit is enough. on_rung: told of each. Raises InputError if none is within.
    """
    if goal not in get_args(Goal):
        raise InputError(f"--for is {goal!r}; expected {', '.join(get_args(Goal))}")
    if not 0 <= max_loss < math.inf or not 0 <= train_minutes < math.inf:
        raise InputError(f"--max-loss is {max_loss:g}, --train {train_minutes:g}; expected 0 or more")
    ladder = [steps for step in ladder if (steps := [r for r in step if train_minutes or r.how != "train"])]
    rungs = {rung.name: rung for step in ladder for rung in step}
    if keep is not None and keep not in rungs:
        raise InputError(f"no rung {keep!r} to keep; there are {', '.join(rungs)}; trained ones with --train only")
    if not rungs or any(Path(name).name != name for name in rungs) or len(rungs) < sum(map(len, ladder)):
        why = "two rungs of one name, or one whose name is none of a folder" if rungs else "no rung without --train"
        raise InputError(f"the ladder has {why}; give another one")
    check_output(out, force)
    Journal.check_ours(folder := Path(f"{Path(out)}.rungs"))
    model = load_float(source)
    train_data, test = load_parts(data, model, source, seed, **columns)
    assert test is not None
    choice, fresh = test.split(len(test) // 2, seed)
    check_metric(model, choice)
    start = time.perf_counter()
    reference = predict(model, track(choice, "float"))
    seconds = (time.perf_counter() - start) / len(choice)  # of one sample
    check_classes(model, choice, reference)
    measured = metrics(model, choice, reference, reference)
    metric = headline(data, measured, choice.metric)
    if metric in LOWER_IS_BETTER and not measured[metric]:
        raise InputError(f"no share of {metric} can be lost, which is 0 for the float model; choose another --metric")
    if task_of(model) == "classes" and (least := 100 / (len(choice) + 2)) > max_loss and keep is None:
        warnings.warn(
            f"{len(choice)} samples to choose by are too few for a limit of {max_loss:g}: even a rung that changes no "
            f"answer may lose {least:.2f}; give more labelled data, or raise --max-loss",
            stacklevel=2,
        )
    calibration = train_data.subset(samples, seed)
    parts = [part.fingerprint() for part in (train_data.subset(256), calibration, choice)]
    known = {"model": digest(sorted(model.state_dict().items())), "data": parts, "metric": metric, "seed": seed}
    journal = Journal(folder, known)
    workshop = Workshop(
        source, folder, model, train_data, calibration, choice, reference, metric, train_minutes, seed, track
    )
    wanted = [rung for rung in rungs.values() if keep in (None, rung.name)]
    missing = [rung for rung in wanted if not journal.kept(*journal_entry(rung, train_minutes))]
    forwards = {rung: HOW[rung.how][1] * len(calibration) + 2 * len(choice) for rung in missing}
    on_estimate({r.name: seconds * n + 60 * train_minutes * (r.how == "train") for r, n in forwards.items()})
    rows = []
    for row in climb(ladder, workshop, journal, max_loss, keep):
        rows.append(row)
        on_rung(row)
    again = partial(workshop.lose, data=fresh, reference=predict(model, track(fresh, "float, on the other half")))
    chosen, why, loss = choose_rung(rows, goal, max_loss, lambda row: again(row["rung"])[2], keep)
    result = {
        "source": str(source),
        "data": data,
        "metric": metric,
        "origin": choice.origin,
        "float": measured[metric],
        "float_bytes": float_bytes(model),
        "max_loss": max_loss,
        "goal": goal,
        "rows": rows,
        "chosen": chosen["rung"],
        "how": HOW[chosen["how"]][0],
        "why": why,
        "fresh": loss,
        "rungs": str(folder),
    }
    with atomic_folder(out, force=force) as place:
        shutil.copytree(folder / chosen["rung"], place, dirs_exist_ok=True)
        with (place / CARD).open("a", encoding="utf-8") as card:
            found = f"{metric} {chosen[metric]:.4f}, of the float model {measured[metric]:.4f}"
            lost = f"on {loss['samples']} other samples it loses {loss['points']:.2f}, at most {loss['at_most']:.2f}"
            card.write(f"* Measured: {found}; {lost}\n")
        (place / REPORT).write_text(json.dumps(result, indent=2) + "\n")
        write_page(result, place / PAGE)
    return result | {"out": str(out)}
