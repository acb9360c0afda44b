"""The laboratory's side of the loop: rollout batches and weight pushes in this process, and held-out accuracy."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from examples.digits_cpu.task import reward
from examples.staleness_lab.sampler import Sampler
from megatron_vespo.config import Config
from megatron_vespo.data.prompts import PromptStream
from megatron_vespo.metrics.measure import Values
from megatron_vespo.models.export import HfExporter
from megatron_vespo.types import Prompt, Sample, SampleGroup

Weights = list[tuple[str, Tensor]]


def copy_weights(exporter: HfExporter) -> Weights:
    """The trainer's weights as they are now, by their Hugging Face names."""
    return [(name, tensor.clone()) for tensors in exporter.stream() for name, tensor in tensors]


class Rollouts:
    """Samples with what was pushed last, or ``hold_back`` pushes before; a RolloutSource and a WeightPush of the loop.

    Args:
        config: Of the run.
        exporter: Of the trainer.
        sampler: Samples.
        stream: Prompts.
        stop_ids: Tokens that end a response.
        hold_back: Pushes that the sampler is behind.
    """

    def __init__(
        self,
        config: Config,
        exporter: HfExporter,
        sampler: Sampler,
        stream: PromptStream,
        stop_ids: Sequence[int],
        hold_back: int,
    ) -> None:
        self._settings, self._exporter, self._sampler = config.rollout, exporter, sampler
        self._stream, self._stop_ids = stream, stop_ids
        self._pushed: deque[tuple[int, Weights]] = deque(maxlen=hold_back + 1)
        self._version = 0

    def push(self, version: int) -> Values:
        """Take the current weights, and sample with the oldest that are kept."""
        self._pushed.append((version, copy_weights(self._exporter)))
        self._version, weights = self._pushed[0]
        self._sampler.load(weights)
        return {}

    def start(self) -> None:
        pass

    def next_batch(self) -> list[SampleGroup]:
        """Sample and score the next prompts."""
        prompts = [next(self._stream) for _ in range(self._settings.prompts_per_step)]
        return sample_groups(
            self._sampler,
            prompts,
            self._settings.samples_per_prompt,
            self._settings.max_new_tokens,
            self._stop_ids,
            self._settings.temperature,
            self._version,
        )

    def release(self) -> None:
        pass

    def metrics(self) -> Values:
        return {}


def sample_groups(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    samples: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float,
    version: int,
) -> list[SampleGroup]:
    """Responses to prompts, with their rewards."""
    ids = [prompt.input_ids for prompt in prompts]
    groups = []
    for prompt, responses in zip(
        prompts, sampler.generate(ids, samples, max_new_tokens, stop_ids, temperature), strict=True
    ):
        group = SampleGroup(
            prompt,
            [
                Sample(
                    prompt,
                    i,
                    r.ids,
                    r.log_mu,
                    np.full(len(r.ids), version, np.int32),
                    r.finish_reason,
                    routed_experts=r.routed_experts,
                )
                for i, r in enumerate(responses)
            ],
        )
        for sample in group.samples:
            sample.reward = reward(sample)
        groups.append(group)
    return groups


class HeldOut:
    """Accuracy on the held-out prompts of weights as they are, by an exact sampler.

    Args:
        sampler: Exact.
        prompts: Held-out prompts.
        config: Of the run: response length and temperature.
        stop_ids: Tokens that end a response.
    """

    def __init__(self, sampler: Sampler, prompts: Sequence[Prompt], config: Config, stop_ids: Sequence[int]) -> None:
        self._sampler, self._prompts, self._stop_ids = sampler, prompts, stop_ids
        self._max_new_tokens, self._temperature = config.rollout.max_new_tokens, config.rollout.temperature
        self._samples = config.evaluation.samples_per_prompt

    @torch.no_grad()
    def accuracy(self, weights: Iterable[tuple[str, Tensor]]) -> float:
        """Share of right answers."""
        self._sampler.load(weights)
        groups = sample_groups(
            self._sampler, self._prompts, self._samples, self._max_new_tokens, self._stop_ids, self._temperature, 0
        )
        return float(np.mean([sample.reward for group in groups for sample in group.samples]))
