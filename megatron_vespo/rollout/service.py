"""Rollouts as every rank sees them: the same groups everywhere, or the same error everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_vespo import codec
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.engine import RolloutEngine, Stopped, WeightsNeeded
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.types import Prompt, SampleGroup

Broadcast = Callable[[bytes | None], bytes]

# First byte of what rank 0 tells the others.
_GROUPS, _FAILED, _WEIGHTS_NEEDED, _STOPPED = b"g", b"f", b"w", b"s"


class RolloutService:
    """Used on every rank; rank 0 holds the engine.

    :meth:`next_batch` and :meth:`evaluate` are collectives: every rank calls them, in the same order. A failure on
    rank 0 is broadcast in place of the groups, so that every rank raises it and none hangs. Where servers that came
    back need weights before there can be groups, all ranks push them together and go on waiting.

    Args:
        engine: On rank 0; None on all others.
        broadcast: Called by all ranks, with the payload on rank 0 and None elsewhere; returns the payload to all.
        push_again: Pushes the weights that were pushed last, which the trainer still has; a collective.
    """

    def __init__(self, engine: RolloutEngine | None, broadcast: Broadcast, push_again: Callable[[], None]) -> None:
        self._engine = engine
        self._broadcast = broadcast
        self._push_again = push_again

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self._engine is not None

    def start(self) -> None:
        """Begin to generate. The servers are ready and hold the weights of the current policy version."""
        if self._engine is not None:
            self._engine.start()

    def next_batch(self) -> list[SampleGroup]:
        """The next groups, the same on every rank; none where the run shall stop. A collective.

        Raises:
            UserError: on every rank, if generating or scoring failed on rank 0.
        """
        return self._share(lambda engine: engine.take())

    def evaluate(self, prompts: Sequence[Prompt], n: int, sampling: SamplingParams) -> list[SampleGroup]:
        """``n`` samples for each prompt, in their order, the same on every rank; none where the run shall stop.

        A collective. Raises as :meth:`next_batch`.
        """
        return self._share(lambda engine: engine.evaluate(prompts, n, sampling))

    def release(self) -> None:
        """Let new prompts in, once the weights trained on the batch taken have been pushed."""
        if self._engine is not None:
            self._engine.release()

    def metrics(self) -> dict[str, float | None]:
        """On rank 0 what happened since the last call, by the names of metrics."""
        return {} if self._engine is None else self._engine.metrics()

    def state(self) -> bytes | None:
        """On rank 0 what a resumed run goes on with; None elsewhere."""
        return None if self._engine is None else self._engine.state()

    def restore(self, data: bytes) -> None:
        """Go on with a saved state; before :meth:`start`. A UserError on rank 0 if it does not belong to this run."""
        if self._engine is not None:
            self._engine.restore(data)

    def close(self) -> None:
        """End all generation."""
        if self._engine is not None:
            self._engine.close()

    def _share(self, produce: Callable[[RolloutEngine], list[SampleGroup]]) -> list[SampleGroup]:
        engine = self._engine
        while True:
            try:
                return share_groups(self._broadcast, None if engine is None else lambda: produce(engine))
            except WeightsNeeded:
                self._push_again()
            except Stopped:
                return []


def share_groups(broadcast: Broadcast, produce: Callable[[], list[SampleGroup]] | None) -> list[SampleGroup]:
    """Groups that rank 0 produces, on every rank. A collective.

    Args:
        broadcast: As of :class:`RolloutService`.
        produce: Where the groups come from, on rank 0; None on all others.

    Raises:
        UserError: on every rank, if producing them failed.
        WeightsNeeded, Stopped: on every rank, as on rank 0.
    """
    if produce is None:
        return _receive(broadcast(None))
    try:
        groups = produce()
        payload = _GROUPS + codec.encode_groups(groups)
    except Exception as error:  # whatever it is, the other ranks wait for a word; raised again below
        broadcast(_word(error))
        raise
    broadcast(payload)
    return groups


def _word(error: Exception) -> bytes:
    if isinstance(error, WeightsNeeded):
        return _WEIGHTS_NEEDED
    if isinstance(error, Stopped):
        return _STOPPED
    message = str(error) if isinstance(error, UserError) else f"rank 0 failed: {type(error).__name__}: {error}"
    return _FAILED + message.encode()


def _receive(payload: bytes) -> list[SampleGroup]:
    kind, content = payload[:1], payload[1:]
    if kind == _WEIGHTS_NEEDED:
        raise WeightsNeeded
    if kind == _STOPPED:
        raise Stopped
    if kind == _FAILED:
        raise UserError(content.decode())
    return codec.decode_groups(content)
