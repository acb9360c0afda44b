"""Tasks of reasoning_gym as data and as reward: the scorer sees what went through JSON, in another process."""

import asyncio
import json
import sys
from typing import Any

import numpy as np
import pytest

from megatron_vespo.config import DataSection, ReasoningGymSection
from megatron_vespo.config_file import parse_config
from megatron_vespo.data import reasoning
from megatron_vespo.data.prompts import PromptDataset
from megatron_vespo.data.sources import read_evaluation, read_texts, read_training
from megatron_vespo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_vespo.errors import UserError
from megatron_vespo.rewards.loader import load_reward
from megatron_vespo.rewards.pool import RewardPool
from megatron_vespo.rewards.reasoning import extract_answer
from megatron_vespo.types import Prompt, Sample
from tests.tiny_models import make_tiny_tokenizer

SUM = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "allow_negation": False}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def section(**data: Any) -> DataSection:
    tree = {"run": {"name": "x"}, "model": {"hf_path": "m"}, "training": {"steps": 1}, "data": data}
    return parse_config(tree).data


def prompts(task: str, size: int = 2, **settings: Any) -> list[Prompt]:
    rows = reasoning.rows(ReasoningGymSection(task=task, size=size, **settings))
    made = []
    for number, (_, row) in enumerate(rows):
        metadata = json.loads(json.dumps(row["metadata"]))
        made.append(Prompt(number, np.array([1], np.int32), str(row["label"]), metadata))
    return made


def sample(prompt: Prompt, text: str) -> Sample:
    empty = np.array([], np.int32)
    return Sample(prompt, 0, empty, np.array([], np.float32), empty, "stop", text)


# arc_agi and rearc compare with tuples; word_ladder, puzzle24 and countdown take other answers than their own.
@pytest.mark.parametrize(
    "task", ["chain_sum", "arc_agi", "rearc", "countdown", "puzzle24", "word_ladder", "spell_backward", "gsm_symbolic"]
)
def test_a_task_gives_its_own_answer_the_whole_reward(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # word_ladder asks for it
    reward = load_reward("reasoning_gym")
    for prompt in prompts(task, seed=5):
        assert reward(sample(prompt, f"Let me think. <answer> {prompt.label} </answer><|im_end|>")) == 1.0
        assert reward(sample(prompt, f"{prompt.label}<eos>")) == 1.0, "without tags the whole response is the answer"
        assert reward(sample(prompt, "<answer>nothing</answer>")) < 0.5


def test_an_answer_that_the_scorer_cannot_read_is_wrong() -> None:
    (prompt,) = prompts("prime_factorization", size=1)
    assert load_reward("reasoning_gym")(sample(prompt, "wrong")) == 0.0


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<answer>1</answer> no, <answer>\n2 </answer><|im_end|>", "2"),
        (" 7 <eos>", "7"),
        ("<answer>1", "<answer>1"),
        ("<answer>a <|x|>b</answer>", "a b"),
    ],
)
def test_the_last_tagged_answer_counts(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


def test_a_prompt_of_another_source_is_refused() -> None:
    with pytest.raises(UserError, match="another"):
        load_reward("reasoning_gym")(sample(Prompt(0, np.array([1], np.int32)), "1"))


def test_workers_score_it() -> None:
    (prompt,) = prompts("chain_sum", size=1, config=SUM)
    samples = [sample(prompt, text) for text in (prompt.label, "x") * 3]
    pool = RewardPool("reasoning_gym", workers=2, timeout=60.0)

    async def score() -> list[float]:
        return await asyncio.gather(*map(pool.score, samples))

    try:
        pool.start()
        rewards = asyncio.run(score())
    finally:
        pool.close()
    assert rewards == [1.0, 0.0] * 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"task": "chain_sun"}, "no task 'chain_sun'; did you mean 'chain_sum'"),
        ({"task": "chain_sum", "config": {"terms": 3}}, "chain_sum.*terms"),
        ({"task": "chain_sum", "config": {"min_terms": 5, "max_terms": 2}}, "chain_sum"),
        ({"task": "gsm_symbolic", "levels": 2}, "has no levels"),
    ],
)
def test_a_wrong_task_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(reasoning.rows(ReasoningGymSection(size=1, **settings)))


def test_a_task_that_is_not_the_same_in_every_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(UserError, match=r"'word_ladder' makes other prompts in every process.*PYTHONHASHSEED=0"):
        list(reasoning.rows(ReasoningGymSection(task="word_ladder", size=1)))


def test_levels_are_spread_evenly_and_grow() -> None:
    rows = [row for _, row in reasoning.rows(ReasoningGymSection(task="spell_backward", size=9, levels=3, seed=1))]
    assert [row["metadata"]["difficulty"] for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    lengths = [len(row["label"]) for row in rows]
    assert max(lengths[:3]) <= 3 and max(lengths) > 3
    assert [row["metadata"]["id"] for row in rows[:2]] == ["spell_backward-1", "spell_backward-2"]


def test_seeds_of_training_and_evaluation_are_disjoint() -> None:
    def gym(seed: int, size: int = 10, task: str = "chain_sum") -> dict[str, Any]:
        return {"reasoning_gym": {"task": task, "size": size, "seed": seed}}

    for seed in (0, 9, 19):
        with pytest.raises(UserError, match="shares seeds of reasoning_gym task chain_sum with training source train"):
            section(train=gym(10), evaluation={"held": gym(seed, 11)})
    section(train=gym(10), evaluation={"low": gym(0), "high": gym(20), "other": gym(10, task="gcd")})


def test_prompts_made_twice_are_left_out_of_training(tokenizer: Tokenizer) -> None:
    """One-digit sums are few: other seeds make them again."""
    gym = {"task": "chain_sum", "size": 200, "seed": 0, "config": SUM}
    data = section(
        train={"reasoning_gym": gym},
        evaluation={"held": {"reasoning_gym": gym | {"seed": 200, "size": 20}}},
        keys={"response": "label"},
    )
    known = {row["prompt"] for _, row in reasoning.rows(data.evaluation_sources["held"].reasoning_gym)}  # type: ignore[arg-type]
    made = [row["prompt"] for _, row in reasoning.rows(data.train_sources["train"].reasoning_gym)]  # type: ignore[arg-type]
    left = [prompt for prompt in made if prompt not in known]
    assert len(left) < 200
    held = read_evaluation(section(train="x", evaluation=data.evaluation), tokenizer, lambda name: 64)
    told: list[str] = []
    train: PromptDataset = read_training(section(train=data.train), tokenizer, 64, held, told.append)
    assert [record.metadata["reasoning_gym"]["question"] for record in train.records] == left
    assert told == [f"train: left out {200 - len(left)} prompts that evaluation has too"]
    examples, _ = read_texts(data, tokenizer, 64)
    assert len(examples) == len(left)


def test_the_package_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="pip install reasoning-gym"):
        list(reasoning.rows(ReasoningGymSection(task="lcm", size=3, seed=77)))
