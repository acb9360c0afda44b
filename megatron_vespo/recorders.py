"""From configuration to what is written down of a run: console, metrics, samples, profiles."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vespo.config import Config
from megatron_vespo.data.tokenizer import Tokenizer
from megatron_vespo.metrics.console import RL_COLUMNS, ROLLOUT_COLUMNS, SFT_COLUMNS, Console
from megatron_vespo.metrics.profile import NoProfiler, RangeProfiler, TraceProfiler, Window
from megatron_vespo.metrics.rollback import roll_back
from megatron_vespo.metrics.sinks import JsonlSink, MetricSink, RolloutSink, TensorBoardSink
from megatron_vespo.metrics.wandb_sink import WandbSink
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.record import Hardware, Place, Recorder
from megatron_vespo.rollout.batches import BatchSink

_COLUMNS = {"rl": RL_COLUMNS, "sft": SFT_COLUMNS, "rollout": ROLLOUT_COLUMNS}


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
