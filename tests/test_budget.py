"""The size of the source is a decision: a feature pays for its lines, and a file that grows is split."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON, CPP, FILE, SKIPS = 16_310, 2_900, 400, 10  # the most lines, and places that the formatter may not touch


def lines(*patterns: str) -> dict[str, list[str]]:
    """The lines of each source file."""
    found = sorted(path for pattern in patterns for path in (ROOT / "src").rglob(pattern))
    return {str(path.relative_to(ROOT)): path.read_text().splitlines() for path in found}


def summary() -> str:
    """One line for the end of a test run."""
    python, cpp = (sum(map(len, lines(*patterns).values())) for patterns in (("*.py",), ("*.h", "*.cpp")))
    return f"src: {python:,} of {PYTHON:,} lines of Python, {cpp:,} of {CPP:,} of C++"


def test_total() -> None:
    """All of the Python and all of the C++ stay within their budgets."""
    python, cpp = lines("*.py"), lines("*.h", "*.cpp")
    assert 0 < sum(map(len, python.values())) <= PYTHON, summary()
    assert 0 < sum(map(len, cpp.values())) <= CPP, summary()


def test_files() -> None:
    """No source file is longer than one can read at a sitting."""
    assert not {name: len(text) for name, text in lines("*.py", "*.h", "*.cpp").items() if len(text) > FILE}


def test_formatter() -> None:
    """Nearly all code looks as the formatter has it."""
    marks = ("# fmt" + ": skip", "# fmt" + ": off")
    found = [name for name, text in lines("*.py").items() for line in text if any(mark in line for mark in marks)]
    assert len(found) < SKIPS, found
