"""What single model types need beyond the general shrinking, and which types are used most.

CONFIGS: type, or path of a nested configuration (`sam2.vision_config`) → values, or a function that makes the
configuration; `_layers` is how many layers to keep, `_drop` names values to leave alone.
BATCHES: type → function of (model, words, noise, text, image) that gives one batch or several to try.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.long)


TIMES = {"prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2], "num_time_features": 1}


def upernet(hf: Any, tiny: Any, ids: Any) -> Any:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = hf.SwinConfig(
        image_size=64, embed_dim=16, depths=[2, 2, 2, 2], num_heads=[2, 2, 4, 4], window_size=2, out_features=stages
    )
    return hf.UperNetConfig(backbone_config=swin, hidden_size=32, auxiliary_in_channels=64, auxiliary_channels=16)


# Vision towers of 16 heads, which a width of 144 does not serve.
TOWERS = [
    f"{kind}_vision" for kind in ("cohere_compass", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp")
]

CONFIGS: dict[str, Any] = {
    **{kind: {"num_heads": 9} for kind in TOWERS},
    "kimi_k25_vision": {"num_attention_heads": 9},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "sam3_lite_text_text_model": {"_layers": 4},
    "lfm3_vl_vision": {"layer_types": ["conv", "full_attention"]},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "mobilevit": {"hidden_sizes": [32, 48, 64]},
    "sam2.vision_config": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "dpt": {"_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "qwen2_vl.text_config": {"rope_parameters": MROPE},
    "qwen2_5_vl.text_config": {"rope_parameters": MROPE},
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32},
    "aya_vision.vision_config": {"num_attention_heads": 16},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "mlcd_vision_model": {"hidden_size": 128, "num_attention_heads": 8},
    "mlcd": {"hidden_size": 128, "num_attention_heads": 8},
    "efficientnet": {"_drop": ["in_channels", "out_channels", "hidden_dim"]},
    "bit": {"_drop": ["hidden_sizes", "embedding_size"]},
    "mimi": {"upsample_groups": 64},
    "autoformer": TIMES,
    "informer": TIMES,
    "time_series_transformer": TIMES,
    "patchtst": {"context_length": 32, "patch_length": 8, "patch_stride": 8, "num_input_channels": 2},
    "patchtsmixer": {"context_length": 32, "patch_length": 8, "patch_stride": 8, "num_input_channels": 2},
    "janus.vq_config": {"base_channels": 32, "num_res_blocks": 1},
    "gpt_oss": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "upernet": upernet,
    "blip-2": {"image_token_index": 140},
    "instructblip": {"image_token_index": 140},
    "instructblipvideo": {"video_token_index": 140},
    "dbrx.attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "deepseek_ocr2.text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "chameleon": {"vocabulary_map": {"<image>": 140}},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "molmo2.adapter_config": {"vision_feature_layer": [1, 0]},
    "step3p7.text_config": {"sliding_window": 8},
    "zoedepth": {"bottleneck_features": 32},
    "blt": {"encoder_hash_byte_group_vocab": 100, "num_hidden_layers": 2},
    "clvp.text_config": {"num_attention_heads": 2},
    "clvp.speech_config": {"num_attention_heads": 2},
    "align.vision_config": {
        "_drop": ["in_channels", "out_channels", "hidden_dim"],
        "width_coefficient": 0.25,
        "depth_coefficient": 0.5,
        "image_size": 64,
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "cohere_compass_text": {
        "rope_parameters": {
            k: {"rope_type": "default", "rope_theta": 10000.0} for k in ("sliding_attention", "full_attention")
        }
    },
    "vitmatte": {"hidden_size": 96},
    "bros": {"hidden_size": 128, "num_attention_heads": 4},
    "axk2": {"index_head_dim": 64},
    "vits": {"speaking_rate": 1000.0, "layerdrop": 0.0},  # one frame for each token
    "paddleocr_vl.text_config": {"rope_parameters": MROPE},
    "ernie4_5_vl_moe.text_config": {"rope_parameters": MROPE | {"mrope_section": [3, 3, 2]}},
    "vision-text-dual-encoder": lambda hf, tiny, ids: hf.VisionTextDualEncoderConfig.from_vision_text_configs(
        tiny(hf.ViTConfig(), ids, 2, False), tiny(hf.BertConfig(), ids, 2, False), projection_dim=32
    ),
}


def grounding(model: Any, words: Any, noise: Any, text: Any, image: Any) -> Any:
    mask = {"pixel_mask": ones(2, 64, 64)}
    return text | {"token_type_ids": torch.zeros(2, 12, dtype=torch.long), "pixel_values": noise(2, 3, 64, 64)} | mask


def series(model: Any, words: Any, noise: Any, text: Any, image: Any) -> Any:
    return {
        "past_values": noise(2, 14),
        "past_time_features": noise(2, 14, 1),
        "past_observed_mask": torch.ones(2, 14),
        "future_values": noise(2, 4),
        "future_time_features": noise(2, 4, 1),
    }


def siglip2(model: Any, words: Any, noise: Any, text: Any, image: Any) -> Any:
    vision = getattr(model.config, "vision_config", model.config)
    return {
        "pixel_values": noise(2, 16, vision.num_channels * vision.patch_size**2),
        "pixel_attention_mask": ones(2, 16),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


def with_images(model: Any, words: Any, noise: Any, text: Any, image: Any) -> Any:
    """Image tokens in front of the words: 32 queries of BLIP-2's kind."""
    token = getattr(model.config, "image_token_index", None) or model.config.image_token_id
    ids = torch.cat([torch.full((2, 32), token), words(8)], 1)
    batch = {"input_ids": ids, "attention_mask": ones(2, 40)} | image
    return [batch, batch | {"qformer_input_ids": words(6), "qformer_attention_mask": ones(2, 6)}]


