"""The order of mixed, staged data: a pure function of seed and position, weights in every window, epochs without
repetition."""

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.data.order import MAX_PERIOD, EndlessOrder, Interleaving, Stage
from megatron_vespo.errors import UserError

weights_of = st.lists(st.integers(1, 40) | st.floats(0.01, 9).map(lambda x: round(x, 2)), min_size=1, max_size=5)


@st.composite
def orders(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of an EndlessOrder over 1 to 3 sources in 1 to 3 stages."""
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    weights = draw(st.lists(st.integers(1, 5), min_size=len(sizes), max_size=len(sizes)))
    starts = np.cumsum([0, *sizes])
    stages = []
    for number in range(count := draw(st.integers(1, 3))):
        members = [
            np.array(sorted(draw(st.sets(st.integers(int(start), int(end) - 1), max_size=7))), np.int64)
            for start, end in pairwise(starts)
        ]
        if not any(len(m) for m in members):
            members[0] = np.arange(sizes[0])
        stages.append(Stage(members, weights, draw(st.integers(1, 30)) if number < count - 1 else None))
    return {"size": sum(sizes), "seed": draw(st.integers(0, 9)), "shuffle": draw(st.booleans()), "stages": stages}


@given(arguments=orders(), cut=st.integers(0, 120), data=st.data())
def test_a_draw_depends_on_seed_and_position_alone(arguments: dict[str, Any], cut: int, data: st.DataObject) -> None:
    whole = EndlessOrder(**arguments)
    drawn = [whole.draw() for _ in range(120)]
    fresh = EndlessOrder(**arguments)
    for position in data.draw(st.lists(st.integers(0, 119), max_size=8)):
        assert fresh.at(position) == drawn[position][1], "in whatever order it is asked"
    resumed = EndlessOrder(**arguments)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(cut))))
    assert [resumed.draw() for _ in range(120 - cut)] == drawn[cut:]


@given(arguments=orders())
def test_a_source_repeats_nothing_within_its_epoch(arguments: dict[str, Any]) -> None:
    order = EndlessOrder(**arguments)
    position = 0
    for stage in arguments["stages"]:
        length = stage.length or 60
        drawn = [order.at(p) for p in range(position, position + length)]
        position += length
        for members in stage.members:
            own = [index for index in drawn if index in members]
            for start in range(0, len(own), max(len(members), 1)):
                epoch = own[start : start + len(members)]
                assert len(set(epoch)) == len(epoch)
                assert len(epoch) < len(members) or sorted(epoch) == members.tolist()
        assert set(drawn) <= {int(index) for members in stage.members for index in members}


@settings(deadline=None)  # a table of up to 65,536 draws is made
@given(weights=weights_of, start=st.integers(0, 2000), length=st.integers(1, 400))
def test_every_window_respects_the_weights(weights: list[float], start: int, length: int) -> None:
    interleaving = Interleaving(weights)
    window = [interleaving.locate(position) for position in range(start, start + length)]
    for source, weight in enumerate(weights):
        share = length * weight / sum(weights)
        # Rounded shares are off by at most one in MAX_PERIOD a draw.
        assert abs(sum(s == source for s, _ in window) - share) < 2 + (start + length) / MAX_PERIOD
        numbers = [drawn for s, drawn in window if s == source]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True


@settings(deadline=None)  # a table of up to 65,536 draws is made
@given(weights=weights_of, length=st.integers(1, 400))
def test_from_the_start_a_source_has_its_share_rounded_down_or_up(weights: list[float], length: int) -> None:
    interleaving = Interleaving(weights)
    counts = np.bincount([interleaving.locate(p)[0] for p in range(length)], minlength=len(weights))
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - length * weight / sum(weights)) < 1 + length / MAX_PERIOD


def test_strange_weights_are_rounded() -> None:
    interleaving = Interleaving([0.333333337, 1.00000001, 1e-9])
    assert interleaving.period <= MAX_PERIOD + 3
    drawn = np.bincount([interleaving.locate(p)[0] for p in range(interleaving.period)])
    assert drawn / len(range(interleaving.period)) == pytest.approx([0.25, 0.75, 0], abs=1e-4) and drawn[2] == 1


def test_one_source_is_shuffled_as_it_always_was() -> None:
    """Checkpoints of older versions hold positions in this order."""
    order = EndlessOrder(5, seed=3)
    expected = [np.random.default_rng([3, epoch]).permutation(5).tolist() for epoch in range(2)]
    assert [order.draw()[1] for _ in range(10)] == expected[0] + expected[1]


def test_a_source_without_members_sits_a_stage_out() -> None:
    stages = [Stage([np.array([0]), np.array([], np.int64)], [1, 9], 4), Stage([np.array([0]), np.array([1])], [1, 1])]
    order = EndlessOrder(2, 0, stages=stages)
    assert [order.draw()[1] for _ in range(4)] == [0] * 4
    assert sorted(order.draw()[1] for _ in range(4)) == [0, 0, 1, 1]


def test_states_of_other_settings_are_refused_and_older_ones_taken() -> None:
    order = EndlessOrder(3, 0, identity={"digest": "a", "stages": [[2, 1], [None, 3]]})
    with pytest.raises(UserError, match=r"digest b -> a, stages None -> "):
        order.load_state_dict({"position": 1, "size": 3, "seed": 0, "shuffle": True, "digest": "b"})
    with pytest.raises(UserError, match=r"sources .* -> None"):
        order.load_state_dict(order.state_dict() | {"sources": {"a": [1, 1.0]}})
    older = EndlessOrder(3, 0, identity={"digest": "a"})
    older.load_state_dict({"position": 7, "size": 3, "seed": 0, "shuffle": True})
    assert older.position == 7
