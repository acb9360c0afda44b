"""Qwen3 and Qwen3-MoE: config facts and weight table. The dense model is the MoE model with another MLP.

Architecture: transformers ``models/qwen3_moe/modeling_qwen3_moe.py``.
"""

from __future__ import annotations

from typing import Any

from megatron_vespo.models.decoder import (
    DECODER_RULES,
    FIELDS,
    FIXED,
    LAYER,
    MCORE,
    REQUIRED,
    decoder_config,
    mlp_rules,
)
from megatron_vespo.models.hf_config import Family
from megatron_vespo.models.layouts import HfConfig, Rule, whole

_SHARED_RULES = (
    *DECODER_RULES,
    Rule(MCORE + "self_attention.q_layernorm.weight", (LAYER + "self_attn.q_norm.weight",), whole),
    Rule(MCORE + "self_attention.k_layernorm.weight", (LAYER + "self_attn.k_norm.weight",), whole),
)


def _dense_config(config: HfConfig) -> dict[str, Any]:
    return {**decoder_config(config), "qk_layernorm": True}


def _moe_config(config: HfConfig) -> dict[str, Any]:
    # norm_topk_prob: softmax over the chosen experts, which is softmax over all, then renormalised over the chosen.
    return {**_dense_config(config), "moe_router_pre_softmax": not config["norm_topk_prob"]}


_SHARED_FIXED = {
    **FIXED,
    "attention_bias": lambda value: value is False,
    "use_sliding_window": lambda value: value is False,
}

QWEN3 = Family(
    model_type="qwen3",
    fields=FIELDS,
    required=REQUIRED,
    fixed=_SHARED_FIXED,
    transformer_config=_dense_config,
    rules=(*_SHARED_RULES, *mlp_rules(MCORE + "mlp.", LAYER + "mlp.", "intermediate_size")),
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    fields={
        **FIELDS,
        "num_experts": "num_moe_experts",
        "num_experts_per_tok": "moe_router_topk",
        "moe_intermediate_size": "moe_ffn_hidden_size",
    },
    required=REQUIRED | {"norm_topk_prob"},
    fixed={
        **_SHARED_FIXED,
        "decoder_sparse_step": lambda value: value == 1,
        "mlp_only_layers": lambda value: not value,
    },
    transformer_config=_moe_config,
    rules=(
        *_SHARED_RULES,
        Rule(MCORE + "mlp.router.weight", (LAYER + "mlp.gate.weight",), whole),
        *mlp_rules(MCORE + "mlp.experts.{expert}.", LAYER + "mlp.experts.{expert}.", "moe_intermediate_size"),
    ),
)
