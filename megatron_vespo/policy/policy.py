"""The policy: a Megatron-Core model with its optimizer, driven a minibatch at a time.

Every rank holds all samples of a minibatch and trains on the microbatches planned for its data-parallel rank. Figures
of the samples come back as one table of the whole minibatch: each sample is filled in by the one rank that reports it
(last pipeline stage, first tensor-parallel rank) and a single sum over all ranks completes the table everywhere. So no
metric needs a reduction of its own, none depends on the layout, and the host waits for the device once a minibatch.
Log-probabilities and entropies of single tokens come the same way, in the same sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_vespo import parallel, platform
from megatron_vespo.policy.figures import Measured, Sums, TokenScores, checked_table
from megatron_vespo.policy.gathering import ParameterGathering
from megatron_vespo.policy.head import log_prob_head
from megatron_vespo.policy.logprobs import TokenLogProbs
from megatron_vespo.policy.objectives import Objective
from megatron_vespo.policy.offload import ALL_PARTS, DeviceMemory, Part
from megatron_vespo.policy.optimizer import Optimizer, build_optimizer, build_scheduler, mark_experts
from megatron_vespo.policy.packing import PackedBatch, pack
from megatron_vespo.policy.reference import HostWeights
from megatron_vespo.policy.router_flips import FlipCounter, flip_shares
from megatron_vespo.policy.router_losses import take_router_losses
from megatron_vespo.types import FloatArray, Sample

Finish = Callable[[PackedBatch, TokenLogProbs], Tensor]
"""Takes what the last stage computed of a microbatch, and returns the scalar to differentiate."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an optimizer step did.

    Attributes:
        grad_norm: Norm of the whole gradient before clipping; NaN where loss scaling found an overflow.
        learning_rate: Rate that was applied.
        router_losses: Auxiliary losses of the routers that are on, by name, without their coefficients.
        skipped: The gradient is not finite; weights, optimizer and schedule are as before. The same on every rank.
    """

    grad_norm: float
    learning_rate: float
    router_losses: dict[str, float]
    skipped: bool


class Policy:
    """Model, optimizer and schedule of this rank.

    Attributes:
        chunks: The model.
        memory: What of it is on the device. Methods assert that it is what they need.
    """

    def __init__(
        self,
        chunks: Sequence[GPTModel],
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
            chunks: From ``models.build_model``, weights loaded: the optimizer copies them.
            ddp_config: Gradient buffers.
            optimizer_config: Optimizer.
            total_steps: Optimizer steps of the run, for the schedule.
            warmup_steps: Of which warm-up.
            decay_style: Learning-rate schedule.
            vocab_size: Vocabulary without padding.
            temperature: Sampling temperature; log-probabilities are of softmax(logits / temperature).
            alignment: Packed microbatches are padded to a multiple of it.
        """
        config = chunks[0].config
        self.chunks = chunks
        mark_experts(chunks)
        self._ddp = [
            DistributedDataParallel(
                config,
                ddp_config,
                Float16Module(config, chunk) if config.bf16 or config.fp16 else chunk,
                # As Megatron-LM: only the first chunk's gradients are reduced in buckets while others are computed.
                disable_bucketing=number > 0,
            )
            for number, chunk in enumerate(chunks)
        ]
        self._optimizer: Optimizer = build_optimizer(optimizer_config, self._ddp)
        self._scheduler: OptimizerParamScheduler = build_scheduler(
            self._optimizer,
            optimizer_config,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            decay_style=decay_style,
        )
        self._vocab_size, self._temperature, self._alignment = vocab_size, temperature, alignment
        # The schedules want one function, or a list of one for each chunk of an interleaved pipeline.
        config.no_sync_func = _one_or_all([ddp.no_sync for ddp in self._ddp])
        if ddp_config.overlap_grad_reduce:
            config.grad_sync_func = _one_or_all([ddp.start_grad_sync for ddp in self._ddp])
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self._optimizer.scale_loss
        for ddp in self._ddp:
            ddp.broadcast_params()
        self._gathering = ParameterGathering(config, self._ddp)
        self.memory = DeviceMemory(self._ddp, self._optimizer, self.finish_param_gather)
        self._router_losses: dict[str, float] = {}
        self._reference: HostWeights | None = None

    def forward_backward(
        self, samples: Sequence[Sample], plan: Sequence[Sequence[int]], objective: Objective
    ) -> Measured:
        """Accumulate the gradient of one global minibatch.

        Args:
            samples: All samples of the minibatch, the same on every rank.
            plan: This data-parallel rank's microbatches, as numbers of samples; equally many on every rank.
            objective: Loss.

        Returns:
            Figures of all samples and their tokens, router flips among them if a sample says how it was routed.

        Raises:
            UserError: Log-probabilities of a sample are NaN or infinite; on every rank.
        """
        self.memory.require(*ALL_PARTS)
        for ddp in self._ddp:
            ddp.train()
            ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        # Megatron divides the loss by the number of microbatches (pipeline_parallel/schedules.py:341) and the summed
        # gradients by the data-parallel size (distributed/distributed_data_parallel.py:212). The objective has divided
        # by the size of the global minibatch already, so both are undone here.
        scale = len(plan) * parallel.data_parallel_size()
        routed = any(sample.routed_experts is not None for sample in samples)
        sums = Sums(samples, len(objective.columns) + 1, flips=routed)

        def finish(batch: PackedBatch, logprobs: TokenLogProbs) -> Tensor:
            loss, columns = objective(batch, logprobs)
            if parallel.reports_samples():
                sums.add_columns(batch, [columns[name] for name in objective.columns])
                sums.set_tokens(batch, logprobs)
            return loss * scale

        self._run(
            samples,
            plan,
            finish,
            trains=objective.trains,
            forward_only=False,
            entropy_gradient=objective.needs_entropy_gradient,
            flips=FlipCounter(self.chunks, sums) if routed else None,
        )
        self._router_losses = take_router_losses(self.chunks[0].config, len(plan))
        rows, tokens = sums.over_ranks()
        if tokens.router_flips is not None:
            shares = flip_shares(samples, tokens.router_flips, self.chunks[0].config)
            tokens = replace(tokens, router_flips=shares)
        return Measured(checked_table(rows, objective.columns, samples), tokens)

    def log_probs(self, samples: Sequence[Sample], plan: Sequence[Sequence[int]]) -> list[FloatArray]:
        """Log-probabilities (nats) of every sample's response tokens under the current weights, on every rank.

        Args:
            samples: All samples, the same on every rank.
            plan: This data-parallel rank's microbatches.
        """
        return self.score(samples, plan).log_pi

    @torch.no_grad()
    def score(
        self, samples: Sequence[Sample], plan: Sequence[Sequence[int]], temperature: float | None = None
    ) -> TokenScores:
        """Log-probabilities and entropies under the current weights, on every rank.

        Args:
            samples: All samples, the same on every rank.
            plan: This data-parallel rank's microbatches.
            temperature: Instead of the policy's own, to see what the sampler's was.
        """
        self.memory.require(Part.PARAMETERS)
        self.finish_param_gather()
        for ddp in self._ddp:
            ddp.eval()
        sums = Sums(samples, 0)

        def finish(batch: PackedBatch, logprobs: TokenLogProbs) -> Tensor:
            if parallel.reports_samples():
                sums.set_tokens(batch, logprobs)
            return logprobs.log_pi.sum()

        self._run(samples, plan, finish, trains=lambda sample: False, forward_only=True, temperature=temperature)
        return sums.over_ranks()[1]

    def keep_reference(self) -> None:
        """Keep a copy of the weights, in host memory, as the reference policy."""
        self.finish_param_gather()
        self._reference = HostWeights(self.chunks)

    def reference(self) -> AbstractContextManager[None]:
        """Within it, ``log_probs`` are the reference policy's."""
        assert self._reference is not None
        self.finish_param_gather()
        return self._reference.in_place()

    def optim_step(self) -> StepResult:
        """Clip, step the optimizer, then the schedule; nothing, as Megatron-LM, where the gradient is not finite."""
        self.memory.require(*ALL_PARTS)
        learning_rate = self._optimizer.param_groups[0]["lr"]
        successful, grad_norm, _ = self._optimizer.step()
        self._gathering.begin()
        if successful:
            self._scheduler.step(1)
        norm = math.nan if grad_norm is None else float(grad_norm)
        return StepResult(norm, learning_rate, self._router_losses, skipped=not successful)

    def finish_param_gather(self) -> None:
        """Make the weights complete on this rank, for whoever reads them outside a training step. A collective.

        With ``overlap_param_gather`` an optimizer step leaves each rank with its own share alone.
        """
        self._gathering.finish()

    def sharded_state_dict(self, metadata: dict[str, Any], *, is_loading: bool = False) -> dict[str, Any]:
        """Weights, optimizer and schedule as Megatron-LM's checkpoints name them.

        Args:
            metadata: Megatron's name for the ways of saving; it is changed.
            is_loading: Whether to load into it.
        """
        self.memory.require(Part.PARAMETERS, Part.OPTIMIZER)
        self.finish_param_gather()
        names = ["model"] if len(self.chunks) == 1 else [f"model{number}" for number in range(len(self.chunks))]
        model = {
            name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in zip(names, self.chunks, strict=True)
        }
        return {
            **model,
            "optimizer": self._optimizer.sharded_state_dict(model, is_loading, metadata=metadata),
            "opt_param_scheduler": self._scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what was loaded into ``sharded_state_dict()``.

        The configuration rules, except over the number of steps taken: a run can be made longer, or its rate lower.
        """
        models = [state[name] for name in sorted(state) if name.startswith("model")]
        for chunk, model in zip(self.chunks, models, strict=True):
            chunk.load_state_dict(model)
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.num_steps = 0
        self._scheduler.step(state["opt_param_scheduler"]["num_steps"])

    def _run(
        self,
        samples: Sequence[Sample],
        plan: Sequence[Sequence[int]],
        finish: Finish,
        *,
        trains: Callable[[Sample], bool],
        forward_only: bool,
        entropy_gradient: bool = False,
        temperature: float | None = None,
        flips: FlipCounter | None = None,
    ) -> None:
        """Run the microbatches through the pipeline; ``finish`` is called on its last stage."""
        temperature = self._temperature if temperature is None else temperature
        batches = [
            pack(
                samples,
                indices,
                trains=trains,
                alignment=self._alignment,
                device=platform.device(),
                routing=flips is not None,
            )
            for indices in plan
        ]

        def forward_step(iterator: Iterator[PackedBatch], ddp: Any) -> tuple[Any, Any]:
            batch = next(iterator)
            with nullcontext() if flips is None else flips.during(batch):
                output = ddp(
                    input_ids=batch.tokens.unsqueeze(0),
                    position_ids=batch.positions.unsqueeze(0),
                    attention_mask=None,
                    packed_seq_params=batch.packed_seq_params,
                    padding_mask=self._padding_mask(batch, ddp),
                    output_processor=log_prob_head(
                        batch, self._vocab_size, temperature, entropy_gradient, partial(self._gathering.wait_for, ddp)
                    ),
                )
            return output, partial(loss_of, batch)

        def loss_of(batch: PackedBatch, logprobs: TokenLogProbs) -> tuple[Tensor, None]:
            return finish(batch, logprobs), None

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=_one_or_all([iter(batches) for _ in self._ddp]),
            model=self._ddp,
            num_microbatches=len(plan),
            seq_length=1,  # variable_seq_lengths: the schedule asks, then ignores it
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _padding_mask(self, batch: PackedBatch, ddp: DistributedDataParallel) -> Tensor:
        """Padding for the router's auxiliary losses, [1, this rank's positions where the sequence is split].

        Megatron splits it itself, but on the first stage alone (models/gpt/gpt_model.py:352).
        """
        mask = batch.padding.unsqueeze(0)
        if not self.chunks[0].config.sequence_parallel or self.chunks[self._ddp.index(ddp)].pre_process:
            return mask
        return mask.chunk(parallel.tensor_parallel_size(), dim=1)[parallel.tensor_parallel_rank()]


def _one_or_all[T](values: list[T]) -> T | list[T]:
    return values[0] if len(values) == 1 else values
