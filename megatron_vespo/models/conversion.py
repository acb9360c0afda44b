"""Hugging Face weights into the sharded model and out again, both by the family's weight table.

Each rank reads only its slices. On the way out every weight has one owner rank for each of its shards; owners send
their shards to rank 0, many weights to a message, and rank 0 puts the HF tensors together a bucket at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from megatron_vespo import parallel
from megatron_vespo.errors import UserError
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.models.hf_files import HfReader
from megatron_vespo.models.layouts import Layout, Rule
from megatron_vespo.models.naming import Weight, named_weights

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def _rules(architecture: Architecture) -> dict[str, Rule]:
    """The weight table by Megatron pattern; tied embeddings read the output layer from the embedding."""
    rules = {rule.mcore: rule for rule in architecture.family.rules}
    if architecture.tied_embeddings:
        rules[_OUTPUT] = replace(rules[_OUTPUT], hf=rules[_EMBEDDING].hf)
    return rules


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a rank's shard of a weight lies in the whole: what two ranks must agree on to move it.

    Attributes:
        rule: Row of the weight table.
        names: HF names with their numbers filled in.
        layout: The whole weight's layout.
        start: First row of the shard, along ``layout.dim``.
        shape: Shape of the shard.
        dtype: Its dtype.
        owner: Whether this rank is the one to send the shard.
    """

    rule: Rule
    names: tuple[str, ...]
    layout: Layout
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    owner: bool

    @property
    def stop(self) -> int:
        """One past the last row of the shard."""
        return self.start + self.shape[self.layout.dim]

    def hf_shape(self, hf: int) -> tuple[int, ...]:
        """Shape of HF tensor number ``hf``."""
        shape = list(self.shape)
        shape[self.layout.dim] = self.layout.hf_rows(hf)
        return tuple(shape)


def _place(weight: Weight, rules: dict[str, Rule], architecture: Architecture) -> Placement:
    rule = rules.get(weight.pattern)
    if rule is None:
        raise UserError(
            f"Megatron weight {weight.pattern} has no rule in the {architecture.family.model_type} weight table"
        )
    expert = weight.expert is not None
    shards = parallel.expert_tensor_parallel_size() if expert else parallel.tensor_parallel_size()
    shard = parallel.expert_tensor_parallel_rank() if expert else parallel.tensor_parallel_rank()
    layout = rule.layout(architecture.config, shards, weight.data.shape[0])
    if not layout.sharded:
        shards, shard_of_weight = 1, 0
    else:
        shard_of_weight = shard
    extent = weight.data.shape[layout.dim]
    covered = sum(piece.rows for piece in layout.pieces)
    if extent * shards < covered or (extent * shards > covered and not layout.padded):
        raise UserError(
            f"Megatron weight {weight.pattern}: {shards} shards of {extent} rows do not hold the {covered} rows of"
            f" {', '.join(rule.hf)}"
        )
    replica_speaks = parallel.owns_expert_weights() if expert else parallel.owns_dense_weights()
    tied_copy = architecture.tied_embeddings and weight.pattern == _OUTPUT
    return Placement(
        rule,
        tuple(weight.fill(name) for name in rule.hf),
        layout,
        shard_of_weight * extent,
        tuple(weight.data.shape),
        weight.data.dtype,
        owner=replica_speaks and (layout.sharded or shard == 0) and not tied_copy,
    )


def load_hf_weights(chunks: Sequence[GPTModel], architecture: Architecture, reader: HfReader) -> None:
    """Fill this rank's weights from a Hugging Face folder. A collective.

    Raises:
        UserError: A tensor is missing, has another shape, or was read by no rank.
    """
    rules = _rules(architecture)
    read: set[str] = set()
    for weight in named_weights(chunks):
        placement = _place(weight, rules, architecture)
        _check_source(placement, reader)
        read.update(placement.names)
        weight.data.zero_()
        dim = placement.layout.dim
        for piece in placement.layout.clip(placement.start, placement.stop):
            rows = reader.read(placement.names[piece.hf], dim, piece.hf_start, piece.rows)
            weight.data.narrow(dim, piece.start, piece.rows).copy_(rows)
    if architecture.tied_embeddings:
        read.add("lm_head.weight")  # some tied checkpoints hold a copy
    unread = reader.names - frozenset().union(*parallel.gather_objects(read))
    if unread:
        raise UserError(f"{reader.folder}: no rank read {_some(unread)}: not weights of this architecture")


