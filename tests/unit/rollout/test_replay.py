from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sample_groups import assert_same_groups, make_group
from two_ranks import on_two_ranks

from megatron_vespo.errors import UserError
from megatron_vespo.rollout.batches import list_batches, save_batch
from megatron_vespo.rollout.replay import BatchReader, ReplayService
from megatron_vespo.rollout.service import Broadcast
from megatron_vespo.types import SampleGroup

UPDATES = 4  # of the replaying run on each batch


def save(folder: Path, step: int, *, policy_version: int = 0, versions: Sequence[int] = (0, 0), **changes: Any) -> None:
    """A batch of two groups, ``versions`` being those of their samples."""
    groups = [make_group(10 * step + i, version=version) for i, version in enumerate(versions)]
    header: dict[str, Any] = {"temperature": 0.8, "vocab_size": 64} | changes
    path = folder / f"batch_{step:06d}.msgpack"
    save_batch(path, groups, step=step, policy_version=policy_version, **header)


def reader(folder: Path, **changes: Any) -> BatchReader:
    settings: dict[str, Any] = {"prompts_per_step": 2, "samples_per_prompt": 2, "temperature": 0.8, "vocab_size": 64}
    return BatchReader(list_batches(folder), **settings | changes)


def train(service: ReplayService, steps: int) -> list[list[SampleGroup]]:
    """The calls of the loop."""
    batches = []
    service.push(0)
    service.start()
    for step in range(1, steps + 1):
        batches.append(service.next_batch())
        service.push(step * UPDATES)
        service.release()
    return batches


def replay(folder: Path, steps: int, **changes: Any) -> tuple[Any, Any]:
    """The batches of both ranks, or their errors."""

    def rank(main: bool, broadcast: Broadcast) -> list[list[SampleGroup]]:
        return train(ReplayService(reader(folder, **changes) if main else None, broadcast), steps)

    return on_two_ranks(rank)


def test_all_ranks_get_the_batches_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for step in (10, 2, 1_000_000):
        save(tmp_path, step)
    main, other = replay(tmp_path, 3)
    assert [[group.prompt.index for group in batch] for batch in main] == [
        [20, 21],
        [100, 101],
        [10_000_000, 10_000_001],
    ]
    for ours, theirs in zip(main, other, strict=True):
        assert_same_groups(theirs, ours)
    assert_same_groups(main[0], [make_group(20), make_group(21)])


def test_more_steps_than_batches_fail_on_every_rank(tmp_path: Path) -> None:
    save(tmp_path, 1)
    main, other = replay(tmp_path, 2)
    assert isinstance(main, UserError) and "all 1 saved rollout batches are used up" in str(main)
    assert str(main) == str(other)


def test_a_damaged_batch_fails_on_every_rank(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    second = tmp_path / "batch_000002.msgpack"
    second.write_bytes(second.read_bytes()[:-1])
    main, other = replay(tmp_path, 2)
    assert isinstance(main, UserError) and str(second) in str(main) and "truncated" in str(main)
    assert str(main) == str(other)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"temperature": 1.0}, "set rollout.temperature=0.8"),
        ({"vocab_size": 65}, "a vocabulary of 64; that of model.hf_path has 65"),
        ({"prompts_per_step": 4}, "2 groups of 2 samples, while rollout.prompts_per_step=4"),
        ({"samples_per_prompt": 1}, "2 groups of 2 samples, while .* rollout.samples_per_prompt=1"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save(tmp_path, 1)
    with pytest.raises(UserError, match=f"^{tmp_path / 'batch_000001.msgpack'}: .*{message}"):
        reader(tmp_path, **changes).read(0)


def staleness(folder: Path, steps: int) -> list[list[int]]:
    """Of the groups of each batch as training on it begins."""
    main, other = replay(folder, steps)
    found = [[group.samples[0].staleness(UPDATES * number) for group in batch] for number, batch in enumerate(main)]
    for mine, theirs in zip(main, other, strict=True):
        assert_same_groups(mine, theirs)
    return found


def test_a_run_with_as_many_updates_keeps_its_versions(tmp_path: Path) -> None:
    for step, versions in enumerate([(0, 0), (0, 4), (4, 8)], start=1):
        save(tmp_path, step, policy_version=4 * (step - 1), versions=versions)
    batches = replay(tmp_path, 3)[0]
    found = [[int(group.samples[0].weight_versions[0]) for group in batch] for batch in batches]
    assert found == [[0, 0], [0, 4], [4, 8]]


@pytest.mark.parametrize("updates", [1, 2, 16])
@pytest.mark.parametrize("first", [0, 3])
def test_a_batch_is_as_stale_as_it_was(tmp_path: Path, updates: int, first: int) -> None:
    """Whether the run that saved it made fewer updates or more, and from wherever in it the replay begins."""
    expected = []
    for step in range(first, first + 3):
        age = min(step, 2)
        version = step * updates
        save(tmp_path, step + 1, policy_version=version, versions=(version, version - age))
        expected.append([0, age])
    assert staleness(tmp_path, 3) == expected


def test_what_the_starting_policy_sampled_grows_stale(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert staleness(tmp_path, 3) == [[0, 0], [UPDATES, UPDATES], [2 * UPDATES, 2 * UPDATES]]


def test_an_empty_response_has_no_version_to_move(tmp_path: Path) -> None:
    groups = [make_group(0, tokens=0), make_group(1, tokens=0)]
    save_batch(tmp_path / "batch_000009.msgpack", groups, step=9, policy_version=8, temperature=0.8, vocab_size=64)
    assert_same_groups(replay(tmp_path, 1)[0][0], groups)
