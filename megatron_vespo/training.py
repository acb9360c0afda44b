"""Assemble a run and run its loop; imported once the server is on its way, since it imports torch and Megatron."""

from __future__ import annotations

from contextlib import ExitStack

from megatron_vespo import assemble, parallel
from megatron_vespo.config import Config
from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.loop import train_rl, train_sft
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.rollout.server import SGLangServer


def train(config: Config, server: SGLangServer | None, stack: ExitStack, *, layout: str) -> None:
    """Run one rank from assembly to summary.

    Args:
        config: Configuration.
        server: The SGLang server that this rank started, if it did.
        stack: Takes what must be closed at the end.
        layout: Parallel layout in words.
    """
    architecture = load_architecture(config.model.hf_path)
    tokenizer = load_tokenizer(config.model.hf_path)
    facts = {"objective": config.objective, "model": config.model.hf_path, "layout": layout}
    if config.rollout.replay is not None:
        facts["rollouts"] = f"replayed from {config.rollout.replay}"
    recorder = assemble.make_recorder(config, architecture, tokenizer, facts)
    stack.callback(recorder.finish)
    rollouts = None
    if config.rollout.replay is not None:
        rollouts = assemble.make_replay(config, architecture)  # before the model: the files may not fit
        recorder.message(f"no server: training on the rollout batches in {config.rollout.replay}, without evaluation")
    schedule = assemble.make_schedule(config, architecture)
    with recorder.phase(f"building the model ({layout})"):
        trainer = assemble.make_trainer(config, architecture)
    if config.objective == "sft":
        batches = assemble.make_sft_batches(config, architecture, tokenizer)
        train_sft(trainer.policy, batches, schedule, recorder, trainer.save)
        return
    algorithm = assemble.make_algorithm(config)
    if rollouts is None:
        with recorder.phase("connecting to SGLang"):
            rollouts = assemble.make_rollouts(config, architecture, tokenizer, trainer.exporter, server, stack)
    train_rl(
        trainer.policy,
        rollouts.service,
        rollouts.weight_sync,
        rollouts.evaluator,
        algorithm,
        schedule,
        recorder,
        trainer.save,
    )
    parallel.barrier()