def _some(names: frozenset[str] | set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _check_source(placement: Placement, reader: HfReader) -> None:
    for hf, name in enumerate(placement.names):
        if name not in reader.names:
            raise UserError(f"{reader.folder}: tensor {name} is missing")
        if reader.shape(name) != placement.hf_shape(hf):
            raise UserError(
                f"{reader.folder}: {name} has shape {reader.shape(name)}, config.json says {placement.hf_shape(hf)}"
            )


Key = tuple[str, ...]
"""HF names of a weight: what identifies it on all ranks."""


class HfExporter:
    """Streams the sharded weights out under Hugging Face names. Built once, used for every push and save."""

    def __init__(self, chunks: Sequence[GPTModel], architecture: Architecture, bucket_bytes: int = 512 * 2**20) -> None:
        """Agree with all ranks on who sends what. A collective.

        Args:
            chunks: This rank's part; its parameters are read anew at every ``stream()``.
            architecture: Its architecture.
            bucket_bytes: Rank 0 puts together about this much at a time.
        """
        rules = _rules(architecture)
        self._local: dict[Key, torch.Tensor] = {}
        mine: dict[Key, _Shard] = {}
        for weight in named_weights(chunks):
            placement = _place(weight, rules, architecture)
            if placement.owner:
                self._local[placement.names] = weight.data
                mine[placement.names] = _Shard.of(placement)
        self._shards: list[dict[Key, _Shard]] = parallel.gather_objects(mine)
        self._buckets = _bucket(self._shards, bucket_bytes)

    def stream(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """HF names and tensors, bucket after bucket: on rank 0; the other ranks send and get empty lists. A collective.

        Every rank must run the iterator to its end.
        """
        for keys in self._buckets:
            assembled: dict[str, torch.Tensor] = {}
            for rank, shards in enumerate(self._shards):
                held = {key: shards[key] for key in keys if key in shards}
                if held:
                    for key, data in self._transfer(rank, held):
                        held[key].put(key, data, assembled)
            yield list(assembled.items())

    def _transfer(self, owner: int, held: dict[Key, _Shard]) -> list[tuple[Key, torch.Tensor]]:
        """One owner's shards of a bucket, on rank 0; one message."""
        if parallel.rank() not in (0, owner):
            return []
        if owner == 0:
            return [(key, self._local[key]) for key in held]
        device = next(iter(self._local.values())).device
        if parallel.rank() == owner:
            dist.send(torch.cat([self._local[key].reshape(-1).view(torch.uint8) for key in held]), dst=0)
            return []
        flat = torch.empty(sum(shard.nbytes for shard in held.values()), dtype=torch.uint8, device=device)
        dist.recv(flat, src=owner)
        parts = flat.split([shard.nbytes for shard in held.values()])
        # clone(): a part need not begin at a multiple of its dtype's size.
        return [
            (key, part.clone().view(shard.dtype).view(shard.shape))
            for (key, shard), part in zip(held.items(), parts, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Shard:
    """A shard as rank 0 knows it: its shape and which of its rows go where."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int
    moves: tuple[tuple[int, int, int, int], ...]  # (HF tensor, its first row, the shard's first row, rows)
    hf_shapes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(placement: Placement) -> _Shard:
        clipped = placement.layout.clip(placement.start, placement.stop)
        return _Shard(
            placement.shape,
            placement.dtype,
            placement.layout.dim,
            tuple((piece.hf, piece.hf_start, piece.start, piece.rows) for piece in clipped),
            tuple(placement.hf_shape(hf) for hf in range(len(placement.names))),
        )

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
