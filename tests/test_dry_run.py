import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.bert import modeling_bert
from transformers.models.mpnet import modeling_mpnet

from bittern import calibrate
from bittern.anatomy import Anatomy, Attention, Block
from bittern.attention import attach, recording, sites
from bittern.dry_run import read_anatomy
from bittern.errors import ModelError
from bittern.layers import as_float, simulate
from bittern.products import Plan
from families import FLOAT_ATTENTION, SUPPORTED, Batch


@dataclass(frozen=True)
class Expected:
    """stacks: blocks in each, in order of execution; blocks: some of them in full; roles: layers outside of blocks."""

    stacks: dict[str, int]
    blocks: tuple[Block, ...]
    roles: dict[str, str]


def attention(name: str, inputs: str, output: str, norm: str, **more: bool) -> Attention:
    """Names relative to the block; `inputs` relative to the attention module, separated by spaces."""
    given: dict[str, Any] = {"cross": False, "norm_reads_residual": True} | more
    return Attention(name, inputs=tuple(f"{name}.{part}" for part in inputs.split()), output=output, norm=norm, **given)


def block(name: str, *attentions: Attention, ffn: str, norms: str) -> Block:
    """A block from names relative to it; of the layers of the FFN the last is its output."""

    def full(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(f"{name}.{part}" for part in names)

    return Block(
        name,
        tuple(
            replace(
                a, name=f"{name}.{a.name}", inputs=full(a.inputs), output=f"{name}.{a.output}", norm=f"{name}.{a.norm}"
            )
            for a in attentions
        ),
        full(ffn.split()[:-1]),
        f"{name}.{ffn.rsplit(maxsplit=1)[-1]}",
        full(norms.split()),
    )


def bert_block(name: str) -> Block:
    norm = "attention.output.LayerNorm"
    return block(
        name,
        attention("attention.self", "query key value", "attention.output.dense", norm),
        ffn="intermediate.dense output.dense",
        norms=f"{norm} output.LayerNorm",
    )


def vision_block(name: str, before: str = "layernorm_before", after: str = "layernorm_after") -> Block:
    return block(
        name,
        attention("attention", "q_proj k_proj v_proj", "attention.o_proj", after),
        ffn="mlp.fc1 mlp.fc2",
        norms=f"{before} {after}",
    )


def llama_block(name: str, extra_norms: str = "") -> Block:
    return block(
        name,
        attention("self_attn", "q_proj k_proj v_proj", "self_attn.o_proj", "post_attention_layernorm"),
        ffn="mlp.gate_proj mlp.up_proj mlp.down_proj",
        norms=f"input_layernorm {extra_norms} post_attention_layernorm",
    )


def llama_like(extra_norms: str = "") -> Expected:
    return Expected(
        {"model.layers": 2},
        (llama_block("model.layers.1", extra_norms),),
        {"model.embed_tokens": "embedding", "lm_head": "head"},
    )


def bart_attention(norm: str, name: str = "self_attn", output: str = "out_proj") -> Attention:
    return attention(name, "q_proj k_proj v_proj", f"{name}.{output}", norm, cross=name == "encoder_attn")


DETR_DECODER_NORMS = "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm"
DETR_ENCODER_BLOCK = block(
    "model.encoder.layers.1",
    bart_attention("self_attn_layer_norm", output="o_proj"),
    ffn="mlp.fc1 mlp.fc2",
    norms="self_attn_layer_norm final_layer_norm",
)
RESNET = "model.backbone.model"
DETR_ROLES = {
    f"{RESNET}.embedder.embedder.convolution": "stem",
    **{f"{RESNET}.encoder.stages.{i}.layers.0.layer.{j}.convolution": "stem" for i in range(4) for j in range(2)},
    **{f"{RESNET}.encoder.stages.{i}.layers.0.shortcut.convolution": "stem" for i in range(1, 4)},
    "model.query_position_embeddings": "position",
    "model.input_projection": "stem",
    "class_labels_classifier": "head",
    **{f"bbox_predictor.layers.{i}": "head" for i in range(3)},
}

EXPECTED = {
    "bert": Expected(
        {"bert.encoder.layer": 2},
        (bert_block("bert.encoder.layer.1"),),
        {
            "bert.embeddings.word_embeddings": "embedding",
            "bert.embeddings.position_embeddings": "position",
            "bert.embeddings.token_type_embeddings": "position",
            "bert.pooler.dense": "pooler",
            "classifier": "head",
        },
    ),
    "roberta": Expected(
        {"roberta.encoder.layer": 2},
        (bert_block("roberta.encoder.layer.1"),),
        {
            "roberta.embeddings.word_embeddings": "embedding",
            "roberta.embeddings.position_embeddings": "position",
            "roberta.embeddings.token_type_embeddings": "position",
            "classifier.dense": "head",
            "classifier.out_proj": "head",
        },
    ),
    "distilbert": Expected(
        {"distilbert.transformer.layer": 2},
        (
            block(
                "distilbert.transformer.layer.1",
                attention("attention", "q_lin k_lin v_lin", "attention.out_lin", "sa_layer_norm"),
                ffn="ffn.lin1 ffn.lin2",
                norms="sa_layer_norm output_layer_norm",
            ),
        ),
        {
            "distilbert.embeddings.word_embeddings": "embedding",
            "distilbert.embeddings.position_embeddings": "position",
            "pre_classifier": "head",
            "classifier": "head",
        },
    ),
    "electra": Expected(
        {"electra.encoder.layer": 2},
        (bert_block("electra.encoder.layer.1"),),
        {
            "electra.embeddings.word_embeddings": "embedding",
            "electra.embeddings.position_embeddings": "position",
            "electra.embeddings.token_type_embeddings": "position",
            "electra.embeddings_project": "stem",
            "classifier.dense": "head",
            "classifier.out_proj": "head",
        },
    ),
    "albert": Expected(
        {"albert.encoder.albert_layer_groups.0.albert_layers": 1},  # shared: one block that runs twice
        (
            block(
                "albert.encoder.albert_layer_groups.0.albert_layers.0",
                attention("attention", "query key value", "attention.dense", "attention.LayerNorm"),
                ffn="ffn ffn_output",
                norms="attention.LayerNorm full_layer_layer_norm",
            ),
        ),
        {
            "albert.embeddings.word_embeddings": "embedding",
            "albert.embeddings.position_embeddings": "position",
            "albert.embeddings.token_type_embeddings": "position",
            "albert.encoder.embedding_hidden_mapping_in": "stem",
            "albert.pooler": "pooler",
            "classifier": "head",
        },
    ),
    "modernbert": Expected(
        {"model.layers": 2},
        (
            block(
                "model.layers.1",
                attention("attn", "Wqkv", "attn.Wo", "mlp_norm"),
                ffn="mlp.Wi mlp.Wo",
                norms="attn_norm mlp_norm",
            ),
        ),
        {"model.embeddings.tok_embeddings": "embedding", "head.dense": "head", "classifier": "head"},
    ),
    "vit": Expected(
        {"vit.layers": 2},
        (vision_block("vit.layers.1"),),
        {"vit.embeddings.patch_embeddings.projection": "stem", "classifier": "head"},
    ),
    "deit": Expected(
        {"deit.layers": 2},
        (vision_block("deit.layers.1"),),
        {"deit.embeddings.patch_embeddings.projection": "stem", "classifier": "head"},
    ),
    "swin": Expected(
        {"swin.encoder.layers.0.blocks": 2, "swin.encoder.layers.1.blocks": 2},
        (vision_block("swin.encoder.layers.0.blocks.1"), vision_block("swin.encoder.layers.1.blocks.1")),
        {
            "swin.embeddings.patch_embeddings.projection": "stem",
            "swin.encoder.layers.0.downsample.reduction": "other",
            "classifier": "head",
        },
    ),
    "dinov2": Expected(
        {"dinov2.encoder.layer": 2},
        (vision_block("dinov2.encoder.layer.1", "norm1", "norm2"),),
        {"dinov2.embeddings.patch_embeddings.projection": "stem", "classifier": "head"},
    ),
    "beit": Expected(
        {"beit.layers": 2},
        (vision_block("beit.layers.1"),),
        {"beit.embeddings.patch_embeddings.projection": "stem", "classifier": "head"},
    ),
    "detr": Expected(
        {"model.encoder.layers": 2, "model.decoder.layers": 2},
        (
            DETR_ENCODER_BLOCK,
            block(
                "model.decoder.layers.1",
                bart_attention("self_attn_layer_norm", output="o_proj"),
                bart_attention("encoder_attn_layer_norm", "encoder_attn", output="o_proj"),
                ffn="mlp.fc1 mlp.fc2",
                norms=DETR_DECODER_NORMS,
            ),
        ),
        DETR_ROLES,
    ),
    "conditional_detr": Expected(
        {"model.encoder.layers": 2, "model.decoder.layers": 2},
        (
            DETR_ENCODER_BLOCK,
            block(
                "model.decoder.layers.0",  # the only one with a projection of the queries' positions
                attention(
                    "self_attn",
                    "q_content_proj q_pos_proj k_content_proj k_pos_proj v_proj",
                    "self_attn.o_proj",
                    "self_attn_layer_norm",
                ),
                attention(
                    "encoder_attn",
                    "q_content_proj k_content_proj v_proj k_pos_proj q_pos_proj q_pos_sine_proj",
                    "encoder_attn.o_proj",
                    "encoder_attn_layer_norm",
                    cross=True,
                ),
                ffn="mlp.fc1 mlp.fc2",
                norms=DETR_DECODER_NORMS,
            ),
        ),
        DETR_ROLES
        | {f"model.decoder.query_scale.layers.{i}": "other" for i in range(2)}
        | {f"model.decoder.ref_point_head.layers.{i}": "other" for i in range(2)},
    ),
    "gpt2": Expected(
        {"transformer.h": 2},
        (
            block(
                "transformer.h.1",
                attention("attn", "c_attn", "attn.c_proj", "ln_2"),
                ffn="mlp.c_fc mlp.c_proj",
                norms="ln_1 ln_2",
            ),
        ),
        {"transformer.wte": "embedding", "transformer.wpe": "position", "lm_head": "head"},
    ),
    "llama": llama_like(),
    "qwen2": llama_like(),
    "qwen3": llama_like(extra_norms="self_attn.q_norm self_attn.k_norm"),
    "mistral": llama_like(),
    "gemma2": Expected(
        {"model.layers": 2},
        (
            block(
                "model.layers.1",
                attention(
                    "self_attn",
                    "q_proj k_proj v_proj",
                    "self_attn.o_proj",
                    "post_attention_layernorm",
                    norm_reads_residual=False,  # it reads W_O alone: a sandwich norm
                ),
                ffn="mlp.gate_proj mlp.up_proj mlp.down_proj",
                norms="input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm",
            ),
        ),
        {"model.embed_tokens": "embedding", "lm_head": "head"},
    ),
    "opt": Expected(
        {"model.decoder.layers": 2},
        (
            block(
                "model.decoder.layers.1",
                bart_attention("final_layer_norm"),
                ffn="fc1 fc2",
                norms="self_attn_layer_norm final_layer_norm",
            ),
        ),
        {"model.decoder.embed_tokens": "embedding", "model.decoder.embed_positions": "position", "lm_head": "head"},
    ),
    "gpt_neox": Expected(
        {"gpt_neox.layers": 2},
        (
            block(
                "gpt_neox.layers.1",
                attention(
                    "attention",
                    "query_key_value",
                    "attention.dense",
                    "post_attention_layernorm",
                    norm_reads_residual=False,  # it reads the block's input: attention and FFN run in parallel
                ),
                ffn="mlp.dense_h_to_4h mlp.dense_4h_to_h",
                norms="input_layernorm post_attention_layernorm",
            ),
        ),
        {"gpt_neox.embed_in": "embedding", "lm_head": "head"},
    ),
    "t5": Expected(
        {"encoder.block": 2, "decoder.block": 2},
        (
            block(
                "encoder.block.0",  # the blocks with a table of relative positions
                attention("layer.0.SelfAttention", "q k v", "layer.0.SelfAttention.o", "layer.1.layer_norm"),
                ffn="layer.1.DenseReluDense.wi layer.1.DenseReluDense.wo",
                norms="layer.0.layer_norm layer.1.layer_norm",
            ),
            block(
                "decoder.block.0",
                attention("layer.0.SelfAttention", "q k v", "layer.0.SelfAttention.o", "layer.1.layer_norm"),
                attention(
                    "layer.1.EncDecAttention", "q k v", "layer.1.EncDecAttention.o", "layer.2.layer_norm", cross=True
                ),
                ffn="layer.2.DenseReluDense.wi layer.2.DenseReluDense.wo",
                norms="layer.0.layer_norm layer.1.layer_norm layer.2.layer_norm",
            ),
        ),
        {
            "shared": "embedding",
            "encoder.embed_tokens": "embedding",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "position",
            "decoder.embed_tokens": "embedding",
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias": "position",
            "lm_head": "head",
        },
    ),
    "bart": Expected(
        {"model.encoder.layers": 2, "model.decoder.layers": 2},
        (
            block(
                "model.encoder.layers.1",
                bart_attention("self_attn_layer_norm"),
                ffn="fc1 fc2",
                norms="self_attn_layer_norm final_layer_norm",
            ),
            block(
                "model.decoder.layers.1",
                bart_attention("self_attn_layer_norm"),
                bart_attention("encoder_attn_layer_norm", "encoder_attn"),
                ffn="fc1 fc2",
                norms="self_attn_layer_norm encoder_attn_layer_norm final_layer_norm",
            ),
        ),
        {
            "model.shared": "embedding",
            "model.encoder.embed_tokens": "embedding",
            "model.encoder.embed_positions": "position",
            "model.decoder.embed_tokens": "embedding",
            "model.decoder.embed_positions": "position",
            "lm_head": "head",
        },
    ),
    "whisper": Expected(
        {"model.encoder.layers": 2, "model.decoder.layers": 2},
        (
            block(
                "model.encoder.layers.1",
                bart_attention("final_layer_norm"),
                ffn="fc1 fc2",
                norms="self_attn_layer_norm final_layer_norm",
            ),
            block(
                "model.decoder.layers.1",
                bart_attention("encoder_attn_layer_norm"),
                bart_attention("final_layer_norm", "encoder_attn"),
                ffn="fc1 fc2",
                norms="self_attn_layer_norm encoder_attn_layer_norm final_layer_norm",
            ),
        ),
        {
            "model.encoder.embed_positions": "position",
            "model.decoder.embed_tokens": "embedding",
            "model.decoder.embed_positions": "position",
            "proj_out": "head",
        },
    ),
    "clip": Expected(
        {"vision_model.encoder.layers": 2, "text_model.encoder.layers": 2},
        tuple(
            block(
                f"{tower}.encoder.layers.1",
                bart_attention("layer_norm2"),
                ffn="mlp.fc1 mlp.fc2",
                norms="layer_norm1 layer_norm2",
            )
            for tower in ("vision_model", "text_model")
        ),
        {
            "text_model.embeddings.token_embedding": "embedding",
            "text_model.embeddings.position_embedding": "position",
            "vision_model.embeddings.patch_embedding": "stem",
            "vision_model.embeddings.position_embedding": "position",
            "visual_projection": "other",  # runs between the towers
            "text_projection": "pooler",
        },
    ),
    "mpnet": Expected(
        {"mpnet.encoder.layer": 2},
        (
            block(
                "mpnet.encoder.layer.1",
                attention("attention.attn", "q k v", "attention.attn.o", "attention.LayerNorm"),
                ffn="intermediate.dense output.dense",
                norms="attention.LayerNorm output.LayerNorm",
            ),
        ),
        {
            "mpnet.embeddings.word_embeddings": "embedding",
            "mpnet.embeddings.position_embeddings": "position",
            "mpnet.encoder.relative_attention_bias": "position",
            "classifier.dense": "head",
            "classifier.out_proj": "head",
        },
    ),
    "deberta_v2": Expected(
        {"deberta.encoder.layer": 2},
        (
            block(
                "deberta.encoder.layer.1",
                attention(
                    "attention.self",
                    "query_proj key_proj value_proj pos_key_proj pos_query_proj",
                    "attention.output.dense",
                    "attention.output.LayerNorm",
                ),
                ffn="intermediate.dense output.dense",
                norms="attention.output.LayerNorm output.LayerNorm",
            ),
        ),
        {
            "deberta.embeddings.word_embeddings": "embedding",
            "deberta.embeddings.position_embeddings": "position",
            "deberta.encoder.rel_embeddings": "position",
            "pooler.dense": "head",
            "classifier": "head",
        },
    ),
    "swinv2": Expected(
        {"swinv2.encoder.layers.0.blocks": 2, "swinv2.encoder.layers.1.blocks": 2},
        (
            block(
                "swinv2.encoder.layers.0.blocks.1",
                attention(
                    "attention.self",
                    "query key value continuous_position_bias_mlp.0 continuous_position_bias_mlp.2",
                    "attention.output.dense",
                    "layernorm_before",
                    norm_reads_residual=False,  # it reads W_O alone, in another order
                ),
                ffn="intermediate.dense output.dense",
                norms="layernorm_before layernorm_after",
            ),
        ),
        {
            "swinv2.embeddings.patch_embeddings.projection": "stem",
            "swinv2.encoder.layers.0.downsample.reduction": "other",
            "classifier": "head",
        },
    ),
    "gptj": Expected(
        {"transformer.h": 2},
        (
            Block(
                "transformer.h.1",
                (
                    Attention(
                        "transformer.h.1.attn",
                        False,
                        tuple(f"transformer.h.1.attn.{part}_proj" for part in "qkv"),
                        "transformer.h.1.attn.out_proj",
                    ),
                ),
                ("transformer.h.1.mlp.fc_in",),
                "transformer.h.1.mlp.fc_out",
                ("transformer.h.1.ln_1",),
            ),
        ),
        {"transformer.wte": "embedding", "lm_head": "head"},
    ),
    "bloom": Expected(
        {"transformer.h": 2},
        (
            block(
                "transformer.h.1",
                attention("self_attention", "query_key_value", "self_attention.dense", "post_attention_layernorm"),
                ffn="mlp.dense_h_to_4h mlp.dense_4h_to_h",
                norms="input_layernorm post_attention_layernorm",
            ),
        ),
        {"transformer.word_embeddings": "embedding", "lm_head": "head"},
    ),
}


def read(name: str) -> Anatomy:
    model, batch = SUPPORTED[name]()
    return read_anatomy(model, batch)


def state_of(model: hf.PreTrainedModel) -> dict[str, Any]:
    """All that a dry run could leave behind in a model."""
    modules = list(model.modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return {
        "weights": {key: value.clone() for key, value in model.state_dict().items()},
        "modes": [m.training for m in modules],
        "attention": [m.config._attn_implementation for m in modules if hasattr(m, "config")],
        "hooks": [len(getattr(m, kind)) for m in modules for kind in hooks],
        "attributes": [set(vars(m)) for m in modules],
    }


def assert_same_state(model: hf.PreTrainedModel, before: dict[str, Any]) -> None:
    after = state_of(model)
    weights, weights_before = after.pop("weights"), before["weights"]
    assert list(weights) == list(weights_before)
    assert all(torch.equal(weights[key], weights_before[key]) for key in weights)
    assert after == {key: value for key, value in before.items() if key != "weights"}


def bad_batch() -> dict[str, Tensor]:
    return {"input_ids": torch.full((2, 5), 1000)}


def test_every_family_has_an_expectation() -> None:
    """No supported family goes without an expected anatomy."""
    assert EXPECTED.keys() == SUPPORTED.keys()


@pytest.mark.parametrize("name", SUPPORTED)
def test_blocks(name: str) -> None:
    """Blocks, their attention, W_O, FFN and norms are found as one reads them in the modeling code."""
    anatomy, expected = read(name), EXPECTED[name]
    assert [b.name for b in anatomy.blocks] == [
        f"{stack}.{i}" for stack, n in expected.stacks.items() for i in range(n)
    ]
    assert Counter(b.stack for b in anatomy.blocks) == expected.stacks
    by_name = {b.name: b for b in anatomy.blocks}
    for wanted in expected.blocks:
        assert by_name[wanted.name] == wanted


@pytest.mark.parametrize("name", SUPPORTED)
def test_roles(name: str) -> None:
    """Each layer with a weight matrix has one role: in blocks by its place, outside of them as expected."""
    model, batch = SUPPORTED[name]()
    anatomy, expected = read_anatomy(model, batch), EXPECTED[name]
    in_blocks = ("qkv", "attention_output", "ffn")
    assert {n: r for n, r in anatomy.roles.items() if r not in in_blocks} == expected.roles
    for wanted in expected.blocks:
        assert all(anatomy.roles[n] == "qkv" for a in wanted.attentions for n in a.inputs)
        assert all(anatomy.roles[a.output] == "attention_output" for a in wanted.attentions if a.output)
        assert all(anatomy.roles[n] == "ffn" for n in (*wanted.ffn_in, wanted.ffn_out) if n)
    layers = (nn.Linear, nn.Conv2d, nn.Embedding, hf.pytorch_utils.Conv1D)
    assert list(anatomy.roles) == [n for n, m in model.named_modules() if isinstance(m, layers)]


@pytest.mark.parametrize("name", SUPPORTED)
def test_made_up_batch(name: str) -> None:
    """A batch made up by the library shows the same anatomy as a real one."""
    assert read_anatomy(SUPPORTED[name]()[0]) == read(name)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_cross_attention_of_equal_lengths(name: str) -> None:
    """Cross-attention is told from self-attention although source and target have the same length."""
    model, batch = SUPPORTED[name]()
    batch["decoder_input_ids"] = batch["input_ids"]
    assert read_anatomy(model, batch) == read(name)


def test_accessors() -> None:
    """Attention modules come in order of execution, and lead back to their block; layers are listed by role."""
    anatomy = read("bart")
    assert [a.name.removeprefix("model.") for a in anatomy.attentions] == [
        "encoder.layers.0.self_attn",
        "encoder.layers.1.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.encoder_attn",
        "decoder.layers.1.self_attn",
        "decoder.layers.1.encoder_attn",
    ]
    assert anatomy.block_of(anatomy.attentions[3]).name == "model.decoder.layers.0"
    assert [name for name, role in anatomy.roles.items() if role == "head"] == ["lm_head"]


@pytest.mark.parametrize(("name", "products", "heads"), [("mpnet", 2, 4), ("deberta_v2", 4, 4), ("bloom", 2, 4)])
def test_attention_in_own_code(name: str, products: int, heads: int) -> None:
    """Where a model computes attention by itself, the products of Q and K and of map and V are found, the first of
    several before the softmax; heads too."""
    assert {a.plan for a in read(name).attentions} == {Plan(0, products - 1, products, products + 1, heads)}


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 99}


def funnel() -> hf.PreTrainedModel:
    config = hf.FunnelConfig(vocab_size=99, block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=48)
    return hf.FunnelForSequenceClassification(config)


def cvt() -> hf.PreTrainedModel:
    sizes = {"embed_dim": [16, 32], "depth": [1, 2], "num_heads": [2, 4], "drop_path_rate": [0.0, 0.0]}
    lists = {"patch_sizes": [7, 3], "patch_stride": [4, 2], "patch_padding": [2, 1], "mlp_ratio": [2.0, 2.0]}
    rest = {"attention_drop_rate": [0.0, 0.0], "drop_rate": [0.0, 0.0], "qkv_bias": [True, True]}
    tokens = {"cls_token": [False, True], "qkv_projection_method": ["dw_bn", "dw_bn"], "kernel_qkv": [3, 3]}
    strides = {"padding_kv": [1, 1], "stride_kv": [2, 2], "padding_q": [1, 1], "stride_q": [1, 1]}
    return hf.CvtForImageClassification(hf.CvtConfig(**sizes, **lists, **rest, **tokens, **strides))


def hiera() -> hf.PreTrainedModel:
    sizes = {"image_size": [32, 32], "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1}
    return hf.HieraForImageClassification(hf.HieraConfig(**sizes, patch_stride=[2, 2], patch_padding=[3, 3]))


def fsmt() -> hf.PreTrainedModel:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    vocabulary = {"langs": ["en", "de"], "src_vocab_size": 99, "tgt_vocab_size": 99, "pad_token_id": 1}
    return hf.FSMTForConditionalGeneration(hf.FSMTConfig(**sizes, **heads, **vocabulary))


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (funnel, [(2, 4, 12, 12), (2, 4, 6, 12)]),  # einsum
        (cvt, [(2, 2, 64, 16), *2 * [(2, 4, 17, 5)]]),  # einsum of a list
        (hiera, [(2, 4, 64, 64), (2, 8, 16, 64)]),  # windows beside heads
        (fsmt, [(2, 4, 12, 12), (2, 4, 9, 9), (2, 4, 9, 12)]),  # (batch · heads, …), and tokens before samples
    ],
)
def test_products_of_other_forms(make: Callable[[], hf.PreTrainedModel], shapes: list[tuple[int, ...]]) -> None:
    """Products by einsum, of windows and of tokens before samples are served; the maps are those of the model."""
    torch.manual_seed(0)
    model = make().eval()
    batch: Batch = {"input_ids": 5 + torch.arange(24).view(2, 12)}
    if make is fsmt:
        batch["decoder_input_ids"] = 5 + torch.arange(18).view(2, 9)
    if model.main_input_name == "pixel_values":
        batch = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}
    with torch.no_grad():
        own = model(**batch, **({} if make is cvt else {"output_attentions": True}))
    report = simulate(model, "w8a8", batch)
    assert not report.anatomy.float_products
    with as_float(model), recording(model, "map", "context") as taps, torch.no_grad():
        out = model(**batch)
    torch.testing.assert_close(out.logits, own.logits, atol=1e-5, rtol=1e-4)
    assert [tuple(x.shape) for x in taps["map"]] == shapes
    kinds = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
    of_model = [x for kind in kinds for x in own.get(kind) or ()]  # CvT gives none
    for ours, theirs in zip(taps["map"] if make is not cvt else (), of_model, strict=True):
        torch.testing.assert_close(ours, theirs.reshape(ours.shape), atol=1e-6, rtol=0)
    calibrate(model, [batch])
    with recording(model, "map") as quantized, torch.no_grad():
        model(**batch)
    assert not torch.equal(quantized["map"][0], taps["map"][0])


