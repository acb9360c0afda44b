"""Optimizer and learning-rate schedule, both Megatron's."""

from __future__ import annotations

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_vespo.errors import UserError


def build_optimizer(config: OptimizerConfig, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Megatron's optimizer; distributed over the data-parallel ranks if ``use_distributed_optimizer``."""
    if config.use_distributed_optimizer != chunks[0].ddp_config.use_distributed_optimizer:
        raise UserError("megatron.use_distributed_optimizer must be the same for optimizer and gradient buffers")
    return get_megatron_optimizer(config, chunks)


def build_scheduler(
    optimizer: MegatronOptimizer,
    config: OptimizerConfig,
    *,
    total_steps: int,
    warmup_steps: int,
    decay_style: str,
) -> OptimizerParamScheduler:
    """Learning rate from ``config.lr`` to ``config.min_lr`` over the run; constant weight decay.

    Args:
        optimizer: What is scheduled.
        config: Its ``lr``, ``min_lr`` and ``weight_decay``.
        total_steps: Optimizer steps of the whole run.
        warmup_steps: Optimizer steps of linear warm-up.
        decay_style: Megatron's name of the schedule.

    Raises:
        UserError: The warm-up is not shorter than the run.
    """
    if warmup_steps >= total_steps:
        raise UserError(f"training.lr_warmup_steps={warmup_steps} must be less than the {total_steps} optimizer steps")
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr or 0.0,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=total_steps,
        lr_decay_style=decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
        wsd_decay_steps=max(total_steps // 10, 1),
        lr_wsd_decay_style="linear",
    )
