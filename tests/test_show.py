"""What is printed: tables fit a terminal of 80 columns, and no word is broken."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from bittern import show

NAMES = ("bert.encoder.layer.*.attention.output.dense", "bert.encoder.layer.*.intermediate.dense", "classifier")


def printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *table: object, **options: object
) -> str:
    monkeypatch.setattr(show, "out_console", Console(width=80, markup=False, emoji=False, highlight=False))
    show.print_table(*table, **options)  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_tables_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of modules beside many numbers go on in the next line after a dot; numbers stay whole."""
    columns = ("layer or product", "count", "before", "after", "worst", "rounds")
    rows = [(name, "12", "1.23e-01", "4.56e-02", "7.89e-02", "3") for name in NAMES]
    text = printed(capsys, monkeypatch, columns, rows, "output error")
    assert max(map(len, text.splitlines())) <= 80
    cells = [line.strip("│").split("│") for line in text.splitlines() if line.startswith("│")]
    assert "".join(cell[0].strip() for cell in cells) == "".join(NAMES)
    assert all(cell[0].strip().endswith((".", "dense", "classifier")) for cell in cells)
    assert [tuple(part.strip() for part in cell[1:]) for cell in cells if cell[1].strip()] == [row[1:] for row in rows]


def test_tables_of_texts_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two columns of texts share the room; lines of a cell stay lines, and all words are there."""
    formats = "weight: uniform 8-bit per row, static\ninput: uniform 8-bit per tensor, asymmetric, static"
    columns = ("modules", "count", "formats")
    rows = [(name, "12", formats) for name in NAMES]
    text = printed(capsys, monkeypatch, columns, rows, left=("modules", "formats"), show_lines=True)
    assert max(map(len, text.splitlines())) <= 80
    words = {word for line in text.splitlines() for word in re.split(r"[\s│]+", line)}
    assert set(formats.split()) <= words


def test_lines_of_a_cell_fold_by_themselves() -> None:
    """A line of a cell is broken where it is too long itself, whatever the line before it was."""
    assert show.fold("key: uniform 8-bit per tensor, static\nvalue: uniform 8-bit", 24).split("\n") == [
        "key: uniform 8-bit per",
        "tensor, static",
        "value: uniform 8-bit",
    ]
