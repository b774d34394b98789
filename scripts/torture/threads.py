"""Packed models in several threads and processes: each gets the answer that one alone gets."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from kills import Trial
from world import Process

from bittern import native
from bittern.deploy.store import load

THREADS = 8


def batch(seed: int = 0, samples: int = 2, length: int = 12) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 16, (samples, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def answer(model: Any, seed: int = 0) -> torch.Tensor:
    found: torch.Tensor = model(**batch(seed)).logits
    return found


def together(works: list[Callable[[], None]]) -> None:
    """Run all at the same moment, and raise what any of them raised."""
    barrier, errors = threading.Barrier(len(works)), []

    def run(work: Callable[[], None]) -> None:
        try:
            barrier.wait()
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def expect(found: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(found, expected):
        raise AssertionError(f"another answer, by up to {(found - expected).abs().max():.2e}")


def first_calls(folder: Path, dice: random.Random) -> None:
    """The first calls of a loaded model come from all threads at the same time."""
    expected = [answer(load(folder), seed) for seed in range(THREADS)]
    for _ in range(5):
        model = load(folder)
        together(
            [lambda seed=seed, model=model: expect(answer(model, seed), expected[seed]) for seed in range(THREADS)]
        )


def first_calls_of_all(folder: Path, dice: random.Random) -> None:
    """Threads load the model for themselves, kernels too, at the same time."""
    found: dict[int, torch.Tensor] = {}
    together([lambda n=n: found.update({n: answer(load(folder))}) for n in range(THREADS)])
    for each in found.values():
        expect(each, answer(load(folder)))


def threads_change(folder: Path, dice: random.Random) -> None:
    """Other threads set the number of threads in between."""
    model = load(folder)
    expected = [answer(model, seed) for seed in range(4)]

    def call(seed: int) -> None:
        for _ in range(20):
            expect(answer(model, seed), expected[seed])

    def change() -> None:
        for _ in range(200):
            torch.set_num_threads(dice.choice((1, 2, 3, 4)))

    together([*(lambda seed=seed: call(seed) for seed in range(4)), change])


def freed(folder: Path, dice: random.Random) -> None:
    """Models are freed while others run."""
    kept, expected = load(folder), answer(load(folder))

    def work(keep: bool) -> None:
        for _ in range(10):
            model = kept if keep else load(folder)
            expect(answer(model), expected)
            del model
            gc.collect()

    together([lambda i=i: work(i % 2 == 0) for i in range(THREADS)])


def switched(folder: Path, dice: random.Random) -> None:
    """One thread switches the kernels off for itself while others compute: each answer is one of the two right ones."""
    model = load(folder)
    fast = answer(model)
    with native.disabled():
        slow = answer(model)

    def call() -> None:
        for _ in range(20):
            found = answer(model)
            if not torch.equal(found, fast) and not torch.equal(found, slow):
                raise AssertionError("an answer that is neither the kernels' nor the simulated one")

    def switch() -> None:
        for _ in range(100):
            with native.disabled():
                pass

    together([call, call, call, switch])
    expect(answer(model), fast)


def forked(folder: Path, dice: random.Random) -> None:
    """A process that is forked after use, while a thread computes, gives the same answer."""
    torch.set_num_threads(3)
    model = load(folder)
    expected, stop = answer(model), threading.Event()

    def compute() -> None:
        while not stop.is_set():
            answer(model)

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        for _ in range(5):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                child = os.fork()
            if not child:
                try:
                    torch.set_num_threads(1)
                    expect(answer(model), expected)
                    os._exit(0)
                finally:
                    os._exit(1)
            if os.waitpid(child, 0)[1]:
                raise AssertionError("after fork")
    finally:
        stop.set()
        thread.join()


def _in_child(model: Any, folder: str, queue: Any) -> None:
    queue.put(answer(model if model is not None else load(folder)).tolist())


def spawned(folder: Path, dice: random.Random) -> None:
    """The model is sent to a new process."""
    model = load(folder)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(model, str(folder), queue))
    child.start()
    expect(torch.tensor(queue.get(timeout=100)), answer(model))
    child.join()


def copies(folder: Path, dice: random.Random) -> None:
    """Copies and pickles give the same, used or not, also while the model runs."""
    model = load(folder)
    unused = copy.deepcopy(model)
    expected = answer(model)

    def copy_it() -> None:
        for made in (copy.deepcopy(model), copy.deepcopy(unused), pickle.loads(pickle.dumps(model))):
            expect(answer(made), expected)

    together([copy_it, copy_it, *(lambda: expect(answer(model), expected) for _ in range(4))])


def many_readers(folder: Path, dice: random.Random) -> None:
    """Eight processes load one folder that none of them may write."""
    expected = answer(load(folder))
    children = []
    for _ in range(8):
        child = os.fork()
        if not child:
            try:
                os.setuid(65534)
                expect(answer(load(folder)), expected)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        raise AssertionError("in one of eight processes")


WAYS = (first_calls, first_calls_of_all, threads_change, freed, switched, forked, spawned, copies, many_readers)


def trials(work: Path, seed: int) -> Iterator[Trial]:
    for turn in range(1 << 30):
        for way in WAYS:
            for model in ("packed", "low"):
                folder = work / "world" / model

                def run(way: Any = way, folder: Path = folder, turn: int = turn) -> str:
                    ended = Process(lambda: way(folder, random.Random(f"{seed} {turn}")), seconds=200).wait(1200)
                    return "" if ended.code == 0 and not ended.signal else str(ended)

                yield f"{way.__name__}: {model} {turn}", run
