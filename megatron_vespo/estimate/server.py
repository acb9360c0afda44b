"""Memory of an SGLang server: weights, keys and values, and how many sequences fit at once."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vespo.config import Config
from megatron_vespo.estimate.assumptions import Assumptions
from megatron_vespo.estimate.devices import Device
from megatron_vespo.estimate.parameters import Count
from megatron_vespo.plan.sizes import Facts
from megatron_vespo.rollout.placement import devices_per_server, server_size

# SGLang computes its own from the device's memory and the size of its CUDA graphs; about this for large devices.
_DEFAULT_FRACTION = 0.85


@dataclass(frozen=True)
class ServerMemory:
    """One server.

    Attributes:
        devices: GPUs.
        replicas: Schedulers with keys and values of their own.
        weights: Bytes on each GPU.
        room: Bytes of keys and values on each GPU.
        budget: Bytes on each GPU for weights, keys and values: ``sglang.mem_fraction_static`` of its memory.
        token: Bytes of keys and values of one token on each GPU.
        read: Bytes of weights that a decoding step reads on each GPU when every expert is wanted.
        read_experts: Of these, the experts'.
    """

    devices: int
    replicas: int
    weights: float
    room: float
    budget: float
    token: float
    read: float
    read_experts: float

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values fit into the server."""
        return max(int(self.room // self.token), 0) * self.replicas


def server_memory(config: Config, facts: Facts, count: Count, device: Device, assume: Assumptions) -> ServerMemory:
    """Memory of one server on each of its GPUs.

    Args:
        config: Configuration.
        facts: The model.
        count: Its parameters.
        device: The GPU.
        assume: What the trainer keeps of a shared GPU.
    """
    sglang = config.sglang
    tensor, stages = server_size(sglang, "tp_size"), server_size(sglang, "pp_size")
    attention_replicas = int(sglang.get("attn_dp_size") or 1)
    if sglang.get("enable_dp_attention"):
        attention_replicas = server_size(sglang, "dp_size")
    attention_ranks = tensor // attention_replicas
    linear = 1 if sglang.get("quantization") else 2
    experts = linear * count.experts / (tensor * stages)
    dense = (linear * count.split / attention_ranks + 2 * count.whole) / stages + 2 * count.embedding / tensor
    weights = experts + dense
    fraction = float(sglang.get("mem_fraction_static") or _DEFAULT_FRACTION)
    shared = assume.leftover_gib if config.placement.mode == "colocate" else 0
    budget = (fraction * device.memory_gib - shared) * 2**30
    return ServerMemory(
        devices=devices_per_server(sglang),
        replicas=devices_per_server(sglang) // (tensor * stages) * attention_replicas,
        weights=weights,
        room=budget - weights,
        budget=budget,
        token=_token_bytes(config, facts, attention_ranks) / stages,
        read=weights,
        read_experts=experts,
    )


def _token_bytes(config: Config, facts: Facts, attention_ranks: int) -> float:
    """Keys and values of one token in all layers, on a GPU; ranks beyond the key-value heads hold copies."""
    t = facts.transformer
    element = 1 if "fp8" in str(config.sglang.get("kv_cache_dtype", "auto")) else 2
    if t.get("multi_latent_attention"):
        return facts.layers * element * (t["kv_lora_rank"] + t["qk_pos_emb_head_dim"])
    return facts.layers * element * 2 * t["kv_channels"] * max(facts.query_groups / attention_ranks, 1)
