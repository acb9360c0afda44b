"""Checkpoints to resume from: the whole state of training, exact to the last bit, in Megatron's ``torch_dist`` format.

A checkpoint is written into a hidden folder, gets a manifest of all its files when every rank has written, then its
name, and then the tracker names it: whatever ends a save early leaves the checkpoints before it as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from megatron_vespo import checkpoint_folder, parallel
from megatron_vespo.checkpoint_folder import Manifest, iteration_name, read_manifest, temporary_name
from megatron_vespo.errors import UserError
from megatron_vespo.models.untrusted import DAMAGE, check_objects, extra_states_checked, first_line
from megatron_vespo.policy.checkpoint_writer import PlannedSave, Written
from megatron_vespo.policy.policy import Policy
from megatron_vespo.policy.random_state import random_state, reseed, restore_random_state

_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # Gathered on the host, by the one rank that writes: otherwise every rank holds the whole of it in its memory.
    "distrib_optim_fully_reshardable_mem_efficient": True,
    # A name for each layer and expert: for shards under one name torch takes time with the square of their number.
    "singleton_local_shards": True,
    "chained_optim_avoid_prefix": True,
}
"""Megatron-LM's names for a way of saving that loads at any layout (megatron/training/checkpointing.py:468)."""
_RANDOM = "random_state"
_HINT = " (model.hf_path, dtype and megatron.use_distributed_optimizer must be those that saved it)"


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint held besides the policy's state.

    Attributes:
        iteration: Which it is.
        files: The run's files, on every rank.
        same_random_streams: Whether random streams go on where they stood. At another layout there are other streams,
            which are seeded with the run's seed and the iteration.
    """

    iteration: int
    files: dict[str, bytes]
    same_random_streams: bool


@dataclass(frozen=True)
class _Save:
    """A save under way."""

    iteration: int
    plan: PlannedSave
    written: Future[Written]
    files: Mapping[str, bytes]


class Checkpoints:
    """Saves and loads a policy. Every rank has one, and all its methods are collectives."""

    def __init__(self, folder: Path, policy: Policy, *, keep: int, asynchronous: bool, seed: int) -> None:
        """Nothing is read or written yet.

        Args:
            folder: Of the checkpoints; on a file system that all ranks share.
            policy: What is saved and loaded.
            keep: Checkpoints kept.
            asynchronous: Write files in a thread, from a copy in host memory.
            seed: Seeds random streams that cannot be restored.
        """
        self._folder, self._policy, self._keep, self._seed = folder, policy, keep, seed
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._under_way: _Save | None = None
        self._validated = False

    # --- saving ---

    def save(self, iteration: int, files: Mapping[str, bytes] | None) -> None:
        """Save; an asynchronous save is complete only when ``poll()`` or ``finish()`` has published it.

        Args:
            iteration: Number of the checkpoint.
            files: On rank 0 what else the run needs to go on, by file name.

        Raises:
            UserError: Writing failed, this checkpoint or the one under way; on every rank.
        """
        self.finish()

        def begin() -> None:
            with self._reporting(iteration):
                checkpoint_folder.begin(self._folder, iteration)

        parallel.on_main(begin)
        folder = self._folder / temporary_name(iteration)
        _agree("" if folder.is_dir() else f"{folder} is not there: checkpoints must lie where all nodes see them")
        content = dict(_CONTENT)
        state = self._policy.sharded_state_dict(dict(_CONTENT))
        state |= {"iteration": iteration, "checkpoint_version": 3.0, _RANDOM: _random_object(random_state())}
        plan = PlannedSave(state, folder, content, validate=not self._validated)
        self._validated = True
        if self._thread is not None:
            plan.detach()
            self._under_way = _Save(iteration, plan, self._thread.submit(plan.write), files or {})
        else:
            self._publish(_Save(iteration, plan, _run(plan.write), files or {}))

    def poll(self) -> None:
        """Publish an asynchronous save that all ranks have finished writing; cheap.

        Raises:
            UserError: Writing failed; on every rank.
        """
        if self._under_way is not None and parallel.all_true(self._under_way.written.done()):
            self.finish()

    def finish(self) -> None:
        """Wait for a save under way, and publish it.

        Raises:
            UserError: Writing failed; on every rank.
        """
        if self._under_way is not None:
            save, self._under_way = self._under_way, None
            self._publish(save)

    def _publish(self, save: _Save) -> None:
        failure = save.written.exception()
        try:
            _agree("" if failure is None else _failed(save.iteration, failure))
        except UserError as error:
            parallel.on_main(lambda: rmtree(self._folder / temporary_name(save.iteration), ignore_errors=True))
            raise error from failure
        written = parallel.gather_on_main(save.written.result())

        def complete() -> None:
            assert written is not None
            with self._reporting(save.iteration):
                save.plan.write_metadata([rank.results for rank in written])
                files = {name: record for rank in written for name, record in rank.files.items()}
                checkpoint_folder.complete(self._folder, save.iteration, parallel.layout(), files, save.files)
            try:
                checkpoint_folder.prune(self._folder, save.iteration, self._keep)
            except OSError as error:
                raise UserError(f"an old checkpoint cannot be removed: {error}; the new one is complete") from error

        parallel.on_main(complete)

    @contextmanager
    def _reporting(self, iteration: int) -> Iterator[None]:
        """On rank 0: a failure removes what was written."""
        try:
            yield
        except OSError as error:
            rmtree(self._folder / temporary_name(iteration), ignore_errors=True)
            raise UserError(_failed(iteration, error)) from error

    # --- loading ---

    def load(self, iteration: int | None) -> Loaded:
        """Load a checkpoint into the policy.

        Args:
            iteration: Which; None is the newest.

        Raises:
            UserError: It is not there, damaged, incomplete, not to be trusted or of another model; on every rank. It
                says which one to go on from instead.
        """
        number = 0

        def choose() -> None:
            nonlocal number
            number = checkpoint_folder.choose(self._folder, iteration)

        parallel.on_main(choose)
        number = int(parallel.broadcast_bytes(str(number).encode() if parallel.is_main() else None))
        folder = self._folder / iteration_name(number)
        try:
            manifest = self._verified(folder)
        except UserError as error:
            raise UserError(f"{error}; {checkpoint_folder.way_out(self._folder, number)}") from error
        same = manifest.layout == parallel.layout()
        self._load(folder, with_random_state=same)
        if not same:
            reseed(self._seed, number)
        files = {name: (folder / checkpoint_folder.RUN_FILES / name).read_bytes() for name in manifest.run_files}
        return Loaded(number, files, same)

    def _verified(self, folder: Path) -> Manifest:
        """Every file is as it was written, and nothing in them runs code; each rank reads its share of the files."""
        manifest, damage = Manifest({}, {}), ""
        try:
            manifest = read_manifest(folder)
            names = sorted(manifest.files, key=lambda name: -manifest.files[name].size)
            damage = manifest.damage(folder, names[parallel.rank() :: parallel.world_size()])
        except UserError as error:
            damage = str(error)
        _agree(damage)
        parallel.on_main(lambda: check_objects(folder))
        return manifest

    def _load(self, folder: Path, *, with_random_state: bool) -> None:
        failure: BaseException | None = None
        try:
            state = self._policy.sharded_state_dict(dict(_CONTENT), is_loading=True)
            if with_random_state:
                state[_RANDOM] = _random_object(None)
            # No collective from here on, so that a rank that fails keeps none waiting.
            state = dist_checkpointing.load(state, str(folder), validate_access_integrity=False)
            with extra_states_checked():
                self._policy.load_state_dict(state)
            if with_random_state:
                restore_random_state(state[_RANDOM])
        except (CheckpointingException, CheckpointException, *DAMAGE) as error:
            failure = error
        try:
            _agree("" if failure is None else f"{folder} does not fit this run: {_reason(failure)}{_HINT}")
        except UserError as error:
            raise error from failure


def _agree(failure: str) -> None:
    """Raise the first rank's failure on every rank; nothing where none failed."""
    failures = [message for message in parallel.gather_values(failure, str) if message]
    if failures:
        raise UserError(failures[0])


def _failed(iteration: int, error: BaseException) -> str:
    reason = str(error) if isinstance(error, OSError) else repr(error)
    return f"saving {iteration_name(iteration)} failed: {reason}; earlier checkpoints are untouched"


def _reason(error: BaseException) -> str:
    """In one line; torch wraps what a rank ran into."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {first_line(error)}"


def _run[T](function: Callable[[], T]) -> Future[T]:
    """Call it now; what it gives or raises, as a thread would have it."""
    future: Future[T] = Future()
    try:
        future.set_result(function())
    except OSError as error:
        future.set_exception(error)
    return future


def _random_object(state: dict[str, Any] | None) -> ShardedObject:
    return ShardedObject(_RANDOM, state, (parallel.world_size(),), (parallel.rank(),))
