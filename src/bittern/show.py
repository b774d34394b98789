"""Output of the commands: lines and tables on stdout, progress on stderr.

Nothing is read as markup: paths and messages may hold brackets. What a terminal cannot show is written plainly.
"""

import codecs
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from io import TextIOWrapper
from textwrap import TextWrapper
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Texts = Sequence[str]
PAUSE = 30.0  # seconds between two lines of progress where there is no terminal
PLAIN = {"–": "-", "×": "x", "→": "->", "·": "-", "…": "...", "’": "'", "τ": "tau"}

out_console, err_console = (Console(stderr=err, markup=False, emoji=False, highlight=False) for err in (False, True))


def write_plainly() -> None:
    """Let stdout and stderr write what their encoding lacks in other signs, where it would be an error."""
    codecs.register_error("bittern", lambda e: ("".join(PLAIN.get(c, "?") for c in e.object[e.start : e.end]), e.end))  # type: ignore[attr-defined]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="bittern")


def say(*parts: str | tuple[str, str], console: Console = out_console) -> None:
    """Print a line of texts, some of them with a style, which the terminal may wrap where it likes."""
    console.print(Text.assemble(*parts), soft_wrap=True)


def warn(text: str) -> None:
    say(text, console=err_console)


def print_table(
    columns: Texts, rows: Iterable[Texts], title: str | None = None, *, left: Texts = (), show_lines: bool = False
) -> None:
    """Print a table; the first column stands left, and those named in `left`: they share what room the others leave."""
    table, rows = Table(title=title, title_justify="left", show_lines=show_lines), list(rows)
    widths = [max(len(line) for row in (columns, *rows) for line in row[i].split("\n")) for i in range(len(columns))]
    texts = {i for i, name in enumerate(columns) if i == 0 or name in left}
    room = out_console.width - 1 - sum(3 + (i not in texts) * width for i, width in enumerate(widths))
    share = min(1.0, room / sum(widths[i] for i in texts))
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i in texts else "right", overflow="fold")
    most = {i: max(12, int(share * widths[i])) for i in texts}
    for row in rows:
        table.add_row(*(fold(cell, most[i]) if i in most else cell for i, cell in enumerate(row)))
    out_console.print(table)


def fold(text: str, width: int) -> str:
    """Break a text after spaces, dots and underscores, so that its lines are no longer than `width` where they can be.

    >>> fold("encoder.layer.*.attention.output", 20).split("\\n")
    ['encoder.layer.*.', 'attention.output']
    """
    wrapper = TextWrapper(width, break_long_words=False)
    wrapper.wordsep_re = re.compile(r"(\s+|[^\s._]*[._]+)")
    return "\n".join(line for part in text.split("\n") for line in wrapper.wrap(part))


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# ---- progress


def watchers(job: Callable[..., Any], arguments: Mapping[str, Any], quiet: bool) -> dict[str, Any]:
    """Return what a job tells its progress to, by the names of its parameters; only what is missing if it is quiet."""
    intervention = arguments.get("intervention")
    watching: dict[str, Any] = {"on_missing": warn}
    if not quiet:
        bar = TrainingBar(intervention.phase if intervention else None)
        watching |= {"track": track, "on_step": bar, "on_estimate": print_estimate, "on_rung": print_rung}
    return {name: watcher for name, watcher in watching.items() if name in signature(job).parameters}


def print_estimate(seconds: Mapping[str, float]) -> None:
    """Say what the parts of long work will take, before they start, if that is more than a moment."""
    total = sum(seconds.values())
    if total > (10 if err_console.is_terminal else PAUSE):
        warn(f"about {duration(total)}: {', '.join(f'{name} {duration(part)}' for name, part in seconds.items())}")


def print_rung(row: Mapping[str, Any]) -> None:
    """Tell of a rung of the ladder as soon as it is measured."""
    gain = f"{row['smaller']:.1f}× smaller, {row['faster']:.2f}× as fast ({duration(row['seconds'])})"
    warn(f"{row['rung']:14} loses {row['points']:.2f} ± {row['error']:.2f} points, {gain}")


def _progress(disable: bool = False) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err_console, transient=True, disable=disable)


def track(items: Iterable[Any], description: str) -> Iterable[Any]:
    """Show on stderr how far an iterable is: a bar, gone when it is done; without a terminal a line now and then."""
    total = -(-len(items) // items.batch_size) if hasattr(items, "batch_size") else len(items)  # type: ignore[arg-type]
    if err_console.is_terminal:
        with _progress() as progress:
            yield from progress.track(items, total=total, description=description)
        return
    said = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - said > PAUSE:
            warn(f"{description}: {done} of {total}")
            said = time.monotonic()


class TrainingBar:
    """Shows a training run on stderr: a bar where there is a terminal, and a line for each evaluation. phase: a name
    for what happens in a step."""

    def __init__(self, phase: Callable[[int], str] | None = None) -> None:
        self.phase = phase
        self.bar = _progress(disable=not err_console.is_terminal)
        self.task = self.bar.add_task("training")
        self.losses: dict[str, float] = {}
        self.started = self.said = 0.0

    def __call__(self, step: int, total: int, logs: Mapping[str, float]) -> None:
        now = time.monotonic()
        self.started = self.started or now
        self.bar.start()
        what = f", {self.phase(max(step - 1, 0))}" if self.phase else ""
        self.bar.update(self.task, completed=step, total=total, description=f"training{what}")
        self.losses |= {k: v for k, v in logs.items() if k.startswith("loss_")}
        if floors := [k.removeprefix("floor_") for k in logs if k.startswith("floor_")]:
            parts = [f"{k} {logs[f'floor_{k}']:.3g} of {logs[f'start_{k}']:.3g}" for k in floors]
            warn(f"what quantized activations alone make of the first losses: {', '.join(parts)}")
        found = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_")}
        texts = [f"{k.replace('_', ' ')} {v:.4f}" for k, v in found.items() if k != "max_difference"]
        if found or (not err_console.is_terminal and self.losses and now - max(self.said, self.started) > PAUSE):
            texts += [f"{k.removeprefix('loss_')} loss {v:.4g}" for k, v in self.losses.items()]
            warn(f"step {step} of {total}{what}, {(now - self.started) / 60:.1f} min: {', '.join(texts)}")
            self.said = now
        if step == total and not logs:
            self.bar.stop()
