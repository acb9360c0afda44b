from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo.models.layouts import Layout, Piece, columns_of, gate_up, grouped_qkv, vocabulary, whole
from megatron_vespo.models.registry import FAMILIES

Case = tuple[Layout, int, int, dict[int, int]]
"""Layout, shards, rows of a shard, and the rows that each HF tensor must have."""


@st.composite
def sharded(draw: st.DrawFn) -> Case:
    shards, unit = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["qkv", "gate_up", "vocabulary", "columns"]))
    if kind == "qkv":
        groups, heads_a_group = shards * draw(st.integers(1, 3)), draw(st.integers(1, 4))
        config = {"num_key_value_heads": groups, "num_attention_heads": groups * heads_a_group, "head_dim": unit}
        layout = grouped_qkv(config, shards, 0)
        queries, keys = groups * heads_a_group * unit, groups * unit
        return layout, shards, (queries + 2 * keys) // shards, {0: queries, 1: keys, 2: keys}
    if kind == "gate_up":
        return (
            gate_up("size")({"size": shards * unit}, shards, 0),
            shards,
            2 * unit,
            {0: shards * unit, 1: shards * unit},
        )
    if kind == "columns":
        layout = columns_of("a", "b")({"a": shards, "b": unit}, shards, 0)
        return layout, shards, unit, {0: shards * unit}
    rows, padding = draw(st.integers(1, 40)), draw(st.integers(0, 10))
    return vocabulary("size")({"size": rows}, shards, 0), shards, -(-(rows + padding) // shards), {0: rows}


def megatron_rows(pieces: Any) -> list[int]:
    return [piece.start + i for piece in pieces for i in range(piece.rows)]


def hf_rows(pieces: Any) -> list[tuple[int, int]]:
    return [(piece.hf, piece.hf_start + i) for piece in pieces for i in range(piece.rows)]


@given(sharded())
def test_pieces_are_disjoint_and_cover_both_sides(case: Case) -> None:
    layout, shards, extent, hf_sizes = case
    rows = megatron_rows(layout.pieces)
    assert len(set(rows)) == len(rows)
    assert set(rows) == set(range(sum(hf_sizes.values())))
    assert layout.padded or len(rows) == shards * extent
    assert sorted(hf_rows(layout.pieces)) == [(hf, i) for hf, size in hf_sizes.items() for i in range(size)]
    assert {hf: layout.hf_rows(hf) for hf in hf_sizes} == hf_sizes


@given(sharded())
def test_the_shards_together_hold_every_row_once_and_in_place(case: Case) -> None:
    layout, shards, extent, _ = case
    whole_map = dict(zip(megatron_rows(layout.pieces), hf_rows(layout.pieces), strict=True))
    clipped: dict[int, tuple[int, int]] = {}
    for shard in range(shards):
        pieces = list(layout.clip(shard * extent, (shard + 1) * extent))
        assert all(0 <= row < extent for row in megatron_rows(pieces))
        rows = [row + shard * extent for row in megatron_rows(pieces)]
        assert not clipped.keys() & set(rows)
        clipped |= dict(zip(rows, hf_rows(pieces), strict=True))
    assert clipped == whole_map


def test_the_worked_example_of_gate_and_up() -> None:
    layout = gate_up("size")({"size": 4}, 2, 8)
    assert list(layout.clip(0, 4)) == [Piece(0, 0, 0, 2), Piece(1, 0, 2, 2)]
    assert list(layout.clip(4, 8)) == [Piece(0, 2, 0, 2), Piece(1, 2, 2, 2)]


def test_query_groups_lie_together() -> None:
    config = {"num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 1}
    assert hf_rows(grouped_qkv(config, 1, 0).pieces) == [(0, 0), (0, 1), (1, 0), (2, 0), (0, 2), (0, 3), (1, 1), (2, 1)]


def test_clipping_cuts_a_piece_on_both_sides() -> None:
    layout = Layout(0, (Piece(0, 10, 0, 8), Piece(1, 0, 8, 2)))
    assert list(layout.clip(3, 6)) == [Piece(0, 13, 0, 3)]
    assert list(layout.clip(6, 10)) == [Piece(0, 16, 0, 2), Piece(1, 0, 2, 2)]
    assert list(layout.clip(10, 20)) == []


def test_a_whole_weight_is_not_sharded() -> None:
    layout = whole({}, 4, 7)
    assert layout == Layout(0, (Piece(0, 0, 0, 7),), sharded=False)


def test_columns_are_along_the_second_dimension() -> None:
    assert columns_of("a")({"a": 6}, 2, 3).dim == 1


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_no_weight_is_in_a_table_twice(family: Any) -> None:
    names = [rule.mcore for rule in family.rules]
    assert len(set(names)) == len(names)
    hf = [name for rule in family.rules for name in rule.hf]
    assert len(set(hf)) == len(hf)
