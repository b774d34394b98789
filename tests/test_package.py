"""The package as such: its public names, what importing it costs, what it must never do, and what it carries."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

import bittern
from bittern.recipe import recipe_names
from material import save_text_model

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


TOOLS = ("accelerate", "datasets", "pandas", "peft", "PIL", "pyarrow", "pycocotools", "onnx", "scipy", "sklearn")


def test_serving_needs_no_tools(tmp_path: Path) -> None:
    """A packed model is loaded, runs and serves a pipeline where nothing of what makes, measures and trains models is
    installed; what needs it says in one line which extra brings it."""
    save_text_model(tmp_path / "float")
    model = bittern.load(tmp_path / "float")
    bittern.simulate(model, "ternary")
    bittern.save(bittern.pack(model), tmp_path / "packed")
    code = f"""
import sys
sys.modules |= dict.fromkeys({TOOLS})
import bittern
from transformers import pipeline
model = bittern.load("packed")
print(pipeline("text-classification", model="packed")("a bittern booms")[0]["label"], bittern.is_packed(model))
assert bittern.inspect("packed", verify=True)["verified"] < 1e-3
bittern.save(model, "again")
from bittern.jobs import evaluate, qat
try:
    evaluate("packed", "sentences", against="float")
except bittern.InputError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0, ran.stderr
    assert lines[0].endswith("True")
    assert lines[1] == "this needs datasets, which is not installed: pip install 'bittern[tools]'"


def test_extras() -> None:
    """What a plain install brings is what runs a packed model; the rest is in extras that messages name."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    plain = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    assert plain == {"torch", "transformers", "safetensors", "numpy", "pydantic", "pyyaml", "typer", "rich", "jinja2"}
    named = set(re.findall(r"bittern\[(\w+)\]|\"(\w+)\"\) for name in", "".join(p.read_text() for p in SOURCES)))
    assert {a or b for a, b in named} | {"tools"} <= project["optional-dependencies"].keys()


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


def test_one_name_is_one_thing() -> None:
    """No two modules give one public name to different things, but a command, its job and what shows its result; the
    kernels' C structures are named as those; `quantize` is a job and post-training quantization in Python."""
    homes: dict[str, set[str]] = {}
    for path in SOURCES:
        if path.parent.name == "cli" or path.name == "structures.py":
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            named = [target.id for target in targets if isinstance(target, ast.Name)]
            for name in [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else named:
                homes.setdefault(name, set()).add(path.name)
    doubled = {name for name, found in homes.items() if len(found) > 1 and not name.startswith("_")}
    assert doubled == {"quantize", "T"}, {name: homes[name] for name in doubled}
