"""Options of whole jobs, as data: what each means, its default, and how the command line shows it.

Nothing here needs torch, so that `bittern qat --help` answers at once.
"""

import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from importlib import import_module
from inspect import signature
from itertools import groupby
from operator import attrgetter
from typing import Any, Literal, NamedTuple, get_args

from bittern.errors import InputError, no_such


class Option(NamedTuple):
    """An option of a command: its help; its flags, by default its name, or the name of what is given without a flag;
    the least value that it may have. Options of the same flag are one, whose value goes to all places."""

    help: str
    flags: tuple[str, ...] = ()
    least: int | None = None


def option(default: Any, help: str, *flags: str, least: int | None = None) -> Any:
    """Make a field of a dataclass that is an option. default: a value, or what makes one."""
    made = {"default_factory" if callable(default) else "default": default}
    return field(**made, metadata={"option": Option(help, flags, least)})


BATCH_SIZE, SEED, METRIC = "Samples per batch.", "Of order, dropout and draws.", "Which metric decides"
LAYER_TYPES = ("Linear", "Conv2d", "Embedding", "Conv1D", "ExpertsLinear")  # what holds a weight matrix, in results
Labels = Mapping[str, str] | Literal["order"]
Sensitivity = Literal["relative", "paper"]
Balance = Literal["fixed", "auto"]
Scope = Literal["all", "part"]
Optimizer = Literal["adamw", "bertadam"]


