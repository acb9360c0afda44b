"""Where this rank's routers choose other experts than the sampler's did.

Each rank counts for the layers of its pipeline stages and the positions that it holds; the sum over ranks is of all
layers of all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vespo import parallel
from megatron_vespo.policy.figures import Sums
from megatron_vespo.policy.packing import PackedBatch
from megatron_vespo.policy.router_losses import router_layers
from megatron_vespo.types import UNKNOWN_EXPERT, FloatArray, Sample


class FlipCounter:
    """Counts, of each response token, the sampler's experts that the routers of this rank did not choose.

    Args:
        chunks: This rank's chunks of the model.
        sums: Where the counts go.
    """

    def __init__(self, chunks: Sequence[GPTModel], sums: Sums) -> None:
        self._sums = sums
        self._split = chunks[0].config.sequence_parallel
        # Where the sequence is not split, all tensor-parallel ranks route the same positions.
        counts = self._split or parallel.tensor_parallel_rank() == 0
        modules = (module for chunk in chunks for module in chunk.modules())
        self._routers = [module for module in modules if isinstance(module, TopKRouter) and counts]

    @contextmanager
    def during(self, batch: PackedBatch) -> Iterator[None]:
        """Around a microbatch's forward pass, so that what is computed again in the backward pass is not counted."""
        hooks = [router.register_forward_hook(partial(self._count, batch)) for router in self._routers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _count(
        self, batch: PackedBatch, router: TopKRouter, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]
    ) -> None:
        assert batch.routed_experts is not None
        routing_map = outputs[1]  # [positions here, experts]
        here = len(routing_map)
        rows = batch.rows - here * parallel.tensor_parallel_rank() if self._split else batch.rows
        nearest = rows.clamp(0, here - 1)  # what lies elsewhere is counted there; selecting would make the host wait
        theirs = batch.routed_experts[:, router.layer_number - 1].long().clamp(min=0)
        missed = ~routing_map.index_select(0, nearest).gather(1, theirs)
        self._sums.add_flips(batch, missed.sum(1) * (rows == nearest))


def flip_shares(samples: Sequence[Sample], counts: Sequence[FloatArray], config: TransformerConfig) -> list[FloatArray]:
    """Share of each response token's experts, over all layers, that trainer and sampler chose differently.

    Args:
        samples: The samples.
        counts: Flips of each one's tokens, summed over layers and ranks, [R].
        config: Of the model.

    Returns:
        For each sample [R] float32; NaN where the sampler's routing is not known.
    """
    choices = router_layers(config) * config.moe_router_topk
    shares = []
    for sample, flips in zip(samples, counts, strict=True):
        routed = sample.routed_experts
        known = np.zeros(len(flips), bool) if routed is None else routed[:, 0, 0] != UNKNOWN_EXPERT
        shares.append(np.where(known, flips / choices, np.nan).astype(np.float32))
    return shares
