"""The command line, and the only place that prints."""

import os
import signal
import sys
from typing import NoReturn


def main() -> None:
    """Run the command line: a known error is one line on stderr and exit code 1; told to stop, by Ctrl-C or SIGTERM, it
    clears up and exits with 130 or 143; told so again, it exits at once."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # not a line for each of its five tries
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # what goes wrong is told once, by us
    told: list[signal.Signals] = []  # to stop

    def stop(number: int, _: object) -> NoReturn:
        told.append(signal.Signals(number))
        for known in handlers:
            signal.signal(known, lambda number, _: os._exit(128 + number))
        raise KeyboardInterrupt

    ours = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, stop) for number in ours if signal.getsignal(number) != signal.SIG_IGN}
    try:
        sys.exit(_run(told))
    except KeyboardInterrupt:  # from the first import on
        print("interrupted; nothing was left half-written", file=sys.stderr)
        sys.exit(128 + next(iter(told), signal.SIGINT))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _run(told: list[signal.Signals]) -> int:
    """Run the command, say in one line what went wrong, and return the exit code. told: signals that came meanwhile."""
    import warnings

    import typer

    from bittern import show
    from bittern.cli.commands import app
    from bittern.errors import BitternError, out_of_memory

    show.write_plainly()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    try:
        code = app(standalone_mode=False)
    except typer.Exit as end:
        return end.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        if told:  # of which the code of others, as of torch.onnx, may make an error of its own
            raise KeyboardInterrupt from None
        if text := str(error) if isinstance(error, BitternError) else out_of_memory(error):
            show.say(("error:", "red"), f" {' '.join(text.split())}", console=show.err_console)
            return 1
        if not hasattr(error, "show"):  # how typer tells of a command that is typed wrongly
            raise
        error.show()
        return 2
    if code == 130:  # what newer typer makes of Ctrl-C
        raise KeyboardInterrupt
    return 0
