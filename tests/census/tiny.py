"""A tiny random model of every type that transformers knows.

Every width of the default configuration is divided by one number, so that what must fit together still does; few
layers, a small vocabulary, small images; nested configurations too.
"""

import dataclasses
import re
from typing import Any

import torch
import transformers as hf
from needs import CONFIGS
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_ORDER = [
    ("SEQ_TO_SEQ_CAUSAL_LM", "AutoModelForSeq2SeqLM"),
    ("SPEECH_SEQ_2_SEQ", "AutoModelForSpeechSeq2Seq"),
    ("IMAGE_TEXT_TO_TEXT", "AutoModelForImageTextToText"),
    ("MASKED_LM+SEQUENCE_CLASSIFICATION", "AutoModelForSequenceClassification"),
    ("MASKED_LM+TOKEN_CLASSIFICATION", "AutoModelForTokenClassification"),
    ("MASKED_LM", "AutoModelForMaskedLM"),
    ("CAUSAL_LM", "AutoModelForCausalLM"),
    ("SEQUENCE_CLASSIFICATION", "AutoModelForSequenceClassification"),
    ("TOKEN_CLASSIFICATION", "AutoModelForTokenClassification"),
    ("QUESTION_ANSWERING", "AutoModelForQuestionAnswering"),
    ("IMAGE_CLASSIFICATION", "AutoModelForImageClassification"),
    ("VIDEO_CLASSIFICATION", "AutoModelForVideoClassification"),
    ("OBJECT_DETECTION", "AutoModelForObjectDetection"),
    ("SEMANTIC_SEGMENTATION", "AutoModelForSemanticSegmentation"),
    ("UNIVERSAL_SEGMENTATION", "AutoModelForUniversalSegmentation"),
    ("ZERO_SHOT_OBJECT_DETECTION", "AutoModelForZeroShotObjectDetection"),
    ("DEPTH_ESTIMATION", "AutoModelForDepthEstimation"),
    ("AUDIO_CLASSIFICATION", "AutoModelForAudioClassification"),
    ("CTC", "AutoModelForCTC"),
    ("MULTIMODAL_LM", "AutoModelForMultimodalLM"),
    ("IMAGE_TO_IMAGE", "AutoModelForImageToImage"),
    ("KEYPOINT_DETECTION", "AutoModelForKeypointDetection"),
    ("IMAGE_MATTING", "AutoModelForImageMatting"),
    ("POSE_ESTIMATION", "AutoModelForPoseEstimation"),
    ("VISUAL_QUESTION_ANSWERING", "AutoModelForVisualQuestionAnswering"),
]


def names(key: str) -> dict[str, Any]:
    """Model type → class name, or names, of one of transformers' auto mappings."""
    return getattr(auto, f"MODEL_FOR_{key}_MAPPING_NAMES", {})


def all_types() -> list[str]:
    """Every type in the auto mappings."""
    found = dict.fromkeys(auto.MODEL_MAPPING_NAMES)
    for key in {k for keys, _ in _ORDER for k in keys.split("+")}:
        found |= dict.fromkeys(names(key))
    return sorted(t for t in found if t in CONFIG_MAPPING)


def auto_class(kind: str, head: str | None = None) -> str:
    """The auto class with a head, or with the one that a type is most used with."""
    for keys, cls in [(k, c) for k, c in _ORDER if head in (None, k)]:
        if all(kind in names(key) for key in keys.split("+")) and hasattr(hf, cls):
            return cls
    return "AutoModel"


