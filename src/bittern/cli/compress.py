"""Commands that make a smaller model: quantize, ptq, qat."""

from __future__ import annotations

from typing import Any

from bittern import jobs
from bittern.cli.options import BATCH_SIZE, COLUMNS, DATA, FORCE, MAX_LENGTH, MODEL, OUT, RECIPE, Option, command
from bittern.show import kept, megabytes, print_losses, print_quantized, print_trained, say, wrote


@command(
    jobs.quantize,
    {
        "source": MODEL,
        "recipe": RECIPE,
        "out": OUT,
        "data": DATA,
        "samples": Option("Calibration samples, drawn at random.", least=1),
        "seed": Option("Seed of the draw."),
        **COLUMNS,
        "batch_size": BATCH_SIZE,
        **FORCE,
    },
)
def quantize(result: dict[str, Any], given: dict[str, Any]) -> None:
    """Quantize a model by a recipe and write it packed: the file is really smaller."""
    print_quantized(result, f"{result['source']} by {result['recipe']}")
    say(f"{result['quantized']} modules quantized; kept float: {kept(result['kept_float'])}")
    if "packed" not in result:
        why = "the data has no test or validation split" if "data" in given else "no data was given; add --data"
        say(f"No accuracy was measured: {why}.")
    wrote(result["out"])


@command(
    jobs.ptq,
    {
        "source": MODEL,
        "data": DATA,
        "recipe": RECIPE,
        "out": OUT,
        "method": Option("How scales and weights are found.", ("--method", "-m")),
        "mixed.target": Option("Mixed precision: bits a weight on average in the blocks."),
        "mixed.bits": Option("Mixed precision: candidate widths, separated by commas."),
        "mixed.sensitivity": Option("Mixed precision: relative, or paper (nuclear norm)."),
        "samples": Option("Calibration samples, drawn at random.", least=1),
        "seed": Option("Seed of the draw."),
        **COLUMNS,
        "batch_size": BATCH_SIZE,
        **FORCE,
    },
)
def ptq(result: dict[str, Any], given: dict[str, Any]) -> None:
    """Quantize after training: search for the scales that lose least, on a few samples of data.

    Interrupted, the same command goes on where it was.
    """
    found = result["ptq"]
    say(result["what"])
    print_losses(found["solved"])
    if found["bits"]:
        say("bits: " + " ".join(f"{part} {width}" for part, width in found["bits"].items()))
    if found["by_extremes"]:
        say(f"by extremes: {', '.join(found['by_extremes'])}")
    how = f"method {found['method']}, {found['samples']} samples"
    print_quantized(result, f"{result['source']} by {result['recipe']}, {how}")
    memory = f"; peak memory {megabytes(found['peak_memory'])}" if found["peak_memory"] else ""
    say(", ".join(f"{phase} {value:.1f} s" for phase, value in found["seconds"].items()) + memory)
    wrote(result["out"])


@command(
    jobs.qat,
    {
        "source": MODEL,
        "data": DATA,
        "recipe": RECIPE,
        "out": OUT,
        "distill.terms": Option(
            "What is learned from the teacher: none, prediction, ternarybert, map, output, unified, or terms with "
            "weights such as prediction,map=0.3.",
            ("--distill",),
        ),
        "distill.balance": Option("auto lets all compared tensors pull alike; fixed adds the terms."),
        "distill.layers": Option("Blocks whose attention is compared, such as 0,-1; all by default."),
        "distill.mapping": Option("Block of the student:block of the teacher, such as 0:1,1:3."),
        "distill.temperature": Option("Of the prediction term."),
        "distill.map_temperature": Option("Of the map term."),
        "intervention.schedule": Option(
            "First let the teacher's signals replace the student's: gradual, output, context, map, inverted, "
            "stochastic or fade.",
            ("--intervene",),
        ),
        "intervention.steps": Option("Steps in which the teacher intervenes.", ("--intervene-steps",)),
        "intervention.scope": Option(
            "What is quantized in them: all, or part (what the teacher does not replace).", ("--intervene-scope",)
        ),
        "baseline_run": Option(
            "Folder of a finished run without intervention, to count the steps saved.", ("--plain",)
        ),
        "student": Option("Float model that the student starts from."),
        "training.epochs": Option("Times over the training data."),
        "training.steps": Option("Steps of the optimizer, in place of epochs."),
        "training.learning_rate": Option("After warm-up.", ("--learning-rate", "--lr")),
        "training.warmup": Option("Share of the steps in which the learning rate rises."),
        "training.weight_decay": Option("Not of biases and norms."),
        "training.evaluations": Option("How often to measure and to write a checkpoint."),
        "training.patience": Option("Stop after so many evaluations without a better one."),
        "training.metric": Option("Which metric decides between checkpoints."),
        "training.arguments": Option("NAME=VALUE of transformers.TrainingArguments; may be repeated.", ("--set",)),
        "samples": Option("Samples for static scales of activations.", least=1),
        "training.seed intervention.seed": Option("Of order, dropout and draws."),
        **COLUMNS,
        "max_length": MAX_LENGTH,
        "training.batch_size": BATCH_SIZE,
        "resume": Option("Go on from the last checkpoint of the same run."),
        **FORCE,
    },
)
def qat(result: dict[str, Any], given: dict[str, Any]) -> None:
    """Train a quantized student with a float teacher, down to ternary weights, and write it packed.

    On several GPUs: torchrun --nproc_per_node N -m bittern qat …
    """
    terms = ", ".join(given["distill"].terms)
    print_trained(result, f"{result['source']} by {result['recipe']}, learned from {terms}")
    wrote(result["out"])
