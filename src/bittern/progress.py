"""Reports of how far work has come, and how much memory it took."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

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
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
