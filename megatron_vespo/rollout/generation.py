"""One prompt to one scored group of samples."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from megatron_vespo.rewards.failures import RewardFailure
from megatron_vespo.rollout.client import TokenIds
from megatron_vespo.rollout.conversation import Conversation, Decode, TurnSettings, converse
from megatron_vespo.rollout.protocol import Generation, ServerError, ServerInfo
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.types import FINISH_ABORT, FINISH_LENGTH, Prompt, Sample, SampleGroup

# Somebody who aborts a request this often before it gets a single token never lets it run.
MAX_FRUITLESS_RESUMES = 100
RESUME_PAUSE_SECONDS = 0.05


class Generator(Protocol):
    """Where responses are sampled: a server, or a route to one of several."""

    async def generate(
        self, input_ids: TokenIds, sampling: SamplingParams, max_new_tokens: int | None = None, seed: int | None = None
    ) -> Generation:
        """Sample one response."""
        ...

    async def limits(self) -> ServerInfo:
        """The lengths that it takes."""
        ...


class Scorer(Protocol):
    """Where samples are scored."""

    async def score(self, sample: Sample) -> float:
        """The reward; a RewardFailure where there is none."""
        ...


async def generate_group(
    generator: Generator,
    prompt: Prompt,
    n: int,
    sampling: SamplingParams,
    decode: Decode,
    scorer: Scorer,
    seed: int | None = None,
    finished: list[Sample] | None = None,
    *,
    turns: TurnSettings | None = None,
) -> SampleGroup:
    """Sample ``n`` responses by separate concurrent requests and score each as soon as it is complete.

    Args:
        generator: Where to sample.
        prompt: What to answer.
        n: Samples in the group.
        sampling: How to sample.
        decode: Token ids to text, special tokens kept.
        scorer: Scores a sample. One that cannot be scored gets reward 0 and the reason.
        seed: Of the run: with deterministic inference it determines every response. None: unseeded.
        finished: Samples that are finished already, which are not drawn again; each that gets finished is added.
        turns: How a response is made of turns; None: of one.

    Raises:
        UserError: a request cannot be answered. The other requests of the group are cancelled.
    """
    finished = [] if finished is None else finished
    settings = turns or TurnSettings()

    async def one(index: int) -> None:
        own_seed = None if seed is None else sample_seed(seed, prompt.index, index)
        conversation = Conversation(
            partial(generate_to_end, generator), generator.limits, prompt, sampling, decode, settings, own_seed
        )
        sample = await converse(conversation, prompt, settings.function, index)
        sample.text = decode(sample.sequence_ids.tolist())
        routed_experts, sample.routed_experts = sample.routed_experts, None  # reward functions need not be sent it
        if not sample.reward_error:
            try:
                sample.reward = await scorer.score(sample)
            except RewardFailure as failure:
                sample.reward_error = str(failure)
        sample.routed_experts = routed_experts
        finished.append(sample)

    there = {sample.index for sample in finished}
    await gather_or_first_error([one(index) for index in range(n) if index not in there])
    return SampleGroup(prompt, sorted(finished, key=lambda sample: sample.index))


def sample_seed(seed: int, prompt: int, sample: int) -> int:
    """The seed, of 63 bits, of one sample of one prompt in a run."""
    (state,) = np.random.SeedSequence((seed, prompt, sample)).generate_state(1, np.uint64).tolist()
    return state >> 1


async def gather_or_first_error[T](work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; the first failure cancels the rest and is raised as it is, not as one of a group."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(item) for item in work]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors.exceptions[0].__cause__
    return [task.result() for task in tasks]


async def generate_to_end(
    generator: Generator, input_ids: TokenIds, sampling: SamplingParams, seed: int | None = None
) -> Generation:
    """Sample one response, resuming it from where it stands whenever it is aborted.

    Each part keeps its own log-probs and weight versions, so the joined response is exact.
    """
    response = await generator.generate(input_ids, sampling, seed=seed)
    fruitless = 0
    while response.finish_reason == FINISH_ABORT:
        so_far = [*input_ids, *response.response_ids]
        left = sampling.max_new_tokens - len(response.response_ids)
        # A response aborted a few tokens before the context's end is too long to be a prompt.
        if left <= 0 or len(so_far) > (await generator.limits()).max_prompt_tokens:
            return dataclasses.replace(response, finish_reason=FINISH_LENGTH)
        part = await generator.generate(so_far, sampling, left, seed)
        fruitless = 0 if len(part.response_ids) else fruitless + 1
        if fruitless > MAX_FRUITLESS_RESUMES:
            raise ServerError(f"a request was aborted {fruitless} times without getting a token")
        if fruitless:
            await asyncio.sleep(RESUME_PAUSE_SECONDS)
        response = response + part
    return response
