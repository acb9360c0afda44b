"""Llama 2, 3, 3.1 and 3.2: config facts and weight table.

Architecture: transformers ``models/llama/modeling_llama.py``.
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
    REQUIRED,
    decoder_config,
    mlp_rules,
)
from megatron_vespo.models.hf_config import Family

# Megatron takes the factor as an argument and has the rest built in
# (models/common/embeddings/rotary_pos_embedding.py, RotaryEmbedding._apply_scaling); every Llama 3.1 and 3.2 has these.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}


def _honours_rope(scaling: dict[str, Any] | None) -> bool:
    if scaling is None:
        return True
    return "factor" in scaling and {**_LLAMA3_ROPE, "factor": scaling["factor"]} == scaling


LLAMA = Family(
    model_type="llama",
    fields=FIELDS,
    required=REQUIRED,
    fixed={
        **FIXED,
        "rope_scaling": _honours_rope,
        # A bias in the output or the MLP projections; Megatron's add_bias_linear has both or none.
        "attention_bias": lambda value: value is False,
        "mlp_bias": lambda value: value is False,
        "pretraining_tp": lambda value: value == 1,
    },
    transformer_config=decoder_config,
    rules=(*DECODER_RULES, *mlp_rules(MCORE + "mlp.", LAYER + "mlp.", "intermediate_size")),
    derived=HEAD_DIM_OF_HIDDEN,
)
