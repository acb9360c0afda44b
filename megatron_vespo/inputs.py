"""What rank 0 prepares while servers start: prompts, what scores, how responses are drawn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from megatron_vespo.config import Config
from megatron_vespo.data.prompts import PromptDataset
from megatron_vespo.data.sources import read_evaluation, read_training
from megatron_vespo.data.tokenizer import Tokenizer
from megatron_vespo.errors import UserError
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.rewards.pool import RewardPool
from megatron_vespo.rewards.terms import terms_of
from megatron_vespo.rollout.conversation import GenerateFunction, load_generate
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.types import Prompt


@dataclass(frozen=True)
class Inputs:
    """What rank 0 prepares while servers start.

    Attributes:
        train: Training prompts.
        evaluation: Prompts of the evaluation sets.
        scorer: Scores samples.
        generate: Function of ``rollout.generate``, if there is one.
    """

    train: PromptDataset
    evaluation: dict[str, list[Prompt]]
    scorer: RewardPool
    generate: GenerateFunction | None


def prepare(
    config: Config,
    architecture: Architecture,
    tokenizer: Tokenizer,
    stack: ExitStack,
    announce: Callable[[str], None] = lambda text: None,
) -> Inputs:
    """Read the prompts and start what scores; on rank 0.

    Args:
        config: Configuration.
        architecture: Limits of prompts and ids.
        tokenizer: Texts.
        stack: Takes what must be closed at the end.
        announce: Told what people should know.

    Raises:
        UserError: Data or reward are not as they should be.
    """
    train, evaluation = _read_prompts(config, architecture, tokenizer, announce)
    generate = load_generate(config.rollout.generate)
    return Inputs(train, evaluation, _start_scorer(config, stack), generate)


def prepare_evaluation(
    config: Config,
    architecture: Architecture,
    tokenizer: Tokenizer,
    stack: ExitStack,
    announce: Callable[[str], None] = lambda text: None,
) -> Inputs:
    """The same where nothing is trained: there are no training prompts."""
    sets = _evaluation_prompts(config, _read_held_out(config, architecture, tokenizer, announce))
    generate = load_generate(config.rollout.generate)
    return Inputs(PromptDataset([], "no training data"), sets, _start_scorer(config, stack), generate)


def training_sampling(config: Config) -> SamplingParams:
    """How training samples are drawn."""
    return SamplingParams(
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        stop_token_ids=tuple(config.rollout.stop_token_ids),
    )


def evaluation_sampling(config: Config, name: str) -> SamplingParams:
    """How the answers to an evaluation set are drawn."""
    section = config.evaluation.of_set(name)
    assert section.temperature is not None and section.top_p is not None and section.top_k is not None
    return SamplingParams(
        max_new_tokens=section.max_new_tokens or config.rollout.max_new_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        stop_token_ids=tuple(config.rollout.stop_token_ids),
        evaluation=True,
    )


def _start_scorer(config: Config, stack: ExitStack) -> RewardPool:
    scorer = RewardPool(terms_of(config.reward), workers=config.reward.workers, timeout=config.reward.timeout)
    stack.callback(scorer.close)
    scorer.start()
    return scorer


def _read_prompts(
    config: Config, architecture: Architecture, tokenizer: Tokenizer, announce: Callable[[str], None]
) -> tuple[PromptDataset, dict[str, list[Prompt]]]:
    room = architecture.context_length - config.rollout.max_new_tokens
    limit = min(config.rollout.max_prompt_tokens or room, room)
    held_out = _read_held_out(config, architecture, tokenizer, announce)
    train = read_training(config.data, tokenizer, limit, held_out, announce)
    _check_packing(config, max(len(record.input_ids) for record in train.records))
    return train, _evaluation_prompts(config, held_out)


def _read_held_out(
    config: Config, architecture: Architecture, tokenizer: Tokenizer, announce: Callable[[str], None]
) -> dict[str, PromptDataset]:
    def limit(name: str) -> int:
        room = architecture.context_length - evaluation_sampling(config, name).max_new_tokens
        return min(config.rollout.max_prompt_tokens or room, room)

    return read_evaluation(config.data, tokenizer, limit, announce)


def _evaluation_prompts(config: Config, held_out: dict[str, PromptDataset]) -> dict[str, list[Prompt]]:
    return {name: dataset.prompts(config.evaluation.of_set(name).max_prompts) for name, dataset in held_out.items()}


def _check_packing(config: Config, longest_prompt: int) -> None:
    """Refuse now what a long response would end in the middle of the run."""
    # The last token is predicted, never fed.
    needed = longest_prompt + config.rollout.max_new_tokens - 1
    if config.objective == "rl" and needed > config.training.max_tokens_per_microbatch:
        raise UserError(
            f"training.max_tokens_per_microbatch={config.training.max_tokens_per_microbatch} cannot hold the longest"
            f" sample: a prompt of {longest_prompt} tokens and rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens} need {needed}"
        )
