"""How many parameters a model has, all of them and on each rank, counted from the architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vespo.plan.sizes import Facts, Parallelism


@dataclass(frozen=True, slots=True)
class Count:
    """Parameters by how ranks share them.

    Attributes:
        split: Of dense weights that tensor parallelism splits, embeddings apart.
        whole: Of dense weights that every tensor-parallel rank holds: norms and routers.
        embedding: Of embedding and output layer, which tensor parallelism splits.
        experts: Of all experts.
    """

    split: float = 0
    whole: float = 0
    embedding: float = 0
    experts: float = 0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.split + other.split,
            self.whole + other.whole,
            self.embedding + other.embedding,
            self.experts + other.experts,
        )

    @property
    def dense(self) -> float:
        """All that is not of experts."""
        return self.split + self.whole + self.embedding

    @property
    def total(self) -> float:
        """All."""
        return self.dense + self.experts

    def on_rank(self, sizes: Parallelism) -> Count:
        """Of one rank, where this is a pipeline stage's."""
        return Count(
            self.split / sizes.tensor,
            self.whole,
            self.embedding / sizes.tensor,
            self.experts / (sizes.expert * sizes.expert_tensor),
        )


def count_layer(facts: Facts, has_experts: bool) -> Count:
    """Of one layer."""
    t = facts.transformer
    hidden = t["hidden_size"]
    count = _attention(t, facts.query_groups) + Count(whole=2 * hidden)  # the two norms
    if not has_experts:
        return count + Count(split=3 * hidden * t["ffn_hidden_size"])
    shared = t.get("moe_shared_expert_intermediate_size") or 0
    gate = hidden if t.get("moe_shared_expert_gate") else 0
    return count + Count(
        split=3 * hidden * shared,
        whole=hidden * facts.experts + gate,
        experts=facts.experts * 3 * hidden * t["moe_ffn_hidden_size"],
    )


def _attention(t: Mapping[str, Any], groups: int) -> Count:
    hidden, heads = t["hidden_size"], t["num_attention_heads"]
    if t.get("multi_latent_attention"):
        rotary, value, queries, keys = (
            t[name] for name in ("qk_pos_emb_head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank")
        )
        down = hidden * (queries + keys + rotary)
        up = queries * heads * (t["qk_head_dim"] + rotary) + keys * heads * (t["qk_head_dim"] + value)
        return Count(split=up + heads * value * hidden, whole=down + queries + keys)
    size = t["kv_channels"]
    rows = (heads + 2 * groups) * size
    bias = rows if t.get("add_qkv_bias") else 0
    norms = 2 * size if t.get("qk_layernorm") else 0
    return Count(split=rows * hidden + bias + heads * size * hidden, whole=norms)


def count_model(facts: Facts, tied: bool) -> Count:
    """Of the whole model, as it is published; ``tied``: embedding and output layer are one."""
    hidden = facts.transformer["hidden_size"]
    count = Count(whole=hidden, embedding=(1 if tied else 2) * facts.vocab_size * hidden)
    for has_experts in facts.moe_layers:
        count += count_layer(facts, has_experts)
    return count


def count_active(facts: Facts, tied: bool) -> float:
    """Parameters that work on a token: all but those of the experts it does not go to."""
    count = count_model(facts, tied)
    share = facts.transformer["moe_router_topk"] / facts.experts if facts.experts else 0
    return count.dense + count.experts * share


def count_stages(facts: Facts, tied: bool, split: list[list[int]], padded_vocab: int) -> list[Count]:
    """Of each pipeline stage, all its ranks together: replicas once, vocabulary padded.

    Args:
        facts: The model.
        tied: Whether the output layer is the embedding; the last of several stages holds a copy of it then.
        split: Layers of each chunk of each stage.
        padded_vocab: Rows of the embedding with padding.
    """
    embedding = Count(embedding=padded_vocab * facts.transformer["hidden_size"])
    counts = [Count() for _ in split]
    for stage, layer_numbers in enumerate(layers_of_stages(split)):
        for layer in layer_numbers:
            counts[stage] += count_layer(facts, facts.moe_layers[layer])
    counts[0] += embedding
    if not tied or len(split) > 1:
        counts[-1] += embedding
    counts[-1] += Count(whole=facts.transformer["hidden_size"])
    return counts


def layers_of_stages(split: list[list[int]]) -> list[list[int]]:
    """Numbers of the layers of each stage: chunk after chunk, each dealt over all stages."""
    numbers: list[list[int]] = [[] for _ in split]
    layer = 0
    for chunk in range(len(split[0])):
        for stage, chunks in enumerate(split):
            numbers[stage] += range(layer, layer + chunks[chunk])
            layer += chunks[chunk]
    return numbers
