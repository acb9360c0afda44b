"""Gathering updated weights while the next forward pass runs (``overlap_param_gather``).

After a step of the distributed optimizer each data-parallel rank has the new values of its own share of the weights.
Hooks of DistributedDataParallel then gather the others, a bucket ahead of the module that reads it. Everything else
that reads weights must have them complete. As in Megatron-LM (training/training.py, ``disable_forward_pre_hook``) the
hooks are on exactly as long as weights may be incomplete, so that a forward pass over complete weights gathers nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class ParameterGathering:
    """Whether the weights of this rank are complete, and what makes them so. Does nothing without the option."""

    def __init__(self, config: TransformerConfig, chunks: Sequence[DistributedDataParallel]) -> None:
        """The weights are complete.

        Args:
            config: Of the model; it tells the interleaved schedule when to gather.
            chunks: This rank's part of the model.
        """
        self._config, self._chunks = config, chunks
        self._overlaps = chunks[0].ddp_config.overlap_param_gather
        self._incomplete = False
        if self._overlaps:  # Megatron begins with the hooks on
            for chunk in chunks:
                chunk.disable_forward_pre_hook(param_sync=False)

    def begin(self) -> None:
        """After an optimizer step: from now on the forward pass gathers."""
        if not self._overlaps or self._incomplete:
            return
        self._incomplete = True
        for chunk in self._chunks:
            chunk.enable_forward_pre_hook()
        if self._chunks[0].ddp_config.align_param_gather:  # the schedule starts it, on all stages at once
            self._config.param_sync_func = [chunk.start_param_sync for chunk in self._chunks]

    def finish(self) -> None:
        """Gather what is not there yet. A collective."""
        if not self._incomplete:
            return
        self._incomplete = False
        self._config.param_sync_func = None
        for chunk in self._chunks:
            chunk.disable_forward_pre_hook(param_sync=True)

    def wait_for(self, chunk: DistributedDataParallel, weight: Tensor) -> None:
        """Have a weight complete that is read outside its own module's forward pass."""
        if self._incomplete:
            chunk.param_to_bucket_group[weight].finish_param_sync(
                skip_next_bucket_dispatch=chunk.ddp_config.align_param_gather
            )
