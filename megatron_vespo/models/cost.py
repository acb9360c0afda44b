"""What a sample costs to train on, from the architecture alone."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vespo.models.hf_config import Architecture


def sample_cost(architecture: Architecture) -> Callable[[int], float]:
    """FLOPs of one forward pass over one packed sequence, as a function of its length.

    A sequence of n tokens costs 2 * P * n for the matrix products with the P weights that work on a token (attention
    projections, the dense MLP or the router and the chosen experts, output layer) and 2 * layers * heads * head_dim *
    n^2 for its attention: query times key and probability times value are 2 * n^2 * head_dim each, and the causal mask
    leaves half. A multiply-add counts as 2. Norms, rotary embedding and the embedding lookup are left out.

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
    queries = facts["num_attention_heads"] * facts["kv_channels"]
    keys = facts["num_query_groups"] * facts["kv_channels"]
    # Query and output projections, key and value projections.
    attention = hidden * (2 * queries + 2 * keys)
    # Gate, up and down projections of each MLP that works on a token.
    if "num_moe_experts" in facts:
        mlp = hidden * (facts["num_moe_experts"] + 3 * facts["moe_router_topk"] * facts["moe_ffn_hidden_size"])
    else:
        mlp = hidden * 3 * facts["ffn_hidden_size"]
    per_token = 2.0 * (layers * (attention + mlp) + hidden * architecture.vocab_size)
    per_pair = 2.0 * layers * queries

    def cost(length: int) -> float:
        return length * (per_token + per_pair * length)

    return cost
