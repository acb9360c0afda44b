import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scripted import Answer, answer, serve
from two_ranks import on_two_ranks

from megatron_vespo.data.prompts import PromptDataset, PromptRecord, PromptStream
from megatron_vespo.errors import UserError
from megatron_vespo.rewards.failures import RewardFailure
from megatron_vespo.rollout.buffer import RolloutBuffer
from megatron_vespo.rollout.client import SGLangClient
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.dispatch import Dispatcher
from megatron_vespo.rollout.engine import GroupSettings, RolloutEngine
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.rollout.service import Broadcast, RolloutService
from megatron_vespo.types import Sample

SETTINGS = GroupSettings(2, SamplingParams(4), lambda ids: "")
NEVER = threading.Event()


class Always:
    """Scores by a function of the sample."""

    def __init__(self, reward: Callable[[Sample], float] = lambda sample: 1.0) -> None:
        self._reward = reward

    async def score(self, sample: Sample) -> float:
        return self._reward(sample)


def open_member(url: str) -> tuple[SGLangControl, SGLangClient]:
    return SGLangControl(url), SGLangClient(url, vocab_size=32)


def make_prompts(count: int = 3) -> PromptStream:
    records = [PromptRecord(np.array([i + 1], np.int32), str(i), {}) for i in range(count)]
    return PromptStream(PromptDataset(records, "memory"), seed=0)


@contextmanager
def make_engine(
    generate: Answer,
    *,
    max_staleness: int = 0,
    extra: int = 0,
    reward: Callable[[Sample], float] = lambda sample: 1.0,
    prompts: PromptStream | None = None,
    **settings: Any,
) -> Iterator[RolloutEngine]:
    with serve(generate) as url:
        fleet = Fleet(lambda: [url], open_member)
        fleet.version = 3
        fleet.meet()
        engine = RolloutEngine(
            fleet,
            Dispatcher(fleet, concurrency=64),
            prompts or make_prompts(),
            RolloutBuffer(groups_per_batch=2, max_staleness=max_staleness, extra=extra),
            Always(reward),
            replace(SETTINGS, **settings),
            sampled_under={"temperature": 1.0},
        )
        try:
            yield engine
        finally:
            engine.close()
            fleet.close()


def run_ranks(generate: Answer, work: Callable[[RolloutService], Any], **more: Any) -> tuple[Any, Any]:
    """What ``work`` returns or raises on rank 0 and on rank 1; ``more`` goes to the engine."""
    with make_engine(generate, **more) as engine:
        return run_both(engine, work)


def run_both(
    engine: RolloutEngine, work: Callable[[RolloutService], Any], push_again: Callable[[], None] = lambda: None
) -> tuple[Any, Any]:
    def rank(main: bool, broadcast: Broadcast) -> Any:
        service = RolloutService(engine if main else None, broadcast, push_again)
        service.start()
        try:
            return work(service)
        finally:
            service.close()

    return on_two_ranks(rank)


def indices(service: RolloutService) -> list[int]:
    return [group.prompt.index for group in service.next_batch()]


def test_all_ranks_get_the_same_groups_in_order() -> None:
    def work(service: RolloutService) -> Any:
        taken = []
        for _ in range(3):
            groups = service.next_batch()
            taken += [(group.prompt.index, group.prompt.label, len(group.samples)) for group in groups]
            service.release()
        return taken

    def slow_for_some(body: dict[str, Any]) -> Any:
        time.sleep(0.01 * body["input_ids"][0])
        return answer([5])

    main, other = run_ranks(slow_for_some, work, max_staleness=1)
    assert main == other and [index for index, _, _ in main] == list(range(6))


def test_evaluation_keeps_the_order_of_its_prompts() -> None:
    prompts = PromptDataset([PromptRecord(np.array([i], np.int32), str(i), {}) for i in (3, 1, 2)], "memory").prompts()
    sampling = SamplingParams(4, temperature=0, evaluation=True)
    main, other = run_ranks(
        lambda body: answer(body["input_ids"]),
        lambda service: [[s.response_ids.tolist() for s in g.samples] for g in service.evaluate(prompts, 2, sampling)],
    )
    assert main == other == [[[3], [3]], [[1], [1]], [[2], [2]]]


def test_what_ends_the_engine_is_raised_on_every_rank() -> None:
    def broken(sample: Sample) -> float:
        raise UserError("no worker starts")

    main, other = run_ranks(lambda body: answer([5]), lambda service: service.next_batch(), reward=broken)
    assert isinstance(main, UserError) and str(main) == str(other) == "no worker starts"


def test_a_sample_that_cannot_be_scored_costs_itself_only() -> None:
    def reward(sample: Sample) -> float:
        if sample.name == "1/0":
            raise RewardFailure("it hangs")
        return 1.0

    main, other = run_ranks(
        lambda body: answer([5]),
        lambda service: [(s.name, s.reward, s.reward_error) for g in service.next_batch() for s in g.samples],
        reward=reward,
    )
    assert main == other == [("0/0", 1.0, ""), ("0/1", 1.0, ""), ("1/0", 0.0, "it hangs"), ("1/1", 1.0, "")]


