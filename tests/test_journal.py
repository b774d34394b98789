"""The folder of a long job: parts come back bit by bit, and nothing that is damaged or of another job is taken."""

import json
from pathlib import Path

import pytest
import torch

from bittern.deploy.journal import JOB, Journal
from bittern.errors import CheckpointError, InputError
from helpers import refused, same
from material import tree

TENSORS = {
    "w": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "view": torch.arange(6.0).view(2, 3).t(),
    "codes": torch.tensor([1, 255], dtype=torch.uint8),
    "one": torch.tensor(2.5),
    "empty": torch.empty(0),
}
NOTES = {"bits": {"4": 1.25}, "names": ["a.b", "ü"], "none": None}


def job(**changes: object) -> dict[str, object]:
    return {"model": "abc", "bits": (4, 6), "recipe": {"name": "w8a8"}} | changes


def test_parts(tmp_path: Path) -> None:
    """What was saved comes back, in this object and in another of the same job; what was not is None."""
    first = Journal(tmp_path / "new" / "folder", job())
    assert first.load("000-a") is None
    first.save("000-a", TENSORS, NOTES)
    for journal in (first, Journal(tmp_path / "new" / "folder", job())):
        found = journal.load("000-a")
        assert found is not None
        assert same(found[0], TENSORS)
        assert found[1] == NOTES
        assert journal.load("001-b") is None


@pytest.mark.parametrize("name", ["model", "bits", "recipe", "extra"])
def test_another_job(tmp_path: Path, name: str) -> None:
    """Another job is refused in one line that says what differs, and nothing is written."""
    Journal(tmp_path, job()).save("000-a", TENSORS, NOTES)
    before = tree(tmp_path)
    with refused(InputError, str(tmp_path), f"another {name} "):
        Journal(tmp_path, job(**{name: "other"}))
    assert tree(tmp_path) == before


def test_a_job_without_finished_parts(tmp_path: Path) -> None:
    """Where nothing is finished, nothing is lost: another job takes the folder."""
    Journal(tmp_path, job())
    Journal(tmp_path, job(model="other")).save("000-a", TENSORS, NOTES)
    with refused(InputError, "another model"):
        Journal(tmp_path, job())


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "{}"])
def test_damaged_job(tmp_path: Path, text: str) -> None:
    """A job.json that holds no job beside finished parts is an error that names it."""
    Journal(tmp_path, job()).save("000-a", TENSORS, NOTES)
    (tmp_path / JOB).write_text(text)
    with refused(InputError if text == "{}" else CheckpointError, str(tmp_path)):
        Journal(tmp_path, job())


def test_parts_without_a_job(tmp_path: Path) -> None:
    """Files of nobody knows what are not taken for parts."""
    Journal(tmp_path, job()).save("000-a", TENSORS, NOTES)
    (tmp_path / JOB).unlink()
    with refused(InputError, str(tmp_path), JOB):
        Journal(tmp_path, job())


def test_damaged_parts(tmp_path: Path) -> None:
    """Flipped bits and lost ends of a part, in its notes too, are found, with an error that names the file."""
    journal = Journal(tmp_path, job())
    journal.save("000-a", TENSORS, NOTES)
    path = tmp_path / "000-a.safetensors"
    whole = path.read_bytes()
    damaged = [whole[:at] for at in range(0, len(whole), 37)]
    for at in range(0, len(whole), 3):
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with refused(CheckpointError, str(path), "damaged"):
            journal.load("000-a")


def test_leftovers(tmp_path: Path) -> None:
    """A part that was half written when the process died is not there; `delete` takes it away with all the rest."""
    folder = tmp_path / "work"
    journal = Journal(folder, job())
    journal.save("000-a", TENSORS, NOTES)
    (folder / ".001-b.safetensors.123").write_bytes(b"half")
    assert Journal(folder, job()).load("001-b") is None
    Journal.delete(folder)
    assert not folder.exists()


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be written the error is one line, and no half file stays."""
    (tmp_path / "file").write_text("")
    with refused(InputError, "cannot write to", "file"):
        Journal(tmp_path / "file", job())
    journal = Journal(tmp_path / "work", job())

    def full(path: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with refused(InputError, "cannot write to", "No space left"):
        journal.save("000-a", TENSORS, NOTES)
    assert [p.name for p in (tmp_path / "work").iterdir()] == [JOB]
    assert json.loads((tmp_path / "work" / JOB).read_text())["model"] == "abc"
