"""Export to ONNX: a file of integer arithmetic with the model's own codes, run and compared before it is kept."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn
from transformers import PreTrainedModel

from bittern import native
from bittern.data import load_any_split
from bittern.deploy.checkpoint import is_packed, pack, packed_layers
from bittern.deploy.companions import REPORT, copy_companions
from bittern.deploy.files import atomic_folder, check_output, check_parent, folder_beside, holds_output, sync
from bittern.deploy.onnx import forms
from bittern.deploy.onnx.parity import check_parity, complete, made_up, measure_parity, run_file, run_model
from bittern.deploy.store import load
from bittern.errors import InputError, ModelError, one_line
from bittern.layers import is_simulated
from bittern.options import find_own, name_own, refuse_unused
from bittern.progress import Track, silent
from bittern.reader import LAYERS

LIBRARIES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")


@holds_output
@native.disabled()  # kernels would not see what is done to the layers
def export(
    source: str | Path,
    out: str | Path,
    *,
    to: str | Callable[[PreTrainedModel, Path], None] = "onnx",
    form: forms.Form = "int8",
    dynamic: bool = False,
    safe: bool = False,
    data: str | None = None,
    samples: int = 64,
    seed: int = 0,
    force: bool = False,
    track: Track = silent,
    **columns: Any,
) -> dict[str, Any]:
    """Write the float, simulated or packed model in folder `source` as ONNX; return the file's contents and its error.

    to: or a function of the loaded model and a folder, or its `module:name`, that writes a format of one's own there.
    out: a folder for model.onnx, processors and bittern.json; or a file that ends in .onnx, which gets a .json beside.
    form: `int8` stores all codes as bytes and is the fastest; `nbits` stores those of 4 bits and fewer as such, for
    onnxruntime; `portable` does so in standard ONNX, with float inputs. dynamic: ranges of inputs are found at run time
    even where there is a static scale. safe: weights that could saturate on x86 without VNNI are stored unsigned.
    data: what the file is run on (see `data.load_data`); made up if not given.
    Raises InputError for options, data and outputs that cannot be used, ModelError if the model cannot be exported or
    the file is further from the simulated model than its arithmetic explains; then no file is left.
    """
    if to != "onnx":
        given = {"form": form, "dynamic": dynamic, "safe": safe, "data": data, "samples": samples, "seed": seed}
        return _export_own(source, Path(out), name_own(to), force, **given, **columns)
    if data is None:
        refuse_unused(export, "without --data", **columns)
    refuse_unused(export, "in an export", metric=columns.get("metric"))
    if missing := [name for name in LIBRARIES if find_spec(name) is None]:
        raise InputError(f"export to ONNX needs {', '.join(missing)}: pip install bittern[onnx]")
    from bittern.deploy.onnx import graph as onnx_graph

    if form not in get_args(forms.Form):
        raise InputError(f"no form {form!r}; give one of {', '.join(get_args(forms.Form))}")
    _check_output(Path(out), force, source)
    model = load(source)
    if is_simulated(model) and not is_packed(model):
        pack(model)
    if not (layers := packed_layers(model)):
        refuse_unused(export, "of a float model", form=form, dynamic=dynamic, safe=safe)
    batches = _batches(model, source, data, samples, seed, columns)
    chosen = {name: forms.choose_form(layer, form, dynamic) for name, layer in layers.items()}
    simulated = run_model(model, track(batches, "simulated"))
    forms.remove_rounding(model)
    exact = run_model(model, track(batches, "exact"))
    forms.round_inputs(layers, chosen)
    reference = run_model(model, track(batches, "reference"))
    onnx_graph.use_operators(layers, chosen, safe)
    with one_line(ModelError, f"torch.onnx cannot export {type(model).__name__}"):
        graph = onnx_graph.trace_graph(model, made_up(model, 2), list(simulated))
    onnx_graph.finish(graph, chosen)
    with _written(Path(out), force) as (file, report):
        onnx_graph.save_graph(graph, file)
        parity = measure_parity(run_file(file, list(simulated), track(batches, "file")), simulated, exact, reference)
        check_parity(parity)
        as_bytes = [name for name, known in chosen.items() if known.kind in ("static", "dynamic")]
        result = {
            "source": str(source),
            "architecture": type(model).__name__,
            "form": form,
            "inputs": onnx_graph.shapes(graph.graph.inputs),
            "outputs": onnx_graph.shapes(graph.graph.outputs),
            "data": data or "made up",
            "parity": parity,
            "layers": dict(Counter(known.kind for known in chosen.values())),
            "may_saturate": [] if safe else [n for n in as_bytes if forms.may_saturate(forms.integer_codes(layers[n]))],
            "kept_float": list(_kept_float(model, chosen)),
            "float_nodes": onnx_graph.float_nodes(graph),
            "bytes": sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*")),
        }
        report.write_text(json.dumps(result, indent=2) + "\n")
        if report.name == REPORT:
            copy_companions(source, file.parent)
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.config.save_pretrained(file.parent)
    return result | {"out": str(out)}


def _export_own(source: str | Path, out: Path, to: str, force: bool, **unused: Any) -> dict[str, Any]:
    """Let a function write the model to a folder, whole or not at all."""
    if ":" not in to:
        raise InputError(f"cannot export to {to!r}; give onnx, or module:name of a function that writes a format")
    refuse_unused(export, f"with --to {to}", **unused)
    write = find_own(to)
    check_output(out, force, source)
    model = load(source)
    with atomic_folder(out, force=force) as folder:
        write(model, folder)
        copy_companions(source, folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"source": str(source), "architecture": type(model).__name__, "to": to, "bytes": size, "out": str(out)}


def _kept_float(model: nn.Module, chosen: Mapping[str, forms.LayerForm]) -> Iterator[dict[str, str]]:
    """Name the layers with a weight matrix that compute in float, and why."""
    for name, module in model.named_modules():
        known = chosen.get(name)
        if known is None and isinstance(module, LAYERS):
            yield {"name": name, "type": type(module).__name__, "why": "float in the model"}
        elif known and known.kind in ("stored", "float"):
            kind = type(module).__name__.removeprefix("Packed")
            yield {"name": name, "type": kind, "why": known.why or "integer weights, computed in float"}


def _batches(
    model: PreTrainedModel, source: str | Path, data: str | None, samples: int, seed: int, columns: Mapping[str, Any]
) -> Sequence[Mapping[str, Tensor]]:
    if data is None:
        longest, size = getattr(model.config, "max_position_embeddings", 64), min(8, samples)
        lengths = [max(4, min(32, longest // 2) - 3 * i) for i in range(samples // size)]
        return [made_up(model, size, length, seed + i) for i, length in enumerate(lengths)]
    return [complete(model, batch) for batch in load_any_split(data, model, source, **columns).subset(samples, seed)]


def _check_output(out: Path, force: bool, source: str | Path) -> None:
    if out.suffix != ".onnx":
        return check_output(out, force, source)
    if out.is_dir():
        raise InputError(f"{out} is a folder; give a file, or a folder whose name does not end in .onnx")
    report = out.with_suffix(".json")
    if there := next((p for p in (out, report) if p.exists()), None):
        ours = report.is_file() and "parity" in report.read_text(errors="replace")
        if not force and (out.exists() or not ours):  # a report alone is of an export that was killed
            raise InputError(f"{there} exists; choose another output or overwrite it with --force")
        if not ours:
            raise InputError(f"no export of Bittern wrote {there}; choose another output")
    check_parent(out)


@contextmanager
def _written(out: Path, force: bool) -> Iterator[tuple[Path, Path]]:
    """Give places for the model and its report in a temporary folder, renamed to `out` if the block ends well."""
    if out.suffix != ".onnx":
        with atomic_folder(out, force=force) as folder:
            yield folder / "model.onnx", folder / REPORT
        return
    with folder_beside(out) as folder:
        file = folder / out.name
        yield file, file.with_suffix(".json")
        for part in sorted(folder.iterdir(), key=lambda part: part == file):  # the model itself last
            sync(part)
            part.replace(out.parent / part.name)
        sync(out.parent)
