"""A campaign against loss, lies and crashes: tries to break Bittern in every way that users' machines do.

    python scripts/torture --minutes 2                # each part for a share of the time
    python scripts/torture --parts kills --trials 100 # so many of each part, however long that takes
    python scripts/torture --page                     # docs/torture.md anew from what was found

Trials that are in the work folder's log already are not tried again: the same command goes on. Exits with 1 if anything
was lost or wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "torture.json"
PAGE = ROOT / "docs" / "torture.md"
PARTS = {
    "kills": "kill -9, SIGTERM, Ctrl-C twice and losses of power at any moment of each command",
    "mutants": "damaged and hostile checkpoints, recipes, data, reports and work folders",
    "disk": "full, read-only and failing disks, two commands on one output, folders that move, clocks that jump",
    "threads": "many threads and processes, forks, copies, models that are freed",
    "values": "numbers, types, sizes and devices that no model expects",
}
SHARES = {"kills": 0.3, "mutants": 0.3, "disk": 0.15, "threads": 0.1, "values": 0.15}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10.0, help="of all parts together, without --trials")
    parser.add_argument("--trials", type=int, help="of each part, counted from its first")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=[*PARTS])
    parser.add_argument("--only", default="", help="trials whose name holds this")
    parser.add_argument("--again", action="store_true", help="try once more what did not survive")
    parser.add_argument("--soak", type=float, default=0.0, help="minutes of mixed requests on packed models")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "torture")
    parser.add_argument("--out", type=Path, help="the summary, as JSON; by default in the work folder")
    parser.add_argument(
        "--page", action="store_true", help="write docs/torture.md from benchmarks/results/torture.json"
    )
    return parser.parse_args()


def start_again_with_the_shim(work: Path) -> None:
    """Replace this process by one that has loaded shim.c, which sees all file operations."""
    import subprocess

    work.mkdir(parents=True, exist_ok=True)
    library = work / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl", "-lpthread"], check=True)
    settings = {"LD_PRELOAD": str(library), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    settings |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | settings)


def lines(log: Path) -> Iterator[dict[str, Any]]:
    if log.exists():
        for line in log.read_text().splitlines():
            yield json.loads(line)


def attempt(part: str, chosen: argparse.Namespace, log: Path) -> int:
    """Do the trials of a part that are not in the log, as long as there is time; return how many failed."""
    from importlib import import_module

    kept = [entry for entry in lines(log) if entry["part"] != part or not (chosen.again and entry["fault"])]
    if chosen.again:
        log.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    done = {entry["name"]: entry["fault"] for entry in kept if entry["part"] == part}
    start, count, failed = time.monotonic(), 0, 0
    share = SHARES[part] / sum(SHARES[name] for name in chosen.parts)
    for name, trial in islice(import_module(part).trials(chosen.work, chosen.seed), 100_000):
        if chosen.only not in name:
            continue
        over = time.monotonic() - start > 60 * chosen.minutes * share
        if count >= chosen.trials if chosen.trials is not None else over:
            break
        count += 1
        if name in done:
            failed += bool(done[name])
            continue
        begun = time.monotonic()
        try:
            fault = trial()
        except Exception:
            fault = traceback.format_exc()
        failed += bool(fault)
        entry = {"part": part, "name": name, "fault": fault, "seconds": round(time.monotonic() - begun, 2)}
        with log.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if fault:
            print(f"{part}: {name}: {fault}", file=sys.stderr, flush=True)
    print(f"{part}: {count} tried, {count - failed} survived", flush=True)
    return failed


def summary(log: Path, seed: int) -> dict[str, Any]:
    """Figures of a log, and each fault in it once."""
    found: dict[str, Any] = {"seed": seed, "parts": {}}
    for entry in lines(log):
        empty: dict[str, Any] = {"tried": 0, "survived": 0, "seconds": 0.0, "kinds": {}, "faults": []}
        part = found["parts"].setdefault(entry["part"], empty)
        kind = entry["name"].rpartition(" ")[0]
        of_kind = part["kinds"].setdefault(kind, {"tried": 0, "survived": 0})
        for each in (part, of_kind):
            each["tried"] += 1
            each["survived"] += not entry["fault"]
        part["seconds"] = round(part["seconds"] + entry["seconds"], 1)
        if entry["fault"]:
            part["faults"].append({"name": entry["name"], "fault": entry["fault"][-300:]})
    return found


def write_page(result: dict[str, Any]) -> None:
    """docs/torture.md: what was tried, and what it found, of which mended.json tells."""
    mended = json.loads(Path(__file__).with_name("mended.json").read_text())
    rows = [
        f"| {PARTS[name]} | {part['tried']:,} | {part['survived']:,} | {sum(m['part'] == name for m in mended)} | "
        f"{part['seconds'] / 60:.0f} |"
        for name, part in result["parts"].items()
    ]
    faults = [f"| {m['fault']} | {m['now']} | {', '.join(f'`{test}`' for test in m['tests'])} |" for m in mended]
    kinds = [
        f"| {name} | {kind} | {of['tried']:,} | {of['survived']:,} |"
        for name, part in result["parts"].items()
        for kind, of in grouped(part["kinds"]).items()
    ]
    soak = result.get("soak")
    text = Path(__file__).with_name("page.md").read_text()
    page = text.format(
        rows="\n".join(rows), faults="\n".join(faults), kinds="\n".join(kinds), soak=told(soak) if soak else "Not run."
    )
    PAGE.write_text(page)


def grouped(kinds: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Join what differs by the command or the model only."""
    found: dict[str, dict[str, int]] = {}
    for kind, of in kinds.items():
        each = found.setdefault(kind.partition(":")[0], {"tried": 0, "survived": 0})
        for key in each:
            each[key] += of[key]
    return found


def told(soak: dict[str, Any]) -> str:
    first, last = (", ".join(f"{k} {v} ms" for k, v in soak[key].items()) for key in ("ms_first", "ms_last"))
    return (
        f"{soak['requests']:,} mixed requests in {soak['minutes']:g} minutes on a packed BERT and a packed ViT, both "
        f"tiny, under a limit of {soak['limit_mb']} MB more than they had at the start: memory went from "
        f"{soak['memory_first_mb']} to {soak['memory_last_mb']} MB, {soak['drifted']} answers differed from the "
        f"first ones; requests of one sample took {first} in the first fifth, {last} in the last."
    )


def main() -> None:
    chosen = options()
    if chosen.page:
        return write_page(json.loads(RESULT.read_text()))
    chosen.work = chosen.work.resolve()
    if "LD_PRELOAD" not in os.environ:
        start_again_with_the_shim(chosen.work)
    sys.path.insert(0, str(ROOT / "tests"))
    import world

    world.warm_up()
    world.in_a_process(lambda: world.build(chosen.work / "world"))
    log = chosen.work / f"log-{chosen.seed}.jsonl"
    failed = sum([attempt(part, chosen, log) for part in chosen.parts])
    result = summary(log, chosen.seed)
    if chosen.soak:
        from soak import soak

        result["soak"], fault = soak(chosen.work, chosen.soak, chosen.seed)
        print(f"soak: {fault or 'no growth, no drift'}; {result['soak']}")
        failed += bool(fault)
    (chosen.out or chosen.work / "torture.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(1 if failed else 0)


main()
