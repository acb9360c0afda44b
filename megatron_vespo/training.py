"""Assemble a run and run its loop; imported once the server is on its way, since it imports torch and Megatron."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import msgspec

from megatron_vespo import assemble, parallel
from megatron_vespo.config import Config
from megatron_vespo.data.sft import SupervisedStream, sft_batches
from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.link import Link, make_link, make_preflight, make_replay, make_rollouts
from megatron_vespo.loop import train_rl, train_sft
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.record import Place
from megatron_vespo.rollout.own_servers import OwnServers
from megatron_vespo.rollout.placement import Node, describe_servers
from megatron_vespo.saving import restore
from megatron_vespo.stopping import StopRequest
from megatron_vespo.types import Progress


def train(
    config: Config,
    own: OwnServers,
    stack: ExitStack,
    *,
    layout: str,
    resume_after: int | None,
    stop: StopRequest,
    at: Place,
) -> None:
    """Run one rank from assembly to summary.

    Args:
        config: Configuration.
        own: The SGLang servers that this rank started, and where those of all nodes are.
        stack: Takes what must be closed at the end.
        layout: Parallel layout in words.
        resume_after: Step whose checkpoint the run goes on from; None: it begins.
        stop: Whether this process was asked to stop.
        at: Says where this rank is, for whoever watches it.
    """
    architecture = load_architecture(config.model.hf_path)
    tokenizer = load_tokenizer(config.model.hf_path)
    facts = {"objective": config.objective, "model": config.model.hf_path, "layout": layout}
    if config.rollout.replay is not None:
        facts["rollouts"] = f"replayed from {config.rollout.replay}"
    placement = describe_servers(config, Node.from_environment())
    if config.samples_from_server:
        facts["servers"] = placement
    recorder = assemble.make_recorder(config, architecture, tokenizer, facts, at, resume_after or 0)
    stack.callback(recorder.finish)
    rollouts = None
    if config.rollout.replay is not None:
        rollouts = make_replay(config, architecture)  # before the model: the files may not fit
        recorder.message(f"no server: training on the rollout batches in {config.rollout.replay}, without evaluation")
    schedule = assemble.make_schedule(config, architecture)
    algorithm = assemble.make_algorithm(config)  # before the model: the configuration may be wrong
    progress, data = Progress(), None

    def connect() -> Link:
        with recorder.phase(f"connecting to SGLang ({placement})"):
            return make_link(
                config,
                architecture,
                tokenizer,
                own,
                stack,
                announce=recorder.message,
                stop_requested=lambda: stop.requested,
                timed=recorder.timed,
            )

    link = None
    if config.shares_devices:  # the servers measure the devices' free memory when they start: they come first
        link = connect()
        link.turns.train()
    with recorder.phase(f"building the model ({layout})"):
        trainer = assemble.make_trainer(config, architecture, resumes=resume_after is not None)
    if resume_after is not None:
        with recorder.phase(f"restoring the checkpoint of step {resume_after}"):
            progress, data = restore(trainer.checkpoints, resume_after, recorder.message)
    stop.defer()  # from here on the loop asks
    if config.objective == "sft":
        stream = assemble.make_sft_stream(config, architecture, tokenizer, recorder.message)
        if data is not None:
            stream.load_state_dict(msgspec.json.decode(data))
        state = partial(_encode, stream)
        saver = assemble.make_saver(config, trainer, state, lambda: stop.requested, recorder.message)
        batches = sft_batches(stream, config.training.samples_per_step)
        train_sft(trainer.policy, batches, schedule, recorder, saver, progress)
        return
    if rollouts is None:
        link = link or connect()
        rollouts = make_rollouts(config, link, trainer, stack)
    if data is not None:
        parallel.on_main(partial(rollouts.service.restore, data))
    preflight = make_preflight(config, rollouts, algorithm)
    if config.preflight.only:
        rollouts.weight_sync.push(progress.policy_version)
        rollouts.service.start()
        preflight.run(trainer.policy, schedule, progress.policy_version, recorder)
        parallel.barrier()
        return
    train_rl(
        trainer.policy,
        rollouts.service,
        rollouts.turns,
        rollouts.weight_sync,
        rollouts.evaluator,
        algorithm,
        schedule,
        recorder,
        assemble.make_saver(
            config, trainer, rollouts.service.state, lambda: stop.requested, recorder.message, rollouts.turns
        ),
        assemble.make_health(config, tokenizer, algorithm, recorder.message),
        preflight,
        progress,
    )
    parallel.barrier()


def _encode(stream: SupervisedStream) -> bytes:
    return msgspec.json.encode(stream.state_dict())
