"""The model's last step: from hidden states to log-probabilities of the response tokens, in place of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_vespo.policy.logprobs import TokenLogProbs, token_log_probs
from megatron_vespo.policy.packing import PackedBatch


def log_prob_head(
    batch: PackedBatch,
    vocab_size: int,
    temperature: float,
    entropy_gradient: bool,
    wait_for: Callable[[Tensor], None] = lambda weight: None,
) -> Callable[..., TokenLogProbs]:
    """An ``output_processor`` for GPTModel (models/gpt/gpt_model.py, _postprocess) that sees this microbatch.

    Args:
        batch: Which positions are response rows, and what their targets are.
        vocab_size: Vocabulary without padding.
        temperature: The sampler's.
        entropy_gradient: Whether the entropy is differentiable.
        wait_for: Called with the output weight before it is read. It is read here and not by its module, so that no
            hook of the module sees to it.
    """

    def process(
        *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, config: Any, **unused: Any
    ) -> TokenLogProbs:
        weight = output_layer.weight if output_weight is None else output_weight
        wait_for(weight)
        # Either of the two sums the gradient of the hidden states over the tensor-parallel ranks, each of which has the
        # part of its slice of the vocabulary: a reduce-scatter of all positions, or an all-reduce of the rows.
        if config.sequence_parallel:
            rows = gather_from_sequence_parallel_region(hidden_states).squeeze(1).index_select(0, batch.rows)
        else:
            rows = copy_to_tensor_model_parallel_region(hidden_states.squeeze(1).index_select(0, batch.rows))
        return token_log_probs(
            rows,
            weight,
            batch.targets,
            trained=batch.trained_rows,
            vocab_size=vocab_size,
            temperature=temperature,
            entropy_gradient=entropy_gradient,
        )

    return process
