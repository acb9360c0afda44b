"""What the Llama-like decoders have in common: config fields and rows of the weight table.

Pre-norm RMSNorm, grouped-query attention with rotary positions, gated SiLU MLP: transformers
``models/llama/modeling_llama.py``, from which the other families are derived.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_vespo.models.layouts import HfConfig, Rule, columns_of, gate_up, grouped_qkv, vocabulary, whole

LAYER = "model.layers.{layer}."
MCORE = "decoder.layers.{layer}."

DECODER_RULES = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary("vocab_size")),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), whole),
    Rule("output_layer.weight", ("lm_head.weight",), vocabulary("vocab_size")),
    Rule(MCORE + "input_layernorm.weight", (LAYER + "input_layernorm.weight",), whole),
    Rule(MCORE + "pre_mlp_layernorm.weight", (LAYER + "post_attention_layernorm.weight",), whole),
    Rule(
        MCORE + "self_attention.linear_qkv.weight",
        tuple(LAYER + f"self_attn.{name}_proj.weight" for name in "qkv"),
        grouped_qkv,
    ),
    Rule(
        MCORE + "self_attention.linear_proj.weight",
        (LAYER + "self_attn.o_proj.weight",),
        columns_of("num_attention_heads", "head_dim"),
    ),
)
QKV_BIAS_RULE = Rule(
    MCORE + "self_attention.linear_qkv.bias",
    tuple(LAYER + f"self_attn.{name}_proj.bias" for name in "qkv"),
    grouped_qkv,  # 1-D, its rows as the weight's
)


def mlp_rules(
    mcore: str, hf: str, size: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Rule, ...]:
    """Rows of a gated MLP.

    Args:
        mcore: Megatron prefix.
        hf: HF prefix.
        size: Config field that counts its inner rows.
        names: HF names of gate, up and down projection.
    """
    gate, up, down = (f"{hf}{name}.weight" for name in names)
    return (
        Rule(mcore + "linear_fc1.weight", (gate, up), gate_up(size)),
        Rule(mcore + "linear_fc2.weight", (down,), columns_of(size)),
    )


def decoder_config(config: HfConfig) -> dict[str, Any]:
    """What the modelling code of all has fixed."""
    return {
        "normalization": "RMSNorm",
        "qk_layernorm": False,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "gated_linear_unit": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "rms_norm_eps": "layernorm_epsilon",
}
REQUIRED = frozenset({"vocab_size", "rope_theta", "max_position_embeddings", "tie_word_embeddings"})
FIXED: dict[str, Callable[[Any], bool]] = {
    "hidden_act": lambda value: value == "silu",
    "attention_dropout": lambda value: value == 0,
    "rope_scaling": lambda value: value is None,
    "layer_types": lambda value: value is None or set(value) == {"full_attention"},
}
HEAD_DIM_OF_HIDDEN: dict[str, Callable[[HfConfig], Any]] = {
    "head_dim": lambda config: config["hidden_size"] // config["num_attention_heads"]
}
"""For ``Family.derived``, where the modelling code takes an absent ``head_dim`` so."""
