"""When a run saves, what travels in a checkpoint beside the model, and when it stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import msgspec

from megatron_vespo import parallel
from megatron_vespo.config import CheckpointSection
from megatron_vespo.errors import UserError
from megatron_vespo.policy.checkpoints import Checkpoints
from megatron_vespo.types import Progress
from megatron_vespo.weight_sync.turns import Turns

_PROGRESS, _DATA = "progress.json", "data.msgpack"


class Saver:
    """Checkpoints to resume from, and Hugging Face folders. On every rank; all methods are collectives.

    Args:
        checkpoints: Where the former go.
        settings: When.
        steps: Of the whole run.
        save_hf: Writes the latter.
        data_state: Where the data stands, on rank 0: prompts, and what is in flight.
        stop_requested: Whether somebody asked this process to stop.
        message: Says something on the console.
        turns: Whose turn it is on devices that trainer and servers share.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        settings: CheckpointSection,
        steps: int,
        save_hf: Callable[[int], None],
        data_state: Callable[[], bytes | None],
        stop_requested: Callable[[], bool],
        message: Callable[[str], None] = lambda text: None,
        turns: Turns | None = None,
    ) -> None:
        self._turns = turns or Turns()
        self._checkpoints, self._settings, self._steps = checkpoints, settings, steps
        self._save_hf, self._data_state = save_hf, data_state
        self._stop_requested, self._message = stop_requested, message
        self._saved = 0

    def stopping(self) -> bool:
        """Whether any rank was asked to stop."""
        return parallel.any_rank(self._stop_requested())

    def after_step(self, progress: Progress) -> None:
        """Save what is due, and publish what an asynchronous save has finished.

        Raises:
            UserError: Saving failed; earlier checkpoints are untouched.
        """
        self._checkpoints.poll()
        last = progress.step == self._steps
        if self._settings.interval and (last or progress.step % self._settings.interval == 0):
            self._save(progress)
        if last or (self._settings.hf_interval and progress.step % self._settings.hf_interval == 0):
            with self._turns.saving():
                self._save_hf(progress.step)

    def leave(self, progress: Progress) -> None:
        """Wait for a save under way; of a run that was stopped early, save where it stands. Raises as `after_step`."""
        if progress.step < self._steps and progress.step > self._saved:
            self._save(progress)
        self._checkpoints.finish()
        if progress.step < self._steps:
            self._message(f"stopped after step {progress.step} of {self._steps}; go on with --resume auto")

    def _save(self, progress: Progress) -> None:
        files = None
        if parallel.is_main():
            files = {_PROGRESS: msgspec.json.encode(asdict(progress)), _DATA: self._data_state() or b""}
        with self._turns.saving():
            self._checkpoints.save(progress.step, files)
        self._saved = progress.step


def restore(checkpoints: Checkpoints, step: int, message: Callable[[str], None]) -> tuple[Progress, bytes]:
    """Load a checkpoint into the policy. A collective.

    Args:
        checkpoints: Where they are.
        step: After which step.
        message: Says something on the console.

    Returns:
        Where the run stood, and where its data did.

    Raises:
        UserError: There is none, it is damaged, or it is not one of a run.
    """
    loaded = checkpoints.load(step)
    if not loaded.same_random_streams:
        message("another parallel layout than the checkpoint's: random streams are seeded anew")
    try:
        progress = msgspec.json.decode(loaded.files[_PROGRESS], type=Progress)
        return progress, loaded.files[_DATA]
    except (KeyError, msgspec.DecodeError) as error:
        raise UserError(f"the checkpoint of step {loaded.iteration} was not saved by a run: {error}") from error
