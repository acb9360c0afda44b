"""The policy: a Megatron-Core model with its optimizer, driven a minibatch at a time.

Every rank holds all samples of a minibatch and trains on the microbatches planned for its data-parallel rank. Figures
of the samples come back as one table of the whole minibatch: each sample is filled in by the one rank that reports it
(last pipeline stage, first tensor-parallel rank) and a single sum over all ranks completes the table everywhere. So no
metric needs a reduction of its own, and none depends on the layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_vespo import parallel, platform
from megatron_vespo.errors import UserError
from megatron_vespo.policy.logprobs import TokenLogProbs, token_log_probs
from megatron_vespo.policy.objectives import Columns, Objective
from megatron_vespo.policy.optimizer import build_optimizer, build_scheduler
from megatron_vespo.policy.packing import PackedBatch, pack
from megatron_vespo.types import FloatArray, Sample

Table = dict[str, np.ndarray]
"""Figures of all samples of a minibatch by name, each [samples] float64, equal on all ranks."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an optimizer step did.

    Attributes:
        grad_norm: Norm of the whole gradient before clipping.
        learning_rate: Rate that was applied.
    """

    grad_norm: float
    learning_rate: float


class Policy:
    """Model, optimizer and schedule of this rank."""

    def __init__(
        self,
        model: GPTModel,
        *,
        ddp_config: DistributedDataParallelConfig,
        optimizer_config: OptimizerConfig,
        total_steps: int,
        warmup_steps: int,
        decay_style: str,
        vocab_size: int,
        temperature: float,
        alignment: int,
    ) -> None:
        """Wrap the model for training.

        Args:
            model: From ``models.build_model``, weights loaded: the optimizer copies them.
            ddp_config: Gradient buffers.
            optimizer_config: Optimizer.
            total_steps: Optimizer steps of the run, for the schedule.
            warmup_steps: Of which warm-up.
            decay_style: Learning-rate schedule.
            vocab_size: Vocabulary without padding.
            temperature: Sampling temperature; log-probabilities are of softmax(logits / temperature).
            alignment: Packed microbatches are padded to a multiple of it.
        """
        config = model.config
        module = Float16Module(config, model) if config.bf16 or config.fp16 else model
        self.module = model
        self._ddp = DistributedDataParallel(config, ddp_config, module)
        self._optimizer: MegatronOptimizer = build_optimizer(optimizer_config, self._ddp)
        self._scheduler: OptimizerParamScheduler = build_scheduler(
            self._optimizer,
            optimizer_config,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            decay_style=decay_style,
        )
        self._vocab_size, self._temperature, self._alignment = vocab_size, temperature, alignment
        config.no_sync_func = self._ddp.no_sync
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self._optimizer.scale_loss
        if ddp_config.overlap_grad_reduce:
            config.grad_sync_func = self._ddp.start_grad_sync
        if ddp_config.overlap_param_gather:
            config.param_sync_func = self._ddp.start_param_sync
        self._ddp.broadcast_params()

    def forward_backward(self, samples: Sequence[Sample], plan: Sequence[Sequence[int]], objective: Objective) -> Table:
        """Accumulate the gradient of one global minibatch.

        Args:
            samples: All samples of the minibatch, the same on every rank.
            plan: This data-parallel rank's microbatches, as numbers of samples; equally many on every rank.
            objective: Loss.

        Returns:
            Figures of all samples.
        """
        self._ddp.train()
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        # Megatron divides the loss by the number of microbatches (pipeline_parallel/schedules.py:341) and the summed
        # gradients by the data-parallel size (distributed/distributed_data_parallel.py:212). The objective has divided
        # by the size of the global minibatch already, so both are undone here.
        scale = len(plan) * parallel.data_parallel_size()

        def loss_of(batch: PackedBatch, logprobs: TokenLogProbs) -> tuple[Tensor, Columns]:
            loss, columns = objective(batch, logprobs)
            return loss * scale, columns

        results = self._run(samples, plan, loss_of, forward_only=False)
        return _complete_table(results, len(samples))

    @torch.no_grad()
    def log_probs(self, samples: Sequence[Sample], plan: Sequence[Sequence[int]]) -> list[FloatArray]:
        """Log-probabilities (nats) of every sample's response tokens under the current weights, on every rank.

        Args:
            samples: All samples, the same on every rank.
            plan: This data-parallel rank's microbatches.
        """
        self._ddp.eval()
        ends = np.cumsum([len(sample.response_ids) for sample in samples])
        starts = ends - [len(sample.response_ids) for sample in samples]

        def collect(batch: PackedBatch, logprobs: TokenLogProbs) -> tuple[Tensor, Any]:
            return logprobs.log_pi.sum(), (batch, logprobs.log_pi)

        flat = torch.zeros(int(ends[-1]), dtype=torch.float32, device=platform.device())
        for batch, log_pi in self._run(samples, plan, collect, forward_only=True):
            if parallel.reports_samples():
                for number, index in enumerate(batch.indices.tolist()):
                    flat[starts[index] : ends[index]] = log_pi[batch.mask & (batch.sample_index == number)]
        values = parallel.all_reduce_sum(flat).cpu().numpy()
        return [values[start:end] for start, end in zip(starts, ends, strict=True)]

    def optim_step(self) -> StepResult:
        """Clip, step the optimizer, then the schedule.

        Raises:
            UserError: The gradient is not finite.
        """
        learning_rate = self._optimizer.param_groups[0]["lr"]
        successful, grad_norm, _ = self._optimizer.step()
        norm = float(grad_norm) if grad_norm is not None else 0.0
        if not successful or not np.isfinite(norm):
            raise UserError(
                f"gradient norm is {norm}, and the step has spoilt the weights: go back to a checkpoint and lower"
                " megatron.lr"
            )
        self._scheduler.step(1)
        return StepResult(norm, learning_rate)

    def _run(
        self, samples: Sequence[Sample], plan: Sequence[Sequence[int]], loss_of: Any, *, forward_only: bool
    ) -> list[Any]:
        """Run the microbatches through the pipeline; on the last stage, what ``loss_of`` gave besides the loss."""
        device = platform.device()

        def batches() -> Iterator[PackedBatch]:
            for indices in plan:
                yield pack(samples, indices, alignment=self._alignment, device=device)

        def forward_step(iterator: Iterator[PackedBatch], model: Any) -> tuple[Tensor, Any]:
            batch = next(iterator)
            output = model(
                input_ids=batch.tokens.unsqueeze(0),
                position_ids=batch.positions.unsqueeze(0),
                attention_mask=None,
                packed_seq_params=batch.packed_seq_params,
            )
            return output, partial(finish, batch)

        def finish(batch: PackedBatch, logits: Tensor) -> tuple[Tensor, Any]:
            logprobs = token_log_probs(
                logits.squeeze(0), batch.targets, vocab_size=self._vocab_size, temperature=self._temperature
            )
            loss, extra = loss_of(batch, logprobs)
            return loss, (batch.indices, extra) if not forward_only else extra

        longest = max(len(indices) for indices in plan)  # variable_seq_lengths: the schedule asks, then ignores it
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches(),
            model=[self._ddp],
            num_microbatches=len(plan),
            seq_length=longest,
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _complete_table(results: list[tuple[Tensor, Columns]], num_samples: int) -> Table:
    """Put the microbatches' columns into one table and sum it over all ranks; each sample is filled in exactly once."""
    names: list[str] = sorted(results[0][1]) if results else []
    names = max(parallel.gather_objects(names), key=len)
    table = torch.zeros(len(names) + 1, num_samples, dtype=torch.float64, device=platform.device())
    if parallel.reports_samples():
        for indices, columns in results:
            for row, name in enumerate(names):
                table[row, indices] = columns[name].double()
            table[-1, indices] += 1
    table = parallel.all_reduce_sum(table).cpu()
    if not bool((table[-1] == 1).all()):
        raise RuntimeError(f"samples reported by other than one rank: counts {table[-1].tolist()}")
    return {name: table[row].numpy() for row, name in enumerate(names)}
