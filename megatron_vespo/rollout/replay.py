"""Saved rollout batches in the place of SGLang: the loop trains on them and no server is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.errors import UserError
from megatron_vespo.rollout.batches import RolloutBatch, load_batch
from megatron_vespo.rollout.service import Broadcast, share_groups
from megatron_vespo.types import SampleGroup


@dataclass(frozen=True, slots=True)
class BatchReader:
    """Reads the batches in turn and refuses those that this run cannot train on. On rank 0 only.

    Attributes:
        files: In the order of training.
        prompts_per_step: Groups that a batch must have.
        samples_per_prompt: Samples that each group must have.
        temperature: Of the trainer's log-probabilities; at another one log W would be of another distribution.
        vocab_size: Of the model.
    """

    files: Sequence[Path]
    prompts_per_step: int
    samples_per_prompt: int
    temperature: float
    vocab_size: int

    def read(self, number: int) -> RolloutBatch:
        """Batch number ``number``, from 0.

        Raises:
            UserError: there is no such batch, it cannot be read, or it does not fit this run; names the file.
        """
        if number >= len(self.files):
            raise UserError(f"rollout.replay: all {len(self.files)} saved rollout batches are used up")
        path = self.files[number]
        batch = load_batch(path)
        if batch.vocab_size != self.vocab_size:
            raise UserError(
                f"{path}: sampled from a model with a vocabulary of {batch.vocab_size}; that of model.hf_path has"
                f" {self.vocab_size}"
            )
        if batch.temperature != self.temperature:
            raise UserError(
                f"{path}: sampled at temperature {batch.temperature}, so log W would be wrong at"
                f" {self.temperature}; set rollout.temperature={batch.temperature}"
            )
        sizes = {len(group.samples) for group in batch.groups}
        if len(batch.groups) != self.prompts_per_step or sizes != {self.samples_per_prompt}:
            found = " or ".join(map(str, sorted(sizes)))
            raise UserError(
                f"{path}: {len(batch.groups)} groups of {found} samples, while rollout.prompts_per_step="
                f"{self.prompts_per_step} and rollout.samples_per_prompt={self.samples_per_prompt}; set them to those"
            )
        return batch


class ReplayService:
    """Stands where the server and :class:`RolloutService` stand: takes pushes and hands out batches. On every rank.

    A push moves no weights; it only tells the policy version, which staleness is counted from. The versions in a file
    are those of the run that saved it, whose updates need not be as many as this run's. So a batch is as stale as it
    was there: its weight versions are moved by the difference between the two runs' policy versions, and may fall below
    0. But what the starting policy sampled (policy version 0, as all batches of objective ``rollout``) keeps version 0,
    and grows staler with every update of this run.

    Args:
        reader: On rank 0; None on all others.
        broadcast: As of :class:`RolloutService`.
    """

    def __init__(self, reader: BatchReader | None, broadcast: Broadcast) -> None:
        self._reader = reader
        self._broadcast = broadcast
        self._number = 0
        self._policy_version = 0

    def push(self, version: int) -> dict[str, float | None]:
        """Note the policy version; nothing is sent, and there are no metrics."""
        self._policy_version = version
        return {}

    def start(self) -> None:
        """Nothing to do: the batches lie ready."""

    def next_batch(self) -> list[SampleGroup]:
        """The groups of the next file, the same on every rank. A collective.

        Raises:
            UserError: on every rank, as :meth:`BatchReader.read` on rank 0.
        """
        reader = self._reader
        return share_groups(self._broadcast, None if reader is None else lambda: self._read(reader))

    def release(self) -> None:
        """Nothing to do: no batch is generated."""

    def metrics(self) -> dict[str, float | None]:
        """None: nothing is generated."""
        return {}

    def state(self) -> bytes | None:
        """On rank 0 how many batches were handed out; None elsewhere."""
        return None if self._reader is None else str(self._number).encode()

    def restore(self, data: bytes) -> None:
        """Go on with the batch after those; the next push tells the policy version."""
        self._number = int(data)

    def _read(self, reader: BatchReader) -> list[SampleGroup]:
        batch = reader.read(self._number)
        self._number += 1
        if batch.policy_version:
            shift = self._policy_version - batch.policy_version
            for group in batch.groups:
                for sample in group.samples:
                    sample.weight_versions += shift
        return batch.groups
