"""From configuration to the objects that need no trainer: the connection to SGLang, evaluation, what is recorded."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_vespo.config import Config
from megatron_vespo.data.prompts import PromptDataset, PromptStream
from megatron_vespo.data.sources import make_stages, read_evaluation, read_training
from megatron_vespo.data.tokenizer import Tokenizer
from megatron_vespo.errors import UserError
from megatron_vespo.evaluation import EvaluationSet, Evaluator
from megatron_vespo.metrics.console import RL_COLUMNS, ROLLOUT_COLUMNS, SFT_COLUMNS, Console
from megatron_vespo.metrics.evaluations import EvaluationSink, Scoring
from megatron_vespo.metrics.profile import NoProfiler, RangeProfiler, TraceProfiler, Window
from megatron_vespo.metrics.rollback import roll_back
from megatron_vespo.metrics.sinks import JsonlSink, MetricSink, RolloutSink, TensorBoardSink
from megatron_vespo.metrics.wandb_sink import WandbSink
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.record import Hardware, Place, Recorder
from megatron_vespo.rewards.failures import check_failures
from megatron_vespo.rewards.pool import RewardPool
from megatron_vespo.rewards.terms import terms_of
from megatron_vespo.rollout.addresses import server_addresses
from megatron_vespo.rollout.batches import BatchSink
from megatron_vespo.rollout.buffer import RolloutBuffer
from megatron_vespo.rollout.client import SGLangClient
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.conversation import GenerateFunction, TurnSettings, load_generate
from megatron_vespo.rollout.dispatch import Dispatcher
from megatron_vespo.rollout.engine import GroupSettings, RolloutEngine
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.keys import server_key
from megatron_vespo.rollout.own_servers import OwnServers
from megatron_vespo.rollout.protocol import UNPUSHED, ServerInfo
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.rollout.service import RolloutService
from megatron_vespo.rollout.watch import Watch
from megatron_vespo.sglang_weights import LOADER
from megatron_vespo.types import Prompt

_COLUMNS = {"rl": RL_COLUMNS, "sft": SFT_COLUMNS, "rollout": ROLLOUT_COLUMNS}


@dataclass(frozen=True)
class Connection:
    """What rank 0 has of SGLang.

    Attributes:
        engine: Generates.
        fleet: The servers.
        evaluation: Prompts of the evaluation sets.
        preflight: Prompts of the pre-flight: the first of the training file.
        evaluation_sink: Where evaluations are written.
    """

    engine: RolloutEngine
    fleet: Fleet
    evaluation: dict[str, list[Prompt]]
    preflight: list[Prompt]
    evaluation_sink: EvaluationSink


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


def _start_scorer(config: Config, stack: ExitStack) -> RewardPool:
    scorer = RewardPool(terms_of(config.reward), workers=config.reward.workers, timeout=config.reward.timeout)
    stack.callback(scorer.close)
    scorer.start()
    return scorer


def connect(
    config: Config,
    architecture: Architecture,
    tokenizer: Tokenizer,
    inputs: Inputs,
    servers: OwnServers,
    stack: ExitStack,
    *,
    announce: Callable[[str], None],
    stop_requested: Callable[[], bool],
    unpushed_version: int | None = None,
    only_evaluates: bool = False,
) -> Connection:
    """Connect to SGLang, whose servers are ready; on rank 0.

    Args:
        config: Configuration.
        architecture: Limits of prompts and ids.
        tokenizer: Texts.
        inputs: What was prepared.
        servers: The servers that the run started; none where ``rollout.server`` names some.
        stack: Takes what must be closed at the end.
        announce: Told what people should know.
        stop_requested: Whether the run shall end.
        unpushed_version: As of :class:`SGLangClient`.
        only_evaluates: No training prompt is ever drawn, and servers may hold weights that a trainer pushed.

    Raises:
        UserError: Servers are not as they should be.
    """
    rollout, train = config.rollout, inputs.train
    fleet, dispatcher = _make_fleet(config, architecture, servers, announce, unpushed_version, only_evaluates)
    stack.callback(fleet.close)
    infos = fleet.meet()
    watch = Watch(
        fleet,
        hang_timeout=rollout.server.hang_timeout,
        max_restarts=rollout.server.max_restarts,
        gate=servers.gate,
    )
    stack.callback(watch.close)
    watch.start()
    engine = RolloutEngine(
        fleet,
        dispatcher,
        PromptStream(train, config.run.seed, config.data.shuffle, make_stages(train, config.data.curriculum)),
        RolloutBuffer(
            rollout.prompts_per_step, rollout.max_staleness, math.ceil(rollout.over_sampling * rollout.prompts_per_step)
        ),
        inputs.scorer,
        GroupSettings(
            rollout.samples_per_prompt,
            training_sampling(config),
            tokenizer.decode,
            seed=config.run.seed if all(info.deterministic for info in infos) else None,
            filter_equal=rollout.filter_equal_groups,
            turns=TurnSettings(
                inputs.generate, partial(tokenizer.encode, add_special_tokens=False), architecture.vocab_size
            ),
        ),
        check_batch=partial(check_failures, max_failed_share=config.reward.max_failed_share, spec=config.reward.spec),
        sampled_under=_sampled_under(config),
        ahead=not (config.shares_devices or only_evaluates),
        stop_requested=stop_requested,
        announce=announce,
    )
    evaluation_sink = EvaluationSink(
        config.run_folder / "evaluation",
        lambda ids: tokenizer.decode(ids.tolist()),
        config.evaluation.keep_answers,
    )
    return Connection(engine, fleet, inputs.evaluation, train.prompts(config.preflight.prompts), evaluation_sink)


def _make_fleet(
    config: Config,
    architecture: Architecture,
    servers: OwnServers,
    announce: Callable[[str], None],
    unpushed_version: int | None,
    only_evaluates: bool,
) -> tuple[Fleet, Dispatcher]:
    section, timeout = config.rollout.server, config.rollout.request_timeout
    api_key = servers.api_key if servers.urls else server_key(section)
    routing = _routing(architecture) if config.health.router_flips else None

    def open_client(url: str) -> SGLangClient:
        return SGLangClient(
            url,
            vocab_size=architecture.vocab_size,
            max_concurrent=config.rollout.concurrency,
            timeout=timeout,
            unpushed_version=unpushed_version,
            api_key=api_key,
            routing=routing,
        )

    def open_member(url: str) -> tuple[SGLangControl, SGLangClient]:
        flush_cache = config.weight_sync.pause != "in_place"
        return SGLangControl(url, timeout=timeout, flush_cache=flush_cache, api_key=api_key), open_client(url)

    fleet = Fleet(
        server_addresses(section, servers.urls, api_key),
        open_member,
        own=servers.here,
        check_info=_check_info(config, only_evaluates),
        balance=section.balance,
        takes_pushes=config.objective == "rl",
        patience=section.startup_timeout,
        announce=announce,
    )
    router = None if section.router is None else open_client(section.router)
    return fleet, Dispatcher(
        fleet,
        concurrency=config.rollout.concurrency,
        router=router,
        cache_by_version=config.weight_sync.pause == "in_place",
    )


def _routing(architecture: Architecture) -> tuple[int, int]:
    """Layers, with experts or without, and experts a token."""
    facts = architecture.transformer_config()
    if "moe_router_topk" not in facts:
        raise UserError("health.router_flips: the model has no experts; leave it out")
    return facts["num_layers"], facts["moe_router_topk"]


def _check_info(config: Config, only_evaluates: bool) -> Callable[[str, ServerInfo], None]:
    """Servers that others started may lack what runs inside them, or hold a trainer's weights."""
    needs_loader = config.objective == "rl" and (
        config.transport in ("delta", "tensor") or config.weight_sync.verify != "none"
    )

    def check(url: str, info: ServerInfo) -> None:
        if needs_loader and LOADER not in info.weight_loaders:
            raise UserError(
                f"{url} was started without --custom-weight-loader {LOADER}, which weight_sync.verify and the"
                " transports delta and tensor need: start it so, with megatron_vespo on its PYTHONPATH, or set"
                " weight_sync.verify: none and another transport"
            )
        if config.health.router_flips and not info.returns_routed_experts:
            raise UserError(
                f"{url} was started without --enable-return-routed-experts, which health.router_flips needs: start it"
                " so, or leave health.router_flips out"
            )
        if config.objective == "rollout" and not only_evaluates and info.weight_version not in (UNPUSHED, "0"):
            raise UserError(
                f"{url} serves weight version {info.weight_version}, which a trainer pushed; objective"
                " rollout needs the weights that the server loaded: restart it"
            )

    return check


