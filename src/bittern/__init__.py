"""Bittern makes Transformers small and fast without losing what they know.

A model is float, simulated or packed; each step is one call:

    report = bittern.simulate(model, "w8a8")   # float → simulated, in place
    bittern.calibrate(model, batches)           # static scales of activations
    bittern.pack(model)                         # simulated → packed: integer codes, the same outputs

Importing this package also teaches transformers' `from_pretrained` to load packed checkpoints.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

__version__ = version("bittern")

# A process of the command line, which is the script beside Python or `-m bittern`, imports what it needs when it needs
# it: its help answers without torch.
_started = Path(sys.orig_argv[-len(sys.argv) :][0] if sys.argv else "")  # the script, or after -m the module
if _started.stem != "bittern" or not (sys.argv[0] == "-m" or _started.parent.samefile(Path(sys.executable).parent)):
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
__all__ += ["is_simulated", "load", "load_recipe", "pack", "read_anatomy", "recipe_names", "restore", "save"]
__all__ += ["simulate"]


def __getattr__(name: str) -> Any:
    """Find what was not imported: `compress`, which needs what serving a model does not; in a command anything."""
    homes = "errors recipe simulation quantizers dry_run layers deploy.checkpoint deploy.store ptq.calibrate ladder"
    for home in homes.split() if name in __all__ else ():
        if hasattr(module := import_module(f"bittern.{home}"), name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
