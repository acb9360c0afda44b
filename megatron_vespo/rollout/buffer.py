"""Which prompts are in flight, and in which order their groups are handed to training. Bookkeeping only, no IO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vespo.types import Prompt, SampleGroup


@dataclass(slots=True, eq=False)
class Entry:
    """A prompt admitted and not yet taken.

    Attributes:
        prompt: The prompt.
        deadline: Number of the last batch, from 0, that may train on what is sampled for it.
        group: Its samples, once all are scored.
        passed_over: Whether a batch was taken without it and its samples are drawn anew; now it is waited for.
    """

    prompt: Prompt
    deadline: int
    group: SampleGroup | None = None
    passed_over: bool = False


class RolloutBuffer:
    """First in, first out in order of admission, however long each group takes, unless ``extra`` groups are sampled.

    A group is *admitted* when its prompt is sent, *complete* when all its samples are scored, *taken* when training
    gets it, and *released* when the weights trained on it have been pushed. With ``extra`` > 0 a batch is taken from
    the oldest ``groups_per_batch + extra`` groups, as soon as ``groups_per_batch`` of them are complete. Those passed
    over go on, but what would be too stale for the batch after is given up: its prompt starts again after the release,
    and is waited for then.

    Invariants:
        - At most ``capacity = (max_staleness + 1) * groups_per_batch + extra`` groups are admitted and not released.
        - Without ``extra``, groups are taken in order of admission. Every admitted prompt is taken or dropped exactly
          once, and started again at most once.
        - If each batch makes N optimizer steps and is released after the push, no token is older than
          ``(max_staleness + 1) * N - 1`` optimizer steps when it is trained on: a group admitted after k releases was
          sampled by version k*N at least, and is trained on in batch k + max_staleness at the latest, whose last update
          is made at version (k + max_staleness) * N + N - 1.

    Args:
        groups_per_batch: Groups of a batch.
        max_staleness: Batches that generation may run ahead.
        extra: More groups to sample than a batch needs; at most ``groups_per_batch``.
    """

    def __init__(self, groups_per_batch: int, max_staleness: int, extra: int = 0) -> None:
        if groups_per_batch < 1 or max_staleness < 0 or not 0 <= extra <= groups_per_batch:
            raise ValueError(
                f"groups_per_batch {groups_per_batch} must be >= 1, max_staleness {max_staleness} >= 0, extra {extra}"
                " in 0..groups_per_batch"
            )
        self.groups_per_batch, self.max_staleness, self.extra = groups_per_batch, max_staleness, extra
        self.capacity = (max_staleness + 1) * groups_per_batch + extra
        self._queue: dict[int, Entry] = {}  # by prompt index, oldest first
        self._again: list[Prompt] = []  # to be started again
        self._batches_taken = self._batches_released = 0

    @property
    def can_admit(self) -> bool:
        """Whether one more prompt may be admitted."""
        unreleased = (self._batches_taken - self._batches_released) * self.groups_per_batch
        return len(self._queue) + len(self._again) + unreleased < self.capacity

    @property
    def ready(self) -> bool:
        """Whether a batch can be taken."""
        due = [entry for entry in self._window() if entry.passed_over and entry.deadline <= self._batches_taken]
        return self.count_ready() == self.groups_per_batch and all(entry.group is not None for entry in due)

    @property
    def complete(self) -> int:
        """Groups that are complete and not yet taken."""
        return sum(entry.group is not None for entry in self._queue.values())

    def count_ready(self) -> int:
        """How many groups of the next batch are complete."""
        return min(sum(entry.group is not None for entry in self._window()), self.groups_per_batch)

    def admit(self, prompt: Prompt) -> None:
        """Take responsibility for a prompt."""
        if not self.can_admit:
            raise RuntimeError(f"all {self.capacity} places are taken; release a batch first")
        if prompt.index in self._queue:
            raise RuntimeError(f"prompt {prompt.index} is in flight already")
        self._queue[prompt.index] = Entry(prompt, self._batches_released + self.max_staleness)

    def finish(self, group: SampleGroup) -> None:
        """Note the finished group of an admitted prompt."""
        entry = self._queue.get(group.prompt.index)
        if entry is None or entry.group is not None:
            raise RuntimeError(f"prompt {group.prompt.index} is not in flight")
        entry.group = group

    def drop(self, index: int) -> None:
        """Give up an admitted prompt for good; its place is free."""
        del self._queue[index]

    def take(self) -> tuple[list[SampleGroup], list[Entry]]:
        """Hand out a batch.

        Returns:
            Its groups in order of admission, and what is given up until the release.
        """
        if not self.ready:
            raise RuntimeError(f"the {self.groups_per_batch} groups of a batch are not all complete")
        complete = [entry for entry in self._window() if entry.group is not None]
        due = [entry for entry in complete if entry.passed_over and entry.deadline <= self._batches_taken]
        others = [entry for entry in complete if entry not in due]
        chosen = {entry.prompt.index for entry in [*due, *others][: self.groups_per_batch]}
        groups = [entry.group for entry in complete if entry.prompt.index in chosen and entry.group is not None]
        self._batches_taken += 1
        late = [
            entry
            for index, entry in self._queue.items()
            if index not in chosen and entry.deadline < self._batches_taken
        ]
        for index in [*chosen, *(entry.prompt.index for entry in late)]:
            del self._queue[index]
        self._again += [entry.prompt for entry in late]
        return groups, late

    def release(self) -> list[Prompt]:
        """Free the places of a batch that was taken.

        Returns:
            The prompts that were given up; they are admitted again.
        """
        if self._batches_released == self._batches_taken:
            raise RuntimeError("no batch is taken")
        self._batches_released += 1
        again, self._again = self._again, []
        for prompt in again:
            deadline = self._batches_released + self.max_staleness
            self._queue[prompt.index] = Entry(prompt, deadline, passed_over=True)
        return again

    def entries(self) -> list[Entry]:
        """What is admitted and not taken, oldest first, deadlines counted from the next batch as 0; for checkpoints.

        Raises:
            RuntimeError: A batch that was taken is not released: nobody knows whether it was trained on.
        """
        if self._batches_released < self._batches_taken:
            raise RuntimeError("a batch is taken and not released")
        return [
            Entry(entry.prompt, entry.deadline - self._batches_taken, entry.group, entry.passed_over)
            for entry in self._queue.values()
        ]

    def restore(self, entries: Sequence[Entry]) -> None:
        """Go on with what :meth:`entries` gave, in place of nothing."""
        if self._queue or self._batches_taken:
            raise RuntimeError("a buffer in use cannot be restored")
        self._queue = {entry.prompt.index: entry for entry in entries}

    def _window(self) -> list[Entry]:
        return list(self._queue.values())[: self.groups_per_batch + self.extra]