def find_own(name: str) -> Any:
    """Import what `module:name` names, of the working folder too. Raises InputError if there is none."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, _, attribute = name.partition(":")
    try:
        return attrgetter(attribute)(import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"no {name}: {error}; expected module:name, of a module in this folder or installed") from None


def name_own(given: Any) -> Any:
    """Return the `module:name` of a function, by which a run is known and resumed; names as they are."""
    if not callable(given):
        return given
    name = f"{given.__module__}:{given.__qualname__}"
    if find_own(name) is not given:
        raise InputError(f"{name} is now another function; pass one that its module knows by this name")
    return name


def refuse_unused(of: Callable[..., Any], why: str, **given: Any) -> None:
    """Raise InputError for options of a job, or of a dataclass here, that say nothing and are not its defaults."""
    known = {name: parameter.default for name, parameter in signature(of).parameters.items()} | vars(Reading())
    if unused := [f"--{name.replace('_', '-')}" for name, value in given.items() if value != known.get(name)]:
        verb, what = ("says", "it") if len(unused) == 1 else ("say", "them")
        raise InputError(f"{', '.join(unused)} {verb} nothing {why}; leave {what} out")


def _check_positive(options: Any, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise InputError(f"{name} is {value:g}; expected more than 0")


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise InputError(f"{name} is {value!r}; expected {' or '.join(get_args(choices))}")


@dataclass(frozen=True)
class Reading:
    """The way to read data, which a job passes on to `bittern.data.load_data`.

    labels: label of the data → class of the model, by name or number. max_length: by default what tokenizer and model
    take, of a language model at most 512. metric: a name that `metrics` gives, or a function of a model's outputs and
    the Data that returns a number, the higher the better, or its `module:name`.
    """

    columns: Sequence[str] = option((), "Input columns of the data, separated by commas.")
    label_column: str | None = option(None, "Label column of the data.")
    labels: Labels | None = option(
        None, "DATA=MODEL,…: which label is which class, by name or number; or order, if both are in the same order."
    )
    max_length: int | None = option(None, "Most tokens of a text; of a language model's block.", least=2)
    batch_size: int = option(32, BATCH_SIZE, least=1)
    metric: str | None = option(None, f"{METRIC}; module:name of one of your own.")
    skip_bad: bool = option(False, "Read all images and texts first, and leave out those that cannot be used.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "metric", name_own(self.metric))


# ---- post-training quantization


@dataclass(frozen=True)
class Mixed:
    """Mixed precision [VT 3.4]: `target` bits a weight on average in the blocks, from the candidates `bits`."""

    target: float = option(MISSING, "Mixed precision: bits a weight on average in the blocks.")
    bits: tuple[int, ...] = option((4, 5, 6, 7, 8), "Mixed precision: candidate widths, separated by commas.")
    sensitivity: Sensitivity = option("relative", "Mixed precision: relative, or paper (nuclear norm).")

    def __post_init__(self) -> None:
        _check_choice("sensitivity", self.sensitivity, Sensitivity)
        if not self.bits or min(self.bits) < 2 or max(self.bits) > 12:
            raise InputError(f"candidate bits must be 2 to 12, got {', '.join(map(str, self.bits)) or 'none'}")
        if not min(self.bits) <= self.target <= max(self.bits):
            raise InputError(f"no choice from {', '.join(map(str, self.bits))} bits has {self.target:g} on average")


# ---- quantization-aware training

TERMS = (
    "truth",  # the task loss of the labels
    "prediction",
    "hidden",  # outputs of blocks, and what the first one reads
    "output",  # Y: the attention output with its residual
    "score",
    "map",
    "self_output",  # AO, without its residual
    "context",
    "query_relation",
    "key_relation",
    "value_relation",
)
RECIPES: dict[str, dict[str, float]] = {
    "none": {"truth": 1.0},
    "prediction": {"prediction": 1.0},
    "ternarybert": {"prediction": 1.0, "hidden": 1.0, "score": 1.0},
    "map": {"prediction": 1.0, "hidden": 1.0, "map": 1.0},
    "output": {"prediction": 1.0, "hidden": 1.0, "output": 1.0},
    "ti": {"prediction": 1.0, "hidden": 1.0, "score": 1.0, "output": 1.0},  # of [TI], in both of its steps
    "unified": {"prediction": 1.0, "hidden": 1.0, "map": 1.0, "output": 1.0},
}


@dataclass(frozen=True)
class Distill:
    """Terms of the loss, and what they compare.

    terms: name → weight. A function (or its `module:name`) is a term of one's own: of a student's tensor, the teacher's
    and which of their rows are real (see `bittern.qat.losses`), at each layer. Its attribute `point` says which tensors
    (see `bittern.attention.Point`): `hidden` if it has none; also `logits`. balance: `auto` gives every tensor that a
    term compares the same share of the loss, in whatever units it is, times the term's weight. layers: blocks whose
    attention is compared, from 0, negative from the end; None: all. mapping: block of the student → block of the
    teacher, where their depths differ. map_temperature: τ. relations: heads that relations are split into. padded:
    to how many tokens the papers' code pads texts; scores then weigh by a text's share of so many. 0: all texts alike.
    """

    terms: Mapping[str, float] = option(
        lambda: dict(RECIPES["unified"]),
        f"What is learned from the teacher: {', '.join(RECIPES)}, or terms with weights such as prediction,map=0.3, "
        "module:name of your own among them.",
        "--distill",
    )
    balance: Balance = option("auto", "auto lets all compared tensors pull alike; fixed adds the terms.")
    layers: tuple[int, ...] | None = option(None, "Blocks whose attention is compared, such as 0,-1; all by default.")
    mapping: Mapping[int, int] | None = option(None, "Block of the student:block of the teacher, such as 0:1,1:3.")
    temperature: float = option(1.0, "Of the prediction term.")
    map_temperature: float = option(1.0, "Of the map term.")
    relations: int | None = None
    padded: int = option(0, "Weigh scores as the papers' code does, which pads texts to so many tokens.", least=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", {name_own(term): weight for term, weight in self.terms.items()})
        for name, weight in self.terms.items():
            if ":" in name:
                find_own(name)
            elif name not in TERMS:
                raise no_such("distillation term", name, TERMS)
            if not weight > 0:
                raise InputError(f"distillation term {name} has the weight {weight:g}; expected more than 0")
        if not self.terms:
            raise InputError(f"there is nothing to learn from; give terms of {', '.join(TERMS)}")
        _check_choice("balance", self.balance, Balance)
        _check_positive(self, "temperature", "map_temperature")
        needed = {"temperature": {"prediction"}, "map_temperature": {"map"}, "layers": {*self.layerwise} - {"hidden"}}
        unused = {name: getattr(self, name) for name, terms in needed.items() if not terms & self.terms.keys()}
        refuse_unused(Distill, f"with the terms {', '.join(self.terms)}", **unused)

    @property
    def needs_teacher(self) -> bool:
        return any(name != "truth" for name in self.terms)

    @property
    def layerwise(self) -> tuple[str, ...]:
        return tuple(name for name in self.terms if name not in ("truth", "prediction") and point_of(name) != "logits")


def point_of(term: str) -> str:
    """Return what a term of one's own compares; empty for the others."""
    return getattr(find_own(term), "point", "hidden") if ":" in term else ""


