"""Bittern makes Transformers small and fast without losing what they know.

A model is float, simulated or packed; each step is one call:

    report = bittern.simulate(model, "w8a8")   # float → simulated, in place
    bittern.calibrate(model, batches)           # static scales of activations
    bittern.pack(model)                         # simulated → packed: integer codes, the same outputs

Importing this package also teaches transformers' `from_pretrained` to load packed checkpoints.
"""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

__version__ = version("bittern")

_script = Path(sys.argv[0])
_is_command = (
    sys.orig_argv[sys.orig_argv.index("-m") + 1] == "bittern"
    if _script.name == "-m"  # while `python -m` imports the package
    else _script.stem == "bittern" and _script.parent.samefile(Path(sys.executable).parent)
)
if not _is_command:  # which imports what it needs, when it needs it: its help answers without torch
    from bittern.anatomy import Anatomy
    from bittern.deploy.checkpoint import is_packed, pack
    from bittern.deploy.store import inspect, load, save
    from bittern.dry_run import read_anatomy
    from bittern.errors import BitternError, CheckpointError, InputError, ModelError, RecipeError
    from bittern.layers import is_simulated, restore, simulate
    from bittern.ptq.calibrate import calibrate
    from bittern.quantizers import FakeQuant, fake_quantize
    from bittern.recipe import Format, Recipe, Rule, load_recipe, recipe_names
    from bittern.simulation import Simulation

__all__ = ["Anatomy", "BitternError", "CheckpointError", "FakeQuant", "Format", "InputError", "ModelError", "Recipe"]
__all__ += ["RecipeError", "Rule", "Simulation", "calibrate", "compress", "fake_quantize", "inspect", "is_packed"]
__all__ += [
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


def __getattr__(name: str) -> Any:
    """Load `compress` when it is asked for: it needs what serving a model does not."""
    if name != "compress":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bittern.ladder import compress

    return compress
