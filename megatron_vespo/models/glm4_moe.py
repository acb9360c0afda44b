"""GLM-4.5 and GLM-4.6 (``glm4_moe``): config facts and weight table.

Architecture: transformers ``models/glm4_moe/modeling_glm4_moe.py``. Rotary positions in a part of each head; query, key
and value may have a bias, the output projection has none; queries and keys may be normalised.
"""

from __future__ import annotations

from typing import Any

from megatron_vespo.models.decoder import DECODER_RULES, FIELDS, FIXED, LAYER, MCORE, QKV_BIAS_RULE, decoder_config
from megatron_vespo.models.hf_config import Family
from megatron_vespo.models.layouts import HfConfig, Rule, whole
from megatron_vespo.models.sigmoid_moe import (
    MOE_FIELDS,
    MOE_FIXED,
    MOE_REQUIRED,
    MOE_RULES,
    is_extra_layer,
    moe_config,
    moe_problem,
)


def _config(config: HfConfig) -> dict[str, Any]:
    return {
        **decoder_config(config),
        **moe_config(config),
        "qk_layernorm": config["use_qk_norm"],
        "add_qkv_bias": config["attention_bias"],
    }


GLM4_MOE = Family(
    model_type="glm4_moe",
    fields={**FIELDS, **MOE_FIELDS},
    required=MOE_REQUIRED | {"partial_rotary_factor", "use_qk_norm", "attention_bias"},
    fixed={**FIXED, **MOE_FIXED},
    transformer_config=_config,
    rules=(
        *DECODER_RULES,
        QKV_BIAS_RULE,
        Rule(MCORE + "self_attention.q_layernorm.weight", (LAYER + "self_attn.q_norm.weight",), whole),
        Rule(MCORE + "self_attention.k_layernorm.weight", (LAYER + "self_attn.k_norm.weight",), whole),
        *MOE_RULES,
    ),
    problem=moe_problem,
    left_out=is_extra_layer,
)