def parse_distill(text: str, **options: Any) -> Distill:
    """Read a ready-made set of terms by name, or terms separated by commas, each with a weight if not 1.

    >>> parse_distill("prediction,map=0.3,output=0.7").terms
    {'prediction': 1.0, 'map': 0.3, 'output': 0.7}
    """
    if text in RECIPES:
        return Distill(RECIPES[text], **options)
    terms: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, weight = part.partition("=")
        try:
            terms[name.strip()] = float(weight) if weight else 1.0
        except ValueError:
            raise InputError(f"distillation term {part!r} has no number as its weight; write {name}=0.5") from None
    return Distill(terms, **options)


SIGNALS: tuple[Literal["output", "context", "map"], ...] = ("output", "context", "map")  # TI-O: AO, TI-C: AC, TI-M: SA
SCHEDULES = ("gradual", *SIGNALS, "inverted", "stochastic", "fade")


class Act(NamedTuple):
    """The teacher's part in a step: at which point, and how much of the signal there is its own."""

    point: Literal["output", "context", "map"]
    share: float = 1.0


@dataclass(frozen=True)
class Intervention:
    """Steps in which the teacher's signals replace the student's.

    schedule: a function of a step's number and of all steps that returns an Act or None, or its `module:name`; or one
    point throughout, or `gradual` (TI-G: output for a sixth of the steps, context for a sixth, then
    map), `inverted` (map, context, output for a third each), `stochastic` (one of the three at random each step),
    `fade` (beyond [TI]: output, mixed with the student's own, from all the teacher's to none).
    steps: of the optimizer, before the student goes on alone, with optimizer and learning rate started afresh.
    scope: `part` quantizes only what the paper trains in these steps: the FFN; under context also W_O; under map also
    W_O and V (not where one layer gives Q, K and V). `all` quantizes everything, as the paper's code does.
    """

    schedule: str = option(
        "gradual",
        f"First let the teacher's signals replace the student's: {', '.join(SCHEDULES)}, or module:name.",
        "--intervene",
    )
    steps: int = option(60, "Steps in which the teacher intervenes.", "--intervene-steps")
    scope: Scope = option(
        "all", "What is quantized in them: all, or part (what the teacher does not replace).", "--intervene-scope"
    )
    seed: int = option(0, SEED)

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", name_own(self.schedule))
        if ":" in self.schedule:
            find_own(self.schedule)
        elif self.schedule not in SCHEDULES:
            raise no_such("intervention", self.schedule, SCHEDULES)
        if not self.steps > 0:
            raise InputError(f"intervention has {self.steps} steps; expected at least 1")
        _check_choice("scope of the intervention", self.scope, Scope)

    def act(self, step: int) -> Act | None:
        """Return what the teacher does in the step with this number, from 0; None if the student is alone.

        >>> [Intervention(steps=6).act(step).point for step in range(6)]
        ['output', 'context', 'map', 'map', 'map', 'map']
        """
        if step >= self.steps:
            return None
        match self.schedule:
            case str(name) if ":" in name:
                return find_own(name)(step, self.steps)  # type: ignore[no-any-return]
            case "gradual":
                return Act(SIGNALS[min(6 * step // self.steps, 2)])
            case "inverted":
                return Act(SIGNALS[::-1][3 * step // self.steps])
            case "stochastic":
                return Act(random.Random(f"{self.seed} {step}").choice(SIGNALS))
            case "fade":
                return Act("output", 1 - step / self.steps)
        return Act(self.schedule)  # type: ignore[arg-type]

    def phases(self, total: int) -> list[dict[str, Any]]:
        """Return the phases of a training of so many steps: `name`, `from` and `to` in steps.

        >>> [(p["name"], p["to"]) for p in Intervention("inverted", steps=60).phases(500)]
        [('map', 20), ('context', 40), ('output', 60), ('alone', 500)]
        """
        groups = [(name, [*steps]) for name, steps in groupby(range(total), self.phase)]
        return [{"name": name, "from": steps[0], "to": steps[-1] + 1} for name, steps in groups]

    def phase(self, step: int) -> str:
        """Name what the teacher does in a step."""
        if (act := self.act(step)) is None:
            return "alone"
        return self.schedule if self.schedule in ("stochastic", "fade") else act.point


@dataclass(frozen=True)
class Training:
    """Options of a training run. Defaults are those of [KD]: Adam, linear warm-up of a tenth, then linear decay.

    optimizer: `bertadam` is that of the papers' code (see `bittern.qat.optimizer`); `adamw` is PyTorch's.
    batch_size: of one process. evaluations: how often in a run the student is measured and a checkpoint written.
    metric: by default `evaluate.headline`. arguments: more of `transformers.TrainingArguments`, by name.
    """

    epochs: float = option(3.0, "Times over the training data.")
    steps: int | None = option(None, "Steps of the optimizer, in place of epochs.")
    batch_size: int = option(32, BATCH_SIZE, least=1)
    learning_rate: float = option(2e-5, "After warm-up.", "--learning-rate", "--lr")
    warmup: float = option(0.1, "Share of the steps in which the learning rate rises.")
    weight_decay: float = option(0.01, "Not of biases and norms.")
    optimizer: Optimizer = option(
        "adamw", "adamw, or the papers' bertadam: longer first steps, each gradient clipped by itself."
    )
    seed: int = option(0, SEED)
    evaluations: int = option(10, "How often to measure and to write a checkpoint.")
    patience: int | None = option(None, "Stop after so many evaluations without a better one.")
    metric: str | None = option(None, f"{METRIC}; module:name of one of your own.")
    arguments: Mapping[str, Any] = option(dict, "NAME=VALUE of transformers.TrainingArguments; may repeat.", "--set")

    def __post_init__(self) -> None:
        _check_positive(self, "epochs", "steps", "batch_size", "learning_rate", "evaluations", "patience")
        if not 0 <= self.warmup < 1:
            raise InputError(f"warmup is {self.warmup:g}; expected a share of the steps, at least 0 and below 1")
        _check_choice("optimizer", self.optimizer, Optimizer)


# ---- analysis


@dataclass(frozen=True)
class Curvature:
    """The part of the loss around a student that is looked at.

    batches: mini-batches, each with a spectrum of its own; eigenvalues: of each; probes: of the trace;
    grid: points along each side of the loss surface, which reaches from -span to span.
    """

    batches: int = option(8, "Curvature: mini-batches that get a spectrum.", "--hessians", least=1)
    eigenvalues: int = option(5, "Curvature: top eigenvalues of each.", least=1)
    probes: int = 10
    grid: int = option(15, "Curvature: points along a side of the loss surface.", least=3)
    span: float = 1.0

    def __post_init__(self) -> None:
        if self.grid % 2 == 0:
            raise InputError(f"grid is {self.grid}; expected an odd number: the student itself is in the middle")