def _sampled_under(config: Config) -> dict[str, Any]:
    """Settings without which samples that a checkpoint holds are of no use."""
    rollout = config.rollout
    return {
        "rollout.samples_per_prompt": rollout.samples_per_prompt,
        "rollout.prompts_per_step": rollout.prompts_per_step,
        "rollout.max_staleness": rollout.max_staleness,
        "rollout.over_sampling": rollout.over_sampling,
        "rollout.temperature": rollout.temperature,
        "rollout.max_new_tokens": rollout.max_new_tokens,
        "rollout.stop_token_ids": rollout.stop_token_ids,
        "training.minibatches_per_step": config.training.minibatches_per_step,
        "reward.function": config.reward.spec,
        "rollout.generate": config.rollout.generate,
    }


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


def make_evaluator(config: Config, service: RolloutService, connection: Connection | None) -> Evaluator:
    """Held-out accuracy; ``connection`` is None on all ranks but 0, which alone has the prompts."""
    section = config.evaluation
    sets = []
    for name in config.data.evaluation:
        prompts = () if connection is None else connection.evaluation[name]
        number = section.of_set(name).samples_per_prompt
        assert number is not None
        sets.append(EvaluationSet(name, prompts, number, evaluation_sampling(config, name)))
    return Evaluator(
        service,
        sets,
        section.interval,
        Scoring(section.correct_from, section.confidence),
        None if connection is None else connection.evaluation_sink,
    )


