"""Mixtral: config facts and weight table. Architecture: transformers ``models/mixtral/modeling_mixtral.py``."""

from __future__ import annotations

from typing import Any

from megatron_vespo.models.decoder import (
    DECODER_RULES,
    FIELDS,
    FIXED,
    HEAD_DIM_OF_HIDDEN,
    LAYER,
    MCORE,
    REQUIRED,
    decoder_config,
    mlp_rules,
)
from megatron_vespo.models.hf_config import Family
from megatron_vespo.models.layouts import HfConfig, Rule, whole

_MOE = LAYER + "block_sparse_moe."  # as published; transformers 5 has another name in memory only


def _moe_config(config: HfConfig) -> dict[str, Any]:
    return {
        **decoder_config(config),
        # The chosen experts' probabilities are renormalised, which is a softmax over their logits.
        "moe_router_pre_softmax": False,
        "moe_ffn_hidden_size": config["intermediate_size"],
    }


MIXTRAL = Family(
    model_type="mixtral",
    fields={**FIELDS, "num_experts": "num_moe_experts", "num_experts_per_tok": "moe_router_topk"},
    required=REQUIRED,
    fixed={
        **FIXED,
        "sliding_window": lambda value: value is None,
        "router_jitter_noise": lambda value: value == 0,
    },
    transformer_config=_moe_config,
    rules=(
        *DECODER_RULES,
        Rule(MCORE + "mlp.router.weight", (_MOE + "gate.weight",), whole),
        *mlp_rules(
            MCORE + "mlp.experts.{expert}.", _MOE + "experts.{expert}.", "intermediate_size", names=("w1", "w3", "w2")
        ),
    ),
    derived=HEAD_DIM_OF_HIDDEN,
)
