"""Torch-native modules for Megatron's layer spec, where Transformer Engine is not.

Megatron's own local modules lack two things that packed MoE training needs: its norm refuses sequence parallelism
(transformer/torch_norm.py:45), which MoE with tensor parallelism requires, and its attention refuses packed sequences
(transformer/dot_product_attention.py, forward).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension; under sequence parallelism its gradient is summed over tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Read by distributed/finalize_model_grads.py (_allreduce_non_tensor_model_parallel_grads).
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., hidden]."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class PackedAttention(MegatronModule):
    """Causal attention over packed sequences: each segment of ``cu_seqlens`` attends to itself only.

    Scaled dot-product attention per segment, so that no mask of packed length squared is made.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [tokens, heads, head_dim]; key and value have a head for each group of query heads.
            key: [tokens, groups, head_dim].
            value: [tokens, groups, head_dim].
            attention_mask: Not used: causal within segments.
            attn_mask_type: Not used.
            attention_bias: Not used.
            packed_seq_params: Segment borders.

        Returns:
            [tokens, heads * head_dim].
        """
        if packed_seq_params is None:
            raise ValueError("PackedAttention needs packed_seq_params")
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        outputs = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True)
            for q, k, v in zip(*(_segments(tensor, lengths) for tensor in (query, key, value)), strict=True)
        ]
        return torch.cat([output.transpose(0, 1) for output in outputs]).flatten(1)


def _segments(tensor: Tensor, lengths: list[int]) -> list[Tensor]:
    """[tokens, heads, dim] -> one [heads, length, dim] a segment."""
    return [segment.transpose(0, 1) for segment in tensor.split(lengths)]


def local_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Megatron's local layer spec with these modules in place of its norm and attention, for this pipeline stage."""
    layer = get_gpt_layer_local_submodules(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    attention = layer.self_attention
    qk_norm = {"q_layernorm": RMSNorm, "k_layernorm": RMSNorm} if config.qk_layernorm else {}
    submodules = replace(attention.submodules, core_attention=PackedAttention, **qk_norm)
    layer = replace(
        layer,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=replace(attention, submodules=submodules),
    )
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm
    )
