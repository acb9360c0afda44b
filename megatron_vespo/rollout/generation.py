"""One prompt to one scored group of samples."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import math
from collections.abc import Callable, Coroutine, Sequence
from numbers import Real
from typing import Any

import numpy as np

from megatron_vespo.errors import UserError
from megatron_vespo.rewards.loader import RewardFunction
from megatron_vespo.rollout.client import SGLangClient, TokenIds
from megatron_vespo.rollout.protocol import Generation, ServerError
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.types import FINISH_ABORT, FINISH_LENGTH, Prompt, Sample, SampleGroup

Decode = Callable[[Sequence[int]], str]

# Somebody who aborts a request this often before it gets a single token never lets it run.
MAX_FRUITLESS_RESUMES = 100
RESUME_PAUSE_SECONDS = 0.05


async def generate_group(
    client: SGLangClient,
    prompt: Prompt,
    n: int,
    sampling: SamplingParams,
    decode: Decode,
    reward: RewardFunction,
    seed: int | None = None,
) -> SampleGroup:
    """Sample ``n`` responses by separate concurrent requests and score each as soon as it is complete.

    Args:
        client: Where to sample.
        prompt: What to answer.
        n: Samples in the group.
        sampling: How to sample.
        decode: Token ids to text, special tokens kept.
        reward: Score of a sample. An ordinary function runs in a thread, a coroutine function in the event loop.
        seed: Of the run: with deterministic inference it determines every response. None: unseeded.

    Raises:
        UserError: the server failed, or the reward function raised or returned no finite number. The other requests
            of the group are cancelled.
    """

    async def one(index: int) -> Sample:
        own_seed = None if seed is None else sample_seed(seed, prompt.index, index)
        generation = await generate_to_end(client, prompt.input_ids, sampling, own_seed)
        sample = Sample(
            prompt,
            index,
            generation.response_ids,
            generation.log_mu,
            generation.weight_versions,
            generation.finish_reason,
            decode(generation.response_ids.tolist()),
        )
        sample.reward = await score(reward, sample)
        return sample

    return SampleGroup(prompt, await gather_or_first_error([one(index) for index in range(n)]))


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
    client: SGLangClient, input_ids: TokenIds, sampling: SamplingParams, seed: int | None = None
) -> Generation:
    """Sample one response, resuming it from where it stands whenever it is aborted.

    Each part keeps its own log-probs and weight versions, so the joined response is exact.
    """
    response = await client.generate(input_ids, sampling, seed=seed)
    fruitless = 0
    while response.finish_reason == FINISH_ABORT:
        so_far = [*input_ids, *response.response_ids]
        left = sampling.max_new_tokens - len(response.response_ids)
        # A response aborted a few tokens before the context's end is too long to be a prompt.
        if left <= 0 or len(so_far) > (await client.limits()).max_prompt_tokens:
            return dataclasses.replace(response, finish_reason=FINISH_LENGTH)
        part = await client.generate(so_far, sampling, left, seed)
        fruitless = 0 if len(part.response_ids) else fruitless + 1
        if fruitless > MAX_FRUITLESS_RESUMES:
            raise ServerError(f"{client.base_url}: a request was aborted {fruitless} times without getting a token")
        if fruitless:
            await asyncio.sleep(RESUME_PAUSE_SECONDS)
        response = response + part
    return response


async def score(reward: RewardFunction, sample: Sample) -> float:
    """The sample's reward.

    Raises:
        UserError: the function raised, or returned no finite number; names the function and the sample.
    """
    name = f"reward function {getattr(reward, '__module__', '?')}.{getattr(reward, '__qualname__', repr(reward))}"
    try:
        if inspect.iscoroutinefunction(reward):
            value = await reward(sample)
        else:
            # In a thread: a slow checker must not keep the event loop from feeding the server.
            value = await asyncio.to_thread(reward, sample)
            if inspect.isawaitable(value):
                value = await value
    except Exception as error:
        raise UserError(f"{name} failed on sample {sample.name}: {type(error).__name__}: {error}") from error
    if not isinstance(value, Real) or not math.isfinite(value):
        raise UserError(f"{name} returned {value!r} for sample {sample.name}; it must return one finite number")
    return float(value)