def boxes(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5)).sort(-1).values


def layout_tokens(model: Any, words: Any, noise: Any, text: Any, image: Any) -> Any:
    box = (boxes(2, 12, 4)[..., [0, 1, 2, 3]] * 100).long()
    return text | {"bbox": box}


def udop(model: Any, words: Any, noise: Any, text: Any, image: Any) -> Any:
    decoder = {"decoder_input_ids": words(9)}
    return [text | {"bbox": boxes(2, 12, 4)} | image | decoder, text | {"bbox": boxes(2, 12, 4)} | decoder]


def grid(model: Any, words: Any, noise: Any, text: Any, image: Any) -> Any:
    """Two images of 4 × 4 patches, for towers that take patches as they are."""
    patch = model.config.patch_size
    grids = {"grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}
    flat = {"pixel_values": noise(32, 3 * patch**2)} | grids | {"merge_sizes": torch.tensor([1, 1])}
    return [flat, {"pixel_values": noise(32, 3, patch, patch)} | grids]


def pix2struct(model: Any, words: Any, noise: Any, text: Any, image: Any) -> Any:
    patches = noise(2, 16, 2 + model.config.vision_config.patch_embed_hidden_size)
    patches[..., :2] = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5))  # row and column, from 1
    return {"flattened_patches": patches, "attention_mask": torch.ones(2, 16), "decoder_input_ids": words(9)}


def features(*shape: int, key: str = "input_features") -> Any:
    return lambda model, words, noise, text, image: {key: noise(2, *shape)}


def with_video(model: Any, words: Any, noise: Any, text: Any, image: Any) -> Any:
    ids = torch.cat([torch.full((2, 2 * 32), model.config.video_token_index), words(8)], 1)
    return {
        "input_ids": ids,
        "pixel_values": noise(2, 2, *image["pixel_values"].shape[1:]),
        "qformer_input_ids": words(6),
    }


