"""What ranks tell each other."""

import math
from typing import Any

from megatron_vespo import parallel
from megatron_vespo.errors import UserError
from tests.ranks import run_ranks


def exchange() -> Any:
    rank = parallel.rank()
    texts = parallel.gather_values(["a" * 1000 * rank, "é"], list[str])
    pairs = parallel.gather_values([(("x", "y"), rank)], list[tuple[tuple[str, ...], int]])
    numbers = parallel.gather_values([0.1 + rank, math.inf], list[float])
    flags = [parallel.any_rank(False), parallel.any_rank(rank == 2), parallel.any_rank(True)]
    return texts, [dict(part) for part in pairs], numbers, flags


def test_every_rank_has_everyones_values_exactly() -> None:
    results = run_ranks(3, exchange)
    assert results[0] == results[1] == results[2]
    texts, pairs, numbers, flags = results[0]
    assert texts == [["", "é"], ["a" * 1000, "é"], ["a" * 2000, "é"]]
    assert pairs == [{("x", "y"): rank} for rank in range(3)]
    assert numbers == [[0.1 + rank, math.inf] for rank in range(3)]
    assert flags == [False, True, True]


def fail_on(ranks: tuple[int, ...]) -> list[str]:
    """Messages of the errors that this rank gets: of a failure on these ranks, then of none."""

    def fail() -> None:
        if parallel.rank() in ranks:
            raise UserError(f"rank {parallel.rank()} has no server")

    messages = []
    for action in (fail, lambda: None):
        try:
            parallel.on_every(action)
        except UserError as error:
            messages.append(str(error))
    return messages


def test_what_fails_on_any_rank_fails_on_every_rank() -> None:
    assert run_ranks(3, fail_on, (1, 2)) == [["rank 1 has no server"]] * 3