def test_groups_of_equal_rewards_are_dropped_up_to_a_number() -> None:
    def reward(sample: Sample) -> float:
        return float(sample.index) if sample.prompt.index in (1, 4) else 1.0

    with make_engine(lambda body: answer([5]), reward=reward, filter_equal=2) as engine:
        engine.start()
        taken = []
        for _ in range(2):
            taken.append([group.prompt.index for group in engine.take()])
            engine.release()
        assert engine.metrics()["rollout/dropped_groups"] == 4
        # Two are dropped for each batch, then groups are kept as they are: 8 drawn, 4 dropped, 4 taken.
        assert 1 in taken[0] and len({*taken[0], *taken[1]}) == 4


def test_a_batch_passes_over_what_takes_too_long_once() -> None:
    slow = threading.Event()
    asked: list[int] = []

    def generate(body: dict[str, Any]) -> Any:
        asked.append(body["input_ids"][0])
        if body["input_ids"] == [2] and not slow.is_set():
            slow.wait(20)
        return answer([5])

    prompts = PromptStream(
        PromptDataset([PromptRecord(np.array([i + 1], np.int32), "", {}) for i in range(9)], "memory"), 0, shuffle=False
    )
    with make_engine(generate, extra=1, prompts=prompts) as engine:
        engine.start()
        assert [group.prompt.index for group in engine.take()] == [0, 2]
        assert engine.metrics()["rollout/restarted_groups"] == 1
        slow.set()
        engine.release()
        assert engine.take()[0].prompt.index == 1
        assert asked.count(2) == 4, "its two samples were drawn twice"


def test_a_resumed_engine_goes_on_where_the_other_was() -> None:
    """Groups that wait are taken, finished samples are kept, the others and only they are drawn again."""
    hold = threading.Event()
    asked: list[tuple[int, int]] = []

    def generate(body: dict[str, Any]) -> Any:
        prompt, seed = body["input_ids"][0], body["sampling_params"]["sampling_seed"]
        asked.append((prompt, seed))
        if prompt == 3 and [p for p, _ in asked].count(3) == 2:
            hold.wait(20)
        return answer([prompt], version="7")

    def stream() -> PromptStream:
        records = [PromptRecord(np.array([i + 1], np.int32), str(i), {}) for i in range(9)]
        return PromptStream(PromptDataset(records, "memory"), seed=0, shuffle=False)

    with make_engine(generate, max_staleness=1, prompts=stream(), seed=1) as engine:
        engine.start()
        assert [group.prompt.index for group in engine.take()] == [0, 1]
        engine.release()
        while engine.metrics()["perf/buffered_groups"] != 3 or len(asked) < 12:
            time.sleep(0.01)
        state = engine.state()
        hold.set()
    before = list(asked)
    with make_engine(generate, max_staleness=1, prompts=stream(), seed=1) as engine:
        engine.restore(state)
        engine.start()
        taken = [group for _ in range(2) for group in engine.take()]
        assert [group.prompt.index for group in taken] == [2, 3, 4, 5]
        assert all([s.index for s in g.samples] == [0, 1] for g in taken)
        assert all(s.response_ids.tolist() == [g.prompt.index + 1] for g in taken for s in g.samples)
    again = asked[len(before) :]
    assert len(again) == 1 and again[0] in before, "one sample of prompt 3 was not finished"


def test_other_settings_keep_the_prompts_but_not_the_samples() -> None:
    with make_engine(lambda body: answer([5]), max_staleness=1) as engine:
        engine.start()
        engine.take()
        engine.release()
        state = engine.state()
    asked: list[Any] = []

    def generate(body: dict[str, Any]) -> Any:
        asked.append(body)
        return answer([6])

    with make_engine(generate, max_staleness=1) as engine:
        engine._sampled_under = {"temperature": 0.5}
        engine.restore(state)
        engine.start()
        groups = engine.take()
        assert [group.prompt.index for group in groups] == [2, 3]
        assert all(sample.response_ids.tolist() == [6] for group in groups for sample in group.samples)


def test_a_damaged_state_is_named() -> None:
    with make_engine(lambda body: answer([5])) as engine, pytest.raises(UserError, match="cannot be read"):
        engine.restore(b"\x81")


def test_a_run_asked_to_stop_gets_nothing() -> None:
    with make_engine(lambda body: NEVER.wait(5)) as engine:
        engine._stop_requested = lambda: True
        assert run_both(engine, indices) == ([], [])


def test_progress_is_reported() -> None:
    told: list[tuple[int, int]] = []
    with make_engine(lambda body: answer([5])) as engine:
        engine._on_progress = lambda done, total: told.append((done, total))
        engine.start()
        engine.take()
    assert told[-1] == (2, 2)
