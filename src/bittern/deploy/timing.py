"""Paired timings: every contender in turn, round after round, so that a drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def alternate(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one call that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for i in range(rounds):
        names = list(contenders)[:: 1 if i % 2 == 0 else -1]
        for name in names:
            start = time.perf_counter()
            contenders[name]()
            times[name].append(time.perf_counter() - start)
    return times


def ratios(times: Mapping[str, list[float]], base: str) -> dict[str, float]:
    """Median over rounds of each contender's time divided by the base's in the same round."""
    return {
        name: statistics.median(t / b for t, b in zip(seconds, times[base], strict=True))
        for name, seconds in times.items()
    }
