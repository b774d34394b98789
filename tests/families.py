"""Tiny models with random weights of many families, each with a batch that it accepts.

`SUPPORTED` and `FLOAT_ATTENTION` map a family's name to a function that gives (model in eval mode, batch), others for
other seeds. Of the latter Bittern quantizes the layers only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import transformers as hf
from torch import Tensor

Batch = dict[str, Any]
Family = Callable[..., tuple[hf.PreTrainedModel, Batch]]

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
CLASSES = {"num_labels": 3}


def family(build: Family) -> Family:
    """Seeded weights, moved off their initial values so that no bias is zero and no attention uniform."""

    @wraps(build)
    def make(seed: int = 0) -> tuple[hf.PreTrainedModel, Batch]:
        torch.manual_seed(seed)
        model, batch = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return model.eval(), batch

    return make


def tokens(length: int = 12) -> Tensor:
    return torch.randint(5, 99, (2, length))


def text() -> Batch:
    """Two texts, the second padded."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, -3:] = 0
    return {"input_ids": tokens() * mask, "attention_mask": mask}


def translation() -> Batch:
    return text() | {"decoder_input_ids": tokens(9)}


def images(height: int = 32, width: int = 32) -> Batch:
    return {"pixel_values": torch.randn(2, 3, height, width)}


def padded_images() -> Batch:
    """Two images, the second narrower and padded."""
    mask = torch.ones(2, 96, 128, dtype=torch.long)
    mask[1, :, 96:] = 0
    return images(96, 128) | {"pixel_mask": mask}


@family
def bert() -> tuple[hf.PreTrainedModel, Batch]:
    return hf.BertForSequenceClassification(hf.BertConfig(**TEXT, **CLASSES)), text()


@family
def roberta() -> tuple[hf.PreTrainedModel, Batch]:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT, **CLASSES)), text()


@family
def distilbert() -> tuple[hf.PreTrainedModel, Batch]:
    config = hf.DistilBertConfig(
        vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64, **CLASSES
    )
    return hf.DistilBertForSequenceClassification(config), text()


@family
def electra() -> tuple[hf.PreTrainedModel, Batch]:
    return hf.ElectraForSequenceClassification(hf.ElectraConfig(**TEXT, **CLASSES, embedding_size=16)), text()


@family
def albert() -> tuple[hf.PreTrainedModel, Batch]:
    return hf.AlbertForSequenceClassification(hf.AlbertConfig(**TEXT, **CLASSES, embedding_size=16)), text()


@family
def modernbert() -> tuple[hf.PreTrainedModel, Batch]:
    special = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = hf.ModernBertConfig(**TEXT, **CLASSES, **special, global_attn_every_n_layers=2, local_attention=8)
    return hf.ModernBertForSequenceClassification(config), text()


@family
def vit() -> tuple[hf.PreTrainedModel, Batch]:
    return hf.ViTForImageClassification(hf.ViTConfig(**VISION, **CLASSES)), images()


@family
def deit() -> tuple[hf.PreTrainedModel, Batch]:
    return hf.DeiTForImageClassification(hf.DeiTConfig(**VISION, **CLASSES)), images()


@family
def swin() -> tuple[hf.PreTrainedModel, Batch]:
    config = hf.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, **CLASSES
    )
    return hf.SwinForImageClassification(config), images()


@family
def dinov2() -> tuple[hf.PreTrainedModel, Batch]:
    sizes = {key: value for key, value in VISION.items() if key != "intermediate_size"}
    return hf.Dinov2ForImageClassification(hf.Dinov2Config(**sizes, mlp_ratio=2, **CLASSES)), images()


@family
def beit() -> tuple[hf.PreTrainedModel, Batch]:
    config = hf.BeitConfig(**VISION, **CLASSES, out_indices=[1], use_relative_position_bias=True)
    return hf.BeitForImageClassification(config), images()


def resnet_backbone() -> hf.ResNetConfig:
    return hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )


@family
def detr() -> tuple[hf.PreTrainedModel, Batch]:
    config = hf.DetrConfig(backbone_config=resnet_backbone(), num_queries=7, **ENCODER_DECODER, **CLASSES)
    return hf.DetrForObjectDetection(config), padded_images()


