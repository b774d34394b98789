"""Packed and simulated checkpoints through transformers' own `save_pretrained` and `AutoModel*.from_pretrained`.

A checkpoint is plain safetensors and config.json. `quantization_config` holds the format version and the table of
formats; each quantized module has an int32 `format_index` into that table. The safetensors metadata holds checksums
of all tensors and of the configuration, verified on every load.
"""

import json
import re
from collections.abc import Iterable, Mapping
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bittern import attention, compat
from bittern.anatomy import record_of
from bittern.compat import WeightTransform
from bittern.deploy import probe
from bittern.deploy.bits import bytes_per_row
from bittern.deploy.blocks import use_kernels
from bittern.deploy.companions import push_to_hub
from bittern.deploy.files import digest, open_tensors, read_json
from bittern.deploy.packed import PackedLayer, make_packed, pack_layers, weight_bytes
from bittern.deploy.tape import use_tapes
from bittern.errors import CheckpointError, ModelError
from bittern.experts import Layout, open_experts
from bittern.layers import QuantizedLayer, QuantLayer, fake_quants, formats, is_simulated, swap, weight_matrix
from bittern.products import Plan
from bittern.recipe import Rule

METHOD = "bittern"
FORMAT_VERSION = 1
INDEX = "format_index"


@register_quantization_config(METHOD)
class BitternConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json. state: `packed` or `simulated`; formats: the table of all that are used."""

    def __init__(
        self,
        state: str = "packed",
        formats: list[dict[str, Any]] | None = None,
        recipe: str = "",
        format_version: int = FORMAT_VERSION,
        bittern_version: str = "",
        quant_method: str = METHOD,
        **unknown: Any,
    ):
        self.quant_method = quant_method
        self.format_version, self.bittern_version = format_version, bittern_version or version("bittern")
        self.state, self.recipe, self.formats = state, recipe, formats or []
        check_format_version(format_version, self.bittern_version)
        if unknown or state not in ("packed", "simulated"):
            given = f"unknown entries {sorted(unknown)}" if unknown else f"state {state!r}"
            raise CheckpointError(f"config.json: quantization_config has {given}; the file is damaged or foreign")

    def rules(self) -> list[Rule]:
        """The table of formats, parsed; an entry has the fields of a recipe's rule."""
        try:
            return [Rule.model_validate(entry) for entry in self.formats]
        except ValidationError as error:
            damaged = "config.json: quantization_config.formats is damaged or foreign"
            raise CheckpointError(f"{damaged}: {error.errors()[0]['msg']}") from None


def check_format_version(given: Any, written_by: Any) -> None:
    """Raises CheckpointError for a format version that this Bittern cannot read."""
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise CheckpointError(f"config.json: format_version {given!r} is no version; the file is damaged or foreign")
    if given > FORMAT_VERSION:
        reads = f"this Bittern reads up to {FORMAT_VERSION}: pip install -U bittern"
        raise CheckpointError(f"the checkpoint has format version {given} (written by Bittern {written_by}); {reads}")


