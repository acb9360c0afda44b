"""Rollouts as every rank sees them: the same groups everywhere, or the same error everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_vespo import codec
from megatron_vespo.rollout.engine import RolloutEngine
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.types import Prompt, SampleGroup

Broadcast = Callable[[bytes | None], bytes]


class RolloutService:
    """Used on every rank; rank 0 holds the engine.

    :meth:`next_batch` and :meth:`evaluate` are collectives: every rank calls them, in the same order. A failure on
    rank 0 is broadcast in place of the groups, so that every rank raises it and none hangs.

    Args:
        engine: On rank 0; None on all others.
        broadcast: Called by all ranks, with the payload on rank 0 and None elsewhere; returns the payload to all.
        groups_per_batch: Groups in a batch.
    """

    def __init__(self, engine: RolloutEngine | None, broadcast: Broadcast, groups_per_batch: int) -> None:
        self._engine = engine
        self._broadcast = broadcast
        self._groups_per_batch = groups_per_batch

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self._engine is not None

    def start(self) -> None:
        """Begin to generate. The servers are ready and hold the weights of the current policy version."""
        if self._engine is not None:
            self._engine.start()

    def next_batch(self) -> list[SampleGroup]:
        """The next groups in order of admission, the same on every rank. A collective.

        Raises:
            UserError: on every rank, if generating or scoring failed on rank 0.
        """
        return self._share(lambda engine: engine.take(self._groups_per_batch))

    def evaluate(self, prompts: Sequence[Prompt], n: int, sampling: SamplingParams) -> list[SampleGroup]:
        """``n`` samples for each prompt, in their order, the same on every rank. A collective."""
        return self._share(lambda engine: engine.evaluate(prompts, n, sampling))

    def release(self, n: int) -> None:
        """Let ``n`` new prompts in, once the weights trained on ``n`` groups taken have been pushed."""
        if self._engine is not None:
            self._engine.release(n)

    def pause(self) -> None:
        """Admit no prompts, for the time of a weight push."""
        if self._engine is not None:
            self._engine.pause()

    def resume(self) -> None:
        """Admit prompts again."""
        if self._engine is not None:
            self._engine.resume()

    def state_dict(self) -> dict[str, Any] | None:
        """On rank 0 what a resumed run needs to go on with the first prompt that was not trained on; else None."""
        return None if self._engine is None else self._engine.state_dict()

    def close(self) -> None:
        """End all generation."""
        if self._engine is not None:
            self._engine.close()

    def _share(self, produce: Callable[[RolloutEngine], list[SampleGroup]]) -> list[SampleGroup]:
        engine = self._engine
        return share_groups(self._broadcast, None if engine is None else lambda: produce(engine))


def share_groups(broadcast: Broadcast, produce: Callable[[], list[SampleGroup]] | None) -> list[SampleGroup]:
    """Groups that rank 0 produces, on every rank. A collective.

    Args:
        broadcast: As of :class:`RolloutService`.
        produce: Where the groups come from, on rank 0; None on all others.

    Raises:
        UserError: on every rank, if producing them failed.
    """
    if produce is None:
        return codec.decode_groups(broadcast(None))
    try:
        groups = produce()
        payload = codec.encode_groups(groups)
    except Exception as error:  # whatever it is, the other ranks wait for a word; raised again below
        broadcast(codec.encode_failure(error))
        raise
    broadcast(payload)
    return groups
