"""Objective ``rollout``: generate, score and evaluate with the weights the server loaded. One rank, no Megatron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext

from megatron_vespo import connect
from megatron_vespo.algorithms.methods import make_advantages
from megatron_vespo.checks import describe_layout
from megatron_vespo.config import Config
from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.evaluation import Evaluator
from megatron_vespo.inputs import prepare
from megatron_vespo.metrics.measure import rollout_metrics
from megatron_vespo.metrics.registry import StepMetrics
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.record import Recorder
from megatron_vespo.recorders import make_recorder
from megatron_vespo.rollout.own_servers import OwnServers
from megatron_vespo.rollout.placement import Node, describe_servers
from megatron_vespo.rollout.service import RolloutService
from megatron_vespo.stopping import StopRequest
from megatron_vespo.types import SampleGroup

# The version of the weights that model.hf_path holds and that training starts from.
STARTING_VERSION = 0


def generate(
    config: Config,
    own: OwnServers,
    stack: ExitStack,
    stop: StopRequest,
) -> None:
    """Run from assembly to summary.

    Args:
        config: Configuration.
        own: The SGLang servers of this run; none where ``rollout.server.url`` names some.
        stack: Takes what must be closed at the end.
        stop: Whether this process was asked to stop.

    Raises:
        UserError: Data, reward or server are not as they should be, or a trainer pushed weights to this server.
    """
    architecture = load_architecture(config.model.hf_path)
    tokenizer = load_tokenizer(config.model.hf_path)
    placement = describe_servers(config, Node.from_environment())
    facts = {
        "objective": config.objective,
        "model": config.model.hf_path,
        "layout": describe_layout(config, 1),
        "servers": placement,
    }
    recorder = make_recorder(config, architecture, tokenizer, facts, lambda place: nullcontext())
    stack.callback(recorder.finish)
    with recorder.phase(f"connecting to SGLang ({placement})"):
        inputs = prepare(config, architecture, tokenizer, stack, recorder.message)
        own.wait_ready()
        connection = connect.connect(
            config,
            architecture,
            tokenizer,
            inputs,
            own,
            stack,
            announce=recorder.message,
            stop_requested=lambda: stop.requested,
            unpushed_version=STARTING_VERSION,
        )
    for member in connection.fleet.members:
        assert member.info is not None
        recorder.message(f"no trainer: sampling from {member.info.model_path} as {member.url} loaded it")
    service = RolloutService(connection.engine, _one_rank, _no_push)
    stack.callback(service.close)
    stop.defer()  # from here on the loop asks
    run_rollouts(
        service,
        connect.make_evaluator(config, service, connection),
        make_advantages(config.algorithm),
        config.training.steps,
        recorder,
    )


def run_rollouts(
    rollouts: RolloutService,
    evaluator: Evaluator,
    assign_advantages: Callable[[Sequence[SampleGroup]], None],
    steps: int,
    recorder: Recorder,
) -> None:
    """Evaluate once, since the weights never change, and generate ``steps`` batches."""
    rollouts.start()
    recorder.record_start(evaluator.run(0))
    for step in range(1, steps + 1):
        metrics = StepMetrics()
        with recorder.timed("generate"):
            groups = rollouts.next_batch()
        if not groups:  # asked to stop
            break
        rollouts.release()  # nobody trains on them: the next may begin
        assign_advantages(groups)
        recorder.record_batch(step, groups, STARTING_VERSION)
        metrics.update(rollout_metrics(groups))
        metrics.update(rollouts.metrics())
        recorder.record_step(step, metrics, groups)


def _one_rank(payload: bytes | None) -> bytes:
    """The broadcast among one rank."""
    assert payload is not None
    return payload


def _no_push() -> None:
    """A server that was started again has the weights it loaded, and they are the ones."""
