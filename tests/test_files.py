"""Outputs: nothing is deleted but what a run of ours wrote."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bittern.deploy.files import WRITTEN, atomic_file, atomic_folder, check_output, reserved
from bittern.deploy.journal import Journal
from bittern.errors import InputError
from helpers import refused
from material import tree


def write(out: Path, text: str = "one", force: bool = True) -> None:
    """An output of two files, one of them in a folder."""
    with atomic_folder(out, force=force) as folder:
        (folder / "model").write_text(text)
        (folder / "plots").mkdir()
        (folder / "plots" / "map.svg").write_text(text)


def own_float(out: Path) -> None:
    shutil.rmtree(out)
    out.mkdir()
    (out / "config.json").write_text("{}")


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "notes": (lambda out: (out / "notes.txt").write_text("kept for years"), "notes.txt"),
    "a note below": (lambda out: (out / "plots" / "mine.svg").write_text(""), "plots/mine.svg"),
    "hidden": (lambda out: (out / ".git").write_text(""), ".git"),
    "a checkpoint": (lambda out: (out / "step").mkdir() or (out / "step" / "model").write_text("x"), "step/model"),
    "a file that was changed": (lambda out: (out / "model").write_text("by hand"), "model"),
    "a link": (lambda out: (out / "link").symlink_to(out.parent), "link"),
    "a model of another program": (own_float, "config.json"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_force_deletes_only_what_is_ours(tmp_path: Path, name: str) -> None:
    """An output that holds a file that no run wrote, or that was changed since, is refused by its name, forced or not,
    before work and when it is written."""
    put, what = FOREIGN[name]
    write(tmp_path / "out")
    put(tmp_path / "out")
    before = tree(tmp_path)
    with refused(InputError, f"holds {what}, which no run of Bittern wrote"):
        check_output(tmp_path / "out", force=True)
    with refused(InputError, what):
        write(tmp_path / "out")
    assert tree(tmp_path) == before


def test_force_replaces_what_is_ours(tmp_path: Path) -> None:
    """An output as a run left it is replaced, all of it, also where it was copied to."""
    write(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "out")
    with atomic_folder(tmp_path / "out", force=True) as folder:
        (folder / "other").write_text("new")
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")] == ["other"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "out"]


def test_what_comes_meanwhile_stays(tmp_path: Path) -> None:
    """A note that is put into the output while a run works is not deleted."""
    write(tmp_path / "out")
    with atomic_folder(tmp_path / "out", force=True) as folder:
        (folder / "model").write_text("two")
        (tmp_path / "out" / "notes.txt").write_text("new")
    assert [path.read_text() for path in tmp_path.rglob("notes.txt")] == ["new"]
    assert (tmp_path / "out" / "model").read_text() == "two"


KILLED = """
import os, signal, sys
from pathlib import Path
from bittern.deploy import files

when, out = sys.argv[1:]
if when == "between":  # the old output has gone, and the new one is not there yet
    files.Path.rename = lambda path, to, rename=Path.rename: rename(path, to) and os.kill(os.getpid(), signal.SIGKILL)
with files.atomic_folder(out, force=True) as folder:
    (folder / "model").write_text("two")
    if when == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
    if when == "waiting":
        print(1, flush=True)
        input()
"""


@pytest.mark.parametrize("when", ["writing", "between"])
@pytest.mark.parametrize("fails", [False, True])
def test_after_a_kill(tmp_path: Path, when: str, fails: bool) -> None:
    """The next run clears away what a killed one left; if it fails too, the output is there that was there before."""
    write(tmp_path / "out")
    killed = subprocess.run([sys.executable, "-c", KILLED, when, str(tmp_path / "out")], check=False)
    assert killed.returncode == -signal.SIGKILL
    with suppress(ZeroDivisionError), atomic_folder(tmp_path / "out", force=True) as folder:
        (folder / "model").write_text("three")
        if fails:
            raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model").read_text() == ("one" if fails else "three")


def test_folders_that_are_deleted_under_a_run(tmp_path: Path) -> None:
    """A temporary folder that somebody deletes while it is written gives one line, a work folder that is gone none."""
    with refused(InputError, "cannot write", "out"), atomic_folder(tmp_path / "out") as folder:
        shutil.rmtree(folder.parent)
        (folder / "model").write_text("one")
    assert not list(tmp_path.iterdir())
    Journal.delete(tmp_path / "out.work")


def test_what_another_run_writes_stays(tmp_path: Path) -> None:
    """Temporary folders of a run that lives are no left-overs, though the two do not see each other's lock."""
    command, elsewhere = [sys.executable, "-c", KILLED, "waiting", str(tmp_path / "out")], tmp_path / "elsewhere"
    elsewhere.mkdir()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"TMPDIR": str(elsewhere)}
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        write(tmp_path / "out")
        other.communicate(b"\n")
    assert other.returncode == 0
    assert (tmp_path / "out" / "model").read_text() == "two"


def test_list_that_names_files_elsewhere(tmp_path: Path) -> None:
    """A folder that lists files outside of it as its own does not get them deleted."""
    write(tmp_path / "out")
    (tmp_path / "mine").write_text("precious")
    listed = {"model": 3, "plots/map.svg": 3, "../mine": 8, "../../mine": 8, str(tmp_path / "mine"): 8}
    (tmp_path / "out" / WRITTEN).write_text(json.dumps(listed))
    write(tmp_path / "out", "two")
    assert (tmp_path / "mine").read_text() == "precious"
    assert (tmp_path / "out" / "model").read_text() == "two"
    (tmp_path / "out" / WRITTEN).write_text("[" * 100_000)
    with refused(InputError, "which no run of Bittern wrote"):
        write(tmp_path / "out", "three")


def test_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of power takes nothing back: files, their folders and the name of the output are synced, in this order."""
    synced: list[str] = []
    monkeypatch.setattr("os.fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "below").mkdir()
        (folder / "below" / "model").write_text("one")
    names = [Path(path).name for path in synced]
    assert names == ["model", WRITTEN, "below", "new", tmp_path.name]
    with atomic_file(tmp_path / "part") as file:
        file.write_text("one")
    assert synced[-1] == str(tmp_path)


@pytest.mark.parametrize("source", ["out", "out/below", "out.work/checkpoint-5"])
def test_sources_stay(tmp_path: Path, source: str) -> None:
    """An output that is or holds the model that is read is refused, by whatever path it is named."""
    (tmp_path / source).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / source)
    for name in (source, "link"):
        with refused(InputError, f"would overwrite {tmp_path / name}", "another output"):
            check_output(tmp_path / "out", True, None, tmp_path / name)
    check_output(tmp_path / source / "new", True, tmp_path / source)


@pytest.mark.parametrize("exists", [True, False])
def test_output_that_is_a_link(tmp_path: Path, exists: bool) -> None:
    """An output that is a symbolic link stays one; what it names is written."""
    if exists:
        write(tmp_path / "disk" / "out")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    write(tmp_path / "out", "two")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "out" / "model").read_text() == "two"


def test_reserved(tmp_path: Path) -> None:
    """While a process holds an output another one is refused and told its number; a dead process holds nothing."""
    code = (
        "import sys, time; from bittern.deploy.files import reserved\n"
        "with reserved(sys.argv[1]): print(1, flush=1), time.sleep(99)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    with (
        refused(InputError, f"is being written by process {other.pid}, since"),
        reserved(tmp_path / "x" / ".." / "out"),
    ):
        pass
    with reserved(tmp_path / "other"):
        other.kill()
    other.wait()
    for _ in range(2):
        with reserved(tmp_path / "out"):
            pass
    assert not tree(tmp_path)
