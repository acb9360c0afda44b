"""From configuration to the connection with SGLang, which needs no trainer; and evaluation over it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_vespo.config import Config
from megatron_vespo.data.prompts import PromptStream
from megatron_vespo.data.sources import make_stages
from megatron_vespo.data.tokenizer import Tokenizer
from megatron_vespo.errors import UserError
from megatron_vespo.evaluation import EvaluationSet, Evaluator
from megatron_vespo.inputs import Inputs, evaluation_sampling, training_sampling
from megatron_vespo.metrics.evaluations import EvaluationSink, Scoring
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.rewards.failures import check_failures
from megatron_vespo.rollout.addresses import server_addresses
from megatron_vespo.rollout.buffer import RolloutBuffer
from megatron_vespo.rollout.client import SGLangClient
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.conversation import TurnSettings
from megatron_vespo.rollout.dispatch import Dispatcher
from megatron_vespo.rollout.engine import GroupSettings, RolloutEngine
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.keys import server_key
from megatron_vespo.rollout.own_servers import OwnServers
from megatron_vespo.rollout.protocol import UNPUSHED, ServerInfo
from megatron_vespo.rollout.service import RolloutService
from megatron_vespo.rollout.watch import Watch
from megatron_vespo.sglang_weights import LOADER
from megatron_vespo.types import Prompt


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
