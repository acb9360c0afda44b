"""The sharded model out again as Hugging Face tensors, by the family's weight table, a bucket at a time.

Every weight has one owner rank for each of its shards; owners send their shards to rank 0, all that they hold of a
bucket in one message, and rank 0 puts the HF tensors together. The messages of the next bucket are under way while
this one is used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from megatron_vespo import parallel
from megatron_vespo.models.conversion import Placement, place, weight_rules
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.models.naming import named_weights

Key = tuple[str, ...]
"""HF names of a weight: what identifies it on all ranks."""

NamedTensor = tuple[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor of the stream."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Exporter(Protocol):
    """A stream of the model's weights under Hugging Face names, on every rank."""

    @property
    def buckets(self) -> list[dict[str, TensorSpec]]:
        """What each bucket of the stream holds, in order; the same on every rank."""
        ...

    def stream(self) -> Iterator[list[NamedTensor]]:
        """Names and tensors, bucket after bucket, on rank 0; empty lists elsewhere.

        A collective, to be run to its end.
        """
        ...

    def done(self) -> None:
        """The tensors of the last stream are not used any more."""


def shapes_of(exporter: Exporter) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by their HF names, in the order of the stream."""
    return {name: spec.shape for bucket in exporter.buckets for name, spec in bucket.items()}


# Buckets whose messages are under way beside the one in use.
_AHEAD = 1


@dataclass(frozen=True, slots=True)
class _Message:
    """One owner's part of a bucket, under way; ``flat`` must live until ``work`` is done."""

    owner: int
    held: dict[Key, _Shard]
    flat: torch.Tensor
    work: dist.Work


class HfExporter:
    """Streams the sharded weights out under Hugging Face names. Built once, used for every push and save."""

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        architecture: Architecture,
        bucket_bytes: int = 512 * 2**20,
        complete: Callable[[], None] = lambda: None,
    ) -> None:
        """Agree with all ranks on who sends what. A collective.

        Args:
            chunks: This rank's part; its parameters are read anew at every ``stream()``.
            architecture: Its architecture.
            bucket_bytes: Rank 0 puts together about this much at a time, and receives as much meanwhile.
            complete: Called before weights are read: it makes them complete. A collective.
        """
        self._complete = complete
        rules = weight_rules(architecture)
        self._local: dict[Key, torch.Tensor] = {}
        mine: dict[Key, _Shard] = {}
        for weight in named_weights(chunks):
            placement = place(weight, rules, architecture)
            if placement.owner:
                self._local[placement.names] = weight.data
                mine[placement.names] = _Shard.of(placement)
        # As pairs: a key of several names is none that a dict has in msgpack.
        self._shards = [dict(held) for held in parallel.gather_values(list(mine.items()), list[tuple[Key, _Shard]])]
        self._buckets = _bucket(self._shards, bucket_bytes)

    @property
    def buckets(self) -> list[dict[str, TensorSpec]]:
        """What each bucket of the stream holds, in order; the same on every rank."""
        return [{name: spec for key in keys for name, spec in self._specs(key)} for keys in self._buckets]

    def stream(self) -> Iterator[list[NamedTensor]]:
        """HF names and tensors, bucket after bucket: on rank 0; the other ranks send and get empty lists. A collective.

        Every rank must run the iterator to its end, with the weights on its device.
        """
        if any(not tensor.untyped_storage().nbytes() for tensor in self._local.values()):
            raise RuntimeError("the weights are in host memory; it is the servers' turn on the devices")
        self._complete()
        started: deque[tuple[list[Key], list[_Message]]] = deque()
        for keys in self._buckets:
            started.append((keys, self._start(keys)))
            if len(started) > _AHEAD:
                yield self._assemble(*started.popleft())
        while started:
            yield self._assemble(*started.popleft())

    def done(self) -> None:
        """Nothing is held."""

    def _specs(self, key: Key) -> Iterator[tuple[str, TensorSpec]]:
        shard = next(shards[key] for shards in self._shards if key in shards)
        for name, shape in zip(key, shard.hf_shapes, strict=True):
            yield name, TensorSpec(tuple(shape), shard.dtype)

    def _start(self, keys: list[Key]) -> list[_Message]:
        """Send this rank's shards of a bucket; on rank 0, receive those of all others."""
        rank = parallel.rank()
        owners = range(1, len(self._shards)) if rank == 0 else (rank,)
        messages = []
        for owner in owners:
            held = {key: self._shards[owner][key] for key in keys if key in self._shards[owner]}
            if not held:
                continue
            if rank == owner:
                flat = torch.cat([self._local[key].reshape(-1).view(torch.uint8) for key in held])
                work = dist.isend(flat, dst=0)
            else:
                device = next(iter(self._local.values())).device
                flat = torch.empty(sum(shard.nbytes for shard in held.values()), dtype=torch.uint8, device=device)
                work = dist.irecv(flat, src=owner)
            assert work is not None
            messages.append(_Message(owner, held, flat, work))
        return messages

    def _assemble(self, keys: list[Key], messages: list[_Message]) -> list[NamedTensor]:
        """The tensors of a bucket, on rank 0."""
        for message in messages:
            message.work.wait()
        if parallel.rank() != 0:
            return []
        assembled: dict[str, torch.Tensor] = {}
        for key in keys:
            if key in self._local:
                self._shards[0][key].put(key, self._local[key], assembled)
        for message in messages:
            parts = message.flat.split([shard.nbytes for shard in message.held.values()])
            for (key, shard), part in zip(message.held.items(), parts, strict=True):
                # clone(): a part need not begin at a multiple of its dtype's size.
                shard.put(key, part.clone().view(shard.dtype).view(shard.shape), assembled)
        return list(assembled.items())


