"""Transport in memory that trainer and servers share: each bucket lies on every rank's device, where workers read it.

For servers on the trainer's own devices, where NCCL cannot help: it knows each GPU once in a group. Rank 0 puts a
bucket together, one broadcast brings it to all ranks, and every server worker opens the memory of the rank on its
device (``sglang_weights.memory``) and picks from it what it holds. It knows that rank by the device's own name, so that
no numbers of ranks, nodes or visible devices need to agree.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_vespo import parallel, platform
from megatron_vespo.errors import UserError
from megatron_vespo.gpus import expandable_segments
from megatron_vespo.models.export import Exporter, NamedTensor, TensorSpec
from megatron_vespo.sglang_weights.memory import Handle, SharedBuffer, device_key
from megatron_vespo.sglang_weights.wire import Change, Request
from megatron_vespo.weight_sync.transport import NamedTensors, StreamTransport


class SharedBucket(list[NamedTensor]):
    """The tensors of a bucket, on rank 0, which lie one after the other in shared memory too.

    Attributes:
        memory: The shared memory of each device.
    """

    memory: dict[str, Handle]


class SharedExporter:
    """A stream whose buckets are in shared memory of every rank's device while rank 0 has them; on every rank.

    There are two buffers: while the workers read one, the other is filled. The next bucket but one is taken from the
    stream only when all workers have answered for this one.

    Args:
        exporter: Where the stream comes from.
    """

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter
        self._buffers: list[SharedBuffer] = []

    @property
    def buckets(self) -> list[dict[str, TensorSpec]]:
        """As of :class:`Exporter`."""
        return self._exporter.buckets

    def stream(self) -> Iterator[list[NamedTensor]]:
        """As of :class:`Exporter`; on rank 0 the buckets are :class:`SharedBucket`."""
        device = platform.device()
        check_allocator(device)
        sizes = [sum(spec.nbytes for spec in bucket.values()) for bucket in self.buckets]
        self._buffers = [SharedBuffer(max(sizes), device) for _ in range(min(2, len(sizes)))]
        for number, (nbytes, tensors) in enumerate(zip(sizes, self._exporter.stream(), strict=True)):
            buffer = self._buffers[number % 2]
            shared = SharedBucket(tensors)
            shared.memory = _spread(buffer, nbytes, tensors)
            yield shared

    def done(self) -> None:
        """Free the buffers."""
        self._exporter.done()
        for buffer in self._buffers:
            buffer.close()
        self._buffers = []
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()  # of what the workers have closed
            torch.cuda.empty_cache()


def check_allocator(device: torch.device) -> None:
    """Refuse memory that CUDA cannot share.

    Raises:
        UserError: torch is told to use such.
    """
    setting = expandable_segments(os.environ)
    if device.type == "cuda" and setting is not None:
        raise UserError(
            f"{setting}: memory in expandable segments cannot be handed to the servers; leave it out, or set"
            " weight_sync.transport: disk"
        )


def _spread(buffer: SharedBuffer, nbytes: int, tensors: list[NamedTensor]) -> dict[str, Handle]:
    """Bring a bucket to the memory of all ranks. A collective; when it returns, all of them have it."""
    flat = buffer.flat[:nbytes]
    if parallel.is_main():
        parts = flat.split([tensor.nbytes for _, tensor in tensors])
        for part, (_, tensor) in zip(parts, tensors, strict=True):
            part.copy_(tensor.reshape(-1).view(torch.uint8))
    dist.broadcast(flat, src=0)
    if flat.is_cuda:
        torch.cuda.synchronize()
    mine: tuple[str, Handle] = device_key(flat.device), buffer.handle()
    # Gathered as the last thing: whoever has all handles knows that all ranks have the bucket.
    return dict(parallel.gather_values(mine, tuple[str, Handle]))


class TensorTransport(StreamTransport):
    """Has the workers of all servers read each bucket from their own devices; on rank 0.

    Args:
        servers: Who gets it; started with our loader as ``custom_weight_loader``, on devices of trainer ranks.
    """

    def send(self, tensors: NamedTensors) -> None:
        """Have one bucket, a :class:`SharedBucket`, read."""
        assert isinstance(tensors, SharedBucket)
        changes = tuple(Change.whole(name, tensor) for name, tensor in tensors)
        request = Request("map", changes, memory=tensors.memory)
        self._servers.each(lambda control: self._servers.load(control, request, self._version))
        self.sent.bytes += sum(change.value_bytes for change in changes)
