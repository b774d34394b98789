"""One forward in total: the model runs on all batches side by side, unit by unit, and stops before each.

Each batch has its own thread, of which one runs at a time. So any family works whose units run in the same order for
every batch: whatever lies between two units (norms, patch merging, cross-attention inputs) is the model's own code,
and only what a unit needs is kept: the inputs of one unit for all batches.
"""

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bittern.anatomy import Batch, holding
from bittern.attention import attention_configs
from bittern.errors import ModelError
from bittern.quantizers import stamp


@dataclass
class Call:
    """A unit about to run on one batch. The model goes on with what `output` holds."""

    batch: int
    unit: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.given = self._stamp()

    def _stamp(self) -> tuple[Any, ...]:
        return stamp(*(x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor)))

    def run(self) -> Any:
        """Compute the unit's output. Raises ModelError if an input was changed in place since the unit was called."""
        if self.given != self._stamp():
            raise ModelError(f"{self.unit}: its input is changed in place, so that it cannot run on it again")
        return type(self.module).forward(self.module, *self.args, **self.kwargs)


class _Worker:
    """The forward of one batch in a thread of its own; it runs only while `advance` waits for it."""

    def __init__(self, index: int, model: nn.Module, batch: Batch):
        self.index = index
        self.going: SimpleQueue[bool] = SimpleQueue()  # whether the thread goes on
        self.shown: SimpleQueue[Call | BaseException | None] = SimpleQueue()  # where it is now, or what it ended with
        self.thread = threading.Thread(target=self._run, args=(model, batch), daemon=True)

    def _run(self, model: nn.Module, batch: Batch) -> None:
        try:
            with torch.no_grad():
                model(**batch)
            self.shown.put(None)
        except BaseException as error:  # told in the thread that waits, if one does
            self.shown.put(error)

    def exchange(self, call: Call) -> Any:
        """Show a call, in the thread, and go on with the output that it gets."""
        self.shown.put(call)
        if not self.going.get():
            raise SystemExit  # which no model catches; nobody wants the rest of the forward
        output, call.output = call.output, None
        return output

    def advance(self) -> Call | None:
        """Run up to the next unit; None at the end."""
        if self.thread.ident is None:
            self.thread.start()
        else:
            self.going.put(True)
        if isinstance(found := self.shown.get(), BaseException):
            raise found
        return found


def stream(model: PreTrainedModel, units: Sequence[str], batches: Sequence[Batch]) -> Generator[tuple[str, list[Call]]]:
    """Yield (unit, its call for every batch) in order of execution; set the `output` of each call before going on.

    units: names of modules, none inside another. Leaving the loop early ends all forwards.
    Raises ModelError if batches take different ways through the model.
    """
    workers: list[_Worker] = []

    def forward(name: str, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        worker = next(w for w in workers if w.thread is threading.current_thread())
        return worker.exchange(Call(worker.index, name, module, args, kwargs))

    # A unit may run more than once on a call, and a cache of keys and values would grow each time.
    with holding([c for c in attention_configs(model) if getattr(c, "use_cache", False)], "use_cache", False):
        try:
            for name in units:
                module = model.get_submodule(name)
                module.forward = partial(forward, name, module)
            workers += [_Worker(i, model, batch) for i, batch in enumerate(batches)]
            while True:
                calls = [worker.advance() for worker in workers]
                names = {call.unit if call else None for call in calls}
                if len(names) > 1:
                    seen = " and ".join(sorted(str(name) for name in names))
                    raise ModelError(f"batches take different ways through the model: {seen} run at the same time")
                if None in names:
                    return
                yield names.pop() or "", [call for call in calls if call]
                del calls
        finally:
            for worker in workers:
                if worker.thread.is_alive():
                    worker.going.put(False)
                    worker.thread.join()
            for name in units:
                model.get_submodule(name).__dict__.pop("forward", None)
