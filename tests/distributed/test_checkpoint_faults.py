"""Saves that are cut short, disks that are full, files that are damaged or mean harm, weights that change meanwhile."""

import argparse
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_vespo import parallel
from megatron_vespo.checkpoint_folder import file_record, list_checkpoints
from megatron_vespo.errors import UserError
from megatron_vespo.models.convert import torch_dist_to_hf
from megatron_vespo.models.describe import describe
from megatron_vespo.policy.checkpoint_writer import PlannedSave
from megatron_vespo.policy.policy import Policy
from megatron_vespo.types import Sample
from tests.checkpoints import State, checkpoints_of, differences, state_of, update
from tests.distributed.test_checkpoint_tools import alone
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


def message(function: Callable[[], Any]) -> str:
    """What the user is told, or nothing."""
    try:
        function()
    except UserError as error:
        return str(error)
    return ""


def save_three(model: Path, samples: list[Sample], folder: Path, megatron: dict[str, Any]) -> list[State]:
    """Checkpoints 1, 2 and 3 with what they hold."""
    policy = make_policy(model, megatron)
    checkpoints, states = checkpoints_of(policy, folder, keep=3), []
    for iteration in (1, 2, 3):
        update(policy, samples, megatron)
        checkpoints.save(iteration, {"run_state": b"%d" % iteration})
        states.append(state_of(policy))
    return states


def load(model: Path, folder: Path, iteration: int | None = None, megatron: dict[str, Any] | None = None) -> Any:
    """What is told, and the state and iteration after loading."""
    policy = make_policy(model, megatron or {})
    loaded = None

    def load() -> None:
        nonlocal loaded
        loaded = checkpoints_of(policy, folder).load(iteration)

    told = message(load)
    return told, loaded and loaded.iteration, state_of(policy)


