"""The router's auxiliary losses as Megatron noted them down during the forward passes of a minibatch."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vespo import parallel, platform

# moe_router_load_balancing_type -> Megatron's name of what it notes (transformer/moe/router.py).
_NAMES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
_Z_LOSS = "z_loss"


def router_loss_names(config: TransformerConfig) -> list[str]:
    """Names of the auxiliary losses that are on, the same on every rank."""
    kinds = config.moe_router_load_balancing_type
    names = [_NAMES[kind] for kind in ([kinds] if isinstance(kinds, str) else kinds) if kind in _NAMES]
    return names + ([_Z_LOSS] if config.moe_z_loss_coeff else [])


def router_layers(config: TransformerConfig) -> int:
    """Layers with experts."""
    frequency = config.moe_layer_freq
    return -(-config.num_layers // frequency) if isinstance(frequency, int) else sum(frequency)


def take_router_losses(config: TransformerConfig, num_microbatches: int) -> dict[str, float]:
    """Mean over layers and microbatches of each loss, without its coefficient; forgets them. A collective if any is on.

    Megatron's own report averages with an operation that gloo does not have.
    """
    names = router_loss_names(config)
    if not config.num_moe_experts or not names:
        return {}
    tracker = get_moe_metrics_tracker()
    sums = torch.zeros(len(names), dtype=torch.float32, device=platform.device())
    for number, name in enumerate(names):
        if name in tracker.metrics:
            entry = tracker.metrics[name]
            # Ranks of reduce_group hold parts of one value; without one, all tensor-parallel ranks hold the same.
            copies = parallel.tensor_parallel_size() if entry.reduce_group is None else 1
            replicas = parallel.data_parallel_size() if entry.needs_dp_avg else 1
            sums[number] = entry.values.sum() / (copies * replicas)
    tracker.clear()
    sums = parallel.all_reduce_sum(sums) / (router_layers(config) * num_microbatches)
    return dict(zip(names, sums.tolist(), strict=True))
