"""From configuration to the objects that need no trainer: the connection to SGLang, evaluation, what is recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_vespo.algorithms.advantages import GroupNormalizedParams, get_advantage_estimator
from megatron_vespo.config import Config
from megatron_vespo.data.prompts import PromptDataset, PromptStream
from megatron_vespo.data.tokenizer import Tokenizer
from megatron_vespo.errors import UserError
from megatron_vespo.evaluation import Evaluator
from megatron_vespo.metrics.console import RL_COLUMNS, ROLLOUT_COLUMNS, SFT_COLUMNS, Console
from megatron_vespo.metrics.sinks import JsonlSink, MetricSink, RolloutSink, TensorBoardSink
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.record import Recorder
from megatron_vespo.rewards.loader import load_reward
from megatron_vespo.rollout.batches import BatchSink
from megatron_vespo.rollout.buffer import RolloutBuffer
from megatron_vespo.rollout.client import SGLangClient
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.engine import RolloutEngine
from megatron_vespo.rollout.protocol import ServerInfo
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.rollout.server import SGLangServer
from megatron_vespo.rollout.service import RolloutService
from megatron_vespo.types import Prompt, SampleGroup

_COLUMNS = {"rl": RL_COLUMNS, "sft": SFT_COLUMNS, "rollout": ROLLOUT_COLUMNS}


@dataclass(frozen=True)
class Connection:
    """What rank 0 has of SGLang.

    Attributes:
        engine: Generates.
        controls: Control routes of each server.
        infos: What each says of itself.
        evaluation: Prompts of the evaluation sets.
    """

    engine: RolloutEngine
    controls: list[SGLangControl]
    infos: list[ServerInfo]
    evaluation: dict[str, list[Prompt]]


def connect(
    config: Config,
    architecture: Architecture,
    tokenizer: Tokenizer,
    server: SGLangServer | None,
    unpushed_version: int | None = None,
) -> Connection:
    """Read the prompts and connect to SGLang; on rank 0.

    Args:
        config: Configuration.
        architecture: Limits of prompts and ids.
        tokenizer: Texts.
        server: The server that was started; None where ``rollout.server.url`` names some.
        unpushed_version: As of :class:`SGLangClient`.

    Raises:
        UserError: Data, reward or server are not as they should be.
    """
    rollout = config.rollout
    train, evaluation = _read_prompts(config, architecture, tokenizer)
    reward = load_reward(config.reward.function)
    if server is not None:
        server.wait_ready()
    urls = [server.url] if server is not None else rollout.server.urls
    controls = [SGLangControl(url, timeout=rollout.request_timeout) for url in urls]
    infos = [control.info() for control in controls]
    clients = [
        SGLangClient(
            url,
            vocab_size=architecture.vocab_size,
            max_concurrent=max(1, rollout.concurrency // len(urls)),
            timeout=rollout.request_timeout,
            unpushed_version=unpushed_version,
        )
        for url in urls
    ]
    engine = RolloutEngine(
        clients,
        PromptStream(train, config.run.seed, config.data.shuffle),
        RolloutBuffer(rollout.prompts_per_step, rollout.max_staleness),
        samples_per_prompt=rollout.samples_per_prompt,
        sampling=_sampling(config, rollout.temperature),
        decode=tokenizer.decode,
        reward=reward,
        seed=config.run.seed if all(info.deterministic for info in infos) else None,
        check_servers=server.check_alive if server is not None else lambda: None,
    )
    return Connection(engine, controls, infos, evaluation)


def _sampling(config: Config, temperature: float, *, evaluation: bool = False) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=temperature,
        stop_token_ids=tuple(config.rollout.stop_token_ids),
        evaluation=evaluation,
    )


def _read_prompts(
    config: Config, architecture: Architecture, tokenizer: Tokenizer
) -> tuple[PromptDataset, dict[str, list[Prompt]]]:
    room = architecture.context_length - config.rollout.max_new_tokens
    limit = min(config.rollout.max_prompt_tokens or room, room)
    if limit < 1:
        raise UserError(
            f"rollout.max_new_tokens={config.rollout.max_new_tokens} leaves no room for a prompt in the model's context"
            f" of {architecture.context_length} tokens"
        )
    assert config.data.train is not None
    train = PromptDataset.from_jsonl(config.data.train, tokenizer, limit)
    _check_packing(config, max(len(record.input_ids) for record in train.records))
    sets = {
        name: PromptDataset.from_jsonl(path, tokenizer, limit).prompts(config.evaluation.max_prompts)
        for name, path in config.data.evaluation.items()
    }
    return train, sets


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


def make_evaluator(config: Config, service: RolloutService, connection: Connection | None) -> Evaluator:
    """Held-out accuracy; ``connection`` is None on all ranks but 0, which alone has the prompts."""
    sets: Mapping[str, Sequence[Prompt]] = {name: () for name in config.data.evaluation}
    return Evaluator(
        service,
        sets if connection is None else connection.evaluation,
        _sampling(config, config.evaluation.temperature, evaluation=True),
        config.evaluation.samples_per_prompt,
        config.evaluation.interval,
    )


def make_advantages(config: Config) -> Callable[[Sequence[SampleGroup]], None]:
    """Sets the advantages of complete groups."""
    estimator = get_advantage_estimator(config.algorithm.advantage)
    return partial(estimator, params=GroupNormalizedParams(normalize_std=config.algorithm.normalize_std))


def make_recorder(config: Config, architecture: Architecture, tokenizer: Tokenizer, facts: dict[str, str]) -> Recorder:
    """Console, sinks and summary; for rank 0."""
    steps, folder = config.training.steps, config.run_folder
    sinks: list[MetricSink] = [JsonlSink(folder / "metrics.jsonl")]
    if config.logging.tensorboard:
        sinks.append(TensorBoardSink(folder / "tensorboard"))
    rollout_sink, batch_sink = None, None
    if config.objective != "sft":
        rollout_sink = RolloutSink(
            folder / "rollouts", config.logging.rollout_groups, lambda ids: tokenizer.decode(ids.tolist())
        )
    if config.objective == "rollout" or (config.objective == "rl" and config.rollout.save_batches):
        batch_sink = BatchSink(folder / "rollouts", config.rollout.temperature, architecture.vocab_size)
    console = Console(steps, _COLUMNS[config.objective])
    return Recorder(steps, console, sinks, rollout_sink, folder, facts, config.logging.console_interval, batch_sink)
