"""Batches of two that a model may accept."""

import inspect
from typing import Any

import torch
import transformers as hf
from needs import BATCHES
from tiny import TOKEN_ID


def find(config: Any, *keys: str, default: Any = None) -> Any:
    """The first of these values that a configuration or one inside of it has."""
    for key in keys:
        for c in (config, *(v for v in vars(config).values() if isinstance(v, hf.PreTrainedConfig))):
            if (value := getattr(c, key, None)) is not None and not isinstance(value, (dict, str)):
                return value
    return default


def candidates(model: Any, kind: str) -> list[dict[str, Any]]:
    """Batches to try, the likeliest first."""
    config = model.config
    generator = torch.Generator().manual_seed(2)
    signature = inspect.signature(model.forward).parameters
    vocab = min(find(config.get_text_config(), "vocab_size", default=100) or 100, 100)
    special = {
        v
        for c in [config, *[v for v in vars(config).values() if isinstance(v, hf.PreTrainedConfig)]]
        for k, v in vars(c).items()
        if TOKEN_ID.search(k) and isinstance(v, int)
    }

    def words(length: int) -> torch.Tensor:
        ids = torch.randint(5, max(vocab, 6), (2, length), generator=generator)
        for bad in special:
            ids[ids == bad] = 4 if 4 not in special else 3
        return ids

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    text = {"input_ids": words(12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    if "attention_mask" not in signature and not any(p.kind == p.VAR_KEYWORD for p in signature.values()):
        text.pop("attention_mask")
    side = find(config, "image_size", default=64)
    side = side if isinstance(side, (list, tuple)) else (side, side)
    channels = find(config, "num_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    image = {"pixel_values": noise(2, channels, *side)}
    frames = find(config, "num_frames", "frames_per_clip", default=4)
    video = noise(2, frames if isinstance(frames, int) else 4, channels, *side)
    mel = find(
        config,
        "num_mel_bins",
        "input_feat_per_channel",
        "feature_size",
        "n_mel_bins",
        "input_feat_size",
        "input_channels",
        "feature_projection_input_dim",
        default=80,
    )
    length = 2 * (getattr(config, "max_source_positions", None) or find(config, "max_source_positions", default=50))
    decoder = {"decoder_input_ids": words(9)} if "decoder_input_ids" in signature else {}
    audio = {"input_values": noise(2, 4000)}
    table = {
        "input_ids": [text | decoder, text],
        "pixel_values": [
            image | decoder,
            image,
            {"pixel_values": noise(2, channels, 64, 64)},
            {"pixel_values": noise(2, channels, 128, 128)},
            {"pixel_values": noise(2, channels, 224, 224)},
        ],
        "pixel_values_videos": [{"pixel_values_videos": video}, {"pixel_values": video}],
        "input_values": [
            audio | decoder,
            audio,
            {"input_values": noise(2, 1, 4000)},
            {"input_values": noise(2, 40, mel)},
            {"input_values": noise(2, 1, 40, mel)},
        ],
        "input_features": [
            {"input_features": noise(2, mel, length)} | decoder,
            {"input_features": noise(2, mel, length)},
            {"input_features": noise(2, 64, mel)} | decoder,
            {"input_features": noise(2, 64, mel)},
            {"input_features": noise(2, 64, 160)},
        ],
    }
    main = model.main_input_name
    main = main if isinstance(main, str) else main[0]
    both = [text | image] if "input_ids" in signature and "pixel_values" in signature else []
    image_tokens = any("image_token" in k for k in vars(config))
    order: list[dict[str, Any]] = []
    if kind in BATCHES:
        made = BATCHES[kind](model, words, noise, text, image)
        order += made if isinstance(made, list) else [made]
    if main == "input_ids" and both and not image_tokens:
        order += both
    order += table.get(main, [])
    if main == "pixel_values":
        order += [*both, {"pixel_values": video}]
    order += both
    for key in ("input_ids", "pixel_values", "input_values", "input_features", "pixel_values_videos"):
        if key != main and key in signature:
            order += table[key]
    for grid in ("grid_thw", "image_grid_thw"):
        if grid in signature and "input_ids" not in signature:
            first = next(iter(signature))
            vision = config
            patch = getattr(vision, "patch_size", 14)
            temporal = getattr(vision, "temporal_patch_size", 1) or 1
            width = find(vision, "in_channels", "num_channels", "in_chans", default=3) * patch * patch
            for rows in (noise(32, width * temporal), noise(32, width), noise(32, width * 2), noise(1, 32, width)):
                order.append({first: rows, grid: torch.tensor([[1, 4, 4], [1, 4, 4]])})
    if "input_features_mask" in signature and main == "input_features":
        order += [
            b | {"input_features_mask": torch.ones(2, b["input_features"].shape[s], dtype=torch.long)}
            for b in table["input_features"]
            for s in (-1, 1)
        ]
    needed = {name for name, p in signature.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    others = text | image | audio | table["input_features"][-3] | {"pixel_values_videos": video}
    others |= {"input_features_mask": torch.ones(2, 64, dtype=torch.long), "qformer_input_ids": words(6)}
    order = [batch | {k: v for k, v in others.items() if k in needed - batch.keys()} for batch in order]
    unique: list[dict[str, Any]] = []
    for batch in order:
        if not any(set(batch) == set(u) and all(batch[k] is u[k] for k in batch) for u in unique):
            unique.append(batch)
    return unique[:14]
