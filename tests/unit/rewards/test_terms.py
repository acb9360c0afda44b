import asyncio
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from megatron_vespo.config import RewardSection
from megatron_vespo.errors import UserError
from megatron_vespo.metrics.measure import rollout_metrics
from megatron_vespo.metrics.registry import metric
from megatron_vespo.rewards.failures import RewardFailure
from megatron_vespo.rewards.pool import RewardPool
from megatron_vespo.rewards.terms import terms_of
from megatron_vespo.types import Prompt, Sample, SampleGroup
from tests.unit.rewards.scored import make

OWN = """
    import asyncio
    def length(sample, by=1):
        return by * len(sample.text)
    def none(sample):
        return None
    async def later(sample):
        await asyncio.sleep(0.2)
        return 10.0
    def awaitable(sample):
        return later(sample)
    class Noted:
        notice = "as you should know"
        def __call__(self, sample):
            return 1.0
"""

Start = Callable[..., RewardPool]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    (tmp_path / "own.py").write_text(textwrap.dedent(OWN))
    monkeypatch.chdir(tmp_path)
    pools = []

    def start(*terms: dict[str, Any], workers: int = 1) -> RewardPool:
        pools.append(RewardPool(terms_of(RewardSection(terms=list(terms))), workers=workers, timeout=20.0))
        pools[-1].start()
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()


def score(pool: RewardPool, *samples: Sample) -> list[float | BaseException]:
    async def all_of_them() -> list[float | BaseException]:
        return await asyncio.gather(*map(pool.score, samples), return_exceptions=True)

    return asyncio.run(all_of_them())


EXACT: dict[str, Any] = {"function": "exact_match", "params": {"answer": "boxed"}}
OVERLONG: dict[str, Any] = {"function": "overlong", "params": {"max_tokens": 10, "buffer_tokens": 5}, "weight": 0.5}


def test_a_weighted_sum(start: Start) -> None:
    pool = start(EXACT, OVERLONG, {"function": "own.py:length", "params": {"by": 2}, "weight": -0.01, "name": "talk"})
    right, wrong = make("\\boxed{4}", "4", tokens=8), make("\\boxed{5}!", "4", tokens=10)
    assert score(pool, right, wrong) == pytest.approx([1 - 0.5 * 0.6 - 0.18, 0 - 0.5 - 0.2])
    assert right.reward_terms == {"exact_match": 1.0, "overlong": pytest.approx(-0.6), "talk": 18.0}
    assert wrong.reward_terms == {"exact_match": 0.0, "overlong": -1.0, "talk": 20.0}


def test_functions_that_wait_and_that_do_not(start: Start) -> None:
    together = [{"function": "own.py:later"}, {"function": "own.py:later", "name": "again", "weight": 2.0}]
    for terms in ([*together], [*together, {"function": "own.py:length"}], [{"function": "own.py:awaitable"}]):
        pool = start(*terms)
        samples = [make("abc") for _ in range(3)]
        expected = 30.0 + 3 if len(terms) == 3 else 30.0 if len(terms) == 2 else 10.0
        assert score(pool, *samples) == [expected] * 3
        assert len(samples[0].reward_terms) == len(terms)


def test_terms_for_data_sources(start: Start) -> None:
    pool = start({**EXACT, "sources": ["math", "aime*"]}, {"function": "own.py:length", "sources": ["talk"]}, OVERLONG)
    samples = [make("\\boxed{4}", "4", data_source=source) for source in ("math", "aime24", "talk")]
    assert score(pool, *samples) == [1.0, 1.0, 9.0]
    assert [list(sample.reward_terms) for sample in samples] == [
        ["exact_match", "overlong"],
        ["exact_match", "overlong"],
        ["length", "overlong"],
    ]
    unknown, silent = score(pool, make("x", data_source="code"), make("x"))
    assert isinstance(unknown, RewardFailure) and "no term of reward.terms has data_source 'code'" in str(unknown)
    assert isinstance(silent, RewardFailure) and "data_source ''" in str(silent)


def test_a_term_that_fails_is_named(start: Start) -> None:
    (outcome,) = score(start(EXACT, {"function": "own.py:none"}), make("x"))
    assert str(outcome) == "none returned None; it must return one finite number"


def test_terms_that_cannot_be_used(start: Start) -> None:
    with pytest.raises(UserError, match=r"reward function exact_match \+ nothing cannot be used: .*no 'nothing'"):
        start(EXACT, {"function": "own.py:nothing"})
    with pytest.raises(UserError, match="overlong: params do not fit: missing a required argument: 'max_tokens'"):
        start(EXACT, {"function": "overlong"})


def test_what_people_should_know_is_said_once(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    start(EXACT, {"function": "own.py:Noted"}, workers=3)
    assert capfd.readouterr().err.count("as you should know") == 1


@pytest.mark.parametrize(
    "section, message",
    [
        ({"terms": [EXACT], "function": "math"}, "not together with function"),
        ({"terms": [EXACT], "params": {}}, "not together with function"),
        ({"terms": [EXACT, EXACT]}, "2 of them are called 'exact_match'; give each a name"),
        ({"terms": [{"function": "math", "weight": 0.0}]}, "every weight is 0"),
        ({"terms": [{"function": "math", "weight": float("nan")}]}, "finite"),
        ({"terms": [{"weight": 1.0}]}, "function"),
        ({"terms": [{"function": "math", "wieght": 1.0}]}, "wieght"),
        ({"terms": [{"function": "math", "name": "a/b"}]}, "pattern"),
    ],
)
def test_terms_are_checked_when_they_are_read(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RewardSection(**section)


def test_one_function_is_no_sum() -> None:
    (only,) = terms_of(RewardSection(function="math", params={"seconds": 3}))
    assert (only.name, only.function, only.params) == ("", "math", {"seconds": 3})


def test_each_term_has_a_metric() -> None:
    prompt = Prompt(0, np.array([1], np.int32))
    samples = [make("") for _ in range(3)]
    for sample, terms in zip(samples, ({"math": 1.0, "form": 0.5}, {"math": 0.0}, {}), strict=True):
        sample.reward_terms = terms
    values = rollout_metrics([SampleGroup(prompt, samples)])
    assert (values["reward/math"], values["reward/form"]) == (0.5, 0.5)
    assert metric("reward/math").name == "reward/<term>"
    assert not [name for name in rollout_metrics([SampleGroup(prompt, [make("")])]) if name.startswith("reward/")]


def test_of_many_math_answers_of_which_some_hang_none_is_lost(start: Start) -> None:
    hanging = {7: r"\boxed{(10^8)!}", 27: r"\boxed{\sum_{k=1}^{10^{9}} \frac{\sin(k!)}{k}}", 47: r"\boxed{9^{9^{9}}}"}
    samples = [make(hanging.get(index, rf"\boxed{{{index}.0}}"), str(index)) for index in range(60)]
    pool = start({"function": "math", "params": {"seconds": 1}}, workers=2)
    outcomes = score(pool, *samples)
    for index, outcome in enumerate(outcomes):
        assert isinstance(outcome, RewardFailure) if index in hanging else outcome == 1.0
    counts = pool.take_counts()
    assert counts.scored == 57 and counts.failed + counts.timed_out == 3
