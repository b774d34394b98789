"""Findings of an analysis, in plain sentences: the worst blocks, the worst head of each, and what may help."""

from __future__ import annotations

from collections.abc import Collection
from statistics import median
from typing import Any

STANDS_OUT = 2.0  # times the median divergence of heads


def worst_blocks(student: dict[str, Any], count: int = 3) -> list[dict[str, Any]]:
    """The blocks that alone do most harm: `name`, `block`, `error`, its `head` of largest divergence, and `advice`."""
    blocks = [b | {"block": i} for i, b in enumerate(student["blocks"][:-2]) if b["error"] > 0]
    attentions = student["compare"]["attentions"]
    typical = median(d for a in attentions for d in a["divergence"])
    found = []
    for block in sorted(blocks, key=lambda b: -b["error"])[:count]:
        inside = [a for a in attentions if a["block"] == block["block"]]
        divergence, head = max(((d, i) for a in inside for i, d in enumerate(a["divergence"])), default=(0.0, 0))
        by_attention = typical > 0 and divergence > STANDS_OUT * typical
        found.append(
            block
            | {
                "head": head,
                "divergence": divergence,
                "times": divergence / typical if typical > 0 else 0.0,
                "advice": _advice(block["name"], by_attention, student["how"], student["learned"]),
            }
        )
    return found


def _advice(name: str, by_attention: bool, how: str, learned: Collection[str]) -> str:
    """Return what to try next, by where the harm is, how the student was made, and the terms that it learned by."""
    wide = f"a first rule of the recipe with modules: “{name}.*” and 8-bit formats"
    if how == "qat":
        term = "map" if by_attention else "output"
        if term not in learned:
            return f"Add the {term} term (--distill unified) or train longer; else {wide}."
        weighted = ",".join(f"{t}=2" if t == term else t for t in learned)
        return f"Train longer, or give the {term} term more weight (--distill {weighted}); else {wide}."
    if by_attention:
        return f"Keep its queries and keys at 8 bits: {wide}. Or train with the map term (bittern qat --distill map)."
    if how == "ptq":
        return f"Let mixed precision give it more bits (bittern ptq --target), or {wide}."
    return f"Search for better scales (bittern ptq), or {wide}."
