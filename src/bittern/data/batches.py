"""Samples with their labels, in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from bittern.data.detection import Scene
from bittern.data.texts import Collate
from bittern.data.tokens import TARGETS
from bittern.errors import InputError


@dataclass(frozen=True)
class Data:
    """Model inputs in batches, with labels if the source has them.

    rows: raw samples (texts, pairs of texts, tokens with labels, images, image paths, scenes with boxes); `collate`
    makes tensors of a few of them. labels: of samples, as the model's loss takes them. processor: for scenes, the image
    processor that makes boxes of a detector's outputs. metric: that decides (see `bittern.options.Reading`). origin:
    which part and columns of the source were read.
    """

    name: str
    rows: Sequence[Any]
    labels: Tensor | None
    collate: Collate
    batch_size: int
    processor: Any = None
    metric: str | None = None
    origin: str = ""

    @property
    def has_labels(self) -> bool:
        """True if samples have labels, of their own or of their tokens."""
        row = self.rows[0] if len(self.rows) else None
        return self.labels is not None or (isinstance(row, dict) and not row.keys().isdisjoint(TARGETS))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.rows), self.batch_size):
            yield self.collate([self.rows[i] for i in range(start, min(start + self.batch_size, len(self.rows)))])

    def take(self, indices: list[int]) -> Data:
        """Return the rows of these numbers."""
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, rows=[self.rows[i] for i in indices], labels=labels)

    def subset(self, samples: int, seed: int = 0) -> Data:
        """Draw at most `samples` random rows; the same for the same seed."""
        return self.take(np.random.default_rng(seed).permutation(len(self.rows))[:samples].tolist())

    def split(self, samples: int, seed: int = 0) -> tuple[Data, Data]:
        """Return all but `samples` random rows, in order, and these. Raises InputError if there are too few of them."""
        if not 0 < samples < len(self.rows):
            raise InputError(f"{self.name} has {len(self.rows)} samples, too few to cut in two; give more samples")
        held_out = set(np.random.default_rng(seed).permutation(len(self.rows))[:samples].tolist())
        return self.take([i for i in range(len(self)) if i not in held_out]), self.take(sorted(held_out))

    def fingerprint(self) -> str:
        """Return the SHA-256 of all inputs and labels: that of the same data is the same, however batched."""
        sha = hashlib.sha256(b"" if self.labels is None else self.labels.numpy().tobytes())
        for row in self.rows:
            batch = self.collate([row])
            for name in sorted(batch):
                sha.update(name.encode() + batch[name].numpy().tobytes())
            if isinstance(row, Scene):
                sha.update(repr(row[1:]).encode())  # not where it lies
        return sha.hexdigest()