def test_heads_that_only_scores_join() -> None:
    """Where only scores are tensors of (batch · heads, …), they are seen by sample and head all the same."""
    model = hf.GPTNeoXJapaneseForCausalLM(hf.GPTNeoXJapaneseConfig(**SMALL)).eval()
    simulate(model, "w8a8")
    with as_float(model), recording(sites(model), "score") as taps, torch.no_grad():
        model(input_ids=torch.arange(18).view(2, 9))
    assert [x.shape for x in taps["score"]] == [(2, 4, 9, 9)]


def test_experts() -> None:
    """A block whose FFN is of experts, which are no layers, is found by its attention."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=99, num_local_experts=4)
    anatomy = read_anatomy(hf.MixtralForCausalLM(config).eval())
    assert [(b.name, b.ffn_out) for b in anatomy.blocks] == [(f"model.layers.{i}", None) for i in range(2)]
    assert [a.output for a in anatomy.attentions] == [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    assert not anatomy.float_products


class Replaced(hf.MPNetForSequenceClassification):
    """Puts another class of attention into its first block once it runs, as BigBird does for short texts."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        attn = self.mpnet.encoder.layer[0].attention.attn
        attn.__class__ = type("OtherAttention", (modeling_mpnet.MPNetSelfAttention,), {})
        return super().forward(*args, **kwargs)


