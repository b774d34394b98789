"""The package as such: its public names, what importing it costs, what it must never do, and what it carries."""

import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import bittern
from bittern.recipe import recipe_names

PUBLIC = [
    "Anatomy",
    "BitternError",
    "CheckpointError",
    "FakeQuant",
    "Format",
    "InputError",
    "ModelError",
    "Recipe",
    "RecipeError",
    "Rule",
    "Simulation",
    "calibrate",
    "compress",
    "fake_quantize",
    "inspect",
    "is_packed",
    "is_simulated",
    "load",
    "load_recipe",
    "pack",
    "read_anatomy",
    "recipe_names",
    "restore",
    "save",
    "simulate",
]
SOURCES = sorted(Path(bittern.__file__).parent.rglob("*.py"))


def test_public_names() -> None:
    """The public names are these, sorted: adding or removing one is a decision, not an accident."""
    assert bittern.__all__ == PUBLIC == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings(name: str) -> None:
    """Each public name says what it is, in words of its own."""
    text = getattr(bittern, name).__doc__ or ""
    assert len(text.split()) > 3
    assert not text.startswith(f"{name}(")  # what a dataclass makes up


def test_import_is_light() -> None:
    """`import bittern` loads no library that only some jobs need, and prints nothing."""
    code = "import sys, bittern; print(*{'torchvision', 'timm', 'datasets', 'sklearn', 'pandas'} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "\n", "")


@pytest.mark.parametrize("pattern", [r"\bpickle\b", r"torch\.load\(", r"\.cuda\(", r"https?://"])
def test_sources_never(pattern: str) -> None:
    """No source unpickles, needs a GPU, or holds an address to talk to."""
    assert SOURCES
    assert not [path.name for path in SOURCES if re.search(pattern, path.read_text())]


@pytest.mark.parametrize(
    "path",
    [
        *(f"recipes/{name}.yaml" for name in recipe_names()),
        "py.typed",
        "assets/digits-vit/config.json",
        "assets/digits-vit/model.safetensors",
        "analysis/templates/compress.html.j2",
        "analysis/templates/report.html.j2",
        "analysis/templates/report.css",
        "analysis/templates/report.js",
        "analysis/templates/plot.svg.j2",
        "analysis/templates/figures.yaml",
    ],
)
def test_package_data(path: str) -> None:
    """Recipes, the model of the demo and the marker of types come with the package."""
    assert files("bittern").joinpath(path).read_bytes() or path == "py.typed"
