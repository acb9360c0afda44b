"""One canonical name for each Megatron weight, whatever spec and rank it comes from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel

from megatron_vespo import parallel

# Transformer Engine fuses a norm into the linear that follows it and groups the experts of a rank into one module.
_VARIANTS = (
    (r"self_attention\.linear_qkv\.layer_norm_weight$", "input_layernorm.weight"),
    (r"mlp\.linear_fc1\.layer_norm_weight$", "pre_mlp_layernorm.weight"),
    (r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc\d)\.weight$", r"mlp.experts.\1.\2.weight"),
    (r"mlp\.experts\.(linear_fc\d)\.weight(\d+)$", r"mlp.experts.\2.\1.weight"),
)
_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+(?=\.)")
_EXPERT = re.compile(r"(?<=\.mlp\.experts\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight that this rank holds.

    Attributes:
        pattern: Canonical name with ``{layer}`` and ``{expert}`` for numbers: the key of the weight table.
        layer: Global layer number, or None.
        expert: Global expert number, or None.
        data: The rank's shard.
    """

    pattern: str
    layer: int | None
    expert: int | None
    data: torch.Tensor

    def fill(self, template: str) -> str:
        """A name template of the weight table with this weight's numbers."""
        return template.format(layer=self.layer, expert=self.expert)


def named_weights(chunks: Sequence[GPTModel]) -> list[Weight]:
    """The weights of this rank under canonical names, layers and experts numbered globally, in the model's order."""
    return [weight for chunk in chunks for weight in _chunk_weights(chunk)]


def _chunk_weights(model: GPTModel) -> list[Weight]:
    layers = [layer.layer_number - 1 for layer in model.decoder.layers]
    first_expert = 0
    if model.config.num_moe_experts:
        per_rank = model.config.num_moe_experts // parallel.expert_parallel_size()
        first_expert = parallel.expert_parallel_rank() * per_rank
    weights = []
    for name, parameter in model.named_parameters():
        for variant, canonical in _VARIANTS:
            name = re.sub(variant, canonical, name)
        layer, expert = _LAYER.search(name), _EXPERT.search(name)
        pattern = _EXPERT.sub("{expert}", _LAYER.sub("{layer}", name))
        weights.append(
            Weight(
                pattern,
                layers[int(layer.group())] if layer else None,
                first_expert + int(expert.group()) if expert else None,
                parameter.data,
            )
        )
    return weights
