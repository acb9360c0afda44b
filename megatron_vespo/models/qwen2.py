"""Qwen2 (and 2.5) and Qwen2-MoE: config facts and weight table.

Architecture: transformers ``models/qwen2/modeling_qwen2.py`` and ``models/qwen2_moe/modeling_qwen2_moe.py``. Query, key
and value have a bias, the output projection has none.
"""

from __future__ import annotations

from typing import Any

from megatron_vespo.models.decoder import (
    DECODER_RULES,
    FIELDS,
    FIXED,
    HEAD_DIM_OF_HIDDEN,
    LAYER,
    MCORE,
    QKV_BIAS_RULE,
    REQUIRED,
    decoder_config,
    mlp_rules,
)
from megatron_vespo.models.hf_config import Family
from megatron_vespo.models.layouts import HfConfig, Rule, whole


def _dense_config(config: HfConfig) -> dict[str, Any]:
    return {**decoder_config(config), "add_qkv_bias": True}


def _moe_config(config: HfConfig) -> dict[str, Any]:
    return {
        **_dense_config(config),
        # norm_topk_prob: softmax over the chosen experts, which is softmax over all, then renormalised over the chosen.
        "moe_router_pre_softmax": not config["norm_topk_prob"],
        "moe_shared_expert_gate": True,
    }


_SHARED_FIXED = {
    **FIXED,
    "use_sliding_window": lambda value: value is False,
    "use_mrope": lambda value: value is False,
}

QWEN2 = Family(
    model_type="qwen2",
    fields=FIELDS,
    required=REQUIRED,
    fixed=_SHARED_FIXED,
    transformer_config=_dense_config,
    rules=(*DECODER_RULES, QKV_BIAS_RULE, *mlp_rules(MCORE + "mlp.", LAYER + "mlp.", "intermediate_size")),
    derived=HEAD_DIM_OF_HIDDEN,
)

QWEN2_MOE = Family(
    model_type="qwen2_moe",
    fields={
        **FIELDS,
        "num_experts": "num_moe_experts",
        "num_experts_per_tok": "moe_router_topk",
        "moe_intermediate_size": "moe_ffn_hidden_size",
        "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    },
    required=REQUIRED | {"norm_topk_prob"},
    fixed={
        **_SHARED_FIXED,
        "qkv_bias": lambda value: value is True,
        "decoder_sparse_step": lambda value: value == 1,
        "mlp_only_layers": lambda value: not value,
    },
    transformer_config=_moe_config,
    rules=(
        *DECODER_RULES,
        QKV_BIAS_RULE,
        Rule(MCORE + "mlp.router.weight", (LAYER + "mlp.gate.weight",), whole),
        *mlp_rules(MCORE + "mlp.experts.{expert}.", LAYER + "mlp.experts.{expert}.", "moe_intermediate_size"),
        *mlp_rules(MCORE + "mlp.shared_experts.", LAYER + "mlp.shared_expert.", "shared_expert_intermediate_size"),
        Rule(MCORE + "mlp.shared_experts.gate_weight", (LAYER + "mlp.shared_expert_gate.weight",), whole),
    ),
    derived=HEAD_DIM_OF_HIDDEN,
)
