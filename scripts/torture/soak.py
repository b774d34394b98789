"""Hours of mixed requests on packed models under a limit on memory: no growth, no drift, no slower answers."""

from __future__ import annotations

import gc
import json
import random
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from world import Process, memory

from bittern.deploy.store import load


def requests(kind: str, dice: random.Random) -> dict[str, Any]:
    samples = dice.choice((1, 1, 1, 2, 5, 16))
    generator = torch.Generator().manual_seed(dice.randrange(1000))
    if kind == "vit":
        return {"pixel_values": torch.rand(samples, 1, 8, 8, generator=generator)}
    ids = torch.randint(5, 16, (samples, dice.randint(1, 60)), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def serve(folders: dict[str, Path], minutes: float, seed: int, limit: int) -> dict[str, Any]:
    """Answer requests for so long; return how memory, answers and times went."""
    models = {kind: load(folder) for kind, folder in folders.items()}
    dice = random.Random(seed)
    probes = [(kind, requests(kind, random.Random(i))) for i in range(20) for kind in models]

    @torch.no_grad()
    def ask(kind: str, batch: dict[str, Any]) -> torch.Tensor:
        logits: torch.Tensor = models[kind](**batch).logits
        return logits

    expected = [ask(kind, batch) for kind, batch in probes]
    for _ in range(500):  # caches fill
        kind = dice.choice([*models])
        ask(kind, requests(kind, dice))
    gc.collect()
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + limit,) * 2)
    start, count, drifted = time.monotonic(), 0, 0
    held, times = [memory("VmRSS")], (Times(), Times())
    while (passed := (time.monotonic() - start) / (60 * minutes)) < 1:
        for _ in range(200):
            kind = dice.choice([*models])
            batch = requests(kind, dice)
            before = time.perf_counter()
            ask(kind, batch)
            if len(next(iter(batch.values()))) == 1 and (passed < 0.2 or passed > 0.8):
                times[passed > 0.5].add(time.perf_counter() - before)
            count += 1
        drifted += sum(not torch.equal(ask(*probe), wanted) for probe, wanted in zip(probes, expected, strict=True))
        held.append(memory("VmRSS"))
    first, last = (statistics.median(part) for part in (held[: len(held) // 5 + 1], held[-len(held) // 5 - 1 :]))
    return {
        "minutes": round(minutes, 1),
        "requests": count,
        "drifted": drifted,
        "memory_first_mb": round(first / 2**20, 1),
        "memory_last_mb": round(last / 2**20, 1),
        "limit_mb": limit >> 20,
        "memory_mb": [round(held[i * (len(held) - 1) // 10] / 2**20, 1) for i in range(11)],  # as time passed
        "ms_first": times[0].percentiles(),
        "ms_last": times[1].percentiles(),
    }


class Times:
    """The last so many times of answers, in memory that does not grow while they are taken."""

    def __init__(self, most: int = 50_000):
        self.kept, self.count = torch.zeros(most), 0

    def add(self, seconds: float) -> None:
        self.kept[self.count % len(self.kept)] = seconds
        self.count += 1

    def percentiles(self) -> dict[str, float]:
        cuts = statistics.quantiles(self.kept[: self.count].tolist(), n=100)
        return {f"p{p}": round(1e3 * cuts[p - 1], 3) for p in (50, 90, 99)}


def soak(work: Path, minutes: float, seed: int) -> tuple[dict[str, Any], str]:
    """Return figures, and what is wrong with them, if anything is."""
    folders = {"bert": work / "world" / "packed", "vit": work / "world" / "packed-vit"}
    process = Process(lambda: print("\nfigures", json.dumps(serve(folders, minutes, seed, 64 << 20))))
    ended = process.wait(60 * minutes + 120)
    if ended.code or ended.signal:
        return {}, str(ended)
    found = json.loads(ended.text.rpartition("\nfigures ")[2])
    if found["drifted"]:
        return found, f"{found['drifted']} answers differ from the first ones"
    grown = found["memory_last_mb"] - found["memory_first_mb"]
    return found, f"memory grew by {grown:.1f} MB" if grown > 4 else ""
