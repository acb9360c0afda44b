"""Memory of what the forward pass keeps for the backward pass.

Counted as in arXiv 2205.05198 (Korthikanti et al., section 4), tensor by tensor, for the layers that are built here:
RMSNorm, grouped-query attention that keeps no matrix of scores, gated SiLU, experts, no dropout. Tensor parallelism
divides what lies between the two linears of a block, sequence parallelism the rest as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vespo.plan.sizes import Facts, Parallelism


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of logits of the log-probability head, as ``policy.tiles`` has it, which takes long to import.

    Attributes:
        elements: Logits where rows are few.
        least_width: Vocabulary entries where rows are many.
        beside: Bytes of each logit beside the product itself, in the forward pass and in the backward pass.
        shared: Whether the product that is added to the hidden gradient lies where the tile lies.
    """

    elements: int
    least_width: int
    beside: tuple[int, int]
    shared: bool


TILES = {"cpu": Tile(2**20, 2048, (8, 4), True), "cuda": Tile(2**27, 4096, (0, 0), False)}
"""By type of device, for bfloat16."""


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes of one token in one layer, on one rank.

    Attributes:
        input: Its input, all that is kept where the layer is computed again.
        kept: What is kept with the recomputation that is configured inside the layer, the input included.
    """

    input: float
    kept: float


@dataclass(frozen=True, slots=True)
class Recompute:
    """What Megatron computes again in the backward pass instead of keeping it."""

    full: bool
    method: str
    layers: int
    modules: frozenset[str]

    @classmethod
    def of(cls, megatron: Mapping[str, Any]) -> Recompute:
        """Read a ``megatron:`` section."""
        granularity = megatron.get("recompute_granularity")
        modules = megatron.get("recompute_modules") or ["core_attn"]
        return cls(
            granularity == "full",
            megatron.get("recompute_method") or "uniform",
            int(megatron.get("recompute_num_layers") or 1),
            frozenset(modules) if granularity == "selective" else frozenset(),
        )


def layer_memory(
    facts: Facts, sizes: Parallelism, megatron: Mapping[str, Any], has_experts: bool, element: int, imbalance: float
) -> LayerMemory:
    """Bytes of one token in one layer; ``imbalance``: tokens of the busiest expert-parallel rank over the mean."""
    hidden, recompute = facts.transformer["hidden_size"], Recompute.of(megatron)
    sequence = sizes.tensor if megatron.get("sequence_parallel") else 1
    stream = element * hidden / sequence
    norms_out = 0 if "layernorm" in recompute.modules else 2 * stream
    block = _experts if has_experts else _mlp
    kept = 2 * stream + norms_out + _attention(facts, sizes, element)
    kept += block(facts, sizes, megatron, recompute.modules, element, imbalance / sequence)
    return LayerMemory(stream, kept)


def _attention(facts: Facts, sizes: Parallelism, element: int) -> float:
    t, tensor = facts.transformer, sizes.tensor
    heads = t["num_attention_heads"] / tensor
    if t.get("multi_latent_attention"):
        keys = t["qk_head_dim"] + t["qk_pos_emb_head_dim"]
        latent = t["q_lora_rank"] + t["kv_lora_rank"]
        return element * (heads * (2 * keys + 2 * t["v_head_dim"]) + 2 * latent) + 4 * heads
    groups = max(facts.query_groups / tensor, 1)
    size = t["kv_channels"]
    normed = (heads + groups) * size if t.get("qk_layernorm") else 0
    # Queries, keys and values; before their norms too; the output; the log-sum-exp of each row in float32.
    return element * ((heads + 2 * groups) * size + normed + heads * size) + 4 * heads


def _gated(width: float, megatron: Mapping[str, Any], weighted: bool) -> float:
    """Elements between the two linears: both halves and their product; not fused, what is made on the way as well.

    These are SiLU of one half, the other half plus an offset of 0, and the product before it is weighted.
    """
    if megatron.get("bias_activation_fusion"):
        return 3 * width
    return (6 if weighted else 5) * width


def _mlp(
    facts: Facts, sizes: Parallelism, megatron: Mapping[str, Any], modules: frozenset[str], element: int, share: float
) -> float:
    if "mlp" in modules:
        return 0
    return element * _gated(facts.transformer["ffn_hidden_size"] / sizes.tensor, megatron, weighted=False)


def _experts(
    facts: Facts, sizes: Parallelism, megatron: Mapping[str, Any], modules: frozenset[str], element: int, share: float
) -> float:
    t = facts.transformer
    shared = (t.get("moe_shared_expert_intermediate_size") or 0) / sizes.tensor
    kept = element * _gated(shared, megatron, weighted=False)
    if "moe" in modules:
        return 0 if "shared_experts" in modules else kept
    width = t["moe_ffn_hidden_size"] / sizes.expert_tensor
    inner = _gated(width, megatron, weighted=True) - (width if "moe_act" in modules else 0)
    routed = t["moe_router_topk"] * share * sizes.expert_tensor
    # Each routed copy of the token, and what the experts make of it; logits and probabilities of the router.
    return kept + routed * element * (t["hidden_size"] + inner) + 2 * 4 * facts.experts / sizes.tensor


def in_flight(sizes: Parallelism, stage: int) -> float:
    """Microbatches of a whole stage whose activations are alive at once (pipeline_parallel/schedules.py:930-943)."""
    behind = sizes.pipeline - stage - 1
    if sizes.virtual == 1:
        return behind + 1
    return (2 * behind + (sizes.virtual - 1) * sizes.pipeline + 1) / sizes.virtual


def stage_activations(
    layers: list[LayerMemory], tokens: int, alive: float, recompute: Recompute, chunks: int
) -> tuple[float, float]:
    """Bytes of a stage: of all microbatches in flight, and of the one layer that is worked on.

    Args:
        layers: Of the stage.
        tokens: Of a microbatch.
        alive: Microbatches in flight.
        recompute: What is computed again.
        chunks: Virtual stages.
    """
    if not layers:
        return 0.0, 0.0
    worked_on = max(layer.kept for layer in layers)
    if not recompute.full:
        return alive * tokens * sum(layer.kept for layer in layers), tokens * worked_on
    if recompute.method == "block":
        # So many layers of each chunk are computed again, the others are kept.
        per_chunk = max(len(layers) // chunks, 1)
        again = [number % per_chunk < recompute.layers for number in range(len(layers))]
        kept = sum(layer.input if new else layer.kept for layer, new in zip(layers, again, strict=True))
        return alive * tokens * kept, 2 * tokens * worked_on
    kept = sum(layer.input for layer in layers[:: recompute.layers])
    return alive * tokens * kept, (recompute.layers + 1) * tokens * worked_on


def head_memory(rows: int, hidden: int, vocab_of_rank: int, element: int, device: str = "cuda") -> float:
    """Bytes of the log-probability head at its highest: the larger of the two passes of ``policy.logprobs``.

    Args:
        rows: Response tokens of a microbatch.
        hidden: Width of the model.
        vocab_of_rank: Rows of the output weight on a rank.
        element: Bytes of a hidden state's element.
        device: Type of device.
    """
    kind = TILES[device]
    tile = rows * min(max(kind.elements // max(rows, 1), kind.least_width), vocab_of_rank)
    states = rows * hidden
    forward, backward = ((element + beside) * tile for beside in kind.beside)
    if kind.shared:
        backward = element * tile + max(kind.beside[1] * tile, 4 * states)
    # The hidden states; and going back their gradient, summed in float32, a tile's share of it, and the weight's.
    return element * states + max(forward, backward + (4 + element) * states + element * vocab_of_rank * hidden)
