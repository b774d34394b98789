"""The popular types of the census, all steps but the search: two minutes of a core. `make census` runs all of it."""

from typing import Any

import pytest
from needs import FAST
from steps import examine

HEADS = ("MASKED_LM", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING")
WITH_HEADS = [(kind, head) for kind in ("bert", "mpnet", "deberta-v2", "modernbert") for head in HEADS]


@pytest.mark.parametrize(("kind", "head"), [*((kind, None) for kind in FAST), *WITH_HEADS])
def test_popular(kind: str, head: str | None) -> None:
    """Of a popular model type every step is right, with other heads too."""
    said: list[dict[str, Any]] = []
    examine(kind, said.append, ptq=False, head=head)
    steps = {what["step"]: what for what in said if "step" in what}
    assert {name: step["outcome"] for name, step in steps.items()} == dict.fromkeys(
        ("build", "float", "simulate", "calibrate", "pack", "save", "train"), "ok"
    ), [step["text"] for step in steps.values() if step["outcome"] != "ok"]


def test_no_attention() -> None:
    """A model without attention is refused with the reason, and in no other way."""
    said: list[dict[str, Any]] = []
    examine("convnext", said.append, ptq=False)
    refused = {what["step"]: what["text"] for what in said if what.get("outcome") == "refused"}
    assert refused.keys() == {"simulate", "train"}
    assert all("ran no attention in the dry run" in text for text in refused.values())
    assert not any(what.get("outcome") == "crash" for what in said)
