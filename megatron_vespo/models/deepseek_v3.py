"""DeepSeek-V3, R1 and V3.1 (``deepseek_v3``): config facts and weight table.

Architecture: transformers ``models/deepseek_v3/modeling_deepseek_v3.py``; multi-head latent attention is that of
arXiv 2405.04434. Queries, and keys with values, are projected down, normalised and up again, head by head; a part of
each head has rotary positions, whose key part all heads share. The pairs that are rotated lie side by side in the
checkpoint and in Megatron alike (models/common/embeddings/rope_utils.py, ``mla_rotary_interleaved``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_vespo.models.decoder import DECODER_RULES, FIELDS, FIXED, LAYER, MCORE, decoder_config
from megatron_vespo.models.hf_config import Family
from megatron_vespo.models.layouts import HfConfig, Layout, MakeLayout, Piece, Rule, columns_of, whole
from megatron_vespo.models.sigmoid_moe import (
    MOE_FIELDS,
    MOE_FIXED,
    MOE_REQUIRED,
    MOE_RULES,
    is_extra_layer,
    moe_config,
    moe_problem,
)

_ATTENTION, _HF_ATTENTION = MCORE + "self_attention.", LAYER + "self_attn."


def _rows(count: Callable[[HfConfig], int]) -> MakeLayout:
    """So many rows in order, split over the ranks; or whole on each, as Transformer Engine has down-projections."""

    def layout(config: HfConfig, shards: int, rows: int) -> Layout:
        total = count(config)
        return Layout(0, (Piece(0, 0, 0, total),), sharded=rows != total)

    return layout


_ATTENTION_RULES = (
    Rule(
        _ATTENTION + "linear_q_down_proj.weight",
        (_HF_ATTENTION + "q_a_proj.weight",),
        _rows(lambda config: config["q_lora_rank"]),
    ),
    Rule(_ATTENTION + "q_layernorm.weight", (_HF_ATTENTION + "q_a_layernorm.weight",), whole),
    Rule(
        _ATTENTION + "linear_q_up_proj.weight",
        (_HF_ATTENTION + "q_b_proj.weight",),
        _rows(lambda c: c["num_attention_heads"] * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])),
    ),
    Rule(
        _ATTENTION + "linear_kv_down_proj.weight",
        (_HF_ATTENTION + "kv_a_proj_with_mqa.weight",),
        _rows(lambda config: config["kv_lora_rank"] + config["qk_rope_head_dim"]),
    ),
    Rule(_ATTENTION + "kv_layernorm.weight", (_HF_ATTENTION + "kv_a_layernorm.weight",), whole),
    Rule(
        _ATTENTION + "linear_kv_up_proj.weight",
        (_HF_ATTENTION + "kv_b_proj.weight",),
        _rows(lambda config: config["num_attention_heads"] * (config["qk_nope_head_dim"] + config["v_head_dim"])),
    ),
    Rule(
        _ATTENTION + "linear_proj.weight",
        (_HF_ATTENTION + "o_proj.weight",),
        columns_of("num_attention_heads", "v_head_dim"),
    ),
)

# HF field of the scaling -> Megatron's. All but the last two must be there.
_YARN = {
    "factor": "rotary_scaling_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
_MSCALES = {"mscale", "mscale_all_dim"}


def _honours_rope(scaling: dict[str, Any] | None) -> bool:
    """Plain, or YaRN with the fields that the published configs have; with one mscale alone readers disagree."""
    if scaling is None:
        return True
    given = scaling.keys() - {"rope_type"}
    scales = given & _MSCALES
    return (
        scaling["rope_type"] == "yarn"
        and _YARN.keys() - _MSCALES <= given <= _YARN.keys()
        and all(isinstance(scaling[name], int | float) for name in given)
        and (not scales or (scales == _MSCALES and all(scaling[name] > 0 for name in scales)))
    )


def _rope_config(config: HfConfig) -> dict[str, Any]:
    """Megatron's rotary fields, all of them: its defaults are those of one DeepSeek model."""
    plain = {"rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    facts = {"rotary_base": config["rope_theta"], "rotary_percent": 1.0, **plain}
    scaling = config.get("rope_scaling")
    if scaling is None:
        return {**facts, "rope_type": "rope"}
    return {**facts, "rope_type": "yarn", **{_YARN[name]: scaling[name] for name in scaling if name in _YARN}}


def _config(config: HfConfig) -> dict[str, Any]:
    return {
        **decoder_config(config),
        **moe_config(config),
        **_rope_config(config),
        "multi_latent_attention": True,
        "qk_layernorm": True,
    }


def _problem(config: HfConfig) -> str | None:
    heads, key_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    if key_heads not in (None, heads):
        return f"num_key_value_heads={key_heads} is not supported: latent attention has {heads} heads of each kind"
    return moe_problem(config)


_GROUPED_FIELDS = {"num_key_value_heads", "head_dim"}


def _ignored(value: Any) -> bool:
    return True


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    fields={
        **{theirs: ours for theirs, ours in FIELDS.items() if theirs not in _GROUPED_FIELDS},
        **MOE_FIELDS,
        "q_lora_rank": "q_lora_rank",
        "kv_lora_rank": "kv_lora_rank",
        "qk_nope_head_dim": "qk_head_dim",
        "qk_rope_head_dim": "qk_pos_emb_head_dim",
        "v_head_dim": "v_head_dim",
    },
    required=MOE_REQUIRED,
    fixed={
        **FIXED,
        **MOE_FIXED,
        "rope_scaling": _honours_rope,
        "attention_bias": lambda value: value is False,
        # The norms inside the attention have this eps whatever the config says, Megatron's the one of all norms.
        "rms_norm_eps": lambda value: value == 1e-6,
        "rope_interleave": lambda value: value is True,
        "moe_layer_freq": lambda value: value == 1,
        "scoring_func": lambda value: value == "sigmoid",
        "topk_method": lambda value: value == "noaux_tc",
        "pretraining_tp": lambda value: value == 1,
        "num_key_value_heads": _ignored,  # see _problem
        # Computed from the others by the config class.
        "head_dim": _ignored,
        "qk_head_dim": _ignored,
        # Of the published training and serving code alone.
        "aux_loss_alpha": _ignored,
        "seq_aux": _ignored,
        "ep_size": _ignored,
    },
    transformer_config=_config,
    rules=(
        *(rule for rule in DECODER_RULES if not rule.mcore.startswith(_ATTENTION)),
        *_ATTENTION_RULES,
        *MOE_RULES,
    ),
    problem=_problem,
    left_out=is_extra_layer,
)
