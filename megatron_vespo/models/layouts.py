"""How a Hugging Face weight lies in a Megatron weight: lists of pieces ``hf[h0:h0+n] <-> mcore[m0:m0+n]``.

The Megatron weight meant here is the whole one: the shards of all tensor-parallel ranks put together in rank order
along the sharded dimension. A rank's shard is an interval of it, and clipping the pieces to that interval says which
slices of the checkpoint to read and, reversed, where each part of a shard goes on the way out. One table, both ways.

A worked example, gate and up projections of 4 rows each over 2 ranks::

    mcore rows   0 1 | 2 3 | 4 5 | 6 7          rank 0 holds 0..3, rank 1 holds 4..7
                 gate  up    gate  up
                 0:2   0:2   2:4   2:4          rows of the HF tensors
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Piece:
    """``rows`` rows along the sharded dimension: of HF tensor ``hf`` from ``hf_start``, of Megatron from ``start``."""

    hf: int
    hf_start: int
    start: int
    rows: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the rows of a weight come from.

    Attributes:
        dim: Dimension that is split over ranks and in which rows are counted.
        pieces: Disjoint on both sides.
        sharded: False where every rank holds the whole weight.
        padded: Whether Megatron's weight may have more rows than the pieces cover (vocabulary padding); they are zero.
    """

    dim: int
    pieces: tuple[Piece, ...]
    sharded: bool = True
    padded: bool = False

    def clip(self, start: int, stop: int) -> Iterator[Piece]:
        """The pieces within rows ``start:stop``, their ``start`` counted from ``start``."""
        for piece in self.pieces:
            low, high = max(piece.start, start), min(piece.start + piece.rows, stop)
            if low < high:
                yield Piece(piece.hf, piece.hf_start + low - piece.start, low - start, high - low)

    def hf_rows(self, hf: int) -> int:
        """Rows of HF tensor number ``hf``."""
        return sum(piece.rows for piece in self.pieces if piece.hf == hf)


HfConfig = Mapping[str, Any]
MakeLayout = Callable[[HfConfig, int, int], Layout]
"""(HF config, shards, rows of the whole Megatron weight along dimension 0) -> layout."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of weight: Megatron name <-> HF names <-> layout. ``{layer}`` and ``{expert}`` are global numbers."""

    mcore: str
    hf: tuple[str, ...]
    layout: MakeLayout


def whole(config: HfConfig, shards: int, rows: int) -> Layout:
    """Every rank holds the whole weight."""
    return Layout(0, (Piece(0, 0, 0, rows),), sharded=False)


def vocabulary(size: str) -> MakeLayout:
    """Split by rows; ``size`` is the config field that counts them. Megatron pads them at the end."""

    def layout(config: HfConfig, shards: int, rows: int) -> Layout:
        return Layout(0, (Piece(0, 0, 0, config[size]),), padded=True)

    return layout


def columns_of(*sizes: str) -> MakeLayout:
    """Split by columns (the input of a row-parallel linear), as many as the product of these config fields."""

    def layout(config: HfConfig, shards: int, rows: int) -> Layout:
        return Layout(1, (Piece(0, 0, 0, _product(config, sizes)),))

    return layout


def gate_up(*sizes: str) -> MakeLayout:
    """Gate and up projections, fused rank by rank: rank 0's gate and up, then rank 1's.

    Each has as many rows as the product of these config fields.
    """

    def layout(config: HfConfig, shards: int, rows: int) -> Layout:
        n = _product(config, sizes) // shards
        pieces = (Piece(hf, r * n, (2 * r + hf) * n, n) for r in range(shards) for hf in (0, 1))
        return Layout(0, tuple(pieces))

    return layout


def _product(config: HfConfig, sizes: tuple[str, ...]) -> int:
    return math.prod(config[size] for size in sizes)


def grouped_qkv(config: HfConfig, shards: int, rows: int) -> Layout:
    """Query, key and value fused group by group: the group's queries, its key, its value (grouped-query attention)."""
    groups, head = config["num_key_value_heads"], config["head_dim"]
    queries = config["num_attention_heads"] // groups * head
    width = queries + 2 * head
    pieces: list[Piece] = []
    for g in range(groups):
        pieces += (
            Piece(0, g * queries, g * width, queries),
            Piece(1, g * head, g * width + queries, head),
            Piece(2, g * head, g * width + queries + head, head),
        )
    return Layout(0, tuple(pieces))
