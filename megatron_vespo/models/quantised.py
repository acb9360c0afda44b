"""A stream of weights quantised to FP8 on the way to servers that sample from FP8."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from megatron_vespo.fp8_format import BLOCK, SCALE_SUFFIX, is_quantised
from megatron_vespo.models.export import Exporter, NamedTensor, TensorSpec
from megatron_vespo.models.fp8 import quantise_blocks, scale_shape


class QuantisedExporter:
    """The linear layers' weights of a stream in FP8, each followed by its scales; all else as it is.

    Rank 0 quantises a bucket when it has put it together.

    Args:
        exporter: Where the stream comes from.
    """

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter

    @property
    def buckets(self) -> list[dict[str, TensorSpec]]:
        """As of :class:`Exporter`."""
        return [dict(_quantised_specs(bucket.items())) for bucket in self._exporter.buckets]

    def stream(self) -> Iterator[list[NamedTensor]]:
        """As of :class:`Exporter`."""
        for tensors in self._exporter.stream():
            yield list(_quantised(tensors))

    def done(self) -> None:
        """As of :class:`Exporter`."""
        self._exporter.done()


def _quantised(tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
    for name, tensor in tensors:
        if not is_quantised(name):
            yield name, tensor
            continue
        values, scales = quantise_blocks(tensor, BLOCK)
        yield name, values
        yield name + SCALE_SUFFIX, scales


def _quantised_specs(specs: Iterable[tuple[str, TensorSpec]]) -> Iterator[tuple[str, TensorSpec]]:
    for name, spec in specs:
        if not is_quantised(name):
            yield name, spec
            continue
        yield name, TensorSpec(spec.shape, torch.float8_e4m3fn)
        yield name + SCALE_SUFFIX, TensorSpec(scale_shape(spec.shape, BLOCK), torch.float32)
