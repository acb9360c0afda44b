"""What the watchdog says of a stuck job. How it finds one: tests/distributed/test_stuck_ranks.py."""

from typing import Any

from megatron_vespo.watchdog import RankState, culprits, describe


def state(**fields: Any) -> RankState:
    settled = {
        "place": "train",
        "changes": 7,
        "seconds": 31.0,
        "line": "policy/policy.py:9 in f",
        "in_collective": True,
    }
    return RankState(**(settled | fields))


def test_a_silent_rank_is_the_culprit_whatever_the_others_do() -> None:
    assert culprits({0: state(), 2: state(changes=6)}, 3)[0] == [1]


def test_a_rank_behind_the_others_is_the_culprit() -> None:
    behind = state(place="generate", changes=6, in_collective=True)
    assert culprits({0: state(in_collective=False), 1: behind, 2: state()}, 3) == ([1], "behind the others")


def test_in_the_same_place_it_is_whoever_waits_for_nobody() -> None:
    assert culprits({0: state(), 1: state(in_collective=False)}, 2)[0] == [1]


def test_where_all_wait_alike_none_is_blamed() -> None:
    assert culprits({0: state(), 1: state()}, 2) == ([], "")
    assert "all ranks wait in the same place" in describe({0: state(), 1: state()}, 2, 30.0)


def test_the_message_has_every_rank_with_place_time_and_line() -> None:
    text = describe({0: state(seconds=42.4), 1: state(place="generate", changes=6)}, 3, 30.0)
    assert text.splitlines() == [
        "stuck: rank 0 has been in 'train' for 42 s, longer than run.stuck_timeout=30",
        "  the others wait for rank 2: no answer: stopped, or its machine is gone",
        "  rank 0: in 'train' for 42 s, at policy/policy.py:9 in f",
        "  rank 1: in 'generate' for 31 s, at policy/policy.py:9 in f",
        "  rank 2: no answer",
    ]


def test_a_big_jobs_message_stays_short_and_shows_the_culprit() -> None:
    states = {rank: state(changes=6 if rank == 700 else 7) for rank in range(1000)}
    text = describe(states, 1000, 30.0)
    assert len(text.splitlines()) == 19 and "  rank 700: " in text and text.endswith("and 984 more")


def test_a_single_rank_waits_for_nobody() -> None:
    assert len(describe({0: state()}, 1, 30.0).splitlines()) == 2
