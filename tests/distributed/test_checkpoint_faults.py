"""Saves that are cut short, disks that are full, weights that change while they are written."""

import os
import resource
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_vespo import parallel
from megatron_vespo.checkpoint_folder import list_checkpoints
from megatron_vespo.policy.checkpoint_writer import PlannedSave
from megatron_vespo.policy.policy import Policy
from megatron_vespo.types import Sample
from tests.checkpoints import State, checkpoints_of, differences, load, message, save_three, state_of, update
from tests.policies import make_policy, random_samples
from tests.ranks import run_ranks
from tests.tiny_models import make_tiny_qwen3_moe

VOCABULARY = 50
DISTRIBUTED = {"use_distributed_optimizer": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3_moe(tmp_path_factory.mktemp("model") / "moe", vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return random_samples(6, VOCABULARY)


# --- asynchronous saves ---


def overwrite_everything(policy: Policy) -> None:
    """In place, as an optimizer does it."""
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(7)
    for part in policy._optimizer.chained_optimizers:
        for parameter, moments in part.optimizer.state.items():
            parameter.data.fill_(7)
            for tensor in moments.values():
                tensor.fill_(7)


def save_while_weights_change(
    model: Path, samples: list[Sample], folder: Path, megatron: dict[str, Any]
) -> tuple[list[list[int]], list[str]]:
    """What is there after each call, and what differs in the checkpoint from the state when it was saved."""
    policy = make_policy(model, megatron)
    update(policy, samples, megatron)
    checkpoints, there = checkpoints_of(policy, folder, asynchronous=True, keep=3), []
    wanted, go, write = state_of(policy), threading.Event(), PlannedSave.write

    def write_late(self: PlannedSave) -> Any:
        go.wait()
        return write(self)

    def look() -> None:
        parallel.barrier()
        there.append(list_checkpoints(folder))
        parallel.barrier()

    with mock.patch.object(PlannedSave, "write", write_late):
        checkpoints.save(1, {"run_state": b"1"})
        overwrite_everything(policy)
        checkpoints.poll()
        look()
        go.set()
        while 1 not in list_checkpoints(folder):
            checkpoints.poll()
            parallel.barrier()
    checkpoints.save(2, None)
    checkpoints.save(3, None)  # waits for the one under way
    there.append([number for number in list_checkpoints(folder) if number < 3])
    checkpoints.finish()
    checkpoints.finish()
    look()
    again = make_policy(model, megatron)
    checkpoints_of(again, folder).load(1)
    return there, differences(state_of(again), wanted)


@pytest.mark.parametrize("megatron", [{}, DISTRIBUTED, DISTRIBUTED | {"bf16": True}], ids=str)
def test_an_asynchronous_save_holds_what_there_was_when_it_began(
    model: Path, samples: list[Sample], tmp_path: Path, megatron: dict[str, Any]
) -> None:
    for there, differ in run_ranks(2, save_while_weights_change, model, samples, tmp_path, megatron):
        assert there == [[], [1, 2], [1, 2, 3]]
        assert not differ


# --- a disk that is full ---


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def save_with_full_disk(
    model: Path, samples: list[Sample], folder: Path, asynchronous: bool, bad_rank: int, size: int
) -> tuple[str, list[str], list[int]]:
    """What is told when a rank cannot write large files, and what is left; then it can again."""
    policy = make_policy(model, DISTRIBUTED)
    checkpoints = checkpoints_of(policy, folder, asynchronous=asynchronous)
    update(policy, samples, DISTRIBUTED)
    checkpoints.save(1, None)
    checkpoints.finish()
    if parallel.rank() == bad_rank:
        limit_file_size(size)

    def save() -> None:
        checkpoints.save(2, None)
        while asynchronous:
            checkpoints.poll()
            parallel.barrier()

    told = message(save)
    left = sorted(path.name for path in folder.iterdir())
    parallel.barrier()
    limit_file_size(resource.RLIM_INFINITY)
    checkpoints.save(3, None)
    checkpoints.finish()
    return told, left, list_checkpoints(folder)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("bad_rank, size, file", [(0, 50_000, "__0_0.distcp"), (1, 2_000, "__1_0.distcp"), (0, 0, "")])
def test_a_rank_that_cannot_write_is_told_of_on_every_rank(
    model: Path, samples: list[Sample], tmp_path: Path, bad_rank: int, size: int, file: str, asynchronous: bool
) -> None:
    folder = tmp_path / "checkpoints"
    ranks = run_ranks(2, save_with_full_disk, model, samples, folder, asynchronous, bad_rank, size)
    (told, left, after), (told_there, *_) = ranks
    assert told == told_there
    assert "saving iter_0000002 failed: [Errno 27] File too large" in told and file in told
    assert told.endswith("earlier checkpoints are untouched")
    assert left == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert after == [1, 3]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def save_until_full(model: Path, samples: list[Sample], folder: Path, asynchronous: bool) -> tuple[str, list[str]]:
    policy = make_policy(model, DISTRIBUTED)
    checkpoints = checkpoints_of(policy, folder, keep=100, asynchronous=asynchronous)
    update(policy, samples, DISTRIBUTED)

    def save() -> None:
        for iteration in range(1, 100):
            checkpoints.save(iteration, None)
        checkpoints.finish()

    return message(save), sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_leaves_the_checkpoints_that_fit(
    model: Path, samples: list[Sample], small_disk: Path, asynchronous: bool
) -> None:
    for told, left in run_ranks(2, save_until_full, model, samples, small_disk, asynchronous):
        assert "[Errno 28] No space left on device" in told
        assert "iter_00000" in told and str(small_disk) in told
        there = list_checkpoints(small_disk)
        assert len(there) > 1
        assert left == [f"iter_{number:07d}" for number in there] + ["latest_checkpointed_iteration.txt"]
    ((told, iteration, _),) = run_ranks(1, load, model, small_disk, None, DISTRIBUTED)
    assert (told, iteration) == ("", there[-1])


# --- a run that is killed ---


def killed_at(model: Path, samples: list[Sample], folder: Path, call: int) -> list[State]:
    """Save checkpoint 1, then 2, killed when something is made to survive a power cut for the nth time."""
    policy, calls, sync = make_policy(model, {}), 0, os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    checkpoints = checkpoints_of(policy, folder, keep=1)
    for iteration in (1, 2):
        update(policy, samples, {})
        if iteration == 2:
            mock.patch.object(os, "fsync", fsync).start()
        checkpoints.save(iteration, {"run_state": b"%d" % iteration})
        torch.save(state_of(policy), folder.parent / f"state_{iteration}")
    return [calls]  # type: ignore[list-item]


def go_on_after(model: Path, samples: list[Sample], folder: Path) -> Any:
    """What is loaded after a kill, and the names in the folder after three more saves."""
    loaded = load(model, folder)
    save_three(model, samples, folder, {})
    return *loaded, sorted(path.name for path in folder.iterdir())


def test_a_kill_at_any_point_leaves_the_last_checkpoint(model: Path, samples: list[Sample], tmp_path: Path) -> None:
    ((calls,),) = run_ranks(1, killed_at, model, samples, tmp_path / "whole" / "checkpoints", 0)
    assert calls > 8
    wanted = {n: torch.load(tmp_path / "whole" / f"state_{n}", weights_only=False) for n in (1, 2)}
    seen = set()
    for call in range(1, calls + 1):
        folder = tmp_path / str(call) / "checkpoints"

        def run(call: int = call, folder: Path = folder) -> None:
            run_ranks(1, killed_at, model, samples, folder, call)

        with pytest.raises(EOFError):
            run()
        ((told, iteration, state, names),) = run_ranks(1, go_on_after, model, samples, folder)
        assert told == ""
        assert not differences(state, wanted[iteration])
        seen.add(iteration)
        assert names == [*(f"iter_{n:07d}" for n in (1, 2, 3)), "latest_checkpointed_iteration.txt"]
    assert seen == {1, 2}


def go_back(model: Path, samples: list[Sample], folder: Path) -> list[int]:
    """Save three, go on from the first, and save two more."""
    save_three(model, samples, folder, DISTRIBUTED)
    policy = make_policy(model, DISTRIBUTED)
    checkpoints = checkpoints_of(policy, folder, keep=2)
    checkpoints.load(1)
    parallel.barrier()
    for iteration in (2, 4):
        update(policy, samples, DISTRIBUTED)
        checkpoints.save(iteration, None)
        if iteration == 2:
            assert checkpoints.load(None).iteration == 2, "not 3, which the run left"
    return list_checkpoints(folder)


def test_a_run_that_went_back_keeps_its_own_checkpoints(model: Path, samples: list[Sample], tmp_path: Path) -> None:
    assert run_ranks(2, go_back, model, samples, tmp_path) == [[3, 4]] * 2