def test_attention_that_a_load_does_not_build() -> None:
    """Attention of a class that the configuration alone does not give stays float: a load would not find its site."""
    model, batch = SUPPORTED["mpnet"]()
    anatomy = read_anatomy(Replaced(model.config).eval(), batch)
    assert not anatomy.attentions
    assert anatomy.float_products == tuple(f"mpnet.encoder.layer.{i}.attention.attn" for i in range(2))


@pytest.mark.parametrize("name", FLOAT_ATTENTION)
def test_attention_that_stays_float(name: str) -> None:
    """Attention that Bittern cannot reach into is named; the roles of the layers around it are found all the same."""
    model, batch = FLOAT_ATTENTION[name]()
    anatomy = read_anatomy(model, batch)
    assert not anatomy.attentions
    assert anatomy.float_products == tuple(f"transformer.layer.{i}.rel_attn" for i in range(2))
    assert {"embedding", "ffn", "head"} <= set(anatomy.roles.values())


@pytest.mark.parametrize("name", ["bert", "swin", "detr", "t5"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dry_run_changes_nothing(name: str, implementation: str) -> None:
    """A dry run leaves weights, the mode of each module, the attention implementation, hooks and attributes alone."""
    model, batch = SUPPORTED[name]()
    model.set_attn_implementation({"": implementation, "backbone_config": "eager"})
    model.train()
    next(m for m in model.modules() if isinstance(m, nn.Linear)).eval()
    before = state_of(model)
    read_anatomy(model, batch)
    assert_same_state(model, before)


def test_failing_dry_run_changes_nothing() -> None:
    """A batch that the model refuses gives a ModelError in one line, and leaves the model as it was."""
    model, _ = SUPPORTED["bert"]()
    before = state_of(model.train())
    with pytest.raises(
        ModelError, match=r"dry run of BertForSequenceClassification on input_ids \(2, 5\) failed"
    ) as error:
        read_anatomy(model, bad_batch())
    assert "\n" not in str(error.value)
    assert_same_state(model, before)


def test_dry_run_fails_without_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the model without a message is a ModelError too."""
    model, batch = SUPPORTED["bert"]()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(ModelError, match="ValueError"):
        read_anatomy(model, batch)


def test_dry_run_keeps_no_reference() -> None:
    """A model is freed as usual after its anatomy was read."""
    model, batch = SUPPORTED["bert"]()
    read_anatomy(model, batch)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def assert_served_without_attention(model: hf.PreTrainedModel, batch: Batch) -> None:
    """Layers are quantized with the model's own attention, which is named; all else is as it was."""
    with torch.no_grad():
        expected = model(**batch).logits
    before = state_of(model)
    anatomy = read_anatomy(model, batch)
    assert_same_state(model, before)
    assert not anatomy.attentions
    assert anatomy.float_products == tuple(f"bert.encoder.layer.{i}.attention.self" for i in range(2))
    report = simulate(model, "w8a8", batch)
    assert report.notes[1].startswith("products of activations stay float in bert.encoder.layer.0.attention.self, ")
    with as_float(model), torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)


def test_attention_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose eager attention differs from ours keeps it."""
    model, batch = SUPPORTED["bert"]()
    eager = modeling_bert.eager_attention_forward

    def gated(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        context, probabilities = eager(*args, **kwargs)
        return context * 1.001, probabilities

    monkeypatch.setattr(modeling_bert, "eager_attention_forward", gated)
    assert_served_without_attention(model, batch)


def test_large_scores() -> None:
    """Scores so large that their rounding shows in the maps are no other attention, with one key for all heads too."""
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=99)).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 3000
    anatomy = read_anatomy(model)
    attach(model, anatomy)
    with recording(model, "score") as taps, torch.no_grad():
        model(input_ids=torch.arange(18).view(2, 9))
    assert taps["score"][0].max() > 50
    assert len(anatomy.attentions) == 2


def test_two_eager_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several eager functions in a family's file, attention is compared with the one that it calls."""
    model, batch = SUPPORTED["bert"]()
    eager = modeling_bert.eager_attention_forward
    monkeypatch.delattr(modeling_bert, "eager_attention_forward")
    monkeypatch.setattr(modeling_bert, "vision_eager_attention_forward", lambda *_, **__: None, raising=False)
    monkeypatch.setattr(modeling_bert, "eager_attention_forward", eager, raising=False)
    assert len(read_anatomy(model, batch).attentions) == 2


class OwnSelfAttention(modeling_bert.BertSelfAttention):
    """A subclass in a module without an eager attention function; its base's is the one that it uses."""


class ForeignSelfAttention(nn.Module):
    """Calls the interface without any eager attention function of its own."""

    def __init__(self, own: modeling_bert.BertSelfAttention):
        super().__init__()
        self.own = own

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor]:
        shape = (*hidden_states.shape[:2], 4, 8)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.own.query, self.own.key, self.own.value))
        attend = modeling_bert.ALL_ATTENTION_FUNCTIONS[self.own.config._attn_implementation]
        context, probabilities = attend(self, q, k, v, attention_mask)
        return context.flatten(2), probabilities


