"""The command line: one short function per command, and the only place that prints."""

from __future__ import annotations

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # what goes wrong is told once, by us

import sys

import typer

from bittern.cli import compress, deliver, look
from bittern.errors import BitternError
from bittern.show import err_console

app = typer.Typer(
    help="Make Transformers small and fast without losing what they know.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for name, command in {
    "demo": look.demo,
    "quantize": compress.quantize,
    "ptq": compress.ptq,
    "qat": compress.qat,
    "eval": look.evaluate,
    "inspect": look.inspect,
    "analyze": look.analyze,
    "export": deliver.export,
    "bench": deliver.bench,
}.items():
    app.command(name)(command)


def main() -> None:
    """Run the command line: a known error is one line on stderr and exit code 1, Ctrl-C exits with 130."""
    try:
        from transformers.utils import logging

        logging.disable_progress_bar()
        if app(standalone_mode=False) == 130:  # what newer typer makes of Ctrl-C
            raise KeyboardInterrupt
    except typer.Exit as exit:
        sys.exit(exit.exit_code)
    except BitternError as error:
        err_console.print(f"[red]error:[/] {' '.join(str(error).split())}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        err_console.print("interrupted; nothing was left half-written")
        sys.exit(130)
    except Exception as error:
        usage = getattr(error, "show", None)
        if usage is None:
            raise
        usage()
        sys.exit(2)
