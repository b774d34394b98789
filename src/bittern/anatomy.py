"""Anatomy of a Transformer, as a dry run finds it (see `dry_run`), and the record of it that a model carries."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bittern.experts import Layout
from bittern.products import Plan
from bittern.recipe import Recipe, Role

Batch = Mapping[str, Any]  # inputs of a model by name


@dataclass(frozen=True)
class Attention:
    """One attention module. `inputs`: its Q, K, V projections (one if fused); `output`: W_O;
    `norm`: the first norm after W_O; `norm_reads_residual`: whether that norm reads X + AO, and nothing else;
    `plan`: which of its products are QKᵀ and map · V, where it does not call transformers' AttentionInterface."""

    name: str
    cross: bool
    inputs: tuple[str, ...] = ()
    output: str | None = None
    norm: str | None = None
    norm_reads_residual: bool = False
    plan: Plan | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Block:
    """One Transformer layer: its attention modules (two in decoders with cross-attention; none if Bittern cannot reach
    into it), FFN linears and norms."""

    name: str
    attentions: tuple[Attention, ...]
    ffn_in: tuple[str, ...]
    ffn_out: str | None
    norms: tuple[str, ...]

    @property
    def stack(self) -> str:
        """The list that the block is in: encoder, decoder, or a stage."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Anatomy:
    """Blocks in order of execution, the role of every layer that holds a weight matrix, and those that never ran.

    inputs: names of what the model was given in the dry run, without labels. float_products: modules outside of
    `attentions` that multiply activations with each other, or weigh them by a softmax, which stays float.
    like_base: layers of subclasses that have nothing of their own but a forward, which gave what their base's gives.
    read: layers that never ran and whose weight a model's own code reads, where it could not be quantized.
    experts: parameters that hold the weights of experts, and that `experts.open_experts` may make layers of.
    """

    blocks: tuple[Block, ...]
    roles: dict[str, Role] = field(hash=False)
    idle: frozenset[str] = frozenset()
    inputs: frozenset[str] = field(default=frozenset(), compare=False)
    float_products: tuple[str, ...] = ()
    like_base: frozenset[str] = field(default=frozenset(), compare=False)
    read: frozenset[str] = field(default=frozenset(), compare=False)
    experts: dict[str, Layout] = field(default_factory=dict, compare=False)

    @property
    def attentions(self) -> tuple[Attention, ...]:
        return tuple(a for block in self.blocks for a in block.attentions)

    def block_of(self, attention: Attention) -> Block:
        return next(b for b in self.blocks if attention in b.attentions)


@dataclass
class Record:
    """Facts that Bittern keeps on a model; a deep copy of the model takes a copy of them along.

    recipe: None while the model is float. anatomy: None before it is read; see `layers.anatomy_of`. attention_was: the
    names of the attention functions that the model had before it got ours, one for each configuration.
    """

    recipe: Recipe | None = None
    anatomy: Anatomy | None = None
    attention_was: list[str] | None = None


def record_of(model: nn.Module) -> Record:
    """Return the record of a model, which is empty at first."""
    record: Record = model.__dict__.setdefault("_bittern", Record())
    return record


@contextmanager
def holding(parts: Iterable[Any], name: str, value: Any) -> Iterator[None]:
    """An attribute of all these has one value inside the block, and their own after it."""
    with ExitStack() as undo:
        for part in parts:
            undo.callback(setattr, part, name, getattr(part, name))
            setattr(part, name, value)
        yield