F = 8  # every width is divided by this
VOCAB = 160
WIDTH = re.compile(
    r"(hidden_sizes?|intermediate_size|(^|_)dims?|d_model|d_ff|dff|d_kv|n_embd|n_inner|d_inner|d_head|head_size|"
    r"embedding_size|lora_rank|lru_width|dim_feedforward|feedforward_size|feed_forward_size|d_latents|projection_size|"
    r"dim_ff|linear_units|ffn_hidden_size|feature_size|fpn_feature_size|in_channels|out_channels|output_channels|"
    r"_units|d_ssm|mask_feature_size|kv_channels|hidden_size_global|share_expert_dim|"
    r"dim_head|d_rel|num_pos_feats|stage_in_channels|stage_mid_channels|latent_channels|head_dim|hidden_expansion_size|dim_per_head|"
    r"backbone_channel_list|hidden_channels|descriptor_decoder_dim|embed_dim_per_stage|text_encoder_width|out_dim)$"
)
NOT_WIDTH = re.compile(
    r"^(num_channels|audio_channels|visual_feat_dim|input_dim|.*kernel_dim|state_dim|act_dim|"
    r"keypoint_decoder_dim|max_.*|patch_embed_input_channels|.*num_(?!pos_feats).*|input_feat.*|codebook_dim)$"
)
LAYERS = re.compile(
    r"((^|_)(num_|n_)?(hidden_|encoder_|decoder_|attention_|global_|adapter_|spatial_|temporal_|auxiliary_)*layers?|"
    r"^depth|decoder_depth|num_self_attends_per_block|_layers)$"
)
NOT_LAYERS = re.compile(
    r"^(vision_feature_layer|mlp_only_layers|conditional_layer|num_conv_layers|.*_layers_(block_)?type|moe_layers|"
    r"extract_layers|.*proj_layers|num_residual_layers|.*postnet_layers|.*prenet_layers|first.*|lqe_layers|feature_layer|"
    r"spatial_vision_layer|no_rope_layers|num_mtp_layers|max_window_layers|attn_layers|.*subsample_layers|"
    r"num_first_full_attention_layers|num_last_full_attention_layers|spatial_target_layers|cross_attention_layers|"
    r"look_ahead_layers|look_backward_layers|rope_scaling_layers|kv_source_layers|num_dense_layers|num_kv_shared_layers|"
    r"num_nextn_predict_layers|.*lstm_layers|num_adapter_layers|num_global_layers)$"
)
TOKEN_ID = re.compile(r"((token|start|end|bos|eos|pad|unk|mask|cls|sep|newline|patch)_(id|index)|_index|_id)$")
EXPERTS = re.compile(r"^(n_routed_experts|num_experts|num_local_experts|moe_num_experts|zero_expert_num)$")
TOP = re.compile(r"^(num_experts_per_tok|moe_topk|moe_k|top_k_experts|num_selected_experts)$")
POSITIONS = re.compile(r"(max_position_embeddings|n_positions|n_ctx|max_target_positions|max_seq_len|context_length)$")
DERIVED = {
    "layer_types",
    "mlp_layer_types",
    "head_dim",
    "layers_block_type",
    "no_rope_layers",
    "attention_types",
    "indexer_types",
    "global_attn_indexes",
    "stage_names",
    "num_key_value_heads_per_layer",
    "mtp_layer_types",
    "num_attention_heads_per_layer",
    "mlp_only_layers",
    "attention_layers",
    "moe_layers",
    "_out_features",
    "_out_indices",
    "out_features",
    "id2label",
    "label2id",
    "transformers_version",
    "architectures",
    "hidden_size_per_layer",
    "layer_rope_theta",
    "compress_rates",
    "activation_sparsity_pattern",
    "rms_norm_eps_per_layer",
    "deepstack_layer_map",
    "cross_attention_layers",
    "sliding_windows",
}


class Ids:
    """Special tokens get small numbers, the same for the same name wherever it stands."""

    def __init__(self) -> None:
        self.given: dict[str, int] = {}

    def __call__(self, name: str) -> int:
        name = name.replace("_index", "_id")
        return self.given.setdefault(name, VOCAB - 10 - len(self.given))