def test_attention_of_a_subclass() -> None:
    """A subclass of a known attention class is compared with the eager function of its base."""
    model, batch = SUPPORTED["bert"]()
    model.bert.encoder.layer[0].attention.self.__class__ = OwnSelfAttention
    assert read_anatomy(model, batch) == read("bert")


def test_attention_with_nothing_to_compare() -> None:
    """Attention modules without an eager function cannot be checked, and so keep their own."""
    model, batch = SUPPORTED["bert"]()
    for layer in model.bert.encoder.layer:
        layer.attention.self = ForeignSelfAttention(layer.attention.self)
    assert_served_without_attention(model, batch)


def test_models_without_attention() -> None:
    """What is no Transformer of Hugging Face, or runs no attention, is refused by its class."""
    bert = hf.BertModel(hf.BertConfig(num_hidden_layers=0, hidden_size=8, num_attention_heads=2, vocab_size=9))
    resnet = hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"))
    for model in (nn.Linear(2, 2), bert, resnet):
        with pytest.raises(ModelError, match=type(model).__name__):
            read_anatomy(model)  # type: ignore[arg-type]


def test_unusual_inputs() -> None:
    """A model whose inputs cannot be made up asks for a real batch."""
    config = hf.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8],
        conv_kernel=[3],
        conv_stride=[2],
        num_feat_extract_layers=1,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    model = hf.Wav2Vec2Model(config).eval()
    with pytest.raises(ModelError, match="Wav2Vec2Model takes 'input_values'; give one real batch"):
        read_anatomy(model)
    assert len(read_anatomy(model, {"input_values": torch.linspace(-1, 1, 128).view(2, 64)}).blocks) == 1


def test_damaged_weights() -> None:
    """A weight with NaN is named, before it could pass for an attention that differs."""
    model, batch = SUPPORTED["bert"]()
    model.classifier.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"classifier\.weight holds NaN"):
        read_anatomy(model, batch)


def test_two_samples() -> None:
    """Of a large batch the dry run takes two samples, so that its memory does not grow with the batch; what is no plain
    batch of samples is run whole."""
    model, _ = SUPPORTED["vit"]()
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True)
    expected = read_anatomy(model)
    assert read_anatomy(model, {"pixel_values": torch.randn(9, 3, 32, 32)}) == expected
    assert read_anatomy(model, {"pixel_values": torch.randn(3, 3, 32, 32), "bool_masked_pos": None}) == expected
    assert seen == [2, 2, 3]
