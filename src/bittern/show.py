"""Output of the commands: tables on stdout, progress on stderr."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

out_console, err_console = Console(), Console(stderr=True)


def say(text: str, console: Console = out_console, *, markup: bool = False) -> None:
    """Print a line, which the terminal may wrap where it likes."""
    console.print(text, highlight=False, markup=markup, soft_wrap=True)


def wrote(out: str) -> None:
    """Where the result lies, and what to do with it next."""
    say(f"Wrote {out}. Next: [bold]bittern inspect {out}[/]", markup=True)


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str | None = None,
    *,
    left: Sequence[str] = (),
    show_lines: bool = False,
) -> None:
    """Print a table; the first column stands left, and those named in `left`."""
    table = Table(title=title, title_justify="left", show_lines=show_lines)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 or name in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    out_console.print(table)


def print_quantized(result: dict[str, Any], title: str) -> None:
    """Sizes and metrics, float against packed."""
    rows = [
        ("size", megabytes(result["float_bytes"]), megabytes(result["file"])),
        ("bits per quantized weight", "32", f"{result['bits']:.2f}"),
    ]
    if "packed" in result:
        for name, value in result["packed"].items():
            rows.append((name.replace("_", " "), f"{result['float'][name]:.4f}", f"{value:.4f}"))
        rows.append(("kernels", "", result["kernels"]))
        error = result["max_error_simulated_packed"]
        rows.append(("max error simulated–packed, without kernels", "", f"{error:g}"))
    print_table(("", "float", "packed"), rows, title)


def print_losses(solved: list[dict[str, Any]]) -> None:
    """1 - similarity of outputs before and after, the same part of all blocks in one row."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in solved:
        groups.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", entry["name"]), []).append(entry)
    rows = []
    for name, entries in groups.items():
        before, after = (sum(e[k] for e in entries) / len(entries) for k in ("before", "after"))
        worst, rounds = (max(e[k] for e in entries) for k in ("after", "rounds"))
        rows.append((name, str(len(entries)), f"{before:.2e}", f"{after:.2e}", f"{worst:.2e}", str(rounds)))
    title = "output error: with scales of the extremes, and as found (mean; worst)"
    print_table(("layer or product", "count", "before", "after", "worst", "rounds"), rows, title)


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """The demo's formats of one model."""
    accuracies = [] if rows[0]["accuracy"] is None else ["accuracy"]
    cells = [
        (
            row["format"],
            f"{row['bits']:.2f}",
            f"{row['bytes'] / 1e3:,.0f}",
            f"{rows[0]['bytes'] / row['bytes']:.1f}",
            *(f"{row[name]:.4f}" for name in (*accuracies, "agreement")),
            "" if row["max_error"] is None else f"{row['max_error']:g}",
        )
        for row in rows
    ]
    print_table(("format", "bits", "kB", "×", *accuracies, "agreement", "max error"), cells, title)
    out_console.print(
        "bits: per quantized weight, with scales · kB: whole file · agreement: with float · max error: "
        "simulated against packed, loaded in a fresh process, without kernels"
    )


def print_trained(result: dict[str, Any], title: str) -> None:
    """Which step was best, then sizes and metrics."""
    run = result["qat"]
    kept_step = f"step {run['best_step']}" if run["best_step"] else "the last step"
    say(
        f"{run['steps']} steps in {run['seconds'] / 60:.1f} minutes; {kept_step} is kept: {run['metric']} "
        f"{run['best']:.4f}; peak memory {megabytes(result['peak_memory'])}"
    )
    if run["phases"]:
        say(_intervened(run["phases"], result.get("plain")))
    print_quantized(result, title)


