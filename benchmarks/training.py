"""What the training scripts share: a state to resume from, in safetensors, and a model folder that is always whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


def save_state(path: Path, step: int, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Write weights and the optimizer's moments; learning rates are the script's own."""
    tensors = {f"{name} {key}": t.clone() for name, m in modules.items() for key, t in m.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer {i} {key}": t.clone() for key, t in moments.items()}
    writing = path.with_suffix(".writing")
    save_file(tensors, writing, {"step": str(step)})
    os.replace(writing, path)


def load_state(path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Go on from what `save_state` wrote: the step, or 0 if there is nothing."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        tensors = {name.split(" ", 1)[0]: {} for name in file.keys()}  # noqa: SIM118
        for name in file.keys():  # noqa: SIM118
            owner, key = name.split(" ", 1)
            tensors[owner][key] = file.get_tensor(name)
    for name, module in modules.items():
        module.load_state_dict(tensors[name])
    moments: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors["optimizer"].items():
        index, key = name.split(" ")
        moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    print(f"resumed at step {step}", flush=True)
    return step


def publish(model: Any, processor: Any, out: Path) -> None:
    """Write a model and its processor so that whoever loads them meanwhile sees whole files."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        for file in Path(folder).iterdir():
            os.replace(file, out / file.name)
