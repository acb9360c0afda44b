"""Qwen3 and Qwen3-MoE: config facts and weight table. The dense model is the MoE model with another MLP.

Architecture: transformers ``models/qwen3_moe/modeling_qwen3_moe.py``.
"""

from __future__ import annotations

from typing import Any

from megatron_vespo.models.hf_config import Family
from megatron_vespo.models.layouts import HfConfig, Rule, columns_of, gate_up, grouped_qkv, vocabulary, whole

_LAYER = "model.layers.{layer}."
_MCORE = "decoder.layers.{layer}."

_SHARED_RULES = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary("vocab_size")),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), whole),
    Rule("output_layer.weight", ("lm_head.weight",), vocabulary("vocab_size")),
    Rule(_MCORE + "input_layernorm.weight", (_LAYER + "input_layernorm.weight",), whole),
    Rule(_MCORE + "pre_mlp_layernorm.weight", (_LAYER + "post_attention_layernorm.weight",), whole),
    Rule(
        _MCORE + "self_attention.linear_qkv.weight",
        tuple(_LAYER + f"self_attn.{name}_proj.weight" for name in "qkv"),
        grouped_qkv,
    ),
    Rule(
        _MCORE + "self_attention.linear_proj.weight",
        (_LAYER + "self_attn.o_proj.weight",),
        columns_of("num_attention_heads", "head_dim"),
    ),
    Rule(_MCORE + "self_attention.q_layernorm.weight", (_LAYER + "self_attn.q_norm.weight",), whole),
    Rule(_MCORE + "self_attention.k_layernorm.weight", (_LAYER + "self_attn.k_norm.weight",), whole),
)


def _mlp_rules(mcore: str, hf: str, size: str) -> tuple[Rule, ...]:
    return (
        Rule(mcore + "linear_fc1.weight", (hf + "gate_proj.weight", hf + "up_proj.weight"), gate_up(size)),
        Rule(mcore + "linear_fc2.weight", (hf + "down_proj.weight",), columns_of(size)),
    )


def _shared_config(config: HfConfig) -> dict[str, Any]:
    """What the modelling code of both has fixed."""
    return {
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "gated_linear_unit": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _moe_config(config: HfConfig) -> dict[str, Any]:
    # norm_topk_prob: softmax over the chosen experts, which is softmax over all, then renormalised over the chosen.
    return {**_shared_config(config), "moe_router_pre_softmax": not config["norm_topk_prob"]}


_SHARED_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "rms_norm_eps": "layernorm_epsilon",
}
_SHARED_REQUIRED = frozenset({"vocab_size", "rope_theta", "max_position_embeddings", "tie_word_embeddings"})
_SHARED_FIXED = {
    "hidden_act": lambda value: value == "silu",
    "attention_bias": lambda value: value is False,
    "attention_dropout": lambda value: value == 0,
    "use_sliding_window": lambda value: value is False,
    "rope_scaling": lambda value: value is None,
    "layer_types": lambda value: value is None or set(value) == {"full_attention"},
}

QWEN3 = Family(
    model_type="qwen3",
    fields=_SHARED_FIELDS,
    required=_SHARED_REQUIRED,
    fixed=_SHARED_FIXED,
    transformer_config=_shared_config,
    rules=(*_SHARED_RULES, *_mlp_rules(_MCORE + "mlp.", _LAYER + "mlp.", "intermediate_size")),
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    fields={
        **_SHARED_FIELDS,
        "num_experts": "num_moe_experts",
        "num_experts_per_tok": "moe_router_topk",
        "moe_intermediate_size": "moe_ffn_hidden_size",
    },
    required=_SHARED_REQUIRED | {"norm_topk_prob"},
    fixed={
        **_SHARED_FIXED,
        "decoder_sparse_step": lambda value: value == 1,
        "mlp_only_layers": lambda value: not value,
    },
    transformer_config=_moe_config,
    rules=(
        *_SHARED_RULES,
        Rule(_MCORE + "mlp.router.weight", (_LAYER + "mlp.gate.weight",), whole),
        *_mlp_rules(_MCORE + "mlp.experts.{expert}.", _LAYER + "mlp.experts.{expert}.", "moe_intermediate_size"),
    ),
)