def make_recorder(
    config: Config,
    architecture: Architecture,
    tokenizer: Tokenizer,
    facts: dict[str, str],
    at: Place,
    resumed_after: int = 0,
    profiler: NoProfiler | None = None,
    hardware: Hardware | None = None,
) -> Recorder:
    """Console, sinks and summary; for rank 0. A run that goes on after a step writes the later ones anew."""
    steps, folder = config.training.steps, config.run_folder
    if resumed_after:
        roll_back(folder, resumed_after)
    sinks: list[MetricSink] = [JsonlSink(folder / "metrics.jsonl")]
    if config.logging.tensorboard:
        sinks.append(TensorBoardSink(folder / "tensorboard", resumed_after + 1 if resumed_after else None))
    wandb = config.logging.wandb
    if wandb.mode != "off":
        tree = config.model_dump(mode="json")
        sinks.append(
            WandbSink(folder, wandb.mode, wandb.project, config.run.name, tree, wandb.entity, wandb.group, wandb.tags)
        )
    rollout_sink, batch_sink = None, None
    if config.objective != "sft":
        rollout_sink = RolloutSink(
            folder / "rollouts", config.logging.rollout_groups, lambda ids: tokenizer.decode(ids.tolist())
        )
    if config.objective == "rollout" or (config.objective == "rl" and config.rollout.save_batches):
        batch_sink = BatchSink(folder / "rollouts", config.rollout.temperature, architecture.vocab_size)
    console = Console(steps, _COLUMNS[config.objective])
    return Recorder(
        steps,
        console,
        sinks,
        rollout_sink,
        folder,
        facts,
        config.logging.console_interval,
        batch_sink,
        at,
        profiler,
        hardware,
        resumed_after,
    )


def make_profiler(config: Config, rank: int, model_ranges: Callable[[bool], None] = lambda on: None) -> NoProfiler:
    """The profiler of a rank.

    Raises:
        UserError: It needs a GPU, and there is none.
    """
    section = config.profile
    if section.steps is None or rank not in section.ranks:
        return NoProfiler()
    first, last = section.steps
    window = Window(first, last, section.shapes, section.stacks, section.memory)
    if section.tool == "nsys":
        return RangeProfiler(window, model_ranges)
    return TraceProfiler(window, config.run_folder / "profile" / f"rank_{rank}_steps_{first}_{last}.json.gz")
