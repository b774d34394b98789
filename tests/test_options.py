"""Options as data: functions of one's own are known by the name under which their module has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bittern
from bittern.data import load_splits
from bittern.data.evaluate import metrics, predict
from bittern.demo import DIGITS
from bittern.errors import InputError
from bittern.options import Act, Distill, Intervention, Reading, find_own, name_own
from bittern.ptq import Method, find_method
from bittern.qat.distill import Distiller
from helpers import refused, teacher_and_student

OWN = Method("own")


def first_half(step: int, steps: int) -> Act | None:
    return Act("map") if 2 * step < steps else None


def largest(outputs: Tensor, data: Any) -> float:
    return outputs.max().item()


def gap(student: Tensor, teacher: Tensor, rows: Tensor | None) -> Tensor:
    return (student - teacher).abs().amax()


def test_names() -> None:
    """A function is known by its module and name, from which it is found again; what cannot be is refused."""
    assert name_own(largest) == "test_options:largest"
    assert find_own("test_options:largest") is largest
    assert name_own("accuracy") == "accuracy"
    with refused(InputError, "expected module:name"):
        name_own(lambda outputs, data: 0.0)
    for name in ("no_such_module:x", "test_options:no_such_name", ":x", "test_options:"):
        with refused(InputError, name, "expected module:name"):
            find_own(name)


def test_own_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the working folder is found, as it is where a script is run."""
    (tmp_path / "only_here.py").write_text("def f(): return 1\n")
    monkeypatch.chdir(tmp_path)
    assert find_own("only_here:f")() == 1


def test_own_schedule() -> None:
    """A function decides what the teacher does; passed or named it is the same intervention."""
    own = Intervention(first_half, steps=4)  # type: ignore[arg-type]
    assert own == Intervention("test_options:first_half", steps=4)
    assert [own.act(step) for step in range(5)] == [Act("map"), Act("map"), None, None, None]
    assert [phase["name"] for phase in own.phases(6)] == ["map", "alone"]


def test_own_term() -> None:
    """A term of one's own compares tensors of its point at each layer, or logits; by default outputs of blocks."""
    own = Distill({gap: 0.5})  # type: ignore[dict-item]
    assert own.terms == {"test_options:gap": 0.5}
    pair, batch = teacher_and_student("bert", packed=False)
    points: dict[str, int] = {"hidden": 3, "context": 2, "logits": 0}  # two blocks, and what the first one reads
    for point, count in points.items():
        gap.point = point  # type: ignore[attr-defined]
        distiller = Distiller(own, pair.student, pair.teacher)
        out, terms = distiller.forward(pair.student, batch)
        assert terms["test_options:gap"] > 0
        assert distiller.compared.get("test_options:gap", 0) == count
    assert torch.equal(terms["test_options:gap"], (out.logits - pair.teacher(**batch).logits).abs().amax())


def test_own_method_and_metric() -> None:
    """A method and a metric are found by name; the metric is measured beside the task's own."""
    assert find_method("test_options:OWN") is OWN
    with refused(InputError, "no method 'test_options:largest'"):
        find_method("test_options:largest")
    assert Reading(metric=largest).metric == "test_options:largest"  # type: ignore[arg-type]
    model = bittern.load(DIGITS)
    _, test = load_splits("digits", model, DIGITS, metric=largest)
    assert test is not None
    output = predict(model, test)
    assert metrics(model, test, output)["test_options:largest"] == output.max().item()
