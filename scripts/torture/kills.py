"""Commands that are ended at any moment: killed, told to stop, or by a loss of power. The same command again must end
with the bits of an undisturbed run, and leave nothing beside them."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from world import COMMANDS, SIGNAL, Ended, Process, Strike, bits, strays, typed

Trial = tuple[str, Callable[[], str]]  # a name, and what returns what went wrong, "" if nothing did
SLOW = ("ptq adaround", "export", "export file", "qat two processes")  # tried half as often
ENDS_AT_A_WRITE = ("kill at a write", "term at a write", "power")  # not counted in several processes
ENDS = ("kill", "kill at a write", "term", "term at a write", "ctrl-c twice", "power")


class Case:
    """A command, a folder for its outputs, and how an undisturbed run of it went."""

    def __init__(self, name: str, work: Path):
        self.name, self.world, self.area = name, work / "world", work / "area"
        self.whole = reference(name, work)
        shutil.rmtree(self.area, ignore_errors=True)
        self.area.mkdir()

    def start(self, strike: Strike | None = None, **options: Any) -> Process:
        return Process(typed(self.name, self.world, self.area), strike, **options)

    def check_whole(self) -> str:
        """Run the command again, to its end, and compare."""
        ended = self.start().wait()
        if "exists; choose another output" in ended.text:  # it had been written just before the end
            found = "" if self.holds_all() else "an output that exists differs from an undisturbed run"
            if found:
                return found
            for name in ("out", "model.onnx", "model.json"):
                place = self.area / name
                shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
            ended = self.start().wait()
        if ended.code or ended.signal:
            return f"run again: {ended}"
        if left := strays(self.area):
            return f"run again, it left {left}"
        if (now := bits(self.area)) != self.whole.bits:
            kept = self.area.with_name("differs")  # to look at
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(self.area, kept)
            return f"other bits in {[k for k in {*now, *self.whole.bits} if now.get(k) != self.whole.bits.get(k)]}"
        return ""

    def holds_all(self) -> bool:
        found = {name: digest for name, digest in bits(self.area).items() if ".work/" not in f"/{name}"}
        return all(found.get(name) == digest for name, digest in self.whole.bits.items())

    def check_part(self) -> str:
        """There is no output yet, or all of it."""
        if any((self.area / name).exists() for name in ("out", "model.onnx")) and not self.holds_all():
            return f"half an output: {sorted(p.name for p in self.area.rglob('*'))}"
        return ""


class Reference:
    def __init__(self, ended: Ended, found: dict[str, str]):
        self.bits, self.seconds, self.operations = found, ended.seconds, ended.operations


@cache
def reference(name: str, work: Path) -> Reference:
    """Run a command undisturbed."""
    area = work / "reference" / name.replace(" ", "-")
    shutil.rmtree(area, ignore_errors=True)
    area.mkdir(parents=True)
    ended = Process(typed(name, work / "world", area), Strike(area, log=work / "log")).wait()
    assert (ended.code, ended.signal, strays(area)) == (0, 0, []), ended
    shutil.copy(work / "log", area.with_suffix(".log"))
    return Reference(ended, bits(area))


def pairs(ways: Iterable[str]) -> list[tuple[str, str]]:
    """Return each way with each command, so that few of them hold all ways and many commands."""
    names = [*COMMANDS]
    return [(way, names[(i + shift) % len(names)]) for shift in range(len(names)) for i, way in enumerate(ways)]


def trials(work: Path, seed: int) -> Iterator[Trial]:
    """Endless: each way to end each command, in turn, at random moments."""
    for turn in range(1 << 30):
        for how, name in pairs(ENDS):
            if (name in SLOW and turn % 2) or (how in ENDS_AT_A_WRITE and name == "qat two processes"):
                continue
            dice = random.Random(f"{seed} {turn} {how} {name}")
            yield f"{how}: {name} {turn}", lambda dice=dice, how=how, name=name: disturb(how, name, work, dice)


def disturb(how: str, name: str, work: Path, dice: random.Random) -> str:
    case = Case(name, work)
    if how == "power":
        return lose_power(case, work, dice)
    for _ in range(dice.choice((1, 1, 2))):  # it may happen to the second run too
        if how.endswith("at a write"):
            number = signal.SIGKILL if how.startswith("kill") else signal.SIGTERM
            ended = case.start(Strike(case.area, SIGNAL, dice.randint(1, case.whole.operations), number)).wait()
        else:
            process = case.start()
            time.sleep(dice.uniform(0, case.whole.seconds))
            process.send({"kill": signal.SIGKILL, "term": signal.SIGTERM}.get(how, signal.SIGINT))
            if how == "ctrl-c twice":
                time.sleep(dice.choice((0, 0.001, 0.01, 0.1)))
                process.send(signal.SIGINT)
            ended = process.wait()
        if fault := case.check_part() or (how[:4] in ("term", "ctrl") and told(ended)) or "":
            return fault
    return case.check_whole()


def told(ended: Ended) -> str:
    """A run that was told to stop says so, in one line, or it was done."""
    if ended.signal == -1:
        return f"it did not stop: {ended}"
    known = ended.code in (0, 130, 143) or "exists; choose another output" in ended.text
    return "" if known and "Traceback" not in ended.text else f"told to stop: {ended}"


# ---- power


def lose_power(case: Case, work: Path, dice: random.Random) -> str:
    """The disk holds what was done up to some operation: all of it, or without what was written and never synced."""
    log = read_log((work / "reference" / case.name.replace(" ", "-")).with_suffix(".log"))
    old = str((work / "reference" / case.name.replace(" ", "-")).resolve())
    moment = dice.randint(1, len(log))
    replay(log[:moment], old, case.area, keep_unsynced=dice.random() < 0.4)
    if fault := case.check_part():
        return f"after operation {moment} of {len(log)}: {fault}"
    fault = case.check_whole()
    return fault and f"after operation {moment} of {len(log)}: {fault}"


def read_log(file: Path) -> list[tuple[list[Any], bytes]]:
    data, at, found = file.read_bytes(), 0, []
    while at < len(data):
        end = data.index(b"\n", at)
        entry = json.loads(data[at:end])
        at = end + 1 + (entry[5] if entry[0] == "write" else 0)
        found.append((entry, data[end + 1 : at]))
    return found


def replay(log: list[tuple[list[Any], bytes]], old: str, area: Path, keep_unsynced: bool) -> None:
    """Make the files as they are after these operations, in `area` for the folder `old`."""
    names: dict[str, int | None] = {}  # path → inode; None for a folder
    content: dict[int, bytearray] = {}
    synced: dict[int, bytes] = {}
    for (what, path, other, inode, offset, size), data in log:
        if what == "create" or (what == "truncate" and inode not in content):
            names[path], content[inode], synced[inode] = inode, bytearray(), b""
        elif what == "truncate":
            content[inode] = bytearray()
        elif what == "open" and inode in content and path not in names:  # renamed by a call that the shim cannot see
            names = {name: number for name, number in names.items() if number != inode} | {path: inode}
        elif what == "mkdir":
            names[path] = None
        elif what == "write" and inode in content:
            part = content[inode]
            part.extend(bytes(max(0, offset + size - len(part))))
            part[offset : offset + size] = data
        elif what == "resize" and inode in content:
            content[inode] = (content[inode] + bytes(offset))[:offset]
        elif what == "sync" and inode in content:
            synced[inode] = bytes(content[inode])
        elif what == "remove":
            names.pop(path, None)
        elif what == "rename":
            names.pop(other, None)
            for name in [n for n in names if n == path or n.startswith(f"{path}/")]:
                names[other + name[len(path) :]] = names.pop(name)
    for name in sorted(names):
        place, number = area / name[len(old) + 1 :], names[name]
        if number is None:
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content[number] if keep_unsynced else synced[number])
