"""Find a Transformer's blocks, attention, W_O, FFN, norms, embeddings and head by one dry run, never by name.

The order of execution tells it all: the first linear layer that runs after the attention function is W_O, what runs
after that in the same block is the FFN, what runs after the last block is the head.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bittern.anatomy import Anatomy, Attention, Block
from bittern.attention import attention_configs, attention_forward
from bittern.compat import eager_mask
from bittern.errors import ModelError, first_line
from bittern.recipe import Role

LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding, Conv1D)
_DRY_RUN = "bittern_dry_run"


@dataclass(frozen=True)
class _Event:
    kind: str  # "enter", "layer", "norm" or "attention"
    name: str
    cross: bool = False


@torch.no_grad()
def read_anatomy(model: PreTrainedModel, batch: Mapping[str, Any] | None = None) -> Anatomy:
    """Run the model once on two samples, of `batch` or made up, and read its structure off the order of execution.

    The same run compares our attention with the family's own eager function, call by call.
    Raises ModelError if the model has no attention that transformers' AttentionInterface serves, or computes it
    otherwise, or holds NaN weights.
    """
    check_model(model)
    if not model._can_set_attn_implementation():
        raise ModelError(
            f"{type(model).__name__} computes its attention outside transformers' AttentionInterface, where Bittern "
            "cannot reach it (DeBERTa, MPNet, Swin v2, GPT-J and BLOOM are such families); use a model that supports "
            "set_attn_implementation"
        )
    batch = dummy_batch(model) if batch is None else _two_samples(batch)
    if not model.config.is_encoder_decoder:
        batch.pop("labels", None)
    events, first_io = _dry_run(model, batch)
    return _Reader(model, events, first_io).anatomy(frozenset(batch) - {"labels"})


def check_model(model: object) -> None:
    """A Transformer of Hugging Face with finite weights, or a ModelError."""
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"expected a Hugging Face Transformer (transformers.PreTrainedModel), got {type(model).__name__}"
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"weight {name} holds NaN or infinite values; the checkpoint is damaged or training diverged"
            )


def dummy_batch(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two small made-up samples that the model accepts, for a dry run. Raises ModelError if the inputs are unusual."""
    config, device = model.config, model.device
    text = config.get_text_config()

    def tokens(length: int) -> Tensor:
        limit: int = min(text.vocab_size, 97)
        return torch.arange(2 * length, device=device).view(2, length) % limit

    def images() -> Tensor:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 64
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (2, getattr(vision, "num_channels", 3), height, width)
        return torch.linspace(-1, 1, math.prod(shape), device=device, dtype=model.dtype).view(shape)

    batch: dict[str, Tensor] = {}
    name = model.main_input_name
    if name == "input_ids":
        batch[name] = tokens(9)
        if hasattr(config, "vision_config") and not any(key.startswith("image_token") for key in vars(config)):
            batch["pixel_values"] = images()  # two towers, as in CLIP; no image tokens among the words
    elif name == "pixel_values":
        batch[name] = images()
    elif name == "input_features" and hasattr(config, "max_source_positions"):
        length = 2 * config.max_source_positions
        batch[name] = torch.linspace(-1, 1, 2 * config.num_mel_bins * length, device=device, dtype=model.dtype)
        batch[name] = batch[name].view(2, config.num_mel_bins, length)
    else:
        raise ModelError(f"{type(model).__name__} takes {name!r}; give one real batch of inputs for the dry run")
    if config.is_encoder_decoder and name != "pixel_values":
        batch["decoder_input_ids"] = tokens(5)
    return batch