def config_digest(config: Mapping[str, Any]) -> str:
    return sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def open_checked(files: list[Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Open a checkpoint's safetensors files and check their headers and config.json beside them; fast, without tensors.

    Returns the open file of each tensor, and what the metadata holds of Bittern. Raises CheckpointError
    naming what is damaged, foreign or newer.
    """
    handles: dict[str, Any] = {}
    for file in files:
        handle, metadata = open_tensors(file)
        handles |= dict.fromkeys(handle.keys(), handle)
        if (text := metadata.get(METHOD)) is None:
            raise CheckpointError(f"{file.name} has no Bittern checksums; it was not written by Bittern, or is damaged")
        try:
            checks = json.loads(text)
            check_format_version(checks["format_version"], "a newer version")
            config = str(checks["config"])
            checks["tensors"] = list(checks["tensors"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CheckpointError(f"{file.name} has damaged checksums") from None
    path = files[0].parent / "config.json"
    if config_digest(read_json(path)) != config:
        advice = "restore it, or load with the original, change model.config and save again"
        raise CheckpointError(f"{path} was changed since the weights were packed; {advice}")
    return handles, checks


def verify(files: list[Path]) -> dict[str, Any]:
    """Check a checkpoint as `open_checked` does, and its tensors too; return the open file of each tensor."""
    handles, checks = open_checked(files)
    if digest((name, handles[name].get_tensor(name)) for name in sorted(handles)) not in checks["tensors"]:
        raise CheckpointError(f"{files[0].parent}: tensors do not match their checksum; a file is damaged or cut off")
    return handles


def pack(model: PreTrainedModel) -> PreTrainedModel:
    """Pack a simulated model in place: from now on it holds integer codes, and `save_pretrained` writes them.

    Its outputs stay those of the simulated model: bit for bit in float32 without the integer kernels, with them up to
    the rounding around the same integers (see docs/deploy.md). Raises ModelError if it is not simulated,
    packed already, or a static scale is missing.
    """
    if is_packed(model):
        raise ModelError("the model is packed already")
    if not is_simulated(model):
        raise ModelError("the model is not simulated; call simulate(model, recipe) before pack(model)")
    pack_layers(model)
    return mark(_ready(model), "packed")


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model with packed layers what its users get: on the kernels, frozen, with a true size in memory."""
    use_kernels(model)
    use_tapes(model)
    model.get_memory_footprint = partial(weight_bytes, model)
    model.push_to_hub = partial(push_to_hub, model)
    return model.requires_grad_(False)


def mark(model: PreTrainedModel, state: Literal["simulated", "packed"]) -> PreTrainedModel:
    """Let transformers know the model as ours: `save_pretrained` then keeps formats and scales beside the weights."""
    recipe = record_of(model).recipe
    name = recipe.name if recipe else getattr(getattr(model.config, "quantization_config", None), "recipe", "")
    config = BitternConfig(state=state, recipe=name)
    model.config.quantization_config = config
    model.hf_quantizer = BitternQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, METHOD
    return model


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Return the packed layers of a model by name, each before those that are tied to it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def is_packed(model: nn.Module) -> bool:
    """True if the model has packed layers."""
    return bool(packed_layers(model))


def _conversions_on_save(model: PreTrainedModel) -> list[WeightTransform]:
    """Return what transformers reverts when it saves a model: conversions it was loaded with, or those of its class."""
    if (loaded_with := getattr(model, "_weight_conversions", None)) is not None:
        return list(loaded_with)
    known = compat.get_model_conversion_mapping(model, add_legacy=False)
    return [conversion for conversion in known if not isinstance(conversion, compat.PrefixChange)]


@register_quantizer(METHOD)
class BitternQuantizer(HfQuantizer):
    """Rebuilds quantized modules from what the checkpoint itself holds; no module names in config.json."""

    requires_calibration = True
    is_trainable = True  # adapters can be trained on a packed model: gradients pass its layers, whose codes stay
    keys_in_file: Iterable[str] = ()  # while a model is loaded

    def is_serializable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return bool(self.quantization_config.state == "simulated")

    # ---- saving

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        state = dict(model.state_dict())
        table: dict[Rule, int] = {}
        for name, rule in formats(model).items():
            owner = f"{name}.{attention.NAME}" if rule.for_attention else name
            module = model.get_submodule(owner)
            form = getattr(module, "plan", getattr(module, "layout", None)) or ()  # attention in own code, experts
            state[f"{owner}.{INDEX}"] = torch.tensor([table.setdefault(rule, len(table)), *form], dtype=torch.int32)
        if not table:  # marked once, and float again since
            self.remove_quantization_config(model)
            return state, {}
        self.quantization_config.formats = [f.model_dump(mode="json", exclude_defaults=True) for f in table]
        for name, layer in packed_layers(model).items():
            if not layer.owner:  # so that the file does not load without Bittern: one number where a matrix should be
                state[f"{name}.weight"] = torch.zeros(1, dtype=layer.weight.dtype)
        # What transformers does next, done before the checksums:
        model._weight_conversions = self.update_weight_conversions(_conversions_on_save(model), model)
        model.config.quantization_config = self.quantization_config
        model.config.architectures, model.config.dtype = [type(model).__name__], str(model.dtype).removeprefix("torch.")
        written = {k: t for k, t in state.items() if k not in (model._keys_to_ignore_on_save or ())}
        written = compat.remove_tied_weights_from_state_dict(written, model)
        original = compat.revert_weight_conversion(model, dict(written))
        checks = {
            "format_version": FORMAT_VERSION,
            # with names as in the original checkpoint, or in the model: save_original_format decides, unseen
            "tensors": [digest(sorted(tensors.items())) for tensors in (original, written)],
            "config": config_digest(json.loads(model.config.to_json_string())),
            "probe": probe.make(model),
        }
        return state, {METHOD: json.dumps(checks)}

    def update_weight_conversions(self, weight_conversions: list[WeightTransform], model: Any) -> list[WeightTransform]:
        """Leave out those that merge, split or turn around weights of quantized layers, whose tensors are only renamed,
        unless the file holds such a weight, as older ones of simulated models may."""
        weights = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, QuantizedLayer)]

        def keep(conversion: WeightTransform) -> bool:
            if not isinstance(conversion, compat.WeightConverter):
                return True
            back = conversion.reverse_transform()
            return not any(_matches(back, weight) for weight in weights) or any(
                _matches(conversion, key) and not _matches(back, key) for key in self.keys_in_file
            )

        return [conversion for conversion in weight_conversions if keep(conversion)]

    # ---- loading

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        if not checkpoint_files:
            raise CheckpointError("a Bittern checkpoint loads from safetensors files; got none")
        handles = verify([Path(file) for file in checkpoint_files])
        self.keys_in_file = tuple(handles)
        _rebuild(model, self.quantization_config, _quantized_modules(model, handles))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        self.keys_in_file = ()
        for layer in packed_layers(model).values():  # in the order of modules: owners before what is tied to them
            layer.hold_weight(torch.empty_like(layer.weight, device=layer.source.weight_codes.device))
        for name, tensor in (*model.named_buffers(), *model.named_parameters()):
            if tensor.device.type == "meta":
                raise CheckpointError(f"the checkpoint holds no {name}; it is damaged or belongs to another model")
        for _name, quantizer in fake_quants(model):
            if quantizer.scale is not None:
                quantizer.set_scale(quantizer.scale, quantizer.offset)
        return _ready(model) if self.quantization_config.state == "packed" else model


