"""What a sample costs to train on, from the architecture alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_vespo.models.hf_config import Architecture


def sample_cost(architecture: Architecture) -> Callable[[int], float]:
    """FLOPs of one forward pass over one packed sequence, as a function of its length.

    A sequence of n tokens costs 2 * P * n for the matrix products with the P weights that work on a token (attention
    projections, the dense MLP or the router with the chosen and the shared experts, output layer) and
    2 * layers * heads * head_dim * n^2 for its attention: query times key and probability times value are
    2 * n^2 * head_dim each, and the causal mask leaves half; where keys and values have heads of two sizes, head_dim is
    their mean. A multiply-add counts as 2. Norms, rotary embedding and the embedding lookup are left out.

    The backward pass costs twice as much of both parts, so the ratio of two samples is the same for training.

    For the sizes of Qwen3-30B-A3B (48 layers, hidden 2048, 32 heads of 128 with 4 key-value heads, 8 experts of 768 a
    token, vocabulary 151,936) P is 3.04e9 and a sequence costs 6.08e9 * n + 3.93e5 * n^2: attention is half of it at
    15,471 tokens, and one sequence of 16,384 costs 1.9 times as much as sixteen of 1,024.

    Args:
        architecture: A model's architecture.

    Returns:
        Tokens of a sequence -> FLOPs.
    """
    facts = architecture.transformer_config()
    layers, hidden = facts["num_layers"], facts["hidden_size"]
    attention, per_pair = _attention(facts)
    with_experts = sum(facts.get("moe_layer_freq", [1] * layers)) if "num_moe_experts" in facts else 0
    weights = layers * attention + (layers - with_experts) * 3 * hidden * facts["ffn_hidden_size"]
    if with_experts:
        weights += with_experts * _experts(facts)
    per_token = 2.0 * (weights + hidden * architecture.vocab_size)

    def cost(length: int) -> float:
        return length * (per_token + layers * per_pair * length)

    return cost


def _attention(facts: dict[str, Any]) -> tuple[int, float]:
    """Weights of a layer's attention, and FLOPs for each pair of its tokens."""
    hidden, heads = facts["hidden_size"], facts["num_attention_heads"]
    if facts.get("multi_latent_attention"):
        rotary, value = facts["qk_pos_emb_head_dim"], facts["v_head_dim"]
        key = facts["qk_head_dim"] + rotary
        queries = facts["q_lora_rank"] * (hidden + heads * key)
        keys = hidden * (facts["kv_lora_rank"] + rotary)
        keys += facts["kv_lora_rank"] * heads * (facts["qk_head_dim"] + value)
        return queries + keys + heads * value * hidden, float(heads * (key + value))
    queries = heads * facts["kv_channels"]
    keys = facts["num_query_groups"] * facts["kv_channels"]
    # Query and output projections, key and value projections.
    return hidden * (2 * queries + 2 * keys), 2.0 * queries


def _experts(facts: dict[str, Any]) -> int:
    """Weights of a layer's router, and gate, up and down projections of the experts that work on a token."""
    shared = facts.get("moe_shared_expert_intermediate_size") or 0
    chosen = facts["moe_router_topk"] * facts["moe_ffn_hidden_size"]
    return facts["hidden_size"] * (facts["num_moe_experts"] + 3 * (chosen + shared))