def shrink(name: str, value: Any, ids: Ids, layers: int, windows: bool = False) -> Any:
    if isinstance(value, bool) or value is None or isinstance(value, (str, float)):
        return value
    if isinstance(value, dict):
        return {k: [max(1, x // F) for x in v] if k == "mrope_section" else v for k, v in value.items()}
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, int) for v in value):
        if name == "stem_channels" and value[0] == 3:
            return [3, *(v // F for v in value[1:])]
        if name == "depths":
            return [min(v, 2) for v in value]
        if WIDTH.search(name) and not NOT_WIDTH.search(name) and all(v % F == 0 for v in value):
            return [v // F for v in value]
        if TOKEN_ID.search(name) and max(value) >= VOCAB:
            return [ids(f"{name}{i}") for i in range(len(value))]
        return list(value)
    if not isinstance(value, int):
        return value
    if name == "codebook_size":
        return min(value, 128)
    if name.endswith("vocab_size") or name in ("vocab_size_per_layer_input", "num_embeddings"):
        return min(value, VOCAB)
    if TOKEN_ID.search(name) and value >= VOCAB and "ignore" not in name:
        return ids(name)
    if LAYERS.search(name) and not NOT_LAYERS.search(name):
        return min(value, layers)
    if EXPERTS.search(name):
        return min(value, 8)
    if TOP.search(name):
        return min(value, 2)
    if name == "num_kv_shared_layers":
        return 0
    if name in ("n_group", "topk_group"):
        return min(value, 2 if name == "n_group" else 1)
    if name in ("first_k_dense_replace", "num_dense_layers"):
        return min(value, 1)
    if name == "window_size" and windows:
        return 2
    if re.search(r"(^|[a-z]_)(intermediate_size|ffn_dim)$", name) and value >= 128 * F:
        return 128
    if name == "max_source_positions":
        return min(value, 50)
    if POSITIONS.search(name):
        return min(value, 130)
    if name in ("num_queries", "num_object_queries"):
        return min(value, 20)
    if name == "max_window_layers":
        return min(value, layers)
    if WIDTH.search(name) and not NOT_WIDTH.search(name) and value >= 64 and value % F == 0:
        return value // F
    return value


def image_size(values: dict[str, Any]) -> dict[str, Any]:
    """Sixteen patches."""
    size, patch = values.get("image_size"), values.get("patch_size")
    if size is None:
        return {}
    patch = patch[-1] if isinstance(patch, (list, tuple)) else patch
    side = 4 * patch if isinstance(patch, int) and 8 <= patch <= 32 else 64
    return {"image_size": [side, side] if isinstance(size, (list, tuple)) else side}


def tiny(config: Any, ids: Ids, deep: int, explicit: bool, path: str = "") -> Any:
    """A configuration like the given one, small. deep: layers; explicit: give head sizes that the class computes."""
    cls = type(config)
    kind = config.model_type
    special = CONFIGS.get(path or kind, {})
    special = {} if callable(special) else special
    if path and not special:
        special = CONFIGS.get(f"*.{kind}", CONFIGS.get(kind, {}))
        special = {} if callable(special) else special
    layers = max(special.get("_layers", 2), deep)
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    nested = {k: v for k, v in vars(config).items() if isinstance(v, hf.PreTrainedConfig)}
    values: dict[str, Any] = {}
    for name, default in defaults.items():
        try:
            value = getattr(config, name, None)
        except Exception:  # differs by layer
            value = None if default is dataclasses.MISSING else default
        deepest, stages = vars(config).get("num_hidden_layers") or -1, len(vars(config).get("depths") or ())
        if isinstance(value, (list, tuple)) and len(value) == deepest != stages:
            value = list(value)[:layers]
            values[name] = value
        if name == "num_hidden_layers" and isinstance(vars(config).get("depths"), (list, tuple)):
            continue
        if name in nested or (name in DERIVED and (default is None or default is dataclasses.MISSING)):
            continue
        small = shrink(name, value, ids, layers, "depths" in defaults)
        if name == "dtype":
            continue
        if small != value or (path and value != default):
            values[name] = small
    hidden, heads = (values.get(n, vars(config).get(n)) for n in ("hidden_size", "num_attention_heads"))
    unset = "head_dim" not in values and defaults.get("head_dim", 0) in (None, dataclasses.MISSING)
    if explicit and unset and isinstance(hidden, int) and isinstance(heads, int):
        values["head_dim"] = max(hidden // heads // 8 * 8, 8)
        if defaults.get("num_key_value_heads", 0) is None:
            values["num_key_value_heads"] = heads
    if "mrope_section" in (getattr(cls, "ignore_keys_at_rope_validation", None) or ()):
        size = values.get("head_dim") or (hidden // heads if hidden and heads else 16)
        rope = dict(vars(config).get("rope_parameters") or {"rope_type": "default", "rope_theta": 10000.0})
        half = int(size * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
        values["rope_parameters"] = rope
    present = {n: values.get(n, vars(config).get(n)) for n in ("image_size", "patch_size") if n in defaults}
    values |= image_size(present)
    for name, sub in nested.items():
        if sub.model_type in ("timm_backbone", "timm_wrapper"):
            values[name] = hf.ResNetConfig(
                embedding_size=8,
                hidden_sizes=[32, 64, 128, 256],
                depths=[1, 1, 1, 1],
                layer_type="basic",
                out_features=["stage4"],
            )
            continue
        values[name] = tiny(sub, ids, deep, explicit, f"{path or kind}.{name}")
    if path and (stages := getattr(config, "out_features", None)) and hasattr(config, "stage_names"):
        if hasattr(config, "num_hidden_layers") and not hasattr(config, "depths"):
            deep = max(layers, len(stages))
            values |= {"num_hidden_layers": deep, "out_indices": list(range(deep - len(stages) + 1, deep + 1))}
        else:
            values["out_features"] = list(stages)
    values |= {k: v for k, v in special.items() if not k.startswith("_")}
    values = {k: v(values) if callable(v) and not isinstance(v, type) else v for k, v in values.items()}
    for name in special.get("_drop", ()):
        values.pop(name, None)
    try:
        return cls(**values)
    except Exception:
        if not nested:
            raise
        return cls(**{k: v.to_dict() if isinstance(v, hf.PreTrainedConfig) else v for k, v in values.items()})


def build(kind: str, deep: int, explicit: bool, head: str | None = None) -> tuple[Any, Any]:
    """A tiny model in float32 with random weights, and the class whose `from_pretrained` loads it again."""
    maker = CONFIGS.get(kind)
    config = maker(hf, tiny, Ids()) if callable(maker) else tiny(CONFIG_MAPPING[kind](), Ids(), deep, explicit)
    name = auto_class(kind, head)
    torch.manual_seed(0)
    given = (names(keys.split("+")[-1]).get(kind, "") for keys, auto_name in _ORDER if auto_name == name)
    if isinstance(first := next(filter(None, given), ""), (list, tuple)):
        name = first[0]
    cls = getattr(hf, name)
    model = cls.from_config(config) if name.startswith("AutoModel") else cls(config)
    size = sum(p.numel() for p in model.parameters())
    if size > 60e6:
        raise MemoryError(f"too large for the census: {size:,} weights")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        computed = [n for n, m in model.named_modules() if "Sinusoid" in type(m).__name__]  # not in the file
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and parameter.requires_grad and name.rpartition(".")[0] not in computed:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.03)
    return model.float().eval(), (cls if name.startswith("AutoModel") else type(model))