def _two_samples(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The first two, since the dry run keeps what all modules read; the whole batch where it is not plain samples."""
    sizes = {len(v) if isinstance(v, Tensor) and v.dim() else -1 for v in batch.values()}
    return {k: v[:2] for k, v in batch.items()} if len(sizes) == 1 and -1 not in sizes else dict(batch)


def _dry_run(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[list[_Event], dict[str, tuple[Any, Any]]]:
    """Run the model once; return what ran in which order, and the first input and output of each module."""
    names = {module: name for name, module in model.named_modules()}
    events: list[_Event] = []
    first_io: dict[str, tuple[Any, Any]] = {}

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        events.append(_Event("attention", names[module], cross=query.shape[2] != key.shape[2]))
        ours = attention_forward(module, query, key, value, mask, **kwargs)
        _check_equal(module, names[module], ours[0], query, key, value, mask, kwargs)
        return ours

    def on_enter(kind: str, name: str) -> Callable[..., None]:
        return lambda module, args: events.append(_Event(kind, name))

    def on_leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            x = args[0] if args else next((v for v in kwargs.values() if torch.is_tensor(v)), None)
            first_io.setdefault(name, (x, out[0] if isinstance(out, tuple) else out))

        return hook

    AttentionInterface.register(_DRY_RUN, spy)
    AttentionMaskInterface.register(_DRY_RUN, eager_mask)
    configs = attention_configs(model)
    was, modes = [c._attn_implementation for c in configs], {m: m.training for m in names}
    hooks = []
    for module, name in names.items():
        is_norm = "norm" in type(module).__name__.lower() and not list(module.children())
        kind = "layer" if isinstance(module, LAYERS) else "norm" if is_norm else "enter"
        hooks.append(module.register_forward_pre_hook(on_enter(kind, name)))
        hooks.append(module.register_forward_hook(on_leave(name), with_kwargs=True))
    try:
        model.eval()
        for config in configs:
            config._attn_implementation_internal = _DRY_RUN
        model(**batch)
    except ModelError:
        raise
    except Exception as error:  # a model may fail on a batch in any way
        raise ModelError(
            f"the dry run of {type(model).__name__} on {_describe(batch)} failed: {first_line(error)}; "
            "give one batch of inputs that the model accepts"
        ) from error
    finally:
        AttentionInterface.register(_DRY_RUN, attention_forward)  # lets go of the spy, and so of the model
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
        for config, implementation in zip(configs, was, strict=True):
            config._attn_implementation_internal = implementation
    return events, first_io


def _check_equal(
    module: nn.Module, name: str, ours: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: Any
) -> None:
    sources = [vars(sys.modules[cls.__module__]) for cls in type(module).__mro__]
    eager = next((f for names in sources for n, f in names.items() if n.endswith("eager_attention_forward")), None)
    if eager is None:
        raise ModelError(
            f"{name}: {type(module).__module__} has no eager attention to compare with; this family is not supported"
        )
    theirs = eager(module, query, key, value, mask, **kwargs)[0]
    tolerance = 1e-5 if query.dtype == torch.float32 else 2e-2
    error = (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-12)
    if not error <= tolerance:
        raise ModelError(
            f"{name}: attention of {type(module).__name__} differs from Bittern's by {error:.1e} (relative); it "
            "computes something that Bittern does not know, so this family is not supported"
        )


def _describe(batch: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {tuple(v.shape)}" if torch.is_tensor(v) else k for k, v in batch.items())


def _inside(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


class _Reader:
    """Reads an Anatomy off the events of one dry run."""

    def __init__(self, model: PreTrainedModel, events: list[_Event], first_io: dict[str, tuple[Any, Any]]):
        self.model, self.events, self.first_io = model, events, first_io
        self.modules = dict(model.named_modules())

    def anatomy(self, inputs: frozenset[str]) -> Anatomy:
        seen: set[str] = set()
        found: dict[str, list[tuple[int, str]]] = {}  # block → its attention calls; a shared block runs more than once
        for i, event in enumerate(self.events):
            if event.kind == "attention" and event.name not in seen:
                seen.add(event.name)
                found.setdefault(self._block_of(i, event.name), []).append((i, event.name))
        if not found:
            raise ModelError(f"{type(self.model).__name__} ran no attention in the dry run; expected a Transformer")
        blocks = tuple(self._block(name, calls) for name, calls in found.items())
        roles = self._roles(blocks)
        idle = frozenset(roles) - {e.name for e in self.events if e.kind == "layer"}
        return Anatomy(blocks, roles, idle, inputs)

    def _layers_after(self, i: int) -> Iterator[str]:
        return (e.name for e in self.events[i + 1 :] if e.kind == "layer")

    def _block_of(self, i: int, attention: str) -> str:
        """The innermost item of a module list that holds the attention and a layer that ran after W_O outside of it.

        So T5's sub-layers, which are list items of their own, are not taken for blocks."""
        parts = attention.split(".")
        items = [
            ".".join(parts[:n])
            for n in range(len(parts), 1, -1)
            if isinstance(self.modules.get(".".join(parts[: n - 1])), nn.ModuleList)
        ]
        after_output = list(self._layers_after(i))[1:]
        for item in items:
            if any(_inside(n, item) and not _inside(n, attention) for n in after_output):
                return item
        raise ModelError(f"{attention}: cannot tell the block it belongs to; this family is not supported")

    def _block(self, name: str, calls: list[tuple[int, str]]) -> Block:
        first, last = calls[0][0], calls[-1][0]
        start = next(i for i in range(first, -1, -1) if self.events[i] == _Event("enter", name))
        span = []  # the events of the block's first run
        for event in self.events[start + 1 :]:
            if not _inside(event.name, name) or event == _Event("enter", name):
                break
            span.append(event)
        offset = start + 1
        attentions: list[Attention] = []
        previous = 0
        for i, attention in calls:
            at = i - offset
            before = [e.name for e in span[previous:at] if e.kind == "layer"]
            output = next((n for n in self._layers_after(i) if _inside(n, name)), None)
            norm = self._norm_after(span[at:], output)
            reads = norm is not None and self._reads_residual(norm, output, name)
            outputs = {a.output for a in attentions}
            inputs = tuple(n for n in before if n not in outputs and not isinstance(self.modules[n], nn.Embedding))
            # Source and target may have the same length; there the second attention of a block is the cross one.
            cross = self.events[i].cross or (bool(attentions) and self.model.config.is_encoder_decoder)
            attentions.append(Attention(attention, cross, inputs, output, norm, reads))
            previous = at
        ffn = [e.name for e in span[last - offset :] if e.kind == "layer"][1:]
        norms = tuple(dict.fromkeys(e.name for e in span if e.kind == "norm"))
        return Block(name, tuple(attentions), tuple(ffn[:-1]), ffn[-1] if ffn else None, norms)

    @staticmethod
    def _norm_after(span: list[_Event], output: str | None) -> str | None:
        names = iter(span)
        if not any(e.name == output for e in names):
            return None
        return next((e.name for e in names if e.kind == "norm"), None)

    def _reads_residual(self, norm: str, output: str | None, block: str) -> bool:
        """A norm may also read W_O alone (sandwich norms) or the block's input (parallel residuals)."""
        x = self.first_io[norm][0]
        return output is not None and x is not self.first_io[output][1] and x is not self.first_io[block][0]

    def _roles(self, blocks: tuple[Block, ...]) -> dict[str, Role]:
        word = {m.get_input_embeddings() for m in self.model.modules() if isinstance(m, PreTrainedModel) and _embeds(m)}
        words = {id(m.weight) for m in word if isinstance(m, nn.Embedding)}
        roles: dict[str, Role] = {}
        for block in blocks:
            for attention in block.attentions:
                roles |= dict.fromkeys(attention.inputs, "qkv")
                roles |= {attention.output: "attention_output"} if attention.output else {}
            roles |= dict.fromkeys((*block.ffn_in, *([block.ffn_out] if block.ffn_out else [])), "ffn")
        in_blocks = [i for i, e in enumerate(self.events) if any(_inside(e.name, b.name) for b in blocks)]
        ran = {e.name: i for i, e in enumerate(self.events) if e.kind == "layer"}
        base = next((n for n, m in self.modules.items() if m is self.model.base_model), "")
        output_embeddings = self.model.get_output_embeddings()
        ordered: dict[str, Role] = {}
        for name, module in self.modules.items():
            if not isinstance(module, LAYERS):
                continue
            if isinstance(module, nn.Embedding):
                ordered[name] = "embedding" if id(module.weight) in words else "position"
            elif name in roles:
                ordered[name] = roles[name]
            elif ran.get(name, len(self.events)) < in_blocks[0]:
                ordered[name] = "stem"
            elif name in ran and ran[name] > in_blocks[-1]:
                is_pooler = _inside(name, base) or (base == "" and module is not output_embeddings)
                ordered[name] = "pooler" if is_pooler else "head"
            else:
                ordered[name] = "other"
        return ordered


def _embeds(model: PreTrainedModel) -> bool:
    try:
        return isinstance(model.get_input_embeddings(), nn.Embedding)
    except NotImplementedError:  # how transformers says that a model has none
        return False