def _matches(conversion: WeightTransform, key: str) -> bool:
    return conversion.rename_source_key(key)[1] is not None


def _quantized_modules(model: PreTrainedModel, handles: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Quantized modules of this model that the checkpoint holds → their tensors by short name, as empty copies, with
    `format_index` read. Keys become module names by transformers' renaming. handles: the open file of each tensor.
    """
    conversions = compat.get_model_conversion_mapping(model, None, None)
    renamings = [c for c in conversions if isinstance(c, compat.WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, compat.WeightConverter)]
    meta, prefix = model.state_dict(), f"{model.base_model_prefix}."
    modules = dict(model.named_modules()) | dict(model.named_parameters())  # these of experts

    def module_name(owner: str) -> str | None:
        """In-model name of a quantized module; None if this class of model has no such module."""
        probe = f"{owner}.{INDEX if owner.endswith(f'.{attention.NAME}') else 'weight'}"  # a name that renamings expect
        renamed = compat.rename_source_key(probe, renamings, converters, model.base_model_prefix, meta)[0]
        name = renamed.rpartition(".")[0]
        options = (name, name.removeprefix(prefix), prefix + name)
        return next((n for n in options if n.removesuffix(f".{attention.NAME}") in modules), None)

    owners = [key.removesuffix(f".{INDEX}") for key in handles if key.endswith(f".{INDEX}")]
    names = {owner: name for owner in owners if (name := module_name(owner))}
    if not names:
        kind = type(model).__name__
        raise CheckpointError(f"the checkpoint holds no quantized module of {kind}; it belongs to another model")
    stored: dict[str, dict[str, Tensor]] = {name: {} for name in names.values()}
    for key, handle in handles.items():
        for depth in (1, 2):  # a tensor of the module, or of a quantizer in it
            if (owner := key.rsplit(".", depth)[0]) in names:
                tensor, part = handle.get_tensor(key), key.removeprefix(f"{owner}.")
                stored[names[owner]][part] = tensor if part == INDEX else tensor.to("meta")
    return stored


def _rebuild(model: PreTrainedModel, config: BitternConfig, stored: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give a model on the meta device the modules and empty buffers that the checkpoint will fill."""
    rules, forms = config.rules(), {name: tensors[INDEX].tolist() for name, tensors in stored.items()}
    parameters = [name for name, _ in model.named_parameters()]
    for name, (index, *form) in forms.items():
        sizes = (len(Layout._fields),) if name in parameters else (0, len(Plan._fields))
        if not 0 <= index < len(rules) or len(form) not in sizes:
            raise CheckpointError(f"{name}: format_index {index} is outside the table of {len(rules)} formats")
    open_experts(model, {name: Layout(*forms[name][1:]) for name in parameters if name in forms})
    for name, (index, *form) in forms.items():
        rule = rules[index]
        if rule.for_attention:
            parent = name.removesuffix(f".{attention.NAME}")
            site = attention.Site(parent, rule.operands, Plan(*form) if form else None)
            attention.add_site(model.get_submodule(parent), site)
        else:
            swap(model.get_submodule(name), name, rule.weight, rule.input)
    if any(rule.for_attention for rule in rules):
        attention.use_attention(model)  # not before it is built: some families choose a class by the function's name
    if config.state == "packed":
        _rebuild_packed(model, stored)
    for name, tensors in stored.items():
        for part, quantizer in fake_quants(model.get_submodule(name)):
            for kind in ("scale", "offset"):
                setattr(quantizer, kind, tensors.get(f"{part}.{kind}"))
    prefix = f"{model.base_model_prefix}."
    packed = "|".join(re.escape(name.removeprefix(prefix)) for name in packed_layers(model))
    unexpected = {rf"\.{INDEX}$", *([rf"(^|\.)({packed})\.weight$"] if packed else ())}
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *unexpected}


