import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.rollout.buffer import RolloutBuffer
from megatron_vespo.types import Prompt, SampleGroup


def make_prompt(index: int) -> Prompt:
    return Prompt(index, np.array([1], np.int32))


class Adversary:
    """A loop whose groups get their first token at once and their last as late as the test draws."""

    def __init__(self, buffer: RolloutBuffer, updates: int) -> None:
        self.buffer, self.updates = buffer, updates
        self.version = self.drawn = self.dropped = 0
        self.sampled_at: dict[int, int] = {}  # version of the oldest weights that sampled a token
        self.flying: list[int] = []
        self.trained: list[int] = []
        self.restarts: dict[int, int] = {}

    def send(self, index: int) -> None:
        self.sampled_at[index] = self.version
        self.flying.append(index)

    def admit(self) -> None:
        while self.buffer.can_admit:
            self.buffer.admit(make_prompt(self.drawn))
            self.send(self.drawn)
            self.drawn += 1

    def finish_one(self, data: st.DataObject, may_drop: bool) -> None:
        index = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        if may_drop and data.draw(st.booleans()):
            self.buffer.drop(index)
            self.dropped += 1
            self.admit()
        else:
            self.buffer.finish(SampleGroup(make_prompt(index), []))

    def train(self, data: st.DataObject, may_drop: bool) -> None:
        groups, late = self.buffer.take()
        assert len(groups) == self.buffer.groups_per_batch
        indices = [group.prompt.index for group in groups]
        for entry in late:
            index = entry.prompt.index
            self.restarts[index] = self.restarts.get(index, 0) + 1
            self.flying = [flying for flying in self.flying if flying != index]
        bound = (self.buffer.max_staleness + 1) * self.updates - 1
        for _ in range(self.updates):
            assert all(self.version - self.sampled_at[index] <= bound for index in indices)
            self.version += 1
            # Other groups go on meanwhile.
            if self.flying and data.draw(st.booleans()):
                self.finish_one(data, may_drop)
        self.trained += indices
        for prompt in self.buffer.release():
            self.send(prompt.index)
        self.admit()


@settings(deadline=None)
@given(
    batch=st.integers(1, 4),
    max_staleness=st.integers(0, 3),
    extra=st.integers(0, 4),
    updates=st.integers(1, 3),
    may_drop=st.booleans(),
    data=st.data(),
)
def test_a_loop_with_adversarial_completion_times(
    batch: int, max_staleness: int, extra: int, updates: int, may_drop: bool, data: st.DataObject
) -> None:
    extra = min(extra, batch)
    loop = Adversary(RolloutBuffer(batch, max_staleness, extra), updates)
    loop.admit()
    batches = 5
    for _ in range(batches):
        while not loop.buffer.ready:
            # In the end all groups are kept, as the cap on dropping sees to.
            loop.finish_one(data, may_drop and loop.dropped < 3 * batch)
        assert loop.drawn - len(loop.trained) - loop.dropped <= (max_staleness + 1) * batch + extra
        loop.train(data, may_drop)
    assert len(loop.trained) == len(set(loop.trained)) == batch * batches, "trained on once"
    assert all(count == 1 for count in loop.restarts.values()), "started again at most once"
    left = {entry.prompt.index for entry in loop.buffer.entries()}
    assert len(left | set(loop.trained)) + loop.dropped == loop.drawn, "nothing is lost"
    if not extra:
        assert loop.trained == sorted(loop.trained) and not loop.restarts
        if not may_drop:
            assert loop.trained == list(range(batch * batches))


def test_a_batch_does_not_wait_for_the_longest_of_more_than_it_needs() -> None:
    buffer = RolloutBuffer(groups_per_batch=2, max_staleness=0, extra=1)
    for index in range(3):
        buffer.admit(make_prompt(index))
    for index in (2, 1):
        buffer.finish(SampleGroup(make_prompt(index), []))
    groups, late = buffer.take()
    assert [group.prompt.index for group in groups] == [1, 2]
    assert [entry.prompt.index for entry in late] == [0] and not buffer.can_admit
    assert [prompt.index for prompt in buffer.release()] == [0]
    for index in (3, 4):
        buffer.admit(make_prompt(index))
        buffer.finish(SampleGroup(make_prompt(index), []))
    assert buffer.count_ready() == 2 and not buffer.ready  # the one passed over is waited for
    buffer.finish(SampleGroup(make_prompt(0), []))
    assert [group.prompt.index for group in buffer.take()[0]] == [0, 3]


def test_a_group_passed_over_goes_on_while_it_is_fresh_enough() -> None:
    buffer = RolloutBuffer(groups_per_batch=1, max_staleness=1, extra=1)
    for index in range(3):
        buffer.admit(make_prompt(index))
    buffer.finish(SampleGroup(make_prompt(1), []))
    groups, late = buffer.take()
    assert [group.prompt.index for group in groups] == [1] and not late
    assert buffer.release() == []
    buffer.finish(SampleGroup(make_prompt(0), []))
    assert [group.prompt.index for group in buffer.take()[0]] == [0]


def test_what_is_held_travels() -> None:
    buffer = RolloutBuffer(groups_per_batch=1, max_staleness=2)
    for index in range(3):
        buffer.admit(make_prompt(index))
    buffer.finish(SampleGroup(make_prompt(0), []))
    buffer.take()
    with pytest.raises(RuntimeError, match="not released"):
        buffer.entries()
    buffer.release()
    buffer.admit(make_prompt(3))
    other = RolloutBuffer(groups_per_batch=1, max_staleness=2)
    other.restore(buffer.entries())
    assert [(entry.prompt.index, entry.deadline) for entry in other.entries()] == [(1, 1), (2, 1), (3, 2)]
    assert not other.can_admit
    with pytest.raises(RuntimeError, match="in use"):
        other.restore([])


def test_misuse_is_refused() -> None:
    buffer = RolloutBuffer(groups_per_batch=2, max_staleness=0)
    buffer.admit(make_prompt(0))
    with pytest.raises(RuntimeError, match="in flight already"):
        buffer.admit(make_prompt(0))
    buffer.admit(make_prompt(1))
    with pytest.raises(RuntimeError, match="release a batch"):
        buffer.admit(make_prompt(2))
    buffer.finish(SampleGroup(make_prompt(1), []))
    with pytest.raises(RuntimeError, match="not in flight"):
        buffer.finish(SampleGroup(make_prompt(1), []))
    with pytest.raises(RuntimeError, match="not all complete"):
        buffer.take()
    buffer.finish(SampleGroup(make_prompt(0), []))
    buffer.take()
    assert not buffer.can_admit
    buffer.release()
    with pytest.raises(RuntimeError, match="no batch is taken"):
        buffer.release()
    with pytest.raises(ValueError, match="extra 3"):
        RolloutBuffer(2, 0, 3)
