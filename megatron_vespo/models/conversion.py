"""Hugging Face weights into the sharded model by the family's weight table; each rank reads only its slices.

:mod:`export` is the way out, by the same table and the same placements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.models.gpt import GPTModel

from megatron_vespo import parallel
from megatron_vespo.errors import UserError
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.models.hf_files import HfReader
from megatron_vespo.models.layouts import Layout, Piece, Rule
from megatron_vespo.models.naming import Weight, named_weights

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


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
        pieces: The layout's pieces within the shard, their ``start`` counted from the shard's.
        hf_shapes: Shapes of the HF tensors.
    """

    rule: Rule
    names: tuple[str, ...]
    layout: Layout
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    owner: bool
    pieces: tuple[Piece, ...]
    hf_shapes: tuple[tuple[int, ...], ...]

    @property
    def stop(self) -> int:
        """One past the last row of the shard."""
        return self.start + self.shape[self.layout.dim]

    def hf_shape(self, hf: int) -> tuple[int, ...]:
        """Shape of HF tensor number ``hf``."""
        return self.hf_shapes[hf]

    def narrowed(self, start: int, rows: int) -> Placement:
        """The placement of ``rows`` rows of this shard from ``start``, along ``layout.dim``."""
        shape = list(self.shape)
        shape[self.layout.dim] = rows
        begin = self.start + start
        pieces = tuple(self.layout.clip(begin, begin + rows))
        return replace(self, start=begin, shape=tuple(shape), pieces=pieces)


class WeightTable:
    """The family's weight table as it applies to this rank; tied embeddings read the output layer from the embedding.

    What the weights of one kind have in common is worked out for the first of them: a model has tens of thousands of
    weights and a dozen kinds.
    """

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        self._rules = {rule.mcore: rule for rule in architecture.family.rules}
        if architecture.tied_embeddings:
            self._rules[_OUTPUT] = replace(self._rules[_OUTPUT], hf=self._rules[_EMBEDDING].hf)
        self._kinds: dict[tuple[str, torch.Size, torch.dtype], Placement] = {}

    def place(self, weight: Weight) -> Placement:
        """Where a weight of this rank lies.

        Raises:
            UserError: The table has no row for it, or the row has another number of rows.
        """
        key = (weight.pattern, weight.data.shape, weight.data.dtype)
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = self._kind(weight)
        return replace(kind, names=tuple(weight.fill(name) for name in kind.rule.hf))

    def _kind(self, weight: Weight) -> Placement:
        architecture, rule = self._architecture, self._rules.get(weight.pattern)
        if rule is None:
            raise UserError(
                f"Megatron weight {weight.pattern} has no rule in the {architecture.family.model_type} weight table"
            )
        expert = weight.expert is not None
        shards = parallel.expert_tensor_parallel_size() if expert else parallel.tensor_parallel_size()
        shard = parallel.expert_tensor_parallel_rank() if expert else parallel.tensor_parallel_rank()
        shape = tuple(weight.data.shape)
        layout = rule.layout(architecture.config, shards, shape[0])
        extent = shape[layout.dim]
        _check_rows(weight, rule, layout, extent, shards if layout.sharded else 1)
        replica_speaks = parallel.owns_expert_weights() if expert else parallel.owns_dense_weights()
        tied_copy = architecture.tied_embeddings and weight.pattern == _OUTPUT
        start = shard * extent if layout.sharded else 0
        return Placement(
            rule,
            rule.hf,
            layout,
            start,
            shape,
            weight.data.dtype,
            owner=replica_speaks and (layout.sharded or shard == 0) and not tied_copy,
            pieces=tuple(layout.clip(start, start + extent)),
            hf_shapes=tuple(
                (*shape[: layout.dim], layout.hf_rows(hf), *shape[layout.dim + 1 :]) for hf in range(len(rule.hf))
            ),
        )


def _check_rows(weight: Weight, rule: Rule, layout: Layout, extent: int, shards: int) -> None:
    covered = sum(piece.rows for piece in layout.pieces)
    if extent * shards < covered or (extent * shards > covered and not layout.padded):
        raise UserError(
            f"Megatron weight {weight.pattern}: {shards} shards of {extent} rows do not hold the {covered} rows of"
            f" {', '.join(rule.hf)}"
        )


def weight_rules(architecture: Architecture) -> WeightTable:
    """The weight table of an architecture, for this rank."""
    return WeightTable(architecture)


def place(weight: Weight, rules: WeightTable, architecture: Architecture) -> Placement:
    """Where a weight of this rank lies."""
    return rules.place(weight)


def load_hf_weights(chunks: Sequence[GPTModel], architecture: Architecture, reader: HfReader) -> None:
    """Fill this rank's weights from a Hugging Face folder. A collective.

    Raises:
        UserError: A tensor is missing, has another shape, or was read by no rank.
    """
    table = WeightTable(architecture)
    read: set[str] = set()
    for weight in named_weights(chunks):
        placement = table.place(weight)
        check_source(placement, reader)
        read.update(placement.names)
        read_into(weight.data, placement, reader)
    check_unread(frozenset().union(*parallel.gather_values(read, set[str])), architecture, reader)


def read_into(target: torch.Tensor, placement: Placement, reader: HfReader) -> None:
    """Fill a shard from the HF tensors; of each the part that it needs is read once."""
    dim = placement.layout.dim
    if placement.layout.padded:
        target.zero_()
    parts: dict[int, tuple[int, torch.Tensor]] = {}
    for piece in placement.pieces:
        if piece.hf not in parts:
            mine = [other for other in placement.pieces if other.hf == piece.hf]
            first = min(other.hf_start for other in mine)
            last = max(other.hf_start + other.rows for other in mine)
            parts[piece.hf] = first, reader.read(placement.names[piece.hf], dim, first, last - first)
        first, part = parts[piece.hf]
        target.narrow(dim, piece.start, piece.rows).copy_(part.narrow(dim, piece.hf_start - first, piece.rows))


def check_unread(read: frozenset[str], architecture: Architecture, reader: HfReader) -> None:
    """Refuse a folder with tensors that are in no weight.

    Raises:
        UserError: It names some of them.
    """
    unread = {name for name in reader.names - read if not architecture.family.left_out(architecture.config, name)}
    if architecture.tied_embeddings:
        unread.discard("lm_head.weight")  # some tied checkpoints hold a copy
    if unread:
        raise UserError(f"{reader.folder}: no rank read {some(unread)}: not weights of this architecture")


def some(names: frozenset[str] | set[str]) -> str:
    """A few of the names, and how many more."""
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def check_source(placement: Placement, reader: HfReader) -> None:
    """Refuse a folder in which the HF tensors of a weight are missing or have another shape.

    Raises:
        UserError: It names the tensor.
    """
    for hf, name in enumerate(placement.names):
        if name not in reader.names:
            raise UserError(f"{reader.folder}: tensor {name} is missing")
        if reader.shape(name) != placement.hf_shape(hf):
            raise UserError(
                f"{reader.folder}: {name} has shape {reader.shape(name)}, config.json says {placement.hf_shape(hf)}"
            )
