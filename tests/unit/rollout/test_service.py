import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from scripted import Answer, Break, answer, serve
from two_ranks import on_two_ranks

from megatron_vespo.data.prompts import PromptDataset, PromptRecord, PromptStream
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.buffer import RolloutBuffer
from megatron_vespo.rollout.client import SGLangClient
from megatron_vespo.rollout.engine import RolloutEngine
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.rollout.service import Broadcast, RolloutService
from megatron_vespo.types import Sample


@contextmanager
def make_engine(generate: Answer, *, max_staleness: int = 0, **more: Any) -> Iterator[RolloutEngine]:
    records = [PromptRecord(np.array([i + 1], np.int32), str(i), {}) for i in range(3)]
    with serve(generate) as url:
        engine = RolloutEngine(
            [SGLangClient(url, vocab_size=32)],
            PromptStream(PromptDataset(records, "memory"), seed=0),
            RolloutBuffer(groups_per_batch=2, max_staleness=max_staleness),
            samples_per_prompt=2,
            sampling=SamplingParams(4),
            decode=lambda ids: "",
            **({"reward": lambda sample: 1.0} | more),
        )
        try:
            yield engine
        finally:
            engine.close()


def run_ranks(generate: Answer, work: Callable[[RolloutService], Any], **more: Any) -> tuple[Any, Any]:
    """What ``work`` returns or raises on rank 0 and on rank 1; ``more`` goes to the engine."""
    with make_engine(generate, **more) as engine:
        return run_both(engine, work)


def run_both(engine: RolloutEngine, work: Callable[[RolloutService], Any]) -> tuple[Any, Any]:
    def rank(main: bool, broadcast: Broadcast) -> Any:
        service = RolloutService(engine if main else None, broadcast, groups_per_batch=2)
        service.start()
        try:
            return work(service)
        finally:
            service.close()

    return on_two_ranks(rank)


def test_all_ranks_get_the_same_groups_in_order() -> None:
    def work(service: RolloutService) -> Any:
        indices = []
        for _ in range(3):
            groups = service.next_batch()
            indices += [(group.prompt.index, group.prompt.label, len(group.samples)) for group in groups]
            service.pause()
            service.resume()
            service.release(len(groups))
        return indices

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


def test_a_reward_that_raises_is_raised_on_every_rank() -> None:
    def broken(sample: Sample) -> float:
        raise KeyError("x")

    main, other = run_ranks(lambda body: answer([5]), lambda service: service.next_batch(), reward=broken)
    assert isinstance(main, UserError) and "KeyError" in str(main)
    assert str(main) == str(other)


def test_a_server_that_died_is_reported_with_its_log() -> None:
    def check() -> None:
        raise UserError("the SGLang server ended with status 1; the end of its log: boom")

    main, other = run_ranks(lambda body: Break(), lambda service: service.next_batch(), check_servers=check)
    assert "boom" in str(main) and str(main) == str(other)


def test_progress_is_reported() -> None:
    told: list[tuple[int, int]] = []
    run_ranks(
        lambda body: answer([5]),
        lambda service: service.next_batch(),
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1] == (2, 2)


def test_the_state_is_that_of_the_groups_taken() -> None:
    with make_engine(lambda body: answer([5]), max_staleness=2) as engine:
        engine.start()
        assert engine.state_dict()["position"] == 0
        engine.take(2)
        assert engine.state_dict()["position"] == 2
        engine.take(2)
        engine.take(2)
        with pytest.raises(RuntimeError, match="before a release"):
            engine.take(2)
