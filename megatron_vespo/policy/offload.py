"""What a policy has on its device, and host memory for the rest while others use the device.

Memory is taken from under the tensors: their storages shrink to nothing and grow again, so that every view of them, the
gradient buckets', the distributed optimizer's, the exporter's, is what it was. Megatron does the same with gradients
(DistributedDataParallel.offload_grad_buffers). Its way with the optimizer, ``p.data = p.data.cpu()``, would not do: in
float32 the optimizer's parameters are views of the model's, and would come back as copies that the model never sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_vespo import platform
from megatron_vespo.policy.optimizer import Optimizer

# Pinned memory is handed out in powers of two; a buffer of the size needed might cost twice that.
_CHUNK_BYTES = 2**28


class Part(StrEnum):
    """Parts of a policy that move on their own."""

    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"


ALL_PARTS = frozenset(Part)


class DeviceMemory:
    """Moves the parts of one rank's policy between its device and host memory, bit for bit.

    Gradients are not kept: they are zero when they come back, as every update begins. The model's few buffers stay.

    Args:
        chunks: The model, wrapped.
        optimizer: Its optimizer.
        complete: Called before parameters leave: it makes them complete. A collective.

    Attributes:
        held: Parts on the device.
    """

    def __init__(
        self, chunks: Sequence[DistributedDataParallel], optimizer: Optimizer, complete: Callable[[], None]
    ) -> None:
        self._chunks, self._optimizer, self._complete = chunks, optimizer, complete
        self._host = {part: _HostCopy() for part in (Part.PARAMETERS, Part.OPTIMIZER)}
        self.held = ALL_PARTS

    def require(self, *parts: Part) -> None:
        """Assert that these are on the device."""
        missing = set(parts) - self.held
        assert not missing, f"{', '.join(sorted(missing))} are in host memory; it is the servers' turn on the device"

    def keep(self, parts: frozenset[Part]) -> None:
        """Move all other parts to host memory. A collective."""
        # The parameters go last: what the optimizer shares with them is found while they are there.
        leaving = sorted(self.held - parts, key=list(_LEAVING).index)
        if Part.PARAMETERS in leaving:
            self._complete()
        for part in leaving:
            if part is Part.GRADIENTS:
                self._optimizer.zero_grad()
                for chunk in self._chunks:
                    chunk.offload_grad_buffers(empty_cache=False)
            else:
                self._host[part].take(self._storages(part))
        self.held &= parts
        if leaving and torch.cuda.is_available():
            torch.cuda.empty_cache()  # or the memory stays this process's

    def bring(self, parts: frozenset[Part]) -> None:
        """Move these parts to the device."""
        for part in sorted(parts - self.held, key=list(_LEAVING).index, reverse=True):
            if part is Part.GRADIENTS:
                for chunk in self._chunks:
                    chunk.restore_grad_buffers()
            else:
                self._host[part].give_back()
        self.held |= parts

    def _storages(self, part: Part) -> list[torch.UntypedStorage]:
        """All memory of a part on this device."""
        parameters = _storages_of(self._parameters())
        if part is Part.PARAMETERS:
            return list(parameters.values())
        optimizer = _storages_of(self._optimizer_tensors())
        return [storage for key, storage in optimizer.items() if key not in parameters]

    def _parameters(self) -> Iterator[Tensor]:
        for chunk in self._chunks:
            yield from (parameter.data for parameter in chunk.parameters())
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                if buffer.param_data is not None:
                    yield buffer.param_data

    def _optimizer_tensors(self) -> Iterator[Tensor]:
        for part in self._optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                yield from (parameter.data for parameter in group["params"])
            for state in part.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


_LEAVING = (Part.GRADIENTS, Part.OPTIMIZER, Part.PARAMETERS)


class _HostCopy:
    """The content of storages that gave up their memory, in pinned host memory, which is kept for the next time."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._taken: list[tuple[torch.UntypedStorage, int]] = []

    def take(self, storages: Sequence[torch.UntypedStorage]) -> None:
        """Copy the content of these, and free their memory."""
        assert not self._taken, "taken already"
        self._taken = [(storage, storage.nbytes()) for storage in storages]
        self._reserve(sum(nbytes for _, nbytes in self._taken))
        for host, device in self._pieces():
            host.copy_(device, non_blocking=True)
        _synchronize()
        for storage, _ in self._taken:
            storage.resize_(0)

    def give_back(self) -> None:
        """Give the storages memory and their content again."""
        for storage, nbytes in self._taken:
            storage.resize_(nbytes)
        for host, device in self._pieces():
            device.copy_(host, non_blocking=True)
        _synchronize()
        self._taken = []

    def _reserve(self, nbytes: int) -> None:
        while len(self._chunks) * _CHUNK_BYTES < nbytes:
            pinned = torch.cuda.is_available()
            self._chunks.append(torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=pinned))

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of host memory with those of the device that belong there."""
        position = 0
        for storage, nbytes in self._taken:
            whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            done = 0
            while done < nbytes:
                chunk, offset = divmod(position, _CHUNK_BYTES)
                size = min(nbytes - done, _CHUNK_BYTES - offset)
                yield self._chunks[chunk][offset : offset + size], whole[done : done + size]
                done, position = done + size, position + size


def _storages_of(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Each storage on this device once, by its identity."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.device == platform.device() and storage.nbytes():
            storages[storage._cdata] = storage
    return storages


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
