"""A second set of weights for the same model: the reference policy of a KL term."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class HostWeights:
    """A copy of a model's weights in host memory, which can take the place of the model's own for a while."""

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self._chunks = chunks
        self._kept = self._copy()

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The model computes with these weights; afterwards it has its own again, bit for bit."""
        own = self._copy()
        self._write(self._kept)
        try:
            yield
        finally:
            self._write(own)

    def _tensors(self) -> list[Tensor]:
        # Buffers too: the bias of a balanced router is one.
        return [x for chunk in self._chunks for x in (*chunk.parameters(), *chunk.buffers())]

    def _copy(self) -> list[Tensor]:
        return [tensor.detach().to("cpu", copy=True) for tensor in self._tensors()]

    def _write(self, values: Sequence[Tensor]) -> None:
        for tensor, value in zip(self._tensors(), values, strict=True):
            tensor.data.copy_(value)
