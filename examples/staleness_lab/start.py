"""What all runs of a sweep begin with: prompts, and one model that supervised training has made mediocre."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.digits_cpu.task import write_data, write_model
from examples.staleness_lab.settings import Task
from megatron_vespo import assemble
from megatron_vespo.config import Config
from megatron_vespo.config_file import parse_config
from megatron_vespo.data.sft import sft_batches
from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.files import atomic_folder
from megatron_vespo.loop import train_sft
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.policy.checkpoint import save_hf
from megatron_vespo.record import Recorder
from megatron_vespo.types import Progress

# Of the data and the supervised training; a sweep's seeds are of what comes after.
_SEED = 1


class NoSaving:
    """Runs that are short enough to be begun again."""

    def stopping(self) -> bool:
        return False

    def after_step(self, progress: Progress) -> None:
        pass

    def leave(self, progress: Progress) -> None:
        pass


def silent_recorder(config: Config) -> Recorder:
    """One that writes nothing."""
    return Recorder(config.training.steps, None, (), None, config.run_folder, {})


def make_start(folder: Path, task: Task) -> None:
    """Make data and model in ``folder``, complete or not at all. In a process that holds one rank."""
    with atomic_folder(folder) as temporary:
        write_data(temporary, _SEED, wrong_sum=task.wrong_sum)
        empty = temporary / "random"
        empty.mkdir()
        write_model(
            empty,
            hidden_size=task.hidden_size,
            moe_intermediate_size=task.moe_intermediate_size,
            num_experts=task.num_experts,
        )
        config = parse_config(_supervised(temporary, task))
        architecture = load_architecture(empty)
        trainer = assemble.make_trainer(config, architecture)
        stream = assemble.make_sft_stream(config, architecture, load_tokenizer(empty))
        train_sft(
            trainer.policy,
            sft_batches(stream, config.training.samples_per_step),
            assemble.make_schedule(config, architecture),
            silent_recorder(config),
            NoSaving(),
            Progress(),
        )
        save_hf(trainer.exporter, temporary / "model", empty)


def _supervised(folder: Path, task: Task) -> dict[str, Any]:
    return {
        "objective": "sft",
        "run": {"name": "start", "seed": _SEED, "folder": str(folder)},
        "model": {"hf_path": str(folder / "random"), "initialize": "random", "make_vocab_size_divisible_by": 16},
        "megatron": {"lr": 3e-3, "min_lr": 3e-4, "weight_decay": 0.0, "clip_grad": 1.0, "adam_beta2": 0.99},
        "data": {"train": str(folder / "sft.jsonl")},
        "training": {
            "steps": task.sft_steps,
            "samples_per_step": 64,
            "max_tokens_per_microbatch": 2048,
            "lr_decay_style": "cosine",
            "lr_warmup_steps": 20,
        },
    }