@pytest.fixture(scope="module")
def saved(model: Path, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    run_ranks(2, save_three, model, samples, folder, DISTRIBUTED)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


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
        ((told, iteration, state),) = run_ranks(1, load, model, folder)
        assert told == ""
        assert not differences(state, wanted[iteration])
        seen.add(iteration)
        run_ranks(1, save_three, model, samples, folder, {})
        names = sorted(path.name for path in folder.iterdir())
        assert names == [*(f"iter_{n:07d}" for n in (1, 2, 3)), "latest_checkpointed_iteration.txt"]
    assert seen == {1, 2}


def go_back(model: Path, samples: list[Sample], folder: Path) -> list[int]:
    """Go on from checkpoint 1 of 3, and save two more."""
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


def test_a_run_that_went_back_keeps_its_own_checkpoints(model: Path, samples: list[Sample], copy: Path) -> None:
    assert run_ranks(2, go_back, model, samples, copy) == [[3, 4]] * 2


# --- damage ---


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {"flipped": (flip, "is damaged"), "cut": (cut, "bytes instead of"), "missing": (Path.unlink, "is missing")}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json", "run/run_state"])
def test_damage_is_refused_by_name(model: Path, copy: Path, damage: str, name: str) -> None:
    act, text = DAMAGE[damage]
    act(copy / "iter_0000003" / name)
    for told, _, _ in run_ranks(2, load, model, copy, None, DISTRIBUTED):
        assert f"iter_0000003/{name} " in told and text in told
        assert told.endswith("; go on from the one before with --resume 2")
    ((told, iteration, _),) = run_ranks(1, load, model, copy, 2, DISTRIBUTED)
    assert (told, iteration) == ("", 2)


def test_an_incomplete_checkpoint_is_refused(model: Path, copy: Path) -> None:
    (copy / "iter_0000003" / "manifest.json").unlink()
    flip(copy / "iter_0000002" / "manifest.json")
    cut(copy / "iter_0000001" / ".metadata")

    def loads() -> list[str]:
        return [load(model, copy, iteration, DISTRIBUTED)[0] for iteration in (None, 2, 1, 5)]

    for newest, flipped, first, fifth in run_ranks(2, loads):
        assert "iter_0000003 is not complete: manifest.json is missing; go on from the one before with" in newest
        assert "iter_0000002" in flipped and "--resume 1" in flipped
        assert first.endswith("; there is none before it")
        assert "there is no checkpoint 5; there are 1, 2" in fifth
    (told,) = run_ranks(1, lambda: load(model, copy / "nowhere")[0])
    assert "there is no checkpoint to go on from" in told


def test_a_checkpoint_of_another_model_is_refused(copy: Path, tmp_path: Path) -> None:
    other = make_tiny_qwen3_moe(tmp_path / "other", vocab_size=VOCABULARY, hidden_size=64)
    for told, _, _ in run_ranks(2, load, other, copy, None, DISTRIBUTED):
        assert "iter_0000003 does not fit this run's model and optimizer: " in told and "shape" in told
        assert "\n" not in told


def test_a_checkpoint_of_the_other_optimizer_is_refused(model: Path, copy: Path) -> None:
    ((told, _, _),) = run_ranks(1, load, model, copy, None, {})
    assert told == "" or "does not fit this run's model and optimizer" in told


# --- harm ---


class Harm:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def put_into_metadata(folder: Path, harm: Harm) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = harm
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def put_into_object(folder: Path, harm: Any, key: str = "common_state/shard_0_1") -> None:
    """At the end of the file, where .metadata then says that it lies."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (index,) = [index for index in metadata.storage_data if index.fqn == key]
    info = metadata.storage_data[index]
    stream = io.BytesIO()
    torch.save([harm], stream)
    path = folder / info.relative_path
    info.offset, info.length = path.stat().st_size, len(stream.getvalue())
    path.write_bytes(path.read_bytes() + stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def put_into_extra_state(folder: Path, harm: Harm) -> None:
    """As Transformer Engine keeps it: a pickle in a tensor of bytes."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    key = next(index.fqn for index in metadata.storage_data if "_extra_state" in index.fqn)
    content = torch.frombuffer(bytearray(pickle.dumps({"recipe": harm})), dtype=torch.uint8)
    put_into_object(folder, content, key)


def sign(folder: Path) -> None:
    """A manifest that fits: whoever means harm can make one."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {name: asdict(file_record(folder / name)) for name in manifest["files"]}
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "put, file",
    [(put_into_metadata, ".metadata"), (put_into_object, "_0.distcp"), (put_into_extra_state, "_0.distcp")],
)
def test_nothing_in_a_checkpoint_runs(model: Path, copy: Path, tmp_path: Path, put: Any, file: str) -> None:
    harm, folder = Harm(tmp_path / "harm"), copy / "iter_0000003"
    put(folder, harm)
    sign(folder)
    for told, _, _ in run_ranks(2, load, model, copy, None, DISTRIBUTED):
        assert file in told and "is refused, it could run code" in told and "system" in told
    assert not harm.path.exists()


def test_the_same_checkpoint_would_have_done_harm(copy: Path, tmp_path: Path) -> None:
    """Or the test above shows nothing."""
    harm, folder = Harm(tmp_path / "harm"), copy / "iter_0000003"
    put_into_object(folder, harm)

    def load_as_upstream() -> None:
        from megatron.core import dist_checkpointing

        dist_checkpointing.load_common_state_dict(str(folder))

    alone(load_as_upstream)
    assert harm.path.exists()


def test_the_tools_run_nothing_either(model: Path, copy: Path, tmp_path: Path) -> None:
    harm = Harm(tmp_path / "harm")
    put_into_metadata(copy / "iter_0000003", harm)
    told = alone(torch_dist_to_hf, copy, tmp_path / "hf", model)
    assert ".metadata: is refused, it could run code: posix.system has no place there" in told
    assert "is refused" in alone(describe, copy)
    assert not harm.path.exists()


def test_the_tools_read_weights_beside_the_arguments_of_megatron_lm(model: Path, copy: Path, tmp_path: Path) -> None:
    """Its common state has a Namespace in it, which they never read."""
    folder = copy / "iter_0000003"
    put_into_object(folder, {"args": argparse.Namespace(lr=1.0), "iteration": 3})
    (folder / "manifest.json").unlink()
    assert alone(torch_dist_to_hf, copy, tmp_path / "hf", model) is None
