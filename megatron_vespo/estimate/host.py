"""Memory of the hosts, and disk."""

from __future__ import annotations

from megatron_vespo.config import Config
from megatron_vespo.estimate.cluster import Cluster
from megatron_vespo.estimate.parameters import Count
from megatron_vespo.estimate.trainer import StateBytes, TrainerMemory

# What rank 0 holds of a push at a time, in buckets (weight_sync.bucket_megabytes).
_BUCKETS = 3


def host_memory(config: Config, count: Count, memory: TrainerMemory, cluster: Cluster) -> dict[str, float]:
    """Bytes in the memory of the host of rank 0, by what they are for; of other hosts what is not rank 0's."""
    ranks = cluster.ranks_per_node
    uses: dict[str, float] = {}
    if config.placement.mode == "colocate":
        uses["weights and optimizer while generating"] = ranks * offloaded(memory)
    if memory.host_optimizer:
        uses["optimizer (optimizer_cpu_offload)"] = ranks * memory.host_optimizer
    if config.algorithm.kl_coef:
        uses["reference policy and the policy beside it"] = 2 * ranks * memory.weights
    if config.checkpoint.asynchronous and config.checkpoint.interval:
        uses["copy of an asynchronous checkpoint"] = ranks * (memory.weights + memory.optimizer)
    if config.samples_from_server and config.weight_sync.transport == "delta":
        uses["rank 0: weights of the last push"] = StateBytes.of(config.megatron).weight * count.total
    if config.samples_from_server:
        uses["rank 0: buckets of a push"] = _BUCKETS * config.weight_sync.bucket_megabytes * 2**20
    return uses


def offloaded(memory: TrainerMemory) -> float:
    """Bytes of a rank that wait in host memory while a shared GPU generates; gradients are dropped."""
    return memory.weights + memory.optimizer


def disk(config: Config, count: Count) -> dict[str, float]:
    """Bytes on disk, by what they are for."""
    each = StateBytes.of(config.megatron)
    # Checkpoints hold float32 master weights and moments whatever their layout on the ranks.
    checkpoint = (each.weight + 4 + each.moments) * count.total
    return {
        "disk: model, and each folder in hf/": each.weight * count.total,
        f"disk: {config.checkpoint.keep} checkpoints, and one being saved": checkpoint * (config.checkpoint.keep + 1),
    }
