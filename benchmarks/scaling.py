"""Whole packed models on several threads, alone in their process: call after call, and after pauses.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json

In turns of three calls with a pause before each turn: milliseconds of the first, second and third call, least tenth and
median over the turns. Threads fall asleep in a pause, and what a call needs leaves the caches. `handover`: nanoseconds
that a cache line takes from one core to another and back (handover.cpp), before and after: with 300 and more they share
no cache, which on a virtual machine can change from one moment to the next.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from inference import MODELS, RECIPES

from bittern import calibrate, native, pack, simulate
from bittern.deploy.bench import sample_batch, using_threads

SHAPES = [("MiniLM-L6", 1, 16), ("MiniLM-L6", 1, 128), ("MiniLM-L6", 8, 16), ("DeiT-S", 1, 0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="w8a8", choices=RECIPES.values())
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pauses", type=float, nargs="+", default=[0, 0.1], help="seconds")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(__file__).with_name("handover.cpp"), f"{folder}/handover"
        subprocess.run(["c++", "-O2", "-pthread", str(source), "-o", program], check=True)

        def handover() -> int:
            time.sleep(0.2)  # threads that spin on after a call would take turns with it
            return int(subprocess.run([program], check=True, capture_output=True).stdout)

        rows = measure(options, handover)
    if options.json:
        found = {"kernels": native.engine()[0], "recipe": options.recipe, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def measure(options: argparse.Namespace, handover: Callable[[], int]) -> list[dict[str, Any]]:
    """A row for each shape, number of threads and pause."""
    rows = []
    for name, batch_size, tokens in SHAPES:
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        batch = sample_batch(model, batch_size, tokens)
        simulate(model, options.recipe, batch)
        calibrate(model, [batch])
        pack(model)
        for threads in options.threads:
            for pause in options.pauses:
                before = handover()
                with using_threads(threads), torch.no_grad():
                    turns = [turn(partial(model, **batch), pause) for _ in range(options.turns)]
                row: dict[str, Any] = {
                    "model": name,
                    "batch": batch_size,
                    "tokens": tokens,
                    "threads": threads,
                    "pause": pause,
                    "handover": [before, handover()],
                }
                for call, times in zip(("first", "second", "third"), zip(*turns, strict=True), strict=True):
                    ordered = sorted(times)
                    row[call] = [round(1e3 * ordered[len(ordered) * part // 10], 2) for part in (1, 5)]
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def turn(call: Callable[[], object], pause: float) -> list[float]:
    """Seconds of three calls after a pause."""
    time.sleep(pause)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
