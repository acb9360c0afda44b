"""The FP8 format in which weights are pushed where SGLang samples from FP8, as trainer and server both know it.

That of DeepSeek-V3 and of Qwen3-*-FP8: e4m3 numbers, one float32 scale for each block of 128 x 128. No torch here.
"""

from __future__ import annotations

from typing import Any

BLOCK = (128, 128)
"""Rows and columns that share a scale."""

SCALE_SUFFIX = "_scale_inv"
"""What the name of a weight's scales has after that of the weight."""

NOT_CONVERTED = ("lm_head",)
"""Linear layers whose quantisation SGLang must be told to leave; routers, norms and embeddings it never quantises."""

# Ends of the names of linear layers' weights: attention, dense MLP, experts and shared experts; Mixtral's experts.
_QUANTISED = ("_proj.weight", ".kv_a_proj_with_mqa.weight", ".w1.weight", ".w2.weight", ".w3.weight")


def is_quantised(name: str) -> bool:
    """Whether the weight of this Hugging Face name is pushed in FP8."""
    return name.endswith(_QUANTISED)


def quantization_config() -> dict[str, Any]:
    """What ``config.json`` says of a model in this format."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
        "modules_to_not_convert": list(NOT_CONVERTED),
    }
