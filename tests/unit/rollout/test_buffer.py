import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo.rollout.buffer import RolloutBuffer
from megatron_vespo.types import Prompt, SampleGroup


def make_prompt(index: int) -> Prompt:
    return Prompt(index, np.array([1], np.int32))


@given(
    batch=st.integers(1, 4),
    max_staleness=st.integers(0, 3),
    updates=st.integers(1, 3),
    batches=st.integers(1, 6),
    data=st.data(),
)
def test_a_loop_with_adversarial_completion_times(
    batch: int, max_staleness: int, updates: int, batches: int, data: st.DataObject
) -> None:
    buffer = RolloutBuffer(batch, max_staleness)
    version, drawn, released = 0, 0, 0
    sampled_at: dict[int, int] = {}  # version of the oldest weights that sampled a token
    flying: list[int] = []
    trained: list[int] = []

    def admit() -> None:
        nonlocal drawn
        while buffer.can_admit:
            buffer.admit(make_prompt(drawn))
            # The adversary samples the first token at once, and the last one as late as it likes.
            sampled_at[drawn] = version
            flying.append(drawn)
            drawn += 1
            assert drawn - released <= (max_staleness + 1) * batch

    admit()
    for _ in range(batches):
        while buffer.count_ready(batch) < batch:
            index = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
            buffer.complete(SampleGroup(make_prompt(index), []))
        groups = buffer.take(batch)
        for _ in range(updates):
            for group in groups:
                assert version - sampled_at[group.prompt.index] <= (max_staleness + 1) * updates - 1
            version += 1
        trained += [group.prompt.index for group in groups]
        buffer.release(batch)
        released += batch
        admit()
    assert trained == list(range(batch * batches))


def test_misuse_is_refused() -> None:
    buffer = RolloutBuffer(groups_per_batch=2, max_staleness=0)
    buffer.admit(make_prompt(0))
    with pytest.raises(RuntimeError, match="in flight already"):
        buffer.admit(make_prompt(0))
    buffer.admit(make_prompt(1))
    with pytest.raises(RuntimeError, match="release a batch"):
        buffer.admit(make_prompt(2))
    buffer.complete(SampleGroup(make_prompt(1), []))
    with pytest.raises(RuntimeError, match="not in flight"):
        buffer.complete(SampleGroup(make_prompt(1), []))
    with pytest.raises(RuntimeError, match="not all complete"):
        buffer.take(1)
    buffer.complete(SampleGroup(make_prompt(0), []))
    buffer.take(2)
    assert buffer.takeable == 0 and not buffer.can_admit
    with pytest.raises(RuntimeError, match="cannot release 3"):
        buffer.release(3)
