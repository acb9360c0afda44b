"""The table of turns: what must hold of it, whatever is moved."""

from __future__ import annotations

import pytest

from megatron_vespo.policy.offload import ALL_PARTS, Part
from megatron_vespo.rollout.gate import StartGate
from megatron_vespo.weight_sync import turns
from megatron_vespo.weight_sync.turns import KV_CACHE, SAMPLE, TRAIN, WEIGHTS, SharedDevices, Turn, Turns

ALL = {turn.name: turn for turn in vars(turns).values() if isinstance(turn, Turn)}


def test_nobody_trains_beside_a_cache_nor_samples_beside_a_trainer() -> None:
    for turn in ALL.values():
        assert not (KV_CACHE in turn.servers and turn.trainer)
        assert not (Part.GRADIENTS in turn.trainer and turn.servers)
    assert TRAIN.trainer == ALL_PARTS and SAMPLE.servers == {WEIGHTS, KV_CACHE}


def test_weights_that_were_given_up_are_pushed_before_anything_is_sampled() -> None:
    """The one turn after that which costs the servers their weights is a push."""
    without_weights = {name for name, turn in ALL.items() if WEIGHTS not in turn.servers}
    assert without_weights == {"train"}
    assert {name for name, turn in ALL.items() if turn.after & without_weights} == {"push"}


@pytest.mark.parametrize("first", ["sample", "scoring", "saving"])
def test_a_turn_out_of_order_is_a_mistake(first: str) -> None:
    devices = SharedDevices(None, StartGate(), lambda phase: pytest.fail("nothing may be moved"))
    with pytest.raises(AssertionError, match="start"):
        if first == "sample":
            devices.sample()
        else:
            with getattr(devices, first)():
                pass


def test_on_devices_of_their_own_nobody_waits_for_a_turn() -> None:
    own = Turns()
    own.train()
    own.sample()
    with own.scoring(), own.saving():
        pass
