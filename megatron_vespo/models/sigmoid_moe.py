"""What DeepSeek-V3 and GLM-4.5 have in common: dense layers first, then experts behind a sigmoid router.

A router chooses by sigmoid(logit) + correction bias, within the best groups of experts, and weighs the chosen by
sigmoid(logit) alone, normalised and scaled; a shared expert, without a gate, works on every token. The bias balances
the experts' load without an auxiliary loss (arXiv 2408.15664): it has no gradient and stays float32.

Architecture: transformers ``models/deepseek_v3/modeling_deepseek_v3.py`` (``DeepseekV3TopkRouter``,
``DeepseekV3MoE``), from which ``models/glm4_moe/modeling_glm4_moe.py`` is derived.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_vespo.models.decoder import LAYER, MCORE, REQUIRED, mlp_rules
from megatron_vespo.models.layouts import HfConfig, Rule, columns_of, gate_up, whole

# Experts whose scores make the score of their group.
_EXPERTS_OF_A_GROUP = 2

MOE_FIELDS = {
    "n_routed_experts": "num_moe_experts",
    "num_experts_per_tok": "moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "routed_scaling_factor": "moe_router_topk_scaling_factor",
}
MOE_REQUIRED = REQUIRED | {"first_k_dense_replace", "n_shared_experts", "n_group", "topk_group", "norm_topk_prob"}
MOE_FIXED: dict[str, Callable[[Any], bool]] = {
    "norm_topk_prob": lambda value: value is True,  # Megatron normalises sigmoid scores, always
    "n_shared_experts": lambda value: value >= 1,
    # Multi-token prediction layers follow the others; they are left out.
    "num_nextn_predict_layers": lambda value: True,
}
MOE_RULES = (
    *mlp_rules(MCORE + "mlp.", LAYER + "mlp.", "intermediate_size"),
    Rule(MCORE + "mlp.router.weight", (LAYER + "mlp.gate.weight",), whole),
    Rule(MCORE + "mlp.router.expert_bias", (LAYER + "mlp.gate.e_score_correction_bias",), whole),
    *mlp_rules(MCORE + "mlp.experts.{expert}.", LAYER + "mlp.experts.{expert}.", "moe_intermediate_size"),
    Rule(
        MCORE + "mlp.shared_experts.linear_fc1.weight",
        (LAYER + "mlp.shared_experts.gate_proj.weight", LAYER + "mlp.shared_experts.up_proj.weight"),
        gate_up("moe_intermediate_size", "n_shared_experts"),
    ),
    Rule(
        MCORE + "mlp.shared_experts.linear_fc2.weight",
        (LAYER + "mlp.shared_experts.down_proj.weight",),
        columns_of("moe_intermediate_size", "n_shared_experts"),
    ),
)


def moe_config(config: HfConfig) -> dict[str, Any]:
    """TransformerConfig fields of the experts and their router."""
    dense, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
    grouped = config["n_group"] > 1
    return {
        "moe_layer_freq": [int(layer >= dense) for layer in range(layers)],
        "moe_shared_expert_intermediate_size": config["moe_intermediate_size"] * config["n_shared_experts"],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": config["n_group"] if grouped else None,
        "moe_router_group_topk": config["topk_group"] if grouped else None,
    }


def moe_problem(config: HfConfig) -> str | None:
    """What Megatron's router would compute otherwise than the modelling code."""
    chosen, groups = config["num_experts_per_tok"], config["topk_group"]
    if chosen < 2:
        return f"num_experts_per_tok={chosen} is not supported: the weight of a single expert would not be normalised"
    if config["n_group"] > 1 and chosen // groups != _EXPERTS_OF_A_GROUP:
        return (
            f"num_experts_per_tok={chosen} with topk_group={groups} is not supported: a group's score is the sum of its"
            f" best {_EXPERTS_OF_A_GROUP} experts, but Megatron would take {chosen // groups}"
        )
    if config["first_k_dense_replace"] >= config["num_hidden_layers"]:
        return f"first_k_dense_replace={config['first_k_dense_replace']} leaves no layer with experts"
    return None


def is_extra_layer(config: HfConfig, name: str) -> bool:
    """Whether an HF tensor is of a multi-token prediction layer: these are numbered on from ``num_hidden_layers``."""
    layer = name.removeprefix("model.layers.").split(".")[0]
    extra = config.get("num_nextn_predict_layers") or 0
    first = config["num_hidden_layers"]
    return name.startswith("model.layers.") and layer.isdecimal() and first <= int(layer) < first + extra
