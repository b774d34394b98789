"""Find a Transformer's blocks, attention, W_O, FFN, norms, embeddings and head by one dry run, never by name.

Attention is where transformers' AttentionInterface is called, or where a model's own code has its two products (see
`products`). `reader` tells from the order of execution what everything is.
"""

import inspect
import math
import sys
from contextlib import AbstractContextManager, ExitStack
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from bittern.anatomy import Anatomy, Batch, holding
from bittern.attention import Site, attach, attention_configs, attention_forward, detach
from bittern.compat import eager_mask
from bittern.errors import ModelError, one_line
from bittern.products import unwatch, watch
from bittern.reader import LAYERS, Event, Reader, Run
from bittern.trace import Found, Frame, Trace

_DRY_RUN = "bittern_dry_run"


@torch.no_grad()
def read_anatomy(model: PreTrainedModel, batch: Batch | None = None) -> Anatomy:
    """Run the model once on two samples, of `batch` or made up, and read its structure off the order of execution.

    The same run compares our attention with the family's own eager function, call by call; a model whose attention is
    another keeps it. Attention in a model's own code is found too, if a model that is watched in it gives the same.
    Raises ModelError if the model computes no attention, or holds NaN weights.
    """
    check_model(model)
    batch = dummy_batch(model) if batch is None else two_samples(batch)
    if not model.config.is_encoder_decoder:
        batch.pop("labels", None)
    inputs = frozenset(batch) - {"labels"}
    try:
        run = _dry_run(model, batch)
    except _OtherAttentionError:
        return Reader(model, _dry_run(model, batch, compare=False)).anatomy(inputs, watched=False)
    anatomy = Reader(model, run).anatomy(inputs)
    if any(a.plan for a in anatomy.attentions) and not _holds(model, anatomy, batch, run.output):
        anatomy = Reader(model, run).anatomy(inputs, watched=False)
    return anatomy


def _holds(model: PreTrainedModel, anatomy: Anatomy, batch: Batch, expected: Any) -> bool:
    """True if the model gives the same while its own attention code is watched, in modules that a load builds too."""
    if any(isinstance(m, Site) for m in model.modules()):
        return True  # has been watched before
    with torch.device("meta"):
        fresh = dict(type(model)(deepcopy(model.config)).named_modules())
    built = {a.name: model.get_submodule(a.name) for a in anatomy.attentions}
    if any(type(fresh.get(name, module)) is not type(module) for name, module in built.items()):
        return False  # such as BigBird's for short texts
    try:
        attach(model, anatomy)
        with evaluating(model):
            pairs = zip(tree_leaves(model(**batch)), tree_leaves(expected), strict=True)
        floats = ((x, y) for x, y in pairs if isinstance(x, Tensor) and x.is_floating_point())
        return all(torch.allclose(x, y, 1e-4, 1e-5, equal_nan=True) for x, y in floats)
    except ModelError:
        return False
    finally:
        detach(model)


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """All modules are in evaluation mode inside the block, and in their own after it."""
    return holding(model.modules(), "training", False)


def check_model(model: object) -> None:
    """A Transformer of Hugging Face with finite weights, or a ModelError."""
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"expected a Hugging Face Transformer (PreTrainedModel), got {type(model).__name__}")
    check_merged(model)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(f"weight {name} holds NaN or infinite values: a damaged checkpoint, or training diverged")


def check_merged(model: nn.Module) -> None:
    """Raise ModelError for a model with adapters of PEFT: they would be quantized, or saved, apart from it."""
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ModelError("the model has adapters; merge them first, model.merge_and_unload(), or save them alone")


def dummy_batch(model: PreTrainedModel, samples: int = 2, length: int = 9) -> dict[str, Tensor]:
    """Made-up samples that the model accepts, texts of so many tokens. Raises ModelError if the inputs are unusual."""
    config, device = model.config, model.device

    def tokens(length: int) -> Tensor:
        limit: int = min(config.get_text_config().vocab_size, 97)
        return torch.arange(samples * length, device=device).view(samples, length) % limit

    def numbers(*shape: int) -> Tensor:
        return torch.linspace(-1, 1, samples * math.prod(shape), device=device, dtype=model.dtype).view(samples, *shape)

    def images() -> Tensor:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 64
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return numbers(getattr(vision, "num_channels", 3), height, width)

    name, batch = model.main_input_name, dict[str, Tensor]()
    if name == "input_ids":
        batch[name] = tokens(length)
        if hasattr(config, "vision_config") and not any(key.startswith("image_token") for key in vars(config)):
            batch["pixel_values"] = images()  # two towers, as in CLIP; no image tokens among the words
    elif name == "pixel_values":
        batch[name] = images()
    elif name == "input_features" and hasattr(config, "max_source_positions"):
        batch[name] = numbers(config.num_mel_bins, 2 * config.max_source_positions)
    else:
        raise ModelError(f"{type(model).__name__} takes {name!r}; give one real batch of inputs for the dry run")
    if config.is_encoder_decoder and name != "pixel_values":
        batch["decoder_input_ids"] = tokens(5)
    return batch


def two_samples(batch: Batch) -> dict[str, Any]:
    """The first two, since the dry run keeps what all modules read; the whole batch where it is not plain samples."""
    sizes = {len(v) if isinstance(v, Tensor) and v.dim() else -1 for v in batch.values()}
    return {k: v[:2] for k, v in batch.items()} if len(sizes) == 1 and -1 not in sizes else dict(batch)


