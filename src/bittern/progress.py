"""Reports of how far work has come, and how much memory it took; which of several processes reports."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Track = Callable[[Iterable[Any], str], Iterable[Any]]  # passes items through; their description
OnStep = Callable[[int, int, Mapping[str, float]], None]  # step of a training, of how many, what is logged now
OnEstimate = Callable[[Mapping[str, float]], None]  # seconds that each part will take, about, before work starts


def silent(items: Iterable[Any], description: str) -> Iterable[Any]:
    """The Track that shows nothing."""
    return items


def ignore(*_: Any) -> None:
    """The OnStep that shows nothing."""


def peak_memory() -> int:
    """The most bytes that this process held so far, on the GPU if it used one; 0 where the system does not tell."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def megabytes(size: int) -> str:
    """Return a size in bytes as people say it."""
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def is_main_process() -> bool:
    """True in the process that writes and shows, the first of several; torchrun numbers them by RANK."""
    return os.environ.get("RANK", "0") == "0"


def leave_processes() -> None:
    """End this process at once if it is one of several: gloo's threads abort some at an ordinary exit."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
