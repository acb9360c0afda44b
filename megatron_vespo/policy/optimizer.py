"""Optimizer and learning-rate schedule, both Megatron's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_vespo import parallel, platform
from megatron_vespo.errors import UserError
from megatron_vespo.platform.megatron import keep_bucket_padding, use_adam
from megatron_vespo.policy.adam import Adam


class Optimizer(ChainedOptimizer):
    """Megatron's optimizers of dense and expert weights, with steps that can be skipped and an exact saved state."""

    def get_grad_norm(self) -> float:
        """Norm of the whole gradient; ``step()`` asks for it first."""
        self._grad_norm = float(super().get_grad_norm())
        return self._grad_norm

    def step_with_ready_grads(self) -> bool:
        """Step if the gradient is finite on every rank; Megatron looks at it for loss scaling alone."""
        return parallel.all_true(self._gradient_is_finite()) and bool(super().step_with_ready_grads())

    def _gradient_is_finite(self) -> torch.Tensor:
        """Of this rank. The norm would not do: it leaves out what tensor-parallel ranks have in common."""
        # Where the gradient lies: optimizer/optimizer.py:231.
        name = "decoupled_grad" if self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 else "grad"
        gradients = [getattr(parameter, name, None) for parameter in self.get_parameters()]
        largest = torch._foreach_norm([gradient for gradient in gradients if gradient is not None], torch.inf)
        norm = torch.tensor(self._grad_norm, device=platform.device())
        return torch.stack([*(each.float() for each in largest), norm]).isfinite().all()

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, **kwargs: Any
    ) -> dict[Any, Any]:
        """Megatron's, but before the first step as after it: moments that are not there yet are zero.

        Args:
            model_sharded_state_dict: Of the chunks, by name.
            is_loading: Whether to load into it.
            **kwargs: ``metadata``, Megatron's names for the way of saving.

        Raises:
            UserError: Megatron cannot save this optimizer.
        """
        if self.config.optimizer != "adam":
            raise UserError(f"megatron.optimizer: {self.config.optimizer} cannot be saved to resume from; use adam")
        self._align_steps()
        states: dict[Any, Any] = {}
        for number, part in enumerate(self.chained_optimizers):
            part.init_state_fn(part.optimizer, part.config)
            experts = part.optimizer.param_groups[0]["is_expert_parallel"]
            # Of its own weights only: Megatron prints every other one into a log (dist_checkpointing/optimizer.py:74).
            own = {
                f"{chunk}.{name}": entry
                for chunk, entries in model_sharded_state_dict.items()
                for name, entry in entries.items()
                if isinstance(getattr(entry, "data", None), torch.nn.Parameter) and _of_expert(name) == experts
            }
            states[number] = part.sharded_state_dict(own, is_loading, **kwargs)
            if states[number].get("param_state", ...) is None:
                del states[number]["param_state"]  # this rank writes none; what ranks have in common must be equal
        return states if len(states) > 1 else states[0]

    def load_state_dict(self, state_dict: dict[Any, Any]) -> None:
        """Moments and step from the checkpoint; every hyperparameter stays as this run's configuration has it."""
        single = len(self.chained_optimizers) == 1
        for number, part in enumerate(self.chained_optimizers):
            state = state_dict if single else state_dict[number]
            state = state.get("optimizer", state)
            saved = state["param_groups"][0]
            groups = part.optimizer.state_dict()["param_groups"]
            state["param_groups"] = [{**group, "step": saved["step"]} if "step" in saved else group for group in groups]
        super().load_state_dict(state_dict)

    def _align_steps(self) -> None:
        """One step for all parameter groups.

        Transformer Engine's Adam does not count it in groups without parameters, and what is saved is rank 0's: the
        experts of other pipeline stages would start again from step 0 where the first stage has none.
        """
        groups = [group for part in self.chained_optimizers for group in part.optimizer.param_groups]
        steps = {group["step"] for group in groups if group["params"] and "step" in group}
        if len(steps) > 1:
            raise RuntimeError(f"parameter groups of the optimizer are at different steps: {sorted(steps)}")
        for step in steps:
            for group in groups:
                group["step"] = step


def _of_expert(name: str) -> bool:
    return ".mlp.experts." in name


def mark_experts(chunks: Sequence[torch.nn.Module]) -> None:
    """Let experts be experts at every layout: Megatron calls their weights dense where none of their axes is split.

    Its optimizer is then one instead of two, and its checkpoint another than that of expert parallelism
    (tensor_parallel/layers.py:961). To be called before DistributedDataParallel sorts the weights.
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if _of_expert(name):
                parameter.allreduce = False  # type: ignore[attr-defined]


def build_optimizer(config: OptimizerConfig, chunks: list[DistributedDataParallel]) -> Optimizer:
    """Megatron's optimizer; distributed over the data-parallel ranks if ``use_distributed_optimizer``.

    Raises:
        UserError: The configuration asks for an optimizer of another kind.
    """
    if config.use_distributed_optimizer != chunks[0].ddp_config.use_distributed_optimizer:
        raise UserError("megatron.use_distributed_optimizer must be the same for optimizer and gradient buffers")
    use_adam(Adam)
    chained = get_megatron_optimizer(config, chunks)
    if type(chained) is not ChainedOptimizer:
        raise UserError(f"megatron.optimizer: {config.optimizer} is not supported; use adam or sgd")
    for part in chained.chained_optimizers:
        if isinstance(part, DistributedOptimizer):
            keep_bucket_padding(part)
    return Optimizer(chained.chained_optimizers)


def build_scheduler(
    optimizer: Optimizer,
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
        min_lr=config.min_lr,
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
