"""Disks that are full or refuse to be written, two commands on one output, folders that move away, clocks that jump:
one line of an error, and afterwards the same command ends with the same bits."""

from __future__ import annotations

import errno
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kills import SLOW, Case, Trial, pairs
from world import CALL, FAIL, FAIL_FOREVER, Ended, Process, Strike, typed

ERRORS = {
    "disk full": (FAIL_FOREVER, errno.ENOSPC),
    "quota": (FAIL_FOREVER, errno.EDQUOT),
    "read-only": (FAIL_FOREVER, errno.EROFS),
    "no permission": (FAIL, errno.EACCES),
    "bad disk": (FAIL, errno.EIO),
}
NOBODY = 65534


def trials(work: Path, seed: int) -> Iterator[Trial]:
    ways: dict[str, Callable[[Case, random.Random], str]] = {
        **{name: lambda case, dice, how=how: fail(case, dice, *how) for name, how in ERRORS.items()},
        "not ours": as_nobody,
        "two at once": two,
        "moved": lambda case, dice: taken_away(case, dice, lambda: case.area.rename(case.area.with_name("moved"))),
        "deleted": lambda case, dice: taken_away(case, dice, lambda: shutil.rmtree(case.area)),
        "work deleted": lambda case, dice: taken_away(case, dice, lambda: remove_work(case.area)),
        "clock": jump,
    }
    for turn in range(1 << 30):
        for how, name in pairs(ways):
            if name in SLOW and (turn % 2 or how in ("bad disk", "quota")):
                continue
            if name == "qat two processes" and how not in ("not ours", "two at once", "clock"):
                continue  # whose operations are counted in no process of ours
            dice, try_it = random.Random(f"{seed} {turn} {how} {name}"), ways[how]
            yield f"{how}: {name} {turn}", lambda name=name, try_it=try_it, dice=dice: try_it(Case(name, work), dice)


def refused(ended: Ended) -> str:
    return "" if not ended.signal and (ended.clean or ended.code == 0) else f"no one line: {ended}"


def fail(case: Case, dice: random.Random, what: int, number: int) -> str:
    """From one operation on the disk refuses to be written, or refuses this one."""
    ended = case.start(Strike(case.area, what, dice.randint(1, case.whole.operations), number)).wait()
    return refused(ended) or case.check_part() or case.check_whole()


def as_nobody(case: Case, _: random.Random) -> str:
    """A user who may not write there."""

    def work() -> None:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        typed(case.name, case.world, case.area)()

    import importlib.readers  # noqa: F401  # now: Python itself may be where this user may not read

    os.chmod(case.area, 0o755)
    ended = Process(work).wait()
    if not ended.clean or ended.seconds > max(5.0, case.whole.seconds / 2):
        return f"not refused, or not at once: {ended}"
    return "something was written" if any(case.area.iterdir()) else ""


def two(case: Case, dice: random.Random) -> str:
    first = case.start()
    time.sleep(dice.uniform(0.3, 0.7) * case.whole.seconds)
    second = case.start().wait()
    ended = first.wait()
    told = "is being written by process" in second.text or "exists; choose another output" in second.text
    if not second.clean or not told:
        return f"the second was not refused: {second}"
    return "" if ended.code == 0 and case.holds_all() else f"the first was disturbed: {ended}"


def taken_away(case: Case, dice: random.Random, act: Callable[[], object]) -> str:
    strike = Strike(case.area, CALL, dice.randint(1, case.whole.operations), call=lambda: act() and None)
    ended = case.start(strike).wait()
    if fault := refused(ended):
        return fault
    moved = case.area.with_name("moved")
    if moved.exists():
        shutil.rmtree(case.area, ignore_errors=True)
        moved.rename(case.area)
    case.area.mkdir(exist_ok=True)
    return case.check_part() or case.check_whole()


def remove_work(area: Path) -> None:
    for folder in area.glob("out.*"):
        shutil.rmtree(folder)


def jump(case: Case, dice: random.Random) -> str:
    """The clock goes back and forth by a year at each write."""
    ended = case.start(Strike(case.area, clock=dice.choice((3e7, -3e7, 3600.0)))).wait()
    if ended.code or ended.signal:
        return str(ended)
    return "" if case.holds_all() else "other bits"
