"""One canonical name for each Megatron weight, whatever spec and rank it comes from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from megatron.core.models.gpt import GPTModel

from megatron_vespo import parallel

# Transformer Engine fuses a norm into the linear that follows it and groups the experts of a rank into one module.
_VARIANTS = (
    (r"self_attention\.linear_qkv\.layer_norm_weight$", "input_layernorm.weight"),
    (r"mlp\.linear_fc1\.layer_norm_weight$", "pre_mlp_layernorm.weight"),
    (r"self_attention\.linear_(q|kv)_up_proj\.layer_norm_weight$", r"self_attention.\1_layernorm.weight"),
    (r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc\d)\.weight$", r"mlp.experts.\1.\2.weight"),
    (r"mlp\.experts\.(linear_fc\d)\.weight(\d+)$", r"mlp.experts.\2.\1.weight"),
)
# Weights that Megatron keeps as buffers: they have no gradient, and are float32 whatever the model is.
_BUFFERS = re.compile(r"\.mlp\.router\.expert_bias$")
_LAYERS = "decoder.layers."
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


@cache
def _canonical(name: str) -> tuple[str, int | None]:
    """A name, or what follows the layer number in it -> the same with ``{expert}``, and the expert's number."""
    for variant, canonical in _VARIANTS:
        name = re.sub(variant, canonical, name)
    expert = _EXPERT.search(name)
    return _EXPERT.sub("{expert}", name), int(expert.group()) if expert else None


def parse_name(name: str) -> tuple[str, int | None, int | None]:
    """A module's parameter name -> pattern of the weight table, and layer and expert as the name counts them."""
    if not name.startswith(_LAYERS):
        pattern, expert = _canonical(name)
        return pattern, None, expert
    # The layers are alike: without the number a large model has a few hundred names, not tens of thousands.
    number, dot, rest = name[len(_LAYERS) :].partition(".")
    pattern, expert = _canonical(dot + rest)
    return f"{_LAYERS}{{layer}}{pattern}", int(number), expert


def _chunk_weights(model: GPTModel) -> list[Weight]:
    layers = [layer.layer_number - 1 for layer in model.decoder.layers]
    first_expert = 0
    if model.config.num_moe_experts:
        per_rank = model.config.num_moe_experts // parallel.expert_parallel_size()
        first_expert = parallel.expert_parallel_rank() * per_rank
    weights = []
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if _BUFFERS.search(name)]
    for name, tensor in [*model.named_parameters(), *buffers]:
        pattern, layer, expert = parse_name(name)
        weights.append(
            Weight(
                pattern,
                None if layer is None else layers[layer],
                None if expert is None else first_expert + expert,
                tensor.data,
            )
        )
    return weights