class _OtherAttentionError(ModelError):
    """A family's attention is not what Bittern computes, or cannot be compared."""


def _dry_run(model: PreTrainedModel, batch: dict[str, Any], compare: bool = True) -> Run:
    """Run the model once, in float and with its own attention code, and see what runs in which order. compare: whether
    transformers' AttentionInterface shall call ours beside the family's own; if not, it runs as ever.
    """
    names = {module: name for name, module in model.named_modules()}
    run, running = Run([], {}, {}), list[Frame]()

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        run.events.append(Event("attention", names[module], cross=query.shape[2] != key.shape[2]))
        with torch._C.DisableTorchFunction():  # hides its products from the trace
            ours = attention_forward(module, query, key, value, attention_mask, **kwargs)
            _check_equal(module, names[module], ours[0], [query, key, value], attention_mask, kwargs)
        return ours

    def on_product() -> None:
        run.events.append(Event("product", running[-1].name))

    def on_attention(found: Found) -> None:
        run.events.append(Event("attention", found.frame.name, cross=found.cross))
        run.found.setdefault(found.frame.name, []).append(found)

    def on_enter(kind: str, name: str, module: nn.Module, args: Any) -> None:
        run.events.append(Event(kind, name))
        running.append(Frame(name, kind == "layer"))

    def on_leave(name: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if isinstance(module, LAYERS) and type(module) not in LAYERS:
            run.like_base[name] = run.like_base.get(name, True) and _is_like_base(module, args, kwargs, out)
        running.pop()
        x = args[0] if args else next((v for v in kwargs.values() if torch.is_tensor(v)), None)
        run.first_io.setdefault(name, (x, out[0] if isinstance(out, tuple) else out))

    AttentionInterface.register(_DRY_RUN, spy)
    AttentionMaskInterface.register(_DRY_RUN, eager_mask)
    with ExitStack() as undo:
        undo.callback(AttentionInterface.register, _DRY_RUN, attention_forward)  # lets go of the spy, and of the model
        for module in [m for m in names if hasattr(m, "unwatched")]:
            unwatch(module)
            undo.callback(watch, module)
        for module, name in names.items():
            is_norm = "norm" in type(module).__name__.lower() and not list(module.children())
            kind = "layer" if isinstance(module, LAYERS) else "norm" if is_norm else "enter"
            undo.enter_context(module.register_forward_pre_hook(partial(on_enter, kind, name)))
            undo.enter_context(module.register_forward_hook(partial(on_leave, name), with_kwargs=True))
        configs = attention_configs(model)
        undo.enter_context(holding(configs, "_experts_implementation_internal", "eager"))  # their modules' own code
        undo.enter_context(holding(configs if compare else (), "_attn_implementation_internal", _DRY_RUN))
        given = ", ".join(f"{k} {tuple(v.shape)}" if torch.is_tensor(v) else k for k, v in batch.items())
        failed = f"the dry run of {type(model).__name__} on {given} failed"
        explained = one_line(ModelError, failed, "; give one batch of inputs that the model accepts")
        with explained, evaluating(model), Trace(running, on_product, on_attention) as trace:
            run.output, run.read = model(**batch), trace.read
    return run


def _check_equal(module: nn.Module, name: str, ours: Tensor, qkv: list[Tensor], mask: Any, kwargs: Any) -> None:
    query, key, value = qkv
    sources = [vars(sys.modules[cls.__module__]) for cls in type(module).__mro__]
    known = [(n, f) for names in sources for n, f in names.items() if n.endswith("eager_attention_forward")]
    if not known:
        raise _OtherAttentionError(f"{name}: {type(module).__module__} has no eager attention to compare with")
    if mask is not None and mask.dtype == torch.bool:  # what eager functions would add as 0 and 1
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    named = inspect.unwrap(type(module).forward).__code__.co_names
    eager = min(known, key=lambda pair: pair[0] not in named)[1]  # of several in a file, the one that it calls
    theirs = eager(module, query, key, value, mask, **kwargs)[0]
    scores = query.norm(dim=-1).max() * key.norm(dim=-1).max() * (kwargs.get("scaling") or query.shape[-1] ** -0.5)
    rounding = 4 * torch.finfo(torch.float32).eps * scores.item()  # of the largest score, and so of maps
    tolerance = max(1e-5, rounding) if query.dtype == torch.float32 else 2e-2
    error = (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-12)
    if not error <= tolerance:
        raise _OtherAttentionError(f"{name}: attention of {type(module).__name__} differs by {error:.1e} (relative)")


def _is_like_base(layer: nn.Module, args: Any, kwargs: Any, out: Any) -> bool:
    """True if a layer of a subclass gave what its base gives, and adds nothing but a forward to it."""
    base = next(t for t in LAYERS if isinstance(layer, t))
    added = {name for t in type(layer).__mro__ if issubclass(t, base) and t is not base for name in vars(t)}
    own = {*layer._modules, *layer._buffers, *layer._parameters} - {"weight", "bias"}
    if own or added - {"__init__", "forward", "__module__", "__doc__", "__firstlineno__", "__static_attributes__"}:
        return False
    try:
        theirs = base.forward(layer, *args, **kwargs)  # type: ignore[arg-type]
    except Exception:  # it takes other inputs
        return False
    return isinstance(out, Tensor) and out.shape == theirs.shape and torch.allclose(out, theirs, 1e-4, 1e-5)