@dataclass(frozen=True, slots=True)
class _Shard:
    """A shard as rank 0 knows it: its shape and which of its rows go where."""

    shape: tuple[int, ...]
    dtype_name: str  # text, as it goes to the other ranks
    dim: int
    moves: tuple[tuple[int, int, int, int], ...]  # (HF tensor, its first row, the shard's first row, rows)
    hf_shapes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(placement: Placement) -> _Shard:
        clipped = placement.layout.clip(placement.start, placement.stop)
        return _Shard(
            placement.shape,
            str(placement.dtype).removeprefix("torch."),
            placement.layout.dim,
            tuple((piece.hf, piece.hf_start, piece.start, piece.rows) for piece in clipped),
            tuple(placement.hf_shape(hf) for hf in range(len(placement.names))),
        )

    @property
    def dtype(self) -> torch.dtype:
        dtype = vars(torch)[self.dtype_name]
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def put(self, names: Key, data: torch.Tensor, assembled: dict[str, torch.Tensor]) -> None:
        """Copy the shard's rows into the HF tensors, making those that are not there yet."""
        for hf, hf_start, start, rows in self.moves:
            if names[hf] not in assembled:
                assembled[names[hf]] = torch.empty(self.hf_shapes[hf], dtype=self.dtype, device=data.device)
            assembled[names[hf]].narrow(self.dim, hf_start, rows).copy_(data.narrow(self.dim, start, rows))


def _bucket(shards: list[dict[Key, _Shard]], bucket_bytes: int) -> list[list[Key]]:
    """Keys in order of first appearance, in buckets; all shards of a weight are in one."""
    size: dict[Key, int] = {}
    for held in shards:
        for key, shard in held.items():
            size[key] = size.get(key, 0) + shard.nbytes
    buckets: list[list[Key]] = [[]]
    filled = 0
    for key, nbytes in size.items():
        if filled and filled + nbytes > bucket_bytes:
            buckets.append([])
            filled = 0
        buckets[-1].append(key)
        filled += nbytes
    return buckets
