"""One run of the laboratory: the training loop, policy and loss as they are, with a sampler in this process."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, cast

import torch

from examples.digits_cpu.task import EOS
from examples.staleness_lab.fake_fp8 import Fp8
from examples.staleness_lab.observe import ObservedPolicy
from examples.staleness_lab.outcome import Outcome
from examples.staleness_lab.rollouts import HeldOut, Rollouts, copy_weights
from examples.staleness_lab.sampler import Perturbation, Sampler
from examples.staleness_lab.settings import Cell, Fp8Settings, Mismatch
from examples.staleness_lab.start import NoSaving, silent_recorder
from examples.staleness_lab.trainer_fp8 import emulate_fp8
from megatron_vespo import assemble, parallel
from megatron_vespo.config import Config
from megatron_vespo.config_file import parse_config
from megatron_vespo.data.prompts import PromptDataset, PromptStream
from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.errors import UserError
from megatron_vespo.evaluation import NoEvaluation
from megatron_vespo.loop import train_rl
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.policy.policy import Policy
from megatron_vespo.preflight import NoPreflight
from megatron_vespo.types import Progress
from megatron_vespo.weight_sync.turns import Turns


def make_config(cell: Cell, start: Path) -> Config:
    """The configuration of a cell, as any run has one.

    Args:
        cell: The cell.
        start: Folder that ``make_start`` made.

    Raises:
        UserError: The cell is not possible.
    """
    task = cell.task
    tree: dict[str, Any] = {
        "run": {"name": cell.name, "seed": cell.seed},
        "model": {"hf_path": str(start / "model"), "make_vocab_size_divisible_by": 16},
        "megatron": {"lr": cell.lr, "weight_decay": 0.0, "clip_grad": 1.0, "adam_beta2": 0.999}
        | task.megatron
        | cell.algorithm.megatron,
        "data": {"train": str(start / "train.jsonl"), "evaluation": {"heldout": str(start / "heldout.jsonl")}},
        "rollout": {
            "prompts_per_step": task.prompts_per_minibatch * cell.n,
            "samples_per_prompt": task.samples_per_prompt,
            "max_new_tokens": task.max_new_tokens,
            "max_staleness": cell.perturbation.hold_back,
            "behavior_logprobs": cell.algorithm.behavior_logprobs,
        },
        "algorithm": cell.algorithm.model_dump(exclude_unset=True, exclude={"behavior_logprobs", "megatron"}),
        # Cells that fall silent are what is looked for, and all are measured by the laboratory itself.
        "health": {"enabled": False},
        "training": {
            "steps": task.updates // cell.n,
            "minibatches_per_step": cell.n,
            "max_tokens_per_microbatch": 4096,
        },
    }
    return parse_config(tree, cell.name)


def make_perturbation(mismatch: Mismatch) -> Perturbation:
    """How the sampler differs."""
    fp8 = mismatch.sampler_fp8
    return Perturbation(
        dtype=getattr(torch, mismatch.sampler_dtype),
        fp8=None if fp8 is None else _fp8(fp8),
        fp8_attention=fp8 is not None and fp8.linears == "all",
        router_noise=mismatch.router_noise,
    )


def _fp8(settings: Fp8Settings) -> Fp8:
    return Fp8(settings.granularity, settings.scale)


def run_cell(cell: Cell, start: Path) -> Outcome:
    """Run a cell. In a process that holds one rank.

    Raises:
        UserError: The cell is not possible.
    """
    began = time.process_time()
    config = make_config(cell, start)
    parallel.seed_random(cell.seed)
    architecture, tokenizer = load_architecture(start / "model"), load_tokenizer(start / "model")
    algorithm = assemble.make_algorithm(config)
    trainer = assemble.make_trainer(config, architecture)
    if cell.perturbation.trainer_fp8 is not None:
        emulate_fp8(trainer.policy.chunks, _fp8(cell.perturbation.trainer_fp8), cell.perturbation.trainer_fp8.linears)
    facts = json.loads((start / "model" / "config.json").read_text(encoding="utf-8"))
    room = architecture.context_length - config.rollout.max_new_tokens
    train, heldout = (
        PromptDataset.from_jsonl(start / f"{name}.jsonl", tokenizer, room) for name in ("train", "heldout")
    )
    rollouts = Rollouts(
        config,
        trainer.exporter,
        Sampler(facts, make_perturbation(cell.perturbation), cell.seed),
        PromptStream(train, cell.seed),
        [EOS],
        cell.perturbation.hold_back,
    )
    exam = HeldOut(Sampler(facts, Perturbation(), cell.seed), heldout.prompts(), config, [EOS])
    observed = ObservedPolicy(
        trainer.policy, lambda: exam.accuracy(copy_weights(trainer.exporter)), cell.task.evaluate_every
    )
    diverged = ""
    try:
        train_rl(
            cast(Policy, observed),
            rollouts,
            Turns(),
            rollouts,
            NoEvaluation(),
            algorithm,
            assemble.make_schedule(config, architecture),
            silent_recorder(config),
            NoSaving(),
            assemble.make_health(config, tokenizer, algorithm, print),
            NoPreflight(),
            Progress(),
        )
    except UserError as error:  # NaN gradients or log-probabilities: an outcome
        diverged = str(error)
    return Outcome(cell.definition, observed.history, observed.accuracy, time.process_time() - began, diverged)
