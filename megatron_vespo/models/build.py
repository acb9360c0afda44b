"""From architecture and ``megatron:`` section to a model: ``build_model()``."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from typing import Any, get_type_hints

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_vespo import parallel
from megatron_vespo.errors import UserError
from megatron_vespo.megatron_options import padded_vocab_size
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.models.layer_specs import block_spec, check_installed, defaults
from megatron_vespo.models.precision import check_shapes, fp8_options
from megatron_vespo.models.router import with_router

# What a model computes is read from its config.json, so that the server and the trainer agree; Megatron's default holds
# where a family says nothing.
_ARCHITECTURE_FIELDS = {
    "activation_func_clamp_value",
    "apply_residual_connection_post_layernorm",
    "attention_output_gate",
    "experimental_attention_variant",
    "glu_linear_offset",
    "layernorm_zero_centered_gamma",
    "linear_attention_freq",
    "moe_apply_probs_on_input",
    "moe_latent_size",
    "moe_layer_freq",
    "moe_router_enable_expert_bias",
    "moe_router_force_biased",
    "moe_router_force_load_balancing",
    "moe_router_group_topk",
    "moe_router_num_groups",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_topk_limited_devices",
    "moe_router_topk_scaling_factor",
    "moe_shared_expert_gate",
    "moe_shared_expert_intermediate_size",
    "mrope_section",
    "multi_latent_attention",
    "no_rope_freq",
    "qk_l2_norm",
    "rotary_interleaved",
    "softmax_scale",
    "softmax_type",
    "window_size",
}
# The interleaved schedule as Megatron-LM runs it. With gloo any other way gives wrong gradients without an error.
_INTERLEAVED = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
# Packed microbatches differ in length, so pipeline stages must tell each other the shape.
_FIXED: dict[str, Any] = {"variable_seq_lengths": True, "activation_func": F.silu}


def _typed(config_class: type, section: dict[str, Any]) -> dict[str, Any]:
    """The entries of the section that this upstream dataclass declares, their types checked."""
    hints = get_type_hints(config_class)
    chosen: dict[str, Any] = {}
    for field in fields(config_class):
        if field.name not in section:
            continue
        value, kind = section[field.name], hints[field.name]
        if kind is torch.dtype and isinstance(value, str):
            value = getattr(torch, value, value)
        if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(value, str):
            value = kind.__members__.get(value, value)
        try:
            adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
            chosen[field.name] = adapter.validate_python(value, strict=True)
        except ValidationError as error:
            raise UserError(f"megatron.{field.name}: {error.errors()[0]['msg']}, not {value!r}") from error
    return chosen


def _construct(config_class: type, values: dict[str, Any]) -> Any:
    try:
        return config_class(**values)
    except (ValueError, AssertionError, TypeError) as error:  # how Megatron refuses a combination of options
        raise UserError(f"megatron: {config_class.__name__} refuses these options: {error}") from error


def _dtype(section: dict[str, Any]) -> torch.dtype:
    if section.get("bf16") and section.get("fp16"):
        raise UserError("megatron.bf16 and megatron.fp16 exclude each other")
    return torch.bfloat16 if section.get("bf16") else torch.float16 if section.get("fp16") else torch.float32


def transformer_config(
    architecture: Architecture, section: dict[str, Any], layer_spec: str, fp8_scope: str = "experts"
) -> TransformerConfig:
    """TransformerConfig of a model.

    Args:
        architecture: The HF architecture; it fixes the fields that say what the model computes.
        section: The ``megatron:`` section.
        layer_spec: ``local`` or ``transformer_engine``.
        fp8_scope: With ``megatron.fp8``: ``experts`` or ``all``.

    Raises:
        UserError: The section sets a field that the architecture fixes, a value has a wrong type, a package is not
            there, the device has no such FP8, or Megatron refuses the combination.
    """
    fixed = {**architecture.transformer_config(), **_FIXED}
    for name in sorted((fixed.keys() | _ARCHITECTURE_FIELDS) & section.keys()):
        raise UserError(f"megatron.{name}: fixed by the model ({architecture.source}); remove it")
    dtype = _dtype(section)
    moe = "num_moe_experts" in fixed
    if moe and parallel.tensor_parallel_size() > 1 and not section.get("sequence_parallel"):
        raise UserError("megatron.sequence_parallel: must be true for a mixture of experts with tensor parallelism")
    config_class = MLATransformerConfig if fixed.get("multi_latent_attention") else TransformerConfig
    options = defaults(layer_spec, architecture)
    if fixed.get("moe_router_score_function") == "sigmoid":
        options["moe_router_dtype"] = "fp32"  # as the modelling code and the server have these routers
    options |= section
    check_installed(options)
    values = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "init_method_std": architecture.config.get("initializer_range", 0.02),
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size(),
        **_typed(config_class, options),
        **fp8_options(section, fp8_scope, experts=moe),
        **(_INTERLEAVED if section.get("virtual_pipeline_model_parallel_size") else {}),
        **({"moe_grouped_gemm": True} if moe and layer_spec == "transformer_engine" else {}),
        **fixed,
        "transformer_impl": layer_spec,
    }
    return _construct(config_class, values)


def optimizer_config(section: dict[str, Any]) -> OptimizerConfig:
    """OptimizerConfig from the ``megatron:`` section; ``lr`` must be there."""
    if section.get("lr") is None:
        raise UserError("megatron.lr: missing; set the learning rate")
    section = {name: value for name, value in section.items() if name != "fp8_recipe"}  # that of weights kept in FP8
    values = {"params_dtype": _dtype(section), "min_lr": 0.0, **_typed(OptimizerConfig, section)}
    return _construct(OptimizerConfig, values)


def ddp_config(section: dict[str, Any]) -> DistributedDataParallelConfig:
    """DistributedDataParallelConfig from the ``megatron:`` section; gradients are reduced in float32."""
    values = {"grad_reduce_in_fp32": True, **section}
    return _construct(DistributedDataParallelConfig, _typed(DistributedDataParallelConfig, values))


def build_model(
    architecture: Architecture, config: TransformerConfig, *, layer_spec: str, make_vocab_size_divisible_by: int
) -> list[GPTModel]:
    """This rank's part of the model, weights random, on the CPU or the current GPU.

    Args:
        architecture: HF architecture.
        config: From ``transformer_config()``.
        layer_spec: ``local`` (torch-native) or ``transformer_engine``.
        make_vocab_size_divisible_by: Vocabulary padding.

    Returns:
        The chunks of this pipeline stage in order: one, or one for each virtual stage of an interleaved pipeline.

    Raises:
        UserError: Transformer Engine is not there, or FP8 has no kernel for a layer's shape.
    """
    virtual = config.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in range(virtual) if virtual else (None,):
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=with_router(block_spec(config, layer_spec, vp_stage)),
            vocab_size=padded_vocab_size(
                architecture.vocab_size, make_vocab_size_divisible_by, parallel.tensor_parallel_size()
            ),
            max_sequence_length=architecture.context_length,
            pre_process=parallel.is_first_stage(vp_stage),
            post_process=parallel.is_last_stage(vp_stage),
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            **architecture.rope_options,
            vp_stage=vp_stage,
        )
        chunks.append(chunk.cuda() if torch.cuda.is_available() else chunk)
    check_shapes(chunks, config)
    return chunks
