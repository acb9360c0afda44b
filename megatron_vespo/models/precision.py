"""FP8 training: the recipe that this device has, the layers that it covers, and what it asks of shapes.

Matrix products of the covered layers are in FP8, forward and backward; weights, optimizer, router, embedding, output
layer and log-probabilities are as without it. Transformer Engine knows which device runs which recipe
(pytorch/quantization.py), Megatron what a recipe asks of the number of tokens (fp8_utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.quantization.quant_config import RecipeConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vespo.errors import UserError

# The functions of transformer_engine.pytorch.quantization that say whether the device can run a recipe, and why not.
_SUPPORT = {
    "delayed": "check_fp8_support",
    "tensorwise": "check_fp8_support",
    "blockwise": "check_fp8_block_scaling_support",
    "mxfp8": "check_mxfp8_support",
}
# What devices of a compute capability or a later one multiply natively. Later ones than Hopper only imitate blockwise.
_NATIVE = (((10, 0), "mxfp8"), ((9, 0), "blockwise"))

# How Megatron spells "FP8 as it comes" and "no FP8" for the linear layers of a name
# (extensions/transformer_engine.py, TEQuantizationRecipe).
_AS_IT_COMES = {
    "transformer_engine_config_type": "TEQuantizationParams",
    "training_recipe": {"override_quantized_autocast": False},
}
_NOT_FP8: dict[str, Any] = {"transformer_engine_config_type": "TEQuantizationParams", "training_recipe": {}}
_EXPERTS_ALONE = {
    "configs": {"fp8": _AS_IT_COMES, "bf16": _NOT_FP8},
    "matchers": {  # the first that matches holds
        "experts": {"config": "fp8", "type": "glob", "pattern": "*.mlp.experts.*", "enabled": True},
        "others": {"config": "bf16", "type": "glob", "pattern": "*", "enabled": True},
    },
}


def fp8_options(section: Mapping[str, Any], scope: str, *, experts: bool) -> dict[str, Any]:
    """What FP8 adds to TransformerConfig; nothing without ``megatron.fp8``.

    Args:
        section: The ``megatron:`` section.
        scope: ``experts`` or ``all`` (``model.fp8_scope``).
        experts: Whether the model has experts.

    Raises:
        UserError: This device cannot run the recipe, or nothing would be in FP8.
    """
    if not section.get("fp8"):
        return {}
    if scope == "experts" and not experts:
        raise UserError("model.fp8_scope: experts, but the model has none; use all, or leave out megatron.fp8")
    recipe = _device_recipe(section.get("fp8_recipe"))
    return {
        "fp8_recipe": recipe,
        "quant_recipe": RecipeConfig.from_config_dict(_EXPERTS_ALONE) if scope == "experts" else None,
    }


def _device_recipe(named: str | None) -> str:
    """The recipe that is named, or the best that this device has."""
    try:
        from transformer_engine.pytorch import quantization

        capability = quantization.get_device_compute_capability()
        native = [recipe for least, recipe in _NATIVE if capability >= least]
        reasons = []
        for recipe in [named] if named else [*native[:1], "tensorwise"]:
            supported, reason = getattr(quantization, _SUPPORT[recipe])()
            if supported:
                return recipe
            reasons.append(f"{recipe}: {reason}")
    except (ImportError, RuntimeError, AssertionError) as error:  # the latter two: torch finds no GPU
        raise UserError(
            f"megatron.fp8: needs a GPU and Transformer Engine: {str(error).splitlines()[0]}; leave it out here"
        ) from error
    device = ".".join(map(str, capability))
    raise UserError(
        f"megatron.fp8: this device (compute capability {device}) cannot: {'; '.join(reasons)} Name another"
        " megatron.fp8_recipe, or leave out megatron.fp8"
    )


def check_shapes(chunks: Sequence[torch.nn.Module], config: TransformerConfig) -> None:
    """Refuse linear layers in FP8 that its kernels cannot multiply: their sizes must be multiples of 16, or 32.

    Args:
        chunks: This rank's part of the model.
        config: Its configuration.

    Raises:
        UserError: It names the layer and its shape on this rank.
    """
    if not config.fp8:
        return
    multiple = get_fp8_align_size(config.fp8_recipe)
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if not in_fp8(module):
                continue
            for weight in module.parameters(recurse=False):
                if weight.dim() == 2 and any(size % multiple for size in weight.shape):
                    raise UserError(
                        f"megatron.fp8: {name} has weights of {weight.shape[0]} x {weight.shape[1]} on this rank; the"
                        f" {config.fp8_recipe} recipe needs multiples of {multiple}: less tensor parallelism,"
                        " model.fp8_scope: experts, or no FP8"
                    )


def in_fp8(module: torch.nn.Module) -> bool:
    """Whether a layer multiplies in FP8 where the model does."""
    decide = getattr(module, "will_execute_quantized", None)
    return decide is not None and bool(decide(True))


def packed_alignment(config: TransformerConfig) -> int:
    """Packed microbatches have a multiple of so many tokens.

    Sequence parallelism splits them evenly, and matrix products in FP8 want each part a multiple of 16 (mxfp8: 32).
    Tokens of single experts are padded by Megatron itself.
    """
    split = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return split * (get_fp8_align_size(config.fp8_recipe) if config.fp8 else 1)
