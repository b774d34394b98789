"""Read a Transformer's anatomy off the events of one dry run.

The order of execution tells it all: the first linear layer that runs after the attention function is W_O, what runs
after that in the same block is the FFN, what runs after the last block is the head.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bittern.anatomy import Anatomy, Attention, Block
from bittern.errors import ModelError
from bittern.experts import ExpertsLinear, Layout
from bittern.products import Plan
from bittern.recipe import Role
from bittern.trace import Found

LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding, Conv1D)
WEIGHTS = (*LAYERS, ExpertsLinear)  # all that hold a weight matrix, or one of each expert


@dataclass(frozen=True)
class Event:
    kind: str  # "enter", "layer", "norm", "attention", or "product" of activations that is none
    name: str
    cross: bool = False


@dataclass
class Run:
    """A record of a dry run: events in order, the first input and output of each module, attention in own code, output,
    and the parameters that code outside of layers reads, see `trace.Trace`."""

    events: list[Event]
    first_io: dict[str, tuple[Any, Any]]
    found: dict[str, list[Found]]
    like_base: dict[str, bool] = field(default_factory=dict)  # of layers of subclasses that ran
    output: Any = None
    read: dict[nn.Parameter, set[Layout | None]] = field(default_factory=dict)


def _same_values(x: Any, y: Any) -> bool:
    """True for the same tensor, or one of another shape with its values, as windows are."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.numel() != y.numel() or x.shape == y.shape:
        return x is y
    return torch.equal(x.flatten().sort().values, y.flatten().sort().values)


