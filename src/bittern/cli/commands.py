"""The commands: what each is for, its options, the job that it runs, and what shows the result."""

from pathlib import Path
from typing import Annotated

import typer

from bittern import __version__
from bittern.cli import results
from bittern.cli.parse import command
from bittern.options import BATCH_SIZE, Curvature, Distill, Intervention, Mixed, Option, Reading, Training
from bittern.show import say

DATA_HELP = (
    "Folder or file of texts or images, for detectors a folder in COCO format, a dataset name, or the built-in digits "
    "or sentences."
)
ModelArg = Annotated[str, Option("Folder of a model with config.json and .safetensors, or a hub name.", ("MODEL",))]
RecipeArg = Annotated[str, Option("A ready-made recipe, or a YAML file.", ("--recipe", "-r"))]
DataArg = Annotated[str, Option(DATA_HELP)]
OutArg = Annotated[Path, Option("Folder for the packed model.", ("--out", "-o"))]
SamplesArg = Annotated[int, Option("Calibration samples, drawn at random.", least=1)]
SeedArg = Annotated[int, Option("Seed of the draw.")]
ForceArg = Annotated[bool, Option("Overwrite the output if it exists.")]
TrainArg = Annotated[float, Option("Minutes that training may take; without, nothing is trained.", ("--train",))]
MethodArg = Annotated[str, Option("How scales and weights are found; module:name of your own.", ("--method", "-m"))]
BASELINE_HELP = "Folder of a finished run without intervention, to count the steps saved."
BaselineArg = Annotated[str, Option(BASELINE_HELP, ("--plain",))]
KernelsArg = Annotated[bool, Option("Multiply in integers; without, a packed model gives the simulated one's bits.")]
VerifyArg = Annotated[bool, Option("Run the model too, and compare with outputs that were kept when it was saved.")]
FormArg = Annotated[str, Option("Of the weights: int8 (fast), nbits (small, for onnxruntime) or portable (small).")]


@command("demo:demo", results.demo)
def demo(
    what: Annotated[str, Option("digits, minilm, or all of what is installed.", ("what",))] = "digits",
    out: Annotated[Path, Option("Folder for the packed models.", ("--out", "-o"))] = Path("bittern-demo"),
    force: ForceArg = False,
) -> None:
    """Quantize real models on real data that come with the package, and check them in a fresh process."""


@command("ladder:compress", results.compress)
def compress(
    source: ModelArg,
    data: DataArg,
    out: OutArg,
    max_loss: Annotated[float, Option("The most that may be lost, in points of the task's metric.")] = 1.0,
    goal: Annotated[str, Option("What the choice serves: size, speed or balanced.", ("--for",))] = "balanced",
    train_minutes: TrainArg = 0.0,
    keep: Annotated[str, Option("Write this rung of the ladder, whatever it lost.")] | None = None,
    samples: SamplesArg = 128,
    seed: Annotated[int, Option("Seed of all draws.")] = 0,
    force: ForceArg = False,
    **reading: Reading,
) -> None:
    """Make a model as small or fast as a limit on its loss allows: the command decides how.

    Interrupted, the same command goes on where it was; with another limit it measures only what is missing.
    """


@command("jobs:quantize", results.quantize)
def quantize(
    source: ModelArg,
    recipe: RecipeArg,
    out: OutArg,
    data: DataArg | None = None,
    samples: SamplesArg = 128,
    seed: SeedArg = 0,
    force: ForceArg = False,
    **reading: Reading,
) -> None:
    """Quantize a model by a recipe and write it packed: the file is really smaller."""


@command("jobs:ptq", results.ptq)
def ptq(
    source: ModelArg,
    data: DataArg,
    recipe: RecipeArg,
    out: OutArg,
    method: MethodArg = "bittern",
    mixed: Mixed | None = None,
    samples: SamplesArg = 128,
    seed: SeedArg = 0,
    force: ForceArg = False,
    **reading: Reading,
) -> None:
    """Quantize after training: search for the scales that lose least, on a few samples of data.

    Interrupted, the same command goes on where it was.
    """


