"""The table of turns: what must hold of it, whatever is moved."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vespo.policy.offload import ALL_PARTS, Part
from megatron_vespo.rollout.gate import StartGate
from megatron_vespo.weight_sync import turns
from megatron_vespo.weight_sync.turns import KV_CACHE, SAMPLE, TRAIN, WEIGHTS, SharedDevices, Turn, Turns
from tests.ranks import run_ranks

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


class Device:
    """What lies on a device, as the two sides say it; writes down who gave up or took what."""

    def __init__(self) -> None:
        self.held: frozenset[Part] = frozenset()
        self.moves: list[str] = []
        control = SimpleNamespace(
            pause_generation=lambda mode: None,
            continue_generation=lambda: None,
            release_memory=lambda tags: self.moves.append(f"servers give up {' '.join(tags)}"),
            resume_memory=lambda tags: self.moves.append(f"servers take {' '.join(tags)}"),
        )
        members = [SimpleNamespace(control=control, url="http://server", lives=0)]
        self.fleet: Any = SimpleNamespace(
            look=lambda: None, present=lambda: members, rest=lambda: members, wake=lambda: None
        )

    def keep(self, parts: frozenset[Part]) -> None:
        self._note("gives up", self.held - parts)
        self.held &= parts

    def bring(self, parts: frozenset[Part]) -> None:
        self._note("takes", parts - self.held)
        self.held |= parts

    def _note(self, does: str, parts: frozenset[Part]) -> None:
        if parts:
            self.moves.append(f"trainer {does} {' '.join(sorted(parts))}")


def _two_steps() -> list[list[str]]:
    device, moves = Device(), []
    devices = SharedDevices(device.fleet, StartGate(), lambda phase: nullcontext())
    devices.memory = device  # type: ignore[assignment]
    for take in (devices.train, devices.push, devices.sample, devices.train):
        take()
        moves.append(device.moves.copy())
        device.moves.clear()
    return moves


def test_each_side_gives_up_before_the_other_takes() -> None:
    (moves,) = run_ranks(1, _two_steps)
    trains = ["servers give up kv_cache weights", "trainer takes gradients optimizer parameters"]
    assert moves == [
        trains,
        ["trainer gives up gradients optimizer", "servers take weights"],
        ["trainer gives up parameters", "servers take kv_cache"],
        trains,
    ]
