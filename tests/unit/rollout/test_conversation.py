"""Responses of several turns, from a server whose answers are written here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import answer, with_client

from megatron_vespo.errors import UserError
from megatron_vespo.rewards.failures import RewardFailure
from megatron_vespo.rollout.conversation import Conversation, GenerateFunction, TurnSettings, load_generate
from megatron_vespo.rollout.generation import generate_group, generate_to_end
from megatron_vespo.rollout.protocol import ServerError
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.types import GENERATE_FAILED, Prompt, Sample, SampleGroup

PROMPT = Prompt(7, np.array([1, 2], np.int32), label="4")


class Scorer:
    seen: list[Sample]

    async def score(self, sample: Sample) -> float:
        if sample.text == "":
            raise RewardFailure("nothing said")
        return float(len(sample.text.split("/")))


def run(
    function: GenerateFunction, answers: Callable[[dict[str, Any]], Any], n: int = 1, limit: int = 20
) -> tuple[SampleGroup, list[dict[str, Any]]]:
    requests: list[dict[str, Any]] = []
    group = with_client(
        answers,
        lambda client: generate_group(
            client,
            PROMPT,
            n,
            SamplingParams(limit, stop_token_ids=(9,)),
            lambda ids: "/".join(map(str, ids)),
            Scorer(),
            turns=TurnSettings(function, lambda text: list(map(int, text.split("/"))), vocab_size=32),
        ),
        requests,
    )
    return group, requests


async def two_turns(conversation: Conversation, prompt: Prompt) -> None:
    turn = await conversation.generate(stop_token_ids=[8])
    assert turn.text == "5/8" and turn.finish_reason == "stop"
    assert conversation.insert("20/21/22") == 3
    assert conversation.text == "5/8/20/21/22"
    assert (await conversation.generate()).ids == [6, 9]


def in_turn(*answers: Any) -> Callable[[dict[str, Any]], Any]:
    left = list(answers)
    return lambda body: left.pop(0)


def test_two_turns_and_what_belongs_to_whom() -> None:
    second = answer([6, 9], version="4", log_probs=[-2.0, -3.0])
    group, requests = run(two_turns, in_turn(answer([5, 8], log_probs=[-0.5, -1.0]), second))
    (sample,) = group.samples
    assert sample.response_ids.tolist() == [5, 8, 6, 9]
    assert sample.log_mu.tolist() == [-0.5, -1.0, -2.0, -3.0]
    assert sample.weight_versions.tolist() == [3, 3, 4, 4] and sample.staleness(6) == 3
    assert sample.sequence_ids.tolist() == [5, 8, 20, 21, 22, 6, 9]
    assert sample.offsets.tolist() == [0, 1, 5, 6]
    assert sample.inserted_length == 3 and sample.total_length == 9
    assert (sample.text, sample.reward, sample.finish_reason) == ("5/8/20/21/22/6/9", 7.0, "stop")
    assert [request["input_ids"] for request in requests] == [[1, 2], [1, 2, 5, 8, 20, 21, 22]]
    limits = [request["sampling_params"]["max_new_tokens"] for request in requests]
    assert limits == [20, 15]
    assert [request["sampling_params"]["stop_token_ids"] for request in requests] == [[9, 8], [9]]


def test_a_turn_that_is_aborted_by_a_push_goes_on_exactly() -> None:
    cut = answer([6], version="3", reason="abort", log_probs=[-2.0])
    rest = answer([9], version="4", log_probs=[-3.0])
    group, requests = run(two_turns, in_turn(answer([5, 8]), cut, rest))
    (sample,) = group.samples
    assert sample.response_ids.tolist() == [5, 8, 6, 9] and sample.weight_versions.tolist() == [3, 3, 3, 4]
    assert sample.log_mu.tolist()[2:] == [-2.0, -3.0] and sample.offsets.tolist() == [0, 1, 5, 6]
    assert requests[2]["input_ids"] == [1, 2, 5, 8, 20, 21, 22, 6]
    assert requests[2]["sampling_params"]["max_new_tokens"] == 14


def test_a_function_that_raises_costs_one_sample() -> None:
    count = 0

    async def function(conversation: Conversation, prompt: Prompt) -> None:
        nonlocal count
        count += 1
        mine = count
        await conversation.generate()
        if mine == 2:
            raise ZeroDivisionError("no tool")

    group, _ = run(function, lambda body: answer([5, 9]), n=3)
    errors = [sample.reward_error for sample in group.samples]
    assert sorted(errors) == ["", "", f"{GENERATE_FAILED}ZeroDivisionError: no tool"]
    failed = next(sample for sample in group.samples if sample.reward_error)
    assert failed.response_ids.tolist() == [5, 9] and failed.reward == 0
    assert [s.reward for s in group.samples if not s.reward_error] == [2.0, 2.0]


def test_what_the_server_says_ends_the_run_even_where_the_function_does_not_mind() -> None:
    async def careless(conversation: Conversation, prompt: Prompt) -> None:
        try:
            await conversation.generate()
        except Exception:  # noqa: BLE001
            conversation.insert([3])

    with pytest.raises(ServerError, match="not finite"):
        run(careless, lambda body: answer([5], log_probs=[None]))


def test_room_is_for_all_that_follows_the_prompt() -> None:
    async def function(conversation: Conversation, prompt: Prompt) -> None:
        await conversation.generate(max_new_tokens=2)
        assert conversation.left == 4
        assert conversation.insert([20, 21, 22]) == 3 and conversation.left == 1
        assert (await conversation.generate()).finish_reason == "length"
        assert (await conversation.generate()).ids == []

    group, requests = run(function, in_turn(answer([5, 5], reason="length"), answer([6], reason="length")), limit=6)
    (sample,) = group.samples
    assert sample.sequence_ids.tolist() == [5, 5, 20, 21, 22, 6] and sample.finish_reason == "length"
    assert [request["sampling_params"]["max_new_tokens"] for request in requests] == [2, 1]


def test_a_limit_of_one_turn_is_no_end_of_the_response() -> None:
    async def function(conversation: Conversation, prompt: Prompt) -> None:
        assert (await conversation.generate(max_new_tokens=2)).finish_reason == "stop"

    group, _ = run(function, lambda body: answer([5, 5], reason="length"))
    assert group.samples[0].finish_reason == "stop"


def test_a_tool_that_says_too_much_is_cut() -> None:
    async def function(conversation: Conversation, prompt: Prompt) -> None:
        assert conversation.insert(list(range(30))) == 6

    group, requests = run(function, lambda body: answer([5]), limit=6)
    assert not requests and group.samples[0].finish_reason == "length"
    assert group.samples[0].sequence_ids.tolist() == [0, 1, 2, 3, 4, 5] and len(group.samples[0].response_ids) == 0


def test_near_the_end_of_the_context_there_is_no_next_turn() -> None:
    """The server takes 57 tokens as a prompt and 62 in all."""

    async def function(conversation: Conversation, prompt: Prompt) -> None:
        conversation.insert([3] * 56)
        assert (await conversation.generate()).finish_reason == "length"

    group, requests = run(function, lambda body: answer([5]), limit=60)
    assert not requests and group.samples[0].finish_reason == "length"


def test_tools_of_several_samples_work_at_once() -> None:
    barrier: asyncio.Barrier | None = None

    async def function(conversation: Conversation, prompt: Prompt) -> None:
        nonlocal barrier
        barrier = barrier or asyncio.Barrier(3)
        await conversation.generate()
        await asyncio.wait_for(barrier.wait(), 10)

    group, _ = run(function, lambda body: answer([5, 9]), n=3)
    assert [sample.reward_error for sample in group.samples] == ["", "", ""]


def test_without_a_tokenizer_ids_can_be_inserted_only() -> None:
    async def talk(client: Any) -> None:
        conversation = Conversation(
            partial(generate_to_end, client), client.limits, PROMPT, SamplingParams(4), lambda ids: "", TurnSettings()
        )
        with pytest.raises(TypeError, match="token ids"):
            conversation.insert("text")

    with_client(lambda body: answer([5]), talk)


def test_functions_are_named_and_asynchronous(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("async def good(conversation, prompt): ...\ndef bad(conversation, prompt): ...\n")
    assert load_generate(None) is None
    assert load_generate(f"{file}:good") is not None
    with pytest.raises(UserError, match="async def"):
        load_generate(f"{file}:bad")
    with pytest.raises(UserError, match="has no 'other'"):
        load_generate(f"{file}:other")


def test_token_ids_outside_the_vocabulary_reach_nobody() -> None:
    async def function(conversation: Conversation, prompt: Prompt) -> None:
        await conversation.generate()
        conversation.insert([3, 32])

    group, _ = run(function, lambda body: answer([5]))
    assert "token id 32 is outside the vocabulary of 32" in group.samples[0].reward_error
    assert group.samples[0].inserted_ids is None