@family
def conditional_detr() -> tuple[hf.PreTrainedModel, Batch]:
    config = hf.ConditionalDetrConfig(backbone_config=resnet_backbone(), num_queries=7, **ENCODER_DECODER, **CLASSES)
    return hf.ConditionalDetrForObjectDetection(config), padded_images()


@family
def gpt2() -> tuple[hf.PreTrainedModel, Batch]:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64)), text()


@family
def llama() -> tuple[hf.PreTrainedModel, Batch]:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=2)), text()


@family
def qwen2() -> tuple[hf.PreTrainedModel, Batch]:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**TEXT, num_key_value_heads=2)), text()


@family
def qwen3() -> tuple[hf.PreTrainedModel, Batch]:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT, num_key_value_heads=2, head_dim=8)), text()


@family
def mistral() -> tuple[hf.PreTrainedModel, Batch]:
    return hf.MistralForCausalLM(hf.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=4)), text()


@family
def gemma2() -> tuple[hf.PreTrainedModel, Batch]:
    config = hf.Gemma2Config(
        **TEXT,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        attn_logit_softcapping=2.0,
    )
    return hf.Gemma2ForCausalLM(config), text()


@family
def opt() -> tuple[hf.PreTrainedModel, Batch]:
    config = hf.OPTConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    return hf.OPTForCausalLM(config), text()


@family
def gpt_neox() -> tuple[hf.PreTrainedModel, Batch]:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TEXT)), text()


@family
def t5() -> tuple[hf.PreTrainedModel, Batch]:
    config = hf.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return hf.T5ForConditionalGeneration(config), translation()


@family
def bart() -> tuple[hf.PreTrainedModel, Batch]:
    config = hf.BartConfig(vocab_size=99, max_position_embeddings=64, **ENCODER_DECODER, scale_embedding=True)
    return hf.BartForConditionalGeneration(config), translation()


@family
def whisper() -> tuple[hf.PreTrainedModel, Batch]:
    config = hf.WhisperConfig(
        vocab_size=99,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        **ENCODER_DECODER,
    )
    batch = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": tokens(9)}
    return hf.WhisperForConditionalGeneration(config), batch


@family
def clip() -> tuple[hf.PreTrainedModel, Batch]:
    text_config = TEXT | {"bos_token_id": 1, "eos_token_id": 2}
    config = hf.CLIPConfig(text_config=text_config, vision_config=VISION, projection_dim=16)
    return hf.CLIPModel(config), text() | images()


@family
def deberta_v2() -> tuple[hf.PreTrainedModel, Batch]:
    config = hf.DebertaV2Config(
        **TEXT, **CLASSES, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], type_vocab_size=0
    )
    return hf.DebertaV2ForSequenceClassification(config), text()


@family
def mpnet() -> tuple[hf.PreTrainedModel, Batch]:
    return hf.MPNetForSequenceClassification(hf.MPNetConfig(**TEXT, **CLASSES)), text()


@family
def swinv2() -> tuple[hf.PreTrainedModel, Batch]:
    config = hf.Swinv2Config(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, **CLASSES
    )
    return hf.Swinv2ForImageClassification(config), images()


@family
def gptj() -> tuple[hf.PreTrainedModel, Batch]:
    config = hf.GPTJConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    return hf.GPTJForCausalLM(config), text()


@family
def bloom() -> tuple[hf.PreTrainedModel, Batch]:
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)), text()


@family
def xlnet() -> tuple[hf.PreTrainedModel, Batch]:
    config = hf.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=48, **CLASSES)
    return hf.XLNetForSequenceClassification(config), text()


SUPPORTED: dict[str, Family] = {
    make.__name__: make
    for make in (
        *(bert, roberta, distilbert, electra, albert, modernbert),
        *(vit, deit, swin, dinov2, beit, detr, conditional_detr),
        *(gpt2, llama, qwen2, qwen3, mistral, gemma2, opt, gpt_neox),
        *(t5, bart, whisper, clip),
        *(mpnet, deberta_v2, swinv2, gptj, bloom),  # attention in their own code
    )
}
FLOAT_ATTENTION: dict[str, Family] = {make.__name__: make for make in (xlnet,)}
