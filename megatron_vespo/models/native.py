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
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
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


class SeparateRMSNorm(RMSNorm):
    """A norm that Transformer Engine keeps a module of its own. Its checkpoints have an extra state for each, empty."""

    def get_extra_state(self) -> None:
        """Nothing."""

    def set_extra_state(self, state: Any) -> None:
        """Nothing is to be done."""


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
            [tokens, heads * head_dim]. Megatron pads the values of multi-head latent attention to the keys' head_dim.
        """
        if packed_seq_params is None:
            raise ValueError("PackedAttention needs packed_seq_params")
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        outputs = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True)
            for q, k, v in zip(*(_segments(tensor, lengths) for tensor in (query, key, value)), strict=True)
        ]
        return torch.cat([output.transpose(0, 1) for output in outputs]).flatten(1)


class PackedSelfAttention(SelfAttention):
    """Self-attention that rotates all packed sequences in one call.

    Given angles by position in a sequence, Megatron rotates one sequence after the other, a dozen operations each
    (models/common/embeddings/rope_utils.py:239); given the angles of every token, all at once (:217).
    """

    def forward(
        self,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's.

        Args:
            *args: Hidden states and attention mask.
            rotary_pos_emb: Angles by position in a sequence, [longest sequence, 1, 1, rotary dimensions].
            packed_seq_params: Segment borders.
            **kwargs: What else a layer hands on.
        """
        if isinstance(rotary_pos_emb, Tensor) and packed_seq_params is not None:
            borders = packed_seq_params.cu_seqlens_q.long()
            starts = borders[:-1].repeat_interleave(borders.diff())
            rotary_pos_emb = rotary_pos_emb[torch.arange(len(starts), device=starts.device) - starts]
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params, **kwargs)


class LatentAttention(MLASelfAttention):
    """Multi-head latent attention whose rotary key has the gradient of all heads.

    The local spec splits the down-projection over tensor-parallel ranks, and Megatron gathers the rotary key that all
    heads share in a way whose backward pass keeps this rank's heads alone (multi_latent_attention.py:739). In the form
    that Transformer Engine's projection gives, [tokens / ranks, all columns], it sums them.
    """

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        query, key_value = super()._qkv_down_projection(hidden_states)
        if self.config.tensor_model_parallel_size > 1:
            # Sequence parallelism is on: a mixture of experts with tensor parallelism requires it.
            key_value = scatter_to_sequence_parallel_region(gather_from_tensor_model_parallel_region(key_value))
        return query, key_value


def _segments(tensor: Tensor, lengths: list[int]) -> list[Tensor]:
    """[tokens, heads, dim] -> one [heads, length, dim] a segment."""
    return [segment.transpose(0, 1) for segment in tensor.split(lengths)]


def local_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Megatron's local layer specs with these modules in place of its norm and attention, for this pipeline stage."""
    frequency = config.moe_layer_freq
    if config.num_moe_experts is None:
        experts = [False] * config.num_layers
    elif isinstance(frequency, int):
        experts = [layer % frequency == 0 for layer in range(config.num_layers)]
    else:
        experts = [bool(has_experts) for has_experts in frequency]
    first = get_transformer_layer_offset(config, vp_stage)
    ours = experts[first : first + get_num_layers_to_build(config, vp_stage)]
    specs = {has_experts: _layer_spec(config, has_experts) for has_experts in set(ours)}
    return TransformerBlockSubmodules(
        layer_specs=[specs[has_experts] for has_experts in ours], layer_norm=SeparateRMSNorm
    )


def _layer_spec(config: TransformerConfig, has_experts: bool) -> ModuleSpec:
    layer = get_gpt_layer_local_submodules(
        num_experts=config.num_moe_experts if has_experts else None,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
    )
    attention = layer.self_attention
    names = _checkpoint_names(config, has_experts)

    def norm(name: str) -> type[RMSNorm]:
        return RMSNorm if name in names else SeparateRMSNorm

    kinds = ("q", "kv") if config.multi_latent_attention else ("q", "k")
    qk_norm = {f"{kind}_layernorm": norm(f"self_attention.{kind}_layernorm.") for kind in kinds}
    submodules = replace(
        attention.submodules, core_attention=PackedAttention, **(qk_norm if config.qk_layernorm else {})
    )
    layer = replace(
        layer,
        input_layernorm=norm("input_layernorm."),
        pre_mlp_layernorm=norm("pre_mlp_layernorm."),
        self_attention=replace(
            attention,
            module=LatentAttention if config.multi_latent_attention else PackedSelfAttention,
            submodules=submodules,
        ),
        sharded_state_dict_keys_map=names,
    )
    return ModuleSpec(module=TransformerLayer, submodules=layer)


def _checkpoint_names(config: TransformerConfig, has_experts: bool) -> dict[str, str]:
    """Norms by the names that they have in checkpoints of Transformer Engine's layers, which fuse some of them.

    Megatron's own table for local layers fuses another set than its layers of Transformer Engine do: with experts the
    norm before them, and none of latent attention's (models/gpt/gpt_layer_specs.py).
    """
    names = {} if has_experts else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if not config.multi_latent_attention:
        return names | {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    return names | {
        f"self_attention.{kind}_layernorm.": f"self_attention.linear_{kind}_up_proj.layer_norm_" for kind in ("q", "kv")
    }
