"""Which prompts are in flight, and in which order their groups are handed to training. Bookkeeping only, no IO."""

from __future__ import annotations

from collections import OrderedDict

from megatron_vespo.types import Prompt, SampleGroup


class RolloutBuffer:
    """First in, first out in order of admission, however long each group takes.

    A group is *admitted* when its prompt is sent, *complete* when all its samples are scored, *taken* when training
    gets it, and *released* when the weights trained on it have been pushed.

    Invariants:
        - At most ``capacity = (max_staleness + 1) * groups_per_batch`` groups are admitted and not yet released.
        - Groups are taken in order of admission; every admitted prompt is taken exactly once.
        - Hence, if each batch of ``groups_per_batch`` groups makes N optimizer steps and is released after the push,
          no token is older than ``(max_staleness + 1) * N - 1`` optimizer steps when it is trained on: while k batches
          are released, weights are at version k*N at least, and the youngest group admitted falls into batch number
          k + max_staleness, whose last update is made at version (k + max_staleness) * N + N - 1.
    """

    def __init__(self, groups_per_batch: int, max_staleness: int) -> None:
        if groups_per_batch < 1 or max_staleness < 0:
            raise ValueError(f"groups_per_batch {groups_per_batch} must be >= 1, max_staleness {max_staleness} >= 0")
        self.capacity = (max_staleness + 1) * groups_per_batch
        # Admitted and not yet taken, oldest first: {prompt index: its group once complete}.
        self._queue: OrderedDict[int, SampleGroup | None] = OrderedDict()
        self._taken = 0  # and not yet released

    @property
    def takeable(self) -> int:
        """Groups that can be taken before something must be released."""
        return self.capacity - self._taken

    @property
    def can_admit(self) -> bool:
        """Whether one more prompt may be admitted."""
        return len(self._queue) + self._taken < self.capacity

    def admit(self, prompt: Prompt) -> None:
        """Take responsibility for a prompt."""
        if not self.can_admit:
            raise RuntimeError(f"all {self.capacity} places are taken; release a batch first")
        if prompt.index in self._queue:
            raise RuntimeError(f"prompt {prompt.index} is in flight already")
        self._queue[prompt.index] = None

    def complete(self, group: SampleGroup) -> None:
        """Note the finished group of an admitted prompt."""
        index = group.prompt.index
        if index not in self._queue or self._queue[index] is not None:
            raise RuntimeError(f"prompt {index} is not in flight")
        self._queue[index] = group

    def count_ready(self, n: int) -> int:
        """How many of the ``n`` oldest groups are complete."""
        return sum(group is not None for _, group in zip(range(n), self._queue.values(), strict=False))

    def take(self, n: int) -> list[SampleGroup]:
        """Hand out the ``n`` oldest groups, all complete, oldest first."""
        if self.count_ready(n) < n:
            raise RuntimeError(f"the {n} oldest groups are not all complete")
        groups = [group for _ in range(n) if (group := self._queue.popitem(last=False)[1]) is not None]
        self._taken += n
        return groups

    def release(self, n: int) -> None:
        """Free the places of ``n`` groups that were taken."""
        if not 0 <= n <= self._taken:
            raise RuntimeError(f"cannot release {n} groups, {self._taken} are taken")
        self._taken -= n