def _inside(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


class Reader:
    """Reads an Anatomy off what one dry run saw."""

    def __init__(self, model: PreTrainedModel, run: Run):
        self.model, self.run, self.events, self.first_io = model, run, run.events, run.first_io
        self.modules = dict(model.named_modules())

    def anatomy(self, inputs: frozenset[str], watched: bool = True) -> Anatomy:
        """The anatomy. watched: whether a site may serve attention in a model's own code."""
        plans = {name: plan for name in self.run.found if watched and (plan := self._plan(name))}
        reached = {e.name for e in self.events if e.kind == "attention"} - (self.run.found.keys() - plans.keys())
        lone = [e.name for e in self.events if e.kind in ("product", "attention") and e.name not in reached]
        lone = [n for n in dict.fromkeys(lone) if not any(_inside(n, r) for r in reached)]
        if not reached and not lone:
            raise ModelError(f"{type(self.model).__name__} ran no attention in the dry run; expected a Transformer")
        found: dict[str, list[tuple[int, str]]] = {}  # block → its attention calls; a shared block runs more than once
        for i, name in sorted(self._ends(reached, lone)):
            if (block := self._block_of(i, name)) is not None:
                found.setdefault(block, []).append((i, name))
            elif name in reached:
                lone.append(name)
        blocks = tuple(self._block(name, calls, plans) for name, calls in found.items())
        roles = self._roles(blocks)
        blocks = tuple(replace(b, attentions=tuple(a for a in b.attentions if a.name not in lone)) for b in blocks)
        idle = frozenset(roles) - {e.name for e in self.events}
        like_base = frozenset(name for name, same in self.run.like_base.items() if same)
        read = frozenset(name for name in idle if self.modules[name].weight in self.run.read)
        uses = {name: self.run.read.get(p, set()) for name, p in self.model.named_parameters()}
        experts = {name: layout for name, use in uses.items() if len(use) == 1 for layout in use if layout}
        return Anatomy(blocks, roles, idle, inputs, tuple(lone), like_base, read, experts)

    def _ends(self, reached: set[str], lone: list[str]) -> list[tuple[int, str]]:
        """Return where attention ends in the first run of each module; of lone products that is the last."""
        ends, runs = dict[str, int](), Counter[str]()
        for i, event in enumerate(self.events):
            runs[event.name] += event.kind == "enter"
            if event.name in reached and event.kind == "attention":
                ends.setdefault(event.name, i)
            elif event.name in lone and event.kind in ("product", "attention") and runs[event.name] == 1:
                ends[event.name] = i
        return [(i, name) for name, i in ends.items()]

    def _plan(self, name: str) -> Plan | None:
        """The plan of attention in a module's own code; None if it is not the same in all of its runs, or unclear."""
        found = self.run.found[name]
        at = next(i for i, e in enumerate(self.events) if e.kind == "attention" and e.name == name)
        if len({f.frame for f in found}) < len(found) or not name:
            return None  # two in one run
        heads = (context := found[0].context).shape[1]
        reads = self.first_io[next(self._layers_after(at), name)][0]  # what W_O reads: (batch, queries, hidden)
        holds_weights = any(p.dim() > 1 for child in self.modules[name].children() for p in child.parameters())
        if not holds_weights and not _same_values(reads, context):
            return None  # W_O is no layer, and what runs next is not it
        if context.dim() == 3:  # (batch · heads, queries, head dim)
            heads = reads.shape[-1] // context.shape[-1] if isinstance(reads, Tensor) else 0
            if not heads or len(context) % heads or reads.numel() != context.numel():
                return None
            joined = context.unflatten(0, (-1, heads)).transpose(1, 2)  # (batch, queries, heads, head dim)
            if not any(torch.equal(x.flatten(), reads.flatten()) for x in (joined, joined.transpose(0, 1))):
                return None
        plans = {f.plan._replace(calls=f.frame.calls, heads=heads) for f in found}
        return plans.pop() if len(plans) == 1 else None

    def _layers_after(self, i: int) -> Iterator[str]:
        return (e.name for e in self.events[i + 1 :] if e.kind == "layer")

    def _block_of(self, i: int, attention: str) -> str | None:
        """The innermost item of a module list that holds the attention and a layer that ran after W_O outside of it.

        So T5's sub-layers, which are list items of their own, are not taken for blocks. The innermost item if no layer
        runs after W_O, as in blocks of experts; None outside of all lists."""
        parts = attention.split(".")
        names = [".".join(parts[:n]) for n in range(len(parts), 1, -1)]
        lists = [isinstance(self.modules.get(name.rpartition(".")[0]), nn.ModuleList) for name in names]
        entered = {e.name for e in self.events if e.kind == "enter"}  # SqueezeBERT calls `forward` of its blocks itself
        items = [name for name, listed in zip(names, lists, strict=True) if listed and name in entered]
        after_output = list(self._layers_after(i))[1:]
        whole = (item for item in items if any(_inside(n, item) and not _inside(n, attention) for n in after_output))
        return next(whole, items[0] if items else None)

    def _block(self, name: str, calls: list[tuple[int, str]], plans: Mapping[str, Plan]) -> Block:
        first, last, enter = calls[0][0], calls[-1][0], Event("enter", name)
        start = next(i for i in range(first, -1, -1) if self.events[i] == enter)
        others = (i for i, e in enumerate(self.events) if i > start and (e == enter or not _inside(e.name, name)))
        events = self.events[: next(others, None)]  # up to the end of the block's first run
        attentions, previous = list[Attention](), start
        for i, attention in calls:
            before = [e.name for e in events[previous:i] if e.kind == "layer"]
            output = next((n for n in self._layers_after(i) if _inside(n, name)), None)
            ends = (j for j in range(i, len(events)) if events[j].name == output)
            norm = next((e.name for e in events[next(ends, len(events)) :] if e.kind == "norm"), None)
            reads = norm is not None and self._reads_residual(norm, output, name)
            outputs = {a.output for a in attentions}
            inputs = tuple(n for n in before if n not in outputs and not isinstance(self.modules[n], nn.Embedding))
            # Source and target may have the same length; there the second attention of a block is the cross one.
            cross = self.events[i].cross or (bool(attentions) and self.model.config.is_encoder_decoder)
            attentions.append(Attention(attention, cross, inputs, output, norm, reads, plans.get(attention)))
            previous = i
        ffn = [e.name for e in events[last:] if e.kind == "layer"][1:]
        norms = tuple(dict.fromkeys(e.name for e in events[start:] if e.kind == "norm"))
        return Block(name, tuple(attentions), tuple(ffn[:-1]), ffn[-1] if ffn else None, norms)

    def _reads_residual(self, norm: str, output: str | None, block: str) -> bool:
        """A norm may also read W_O alone (sandwich norms) or the block's input (parallel residuals)."""
        x = self.first_io[norm][0]
        others = self.first_io[block][0], self.first_io[output][1] if output is not None else x
        return not any(_same_values(x, y) for y in others)

    def _roles(self, blocks: tuple[Block, ...]) -> dict[str, Role]:
        word = {m.get_input_embeddings() for m in self.model.modules() if isinstance(m, PreTrainedModel) and _embeds(m)}
        words = {id(m.weight) for m in word if isinstance(m, nn.Embedding)}
        roles: dict[str, Role] = {}
        for block in blocks:
            for attention in block.attentions:
                roles |= dict.fromkeys(attention.inputs, "qkv")
                roles |= {attention.output: "attention_output"} if attention.output else {}
            roles |= dict.fromkeys((*block.ffn_in, *([block.ffn_out] if block.ffn_out else [])), "ffn")
        in_blocks = [i for i, e in enumerate(self.events) if any(_inside(e.name, b.name) for b in blocks)] or [0, 0]
        ran = {e.name: i for i, e in enumerate(self.events) if e.kind == "layer"}
        base = next((n for n, m in self.modules.items() if m is self.model.base_model), "")
        output_embeddings = self.model.get_output_embeddings()
        ordered: dict[str, Role] = {}
        for name, module in self.modules.items():
            if not isinstance(module, WEIGHTS):
                continue
            if isinstance(module, ExpertsLinear):
                ordered[name] = "ffn"
            elif isinstance(module, nn.Embedding):
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
