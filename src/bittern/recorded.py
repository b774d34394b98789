"""What was recorded of a model, put in order: the place of each tensor, and which of its tokens are real."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from bittern.anatomy import Anatomy, Batch
from bittern.attention import Point, Taps
from bittern.errors import ModelError

Place = tuple[int, int]  # block in order of execution, attention within it
TokenMasks = Mapping[tuple[str, str], Tensor]  # (attention module, `queries` or `keys`) → (batch, tokens)


def by_place(taps: Taps, anatomy: Anatomy, point: Point) -> dict[Place, tuple[str, Tensor]]:
    """Return attention module and tensor of each place. A block that runs again (ALBERT) counts as the next one; what a
    stack reads has the places -1, -2 and so on."""
    index = {a.name: (i, j) for i, block in enumerate(anatomy.blocks) for j, a in enumerate(block.attentions)}
    runs: Counter[str] = Counter()
    found: dict[Place, tuple[str, Tensor]] = {}
    for name, x in zip(taps.names[point], taps[point], strict=True):
        block, attention = index[name]
        if point != "embedding":
            found[block + runs[name] * len(anatomy.blocks), attention] = name, x
        elif not runs[name]:
            found[-1 - len(found), 0] = name, x
        runs[name] += 1
    return found


def by_module(names: Iterable[str], tensors: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """Return the tensors of each attention module: several of one that runs again in a forward."""
    found: dict[str, list[Tensor]] = {}
    for name, x in zip(names, tensors, strict=True):
        found.setdefault(name, []).append(x)
    return found


def attended(mask: Tensor | None) -> Tensor | None:
    """True where a mask, additive or boolean, lets a query attend to a key."""
    return mask if mask is None or mask.dtype == torch.bool else mask > -1e4


def token_masks(masks: Sequence[tuple[str, Tensor | None]], anatomy: Anatomy) -> dict[tuple[str, str], Tensor]:
    """Return which tokens are real (batch, tokens) of the queries and the keys of each attention module with a mask. A
    token that no query may attend to is padding. Cross-attention has the queries of the self-attention before it."""
    cross = {a.name for a in anatomy.attentions if a.cross}
    found: dict[tuple[str, str], Tensor] = {}
    queries: Tensor | None = None
    for name, mask in masks:
        seen = attended(mask)  # (batch, 1, queries, keys)
        keys = None if seen is None else seen.any(-2).any(1)  # (batch, keys)
        queries = queries if name in cross else keys
        for side, real in (("queries", queries), ("keys", keys)):
            if real is not None:
                found[name, side] = real
    return found


def real_tokens(masks: TokenMasks, name: str, samples: int, tokens: int, side: str = "queries") -> Tensor | None:
    """Return which tokens of a tensor recorded at an attention module are real (samples, tokens). None where no mask
    tells, or where they are laid out otherwise: nothing of the windows of Swin is padding."""
    if (real := masks.get((name, side))) is None or real.shape[-1] != tokens or len(real) not in (1, samples):
        return None
    return real.expand(samples, -1)


def out_tokens(batch: Batch, out: Tensor) -> Tensor | None:
    """Return which of the tokens (samples, tokens) of a model's output (samples, tokens, …) count: those with a label,
    else those that are not padding, of an encoder-decoder its decoder's. None where the batch does not tell."""
    labels, mask, read = (batch.get(name) for name in ("labels", "attention_mask", "decoder_input_ids"))
    if out.dim() == 3 and isinstance(labels, Tensor) and labels.shape == out.shape[:2]:
        return labels != -100
    if read is not None and not torch.equal(read, batch.get("input_ids", read[:0])):
        mask = None  # the source's, which may be as long by chance
    mask = batch.get("decoder_attention_mask", mask)
    return mask.bool() if isinstance(mask, Tensor) and out.dim() == 3 and mask.shape == out.shape[:2] else None


def attention_output(anatomy: Anatomy) -> Point:
    """Return the point of Y: the norm of X + AO if a block's first norm gives that (post-norm), else the sum itself."""
    for attention in anatomy.attentions:
        if not attention.norm_reads_residual:
            lacks = "has no sum of its output and its input before a norm, so there is no term output"
            raise ModelError(f"{attention.name} {lacks}; use self_output")
    post_norm = all(b.norms and b.norms[0] == b.attentions[0].norm for b in anatomy.blocks if b.attentions)
    return "norm" if post_norm else "residual"


def check_shapes(what: str, name: str, student: Tensor, teacher: Tensor, hint: str = "") -> None:
    """Raise ModelError where a tensor of the student differs in shape from the teacher's. hint: goes on the message."""
    if student.shape != teacher.shape:
        shapes = f"the student has the shape {tuple(student.shape)}, the teacher {tuple(teacher.shape)}"
        raise ModelError(f"{what} at {name}: {shapes}; they must have the same heads, width and classes{hint}")
