"""CTranslate2 as a yardstick: it runs BERT encoders only, with its own rounding to int8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import BertModel, PreTrainedModel


def ctranslate2_engine(
    model: PreTrainedModel, batch: Mapping[str, Tensor], folder: Path
) -> dict[str, Callable[[], object]]:
    """The encoder of a float BERT in int8; nothing if CTranslate2 is not installed or the model is another.

    All samples of the batch must be as long as it is.
    """
    encoder = model.base_model
    if find_spec("ctranslate2") is None or not isinstance(encoder, BertModel) or encoder.pooler is None:
        return {}
    from ctranslate2 import Encoder, StorageView
    from ctranslate2.converters.converter import Converter
    from ctranslate2.converters.transformers import BertLoader

    class InMemory(Converter):
        def _load(self) -> object:
            size = encoder.config.vocab_size
            names = SimpleNamespace(unk_token="0", get_vocab=lambda: {str(i): i for i in range(size)})
            return BertLoader()(encoder, names)

    # an attribute that configurations no longer have, and that the converter asks for
    encoder.config.position_embedding_type = "absolute"
    try:
        InMemory().convert(str(folder / "ctranslate2"), force=True)  # rounded to int8 when it is loaded
    finally:
        del encoder.config.position_embedding_type
    made = Encoder(str(folder / "ctranslate2"), compute_type="int8", intra_threads=torch.get_num_threads())
    ids = batch["input_ids"].to(torch.int32).numpy()
    lengths = batch["attention_mask"].sum(1, dtype=torch.int32).numpy()
    view = StorageView.from_array
    return {"ctranslate2 int8": partial(made.forward_batch, view(ids), view(lengths))}
