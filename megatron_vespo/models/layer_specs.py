"""The layer specs: what layers are made of, and the options of Megatron that suit each.

``local`` is torch-native (:mod:`native`). ``transformer_engine`` is Megatron's own spec: norms fused into the linear
layers behind them, all experts of a rank in one grouped matrix product, cuDNN's fused attention, which takes packed
sequences and computes each as if it were alone.
"""

from __future__ import annotations

import importlib
from typing import Any

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vespo import parallel
from megatron_vespo.errors import UserError
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.models.native import local_block_spec

TRANSFORMER_ENGINE = "transformer_engine.pytorch"
# NVIDIA apex's extension; the package of that name on the package index is another one.
APEX_WGRAD = "fused_weight_gradient_mlp_cuda"
DEEP_EP = "deep_ep"

_BOTH: dict[str, Any] = {
    # cuDNN's; flash-attn is not required. The local spec has an attention of its own, but Megatron passes the choice on
    # in environment variables, and refuses another one in the same process.
    "attention_backend": "fused",
    "moe_token_dispatcher_type": "alltoall",  # the only dispatcher for expert parallelism on every backend
    "moe_router_load_balancing_type": "none",  # a balancing loss would move the policy away from the reward
    "moe_aux_loss_coeff": 0.0,
    "moe_router_bias_update_rate": 0.0,  # and so would moving the bias that experts are chosen with
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "local": _BOTH,
    "transformer_engine": _BOTH
    | {
        "moe_router_dtype": "fp32",  # rounding of its scores would choose other experts than the server
        "bias_activation_fusion": True,
    },
}
"""Ours where Megatron's default does not suit; the ``megatron:`` section overrides them."""

_TRANSFORMER_ENGINE_KERNELS: dict[str, Any] = {
    "moe_permute_fusion": True,
    # Angles by position in a sequence and the borders of the sequences: right for packed batches.
    "apply_rope_fusion": True,
}


def defaults(layer_spec: str, architecture: Architecture) -> dict[str, Any]:
    """Options that hold where the ``megatron:`` section is silent, with the fusions that this machine has kernels for.

    Args:
        layer_spec: ``local`` or ``transformer_engine``.
        architecture: The model.
    """
    chosen = dict(DEFAULTS[layer_spec])
    if layer_spec == "transformer_engine" and importable(TRANSFORMER_ENGINE):
        chosen |= _TRANSFORMER_ENGINE_KERNELS
        chosen["gradient_accumulation_fusion"] = importable(APEX_WGRAD)
        if architecture.transformer_config().get("multi_latent_attention"):
            # Another kernel, of YaRN alone and in Megatron's words experimental (transformer_config.py, post_init).
            chosen["apply_rope_fusion"] = False
    return chosen


def importable(module: str) -> bool:
    """Whether an optional package is there and works."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError):  # OSError: a shared library is missing, or there is no driver
        return False
    return True


def check_installed(options: dict[str, Any]) -> None:
    """Refuse options that need a package which is not there.

    Args:
        options: Of TransformerConfig, defaults included.

    Raises:
        UserError: It names the option and the package.
    """
    if options.get("gradient_accumulation_fusion") and not importable(APEX_WGRAD):
        raise UserError(
            f"megatron.gradient_accumulation_fusion: true needs NVIDIA apex ({APEX_WGRAD}), which does not import here;"
            " leave it out: it is on where apex is"
        )
    if options.get("moe_token_dispatcher_type") != "flex":
        return
    backend = options.get("moe_flex_dispatcher_backend", "deepep")
    if backend not in ("deepep", "hybridep"):
        raise UserError(
            f"megatron.moe_flex_dispatcher_backend: {backend} is not supported: its receive buffers have a fixed size,"
            " for which tokens are dropped; use deepep or hybridep"
        )
    if not importable(DEEP_EP):
        raise UserError(
            f"megatron.moe_token_dispatcher_type: flex needs DeepEP ({DEEP_EP}), which does not import here;"
            " use alltoall"
        )
    if parallel.expert_parallel_size() * parallel.expert_tensor_parallel_size() == 1:
        raise UserError("megatron.moe_token_dispatcher_type: flex needs expert_model_parallel_size > 1; use alltoall")


def block_spec(config: TransformerConfig, layer_spec: str, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Megatron's specification of this pipeline stage's layers.

    Args:
        config: Of the model.
        layer_spec: ``local`` or ``transformer_engine``.
        vp_stage: Virtual stage of an interleaved pipeline, or None.

    Raises:
        UserError: Transformer Engine is asked for and not there.
    """
    if layer_spec == "local":
        return local_block_spec(config, vp_stage)
    try:
        importlib.import_module(TRANSFORMER_ENGINE)  # Megatron swallows its ImportError and fails later, obscurely
    except ImportError as error:
        raise UserError(
            f"model.layer_spec: transformer_engine needs Transformer Engine, which does not import here ({error});"
            " use layer_spec: local"
        ) from error
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
