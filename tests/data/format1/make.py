"""Wrote the folders beside it, once, with Bittern 0.1.0 (commit 8465847, format 1). They are never written again: they
stand for the files that users have, which must load for ever. New folders may join them; no old one changes.

    python tests/data/format1/make.py FOLDER

Each holds a tiny model with random weights, packed or simulated, as `save_pretrained` wrote it. NAME.safetensors beside
it has a batch (`in.NAME`), what the model gave for it without kernels (`out.NAME`), and the codes of all packed
weights, unpacked (`codes.LAYER`, int16). Batches are chosen so that no activation lies within 1/500 of a step of the
middle between two codes: other machines, threads and versions round sums otherwise by 1e-6 to 1e-5 of a step, so that
all get the same codes, and outputs that differ by the rounding of a few sums only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor

import bittern
from bittern import native
from bittern.deploy.bits import unpack_codes
from bittern.deploy.checkpoint import mark
from bittern.deploy.packed import PackedLayer
from bittern.layers import fake_quants
from bittern.quantizers import find_scale
from bittern.recipe import Recipe

TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
CLEAR = 2e-3  # of a step

# What a recipe may say of weights and activations, in few layers.
MANY = """
name: many
rules:
  - {modules: "*embeddings.word_embeddings", weight: {bits: 4, granularity: row}}
  - {modules: "*query", weight: {kind: ternary, clip: 2.5}, input: {bits: 8, clip: 2.5}}
  - {modules: "*key", weight: {bits: 3, granularity: group, group_size: 8}, input: {bits: 4, granularity: token}}
  - {modules: "*value", weight: {bits: 8, scheme: asymmetric, granularity: row, range: static}, input: {bits: 8}}
  - {modules: "*attention.output.dense", weight: {bits: 12}, input: {bits: 6, scheme: asymmetric, range: static}}
  - {modules: "*intermediate.dense", weight: {kind: binary, granularity: row}, input: {bits: 8, granularity: token}}
  - {roles: [ffn], weight: {bits: 5, range: static}, input: {bits: 4, scheme: asymmetric}}
  - {roles: [pooler], weight: {kind: ternary, granularity: row, storage: base3}}
  - {roles: [attention], query: {bits: 4}, key: {bits: 4, granularity: head}, value: {bits: 4, range: static},
     map: {bits: 5, scheme: unsigned, range: static}}
"""


def text(length: int = 4) -> dict[str, Tensor]:
    """Two texts, the second padded by one token."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -1] = 0
    return {"input_ids": torch.randint(3, 40, (2, length)) * mask, "attention_mask": mask}


def bert() -> tuple[hf.PreTrainedModel, dict[str, Tensor]]:
    config = hf.BertConfig(**TEXT, max_position_embeddings=8, pad_token_id=0, num_labels=3)
    return hf.BertForSequenceClassification(config), text()


def roberta() -> tuple[hf.PreTrainedModel, dict[str, Tensor]]:
    config = hf.RobertaConfig(**TEXT, max_position_embeddings=8, pad_token_id=0, num_labels=3)
    return hf.RobertaForSequenceClassification(config), text()


def gpt2() -> tuple[hf.PreTrainedModel, dict[str, Tensor]]:
    config = hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8, n_inner=24)
    return hf.GPT2LMHeadModel(config), text()


def t5() -> tuple[hf.PreTrainedModel, dict[str, Tensor]]:
    config = hf.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return hf.T5ForConditionalGeneration(config), text() | {"decoder_input_ids": torch.randint(3, 40, (2, 3))}


def vit() -> tuple[hf.PreTrainedModel, dict[str, Tensor]]:
    sizes = {k: v for k, v in TEXT.items() if k != "vocab_size"}
    config = hf.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=3)
    return hf.ViTForImageClassification(config), {"pixel_values": torch.randn(1, 1, 8, 8)}


FOLDERS: dict[str, tuple[Callable[[], Any], str | Recipe, dict[str, Any]]] = {
    "packed-bert": (bert, Recipe.from_yaml(MANY), {}),
    "packed-gpt2-tied": (gpt2, "w4a4", {}),
    "packed-t5-tied": (t5, "ternary-2-2-8", {}),
    "packed-vit-renamed": (vit, "w8a8", {}),
    "packed-roberta-sharded": (roberta, "w6a6", {"max_shard_size": "4KB"}),
    "simulated-bert": (bert, Recipe.from_yaml(MANY), {}),
    "simulated-vit-renamed": (vit, "ternary-2-2-8", {}),
}


def margin(model: hf.PreTrainedModel, batch: dict[str, Tensor]) -> float:
    """Distance of the activation nearest to the middle between two codes from it, in steps."""
    found: list[float] = []

    def measure(quantizer: Any, args: tuple[Tensor]) -> None:
        x, fmt = args[0], quantizer.format
        scale, offset = (quantizer.scale, quantizer.offset) if fmt.range == "static" else find_scale(x, fmt)
        x = x if fmt.clip is None else x.clamp(-fmt.clip, fmt.clip)
        steps = (x - (0 if offset is None else offset)) / scale
        found.append((steps - steps.floor() - 0.5).abs().min().item())

    hooks = [q.register_forward_pre_hook(measure) for n, q in fake_quants(model) if not n.endswith("weight_quantizer")]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return min(found)


@torch.no_grad()
def write(folder: Path, build: Callable[[], Any], recipe: str | Recipe, options: dict[str, Any]) -> None:
    for seed in range(5000):
        torch.manual_seed(seed)
        model, batch = build()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        model.eval()
        bittern.simulate(model, recipe, batch)
        bittern.calibrate(model, [batch])
        if margin(model, batch) > CLEAR:
            break
    else:
        raise SystemExit(f"{folder.name}: no seed keeps all activations {CLEAR} from ties")
    expected = {f"out.{name}": t for name, t in model(**batch).items() if isinstance(t, Tensor)}
    if folder.name.startswith("packed"):
        bittern.pack(model)
        assert all(
            torch.equal(t, expected[f"out.{name}"]) for name, t in model(**batch).items() if isinstance(t, Tensor)
        )
    else:
        mark(model, "simulated")
    model.save_pretrained(folder, **options)
    codes = {
        f"codes.{name}": unpack_codes(m.weight_codes, m.weight_shape[1], m.weight_format).to(torch.int16)
        for name, m in model.named_modules()
        if isinstance(m, PackedLayer) and not m.owner
    }
    given = {f"in.{name}": t for name, t in batch.items()}
    everything = {key: t.contiguous() for key, t in {**given, **expected, **codes}.items()}
    save_file(everything, folder.with_suffix(".safetensors"))
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{folder.name}: seed {seed}, {size} bytes, outputs {sorted(expected)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with native.disabled():
        for name, (build, recipe, options) in FOLDERS.items():
            write(Path(sys.argv[1]) / name, build, recipe, options)