@command("jobs:qat", results.qat)
def qat(
    source: ModelArg,
    data: DataArg,
    recipe: RecipeArg,
    out: OutArg,
    distill: Distill,
    training: Training,
    intervention: Intervention | None = None,
    baseline_run: BaselineArg | None = None,
    student: Annotated[str, Option("Float model that the student starts from.")] | None = None,
    samples: Annotated[int, Option("Samples for static scales of activations.", least=1)] = 128,
    resume: Annotated[bool, Option("Go on from the last checkpoint of the same run.")] = False,
    force: ForceArg = False,
    **reading: Reading,
) -> None:
    """Train a quantized student with a float teacher, down to ternary weights, and write it packed.

    On several GPUs: torchrun --nproc_per_node N -m bittern qat …
    """


@command("jobs:evaluate", results.evaluate)
def evaluate(
    source: ModelArg,
    data: DataArg,
    against: Annotated[str, Option("Another model to compare outputs with.")] | None = None,
    kernels: KernelsArg = True,
    **reading: Reading,
) -> None:
    """Measure a float, simulated or packed model on data."""


@command("deploy.store:inspect", results.inspect)
def inspect(path: ModelArg, verify: VerifyArg = False) -> None:
    """Show what a model folder holds: sizes, which module has which format, and what stayed float."""


@command("analysis.study:analyze", results.analyze)
def analyze(
    student: Annotated[str, Option("Folder of a packed or simulated model.", ("STUDENT",))],
    teacher: Annotated[str, Option("Folder of the float model that it was made from.")],
    data: DataArg,
    out: Annotated[Path, Option("Folder for the report.", ("--out", "-o"))],
    against: Annotated[str, Option("Another student of this teacher, shown beside it.")] | None = None,
    samples: Annotated[int, Option("Samples of the test data, drawn at random.", least=3)] = 128,
    subset: Annotated[int, Option("How many of them serve what runs the model many times.", ("--few",), least=1)] = 32,
    curvature: Annotated[Curvature, Option("Hessian and loss surface too; takes long on large models.")] | None = None,
    seed: Annotated[int, Option("Seed of the draw and of random directions.")] = 0,
    force: ForceArg = False,
    **reading: Reading,
) -> None:
    """Show what quantization did to a model: a report by layer and head, in one HTML file.

    Interrupted, the same command goes on where it was.
    """


@command("deploy.onnx.export:export", results.export)
def export(
    source: ModelArg,
    out: Annotated[Path, Option("A folder, or a file that ends in .onnx.", ("--out", "-o"))],
    to: Annotated[str, Option("The format to write: onnx, or module:name of a function that writes one.")] = "onnx",
    form: FormArg = "int8",
    dynamic: Annotated[bool, Option("Find ranges of inputs at run time, not before.")] = False,
    safe: Annotated[bool, Option("Full 8-bit weights that cannot saturate on x86 without VNNI.")] = False,
    data: Annotated[str, Option(f"To check the file on. {DATA_HELP} Made up by default.")] | None = None,
    samples: Annotated[int, Option("Samples to check the file on.", least=1)] = 64,
    seed: Annotated[int, Option("Of the samples.")] = 0,
    force: ForceArg = False,
    **reading: Reading,
) -> None:
    """Write a model for another runtime, run the file and compare it with the simulated model."""


@command("deploy.bench:bench", results.bench)
def bench(
    path: ModelArg,
    against: Annotated[str, Option("The float model; by default the one it was made from.")] | None = None,
    batch_size: Annotated[int, Option(BATCH_SIZE, least=1)] = 1,
    length: Annotated[int, Option("Tokens of each text.", least=1)] = 128,
    threads: Annotated[int, Option("Threads of both models.", least=1)] | None = None,
    rounds: Annotated[int, Option("Timed runs of each model, in turn.", least=1)] = 15,
) -> None:
    """Time a packed model beside its float model in PyTorch."""


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def print_version(asked: bool) -> None:
    if asked:
        say(f"bittern {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    """Make Transformers small and fast without losing what they know."""


for function in (demo, compress, quantize, ptq, qat, evaluate, inspect, analyze, export, bench):
    app.command("eval" if function is evaluate else function.__name__)(function)