def _intervened(phases: list[dict[str, Any]], baseline: dict[str, Any] | None) -> str:
    """Tell what the teacher did when, and how many steps that saved against a run without it, if one is known."""
    *acts, alone = phases
    spans = ", ".join(f"{act['name']} in steps {act['from'] + 1} to {act['to']}" for act in acts)
    text = f"the teacher intervened: {spans}; the student was alone from step {alone['from'] + 1}"
    if baseline is None:
        return f"{text}; --plain OUT of a run without intervention tells how many steps that saved"
    best = f"{baseline['metric']}, {baseline['best']:.4f}"
    text += f". {baseline['folder']} reached its best {best}, at step {baseline['best_step']} "
    if baseline["reached"] is None:
        return f"{text}of {baseline['steps']}; this run did not"
    saved = baseline["best_step"] / baseline["reached"]
    return (
        f"{text}of {baseline['steps']}; this run was there at step {baseline['reached']}: {saved:.1f} times fewer steps"
    )


def kept(modules: list[dict[str, Any]]) -> str:
    """Layers by name, if few; what has no weight matrix, such as norms, by type and count."""
    layers = [m["name"] for m in modules if m["type"] in ("Linear", "Conv2d", "Embedding", "Conv1D")]
    others = Counter(m["type"] for m in modules if m["name"] not in layers)
    named = layers[:6] + ([f"{len(layers) - 6} more layers"] if len(layers) > 6 else [])
    return ", ".join(named + [f"{count} {kind}" for kind, count in others.items()]) or "nothing"


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def print_estimate(seconds: Mapping[str, float]) -> None:
    """Say what the parts of long work will take, before they start, if that is more than a moment."""
    total = sum(seconds.values())
    if total > 10 and err_console.is_terminal:
        parts = ", ".join(f"{name} {duration(part)}" for name, part in seconds.items())
        say(f"about {duration(total)}: {parts}", err_console)


def watchers(job: Callable[..., Any], arguments: Mapping[str, Any], quiet: bool) -> dict[str, Any]:
    """Return what a job tells its progress to, by the names of its parameters; nothing if it shall be quiet."""
    intervention = arguments.get("intervention")
    watching: dict[str, Any] = {"track": track(quiet), "on_missing": lambda text: say(text, err_console)}
    if not quiet:
        watching |= {
            "on_step": TrainingBar(intervention.phase if intervention else None),
            "on_estimate": print_estimate,
        }
    return {name: watcher for name, watcher in watching.items() if name in signature(job).parameters}


def track(quiet: bool) -> Any:
    """A progress bar on stderr around an iterable, gone when it is done."""

    def track(items: Iterable[Any], description: str) -> Iterable[Any]:
        if quiet or not err_console.is_terminal:
            yield from items
            return
        total = -(-len(items) // items.batch_size) if hasattr(items, "batch_size") else len(items)  # type: ignore[arg-type]
        bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*bars, console=err_console, transient=True) as progress:
            yield from progress.track(items, total=total, description=description)

    return track


class TrainingBar:
    """Shows a training run on stderr: a bar where there is a terminal, and a line for each evaluation.

    phase: a name for what happens in a step.
    """

    def __init__(self, phase: Callable[[int], str] | None = None) -> None:
        self.phase = phase
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=err_console, transient=True, disable=not err_console.is_terminal)
        self.task = self.bar.add_task("training")
        self.losses: dict[str, float] = {}
        self.started = 0.0

    def __call__(self, step: int, total: int, logs: Mapping[str, float]) -> None:
        self.started = self.started or time.monotonic()
        self.bar.start()
        what = f"training, {self.phase(max(step - 1, 0))}" if self.phase else "training"
        self.bar.update(self.task, completed=step, total=total, description=what)
        self.losses |= {k: v for k, v in logs.items() if k.startswith("loss_")}
        found = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_")}
        if found:
            texts = [f"{k.replace('_', ' ')} {v:.4f}" for k, v in found.items() if k != "max_difference"]
            texts += [f"{k.removeprefix('loss_')} loss {v:.4g}" for k, v in self.losses.items()]
            minutes = (time.monotonic() - self.started) / 60
            self.bar.console.print(
                f"step {step} of {total}{what.removeprefix('training')}, {minutes:.1f} min: {', '.join(texts)}",
                highlight=False,
                soft_wrap=True,
            )
        if step == total and not logs:
            self.bar.stop()
