"""Two ranks in two threads."""

import threading
from collections.abc import Callable
from typing import Any

from megatron_vespo.errors import UserError
from megatron_vespo.rollout.service import Broadcast


class FakeBroadcast:
    """Among two threads."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=20)
        self._payload = b""

    def __call__(self, payload: bytes | None) -> bytes:
        if payload is not None:
            self._payload = payload
        self._barrier.wait()
        result = self._payload
        self._barrier.wait()
        return result


def on_two_ranks(work: Callable[[bool, Broadcast], Any]) -> tuple[Any, Any]:
    """What ``work(is rank 0, broadcast)`` returns on rank 0 and on rank 1, or the UserError it raises there."""
    broadcast = FakeBroadcast()
    results: list[Any] = [None, None]

    def rank(number: int) -> None:
        try:
            results[number] = work(number == 0, broadcast)
        except UserError as error:
            results[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results[0], results[1]