BATCHES: dict[str, Any] = {
    "instructblipvideo": with_video,
    "voxtral_realtime": lambda m, words, noise, text, image: text | {"input_features": noise(2, 128, 96)},
    "timesfm": lambda m, words, noise, text, image: {
        "past_values": noise(2, 64),
        "past_values_padding": torch.zeros(2, 64),
        "freq": ones(2, 1),
    },
    "kyutai_speech_to_text": lambda m, words, noise, text, image: {
        "input_ids": words(12)[..., None].expand(2, 12, m.config.num_codebooks + 1)
    },
    "timesfm2_5": features(64, key="past_values"),
    "swin2sr": features(3, 16, 16, key="pixel_values"),  # a patch is a pixel
    "granite_speech5_ctc": features(64, 320),
    "granite_speech5_encoder": features(64, 320),
    "fun_asr_nano_encoder": lambda m, words, noise, text, image: {
        "input_features": noise(2, 64, 560),
        "input_features_mask": ones(2, 64),
    },
    "gemma4_audio": features(64, 128),
    "muse_spark_audio": features(3840, key="input_values"),
    "xcodec2": lambda m, words, noise, text, image: {
        "input_values": noise(2, 1, 3840),
        "input_features": noise(2, 12, 20),
    },
    "lightglue": features(2, 3, 64, 64, key="pixel_values"),
    "kosmos-2": lambda m, words, noise, text, image: (
        {
            "input_ids": words(80),
            "image_embeds_position_mask": torch.arange(80).lt(m.config.latent_query_num).long().expand(2, -1),
        }
        | image
    ),
    "pe_audio_video": lambda m, words, noise, text, image: (
        text | {"input_values": noise(2, 1, 4000), "pixel_values_videos": noise(2, 4, 3, 64, 64)}
    ),
    "pe_audio_video_encoder": lambda m, words, noise, text, image: {
        "input_values": noise(2, 1, 4000),
        "pixel_values_videos": noise(2, 4, 3, 64, 64),
    },
    "clvp": lambda m, words, noise, text, image: text | {"input_features": noise(2, 10, 20)},
    "nemotron3_5_transcribe_word_timestamp": lambda m, words, noise, text, image: {
        "inputs_embeds": noise(2, 12, m.config.hidden_size)
    },
    "gemma3n_audio": lambda m, words, noise, text, image: {
        "audio_mel": noise(2, 64, m.config.input_feat_size),
        "audio_mel_mask": torch.zeros(2, 64, dtype=torch.bool),
    },
    "kimi_k25_vision": grid,
    "video_llama_3_vision": grid,
    "switch_transformers": lambda m, words, noise, text, image: {  # enough tokens for each expert
        "input_ids": words(90),
        "decoder_input_ids": words(90),
    },
    "xclip": lambda m, words, noise, text, image: (
        text | {"pixel_values": noise(2, m.config.vision_config.num_frames, *image["pixel_values"].shape[1:])}
    ),
    "pe_audio": lambda m, words, noise, text, image: text | {"input_values": noise(2, 1, 4000)},
    "autoformer": series,
    "informer": series,
    "time_series_transformer": series,
    "patchtst": lambda m, words, noise, text, image: {"past_values": noise(2, 32, 2)},
    "patchtsmixer": lambda m, words, noise, text, image: {"past_values": noise(2, 32, 2)},
    "bros": lambda m, words, noise, text, image: text | {"bbox": boxes(2, 12, 8)},
    "layoutlm": layout_tokens,
    "layoutlmv2": layout_tokens,
    "layoutlmv3": layout_tokens,
    "lilt": layout_tokens,
    "markuplm": lambda m, words, noise, text, image: text,
    "udop": udop,
    "lxmert": lambda m, words, noise, text, image: (
        text | {"visual_feats": noise(2, 5, m.config.visual_feat_dim), "visual_pos": noise(2, 5, 4)}
    ),
    "visual_bert": lambda m, words, noise, text, image: (
        text | {"visual_embeds": noise(2, 5, m.config.visual_embedding_dim), "visual_attention_mask": torch.ones(2, 5)}
    ),
    "blip-2": with_images,
    "instructblip": with_images,
    "blip_2_qformer": lambda m, words, noise, text, image: {
        "query_embeds": noise(2, 8, m.config.hidden_size),
        "encoder_hidden_states": noise(2, 5, m.config.encoder_hidden_size),
    },
    "idefics": lambda m, words, noise, text, image: (
        text | {"pixel_values": image["pixel_values"][:, None], "image_attention_mask": ones(2, 12, 1)}
    ),
    "decision_transformer": lambda m, words, noise, text, image: {
        "states": noise(2, 5, 17),
        "actions": noise(2, 5, 4),
        "rewards": noise(2, 5, 1),
        "returns_to_go": noise(2, 5, 1),
        "timesteps": torch.arange(10).view(2, 5),
        "attention_mask": ones(2, 5),
    },
    "pix2struct": pix2struct,
    "seggpt": lambda m, words, noise, text, image: {
        k: noise(2, 3, m.config.image_size[0] // 2, m.config.image_size[1])
        for k in ("pixel_values", "prompt_pixel_values", "prompt_masks")
    },
    "siglip2_vision_model": siglip2,
    "oneformer": lambda m, words, noise, text, image: {
        "pixel_values": noise(2, 3, 64, 64),
        "task_inputs": words(m.config.task_seq_len),
    },
    "gemma4_vision": lambda m, words, noise, text, image: {
        "pixel_values": noise(2, 16, 3 * m.config.patch_size**2),
        "pixel_position_ids": torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1)
        .view(1, 16, 2)
        .expand(2, -1, -1),
    },
    "audio-spectrogram-transformer": lambda m, words, noise, text, image: {"input_values": noise(2, 64, 32)},
    "clap": lambda m, words, noise, text, image: (
        text | {"input_features": noise(2, 1, 128, 64), "is_longer": torch.zeros(2, 1, dtype=torch.bool)}
    ),
    "grounding-dino": grounding,
    "mm-grounding-dino": grounding,
    "siglip2": lambda m, words, noise, text, image: {
        "input_ids": words(12),
        "pixel_values": noise(2, 16, m.config.vision_config.num_channels * m.config.vision_config.patch_size**2),
        "pixel_attention_mask": ones(2, 16),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    },
}

POPULAR = (Path(__file__).parent / "popular.txt").read_text().split()
# No tiny model (layoutlmv2 needs detectron2), and no attention (convnext is refused).
FAST = [kind for kind in POPULAR if kind not in ("layoutlmv2", "convnext")]