def _rebuild_packed(model: PreTrainedModel, stored: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Pack the layers with weight formats: with codes of their own, or tied to a layer that has some."""

    def source(name: str) -> str:
        """The layer that transformers ties this one's weight to, or itself."""
        while other := model.all_tied_weights_keys.get(f"{name}.weight"):
            name = other.removesuffix(".weight")
        return name

    modules, owners = dict(model.named_modules()), dict[str, PackedLayer]()
    for name, layer in modules.items():  # in this order they were packed: the first of tied layers has the codes
        if isinstance(layer, QuantLayer) and layer.weight_quantizer and "weight_codes" in stored[name]:
            fmt, (rows, columns) = layer.weight_quantizer.format, weight_matrix(layer).shape
            wanted = {"weight_codes", "weight_scale", *(("weight_offset",) if fmt.scheme == "asymmetric" else ())}
            size = (rows, bytes_per_row(columns, fmt))
            if not wanted <= stored[name].keys() or stored[name]["weight_codes"].shape != size:
                expected = f"those of {rows} × {columns} weights, {fmt}"
                raise CheckpointError(f"{name}: the checkpoint's codes and scales are not {expected}")
            owners.setdefault(source(name), make_packed(layer, stored[name]))
    for name, layer in modules.items():
        owner = owners.get(source(name))
        if owner is not None and name not in stored:  # in another class than the checkpoint's
            swap(layer, name, owner.weight_format, None)
        if isinstance(layer, QuantLayer) and layer.weight_quantizer:
            if owner is None:
                raise CheckpointError(f"{name}: the checkpoint holds no codes for it and none it is tied to")
            make_packed(layer, {}, owner)
