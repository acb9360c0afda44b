"""Qwen3-30B-A3B's shape with fewer layers, its weights random; and FP8 by the names that the tables have."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.measure import Setting
from megatron_vespo.models.build import build_model, transformer_config
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.models.registry import load_architecture

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_TINY = {
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "vocab_size": 640,
}

RECIPES = {"blockwise": "e4m3", "tensorwise": "hybrid", "delayed": "hybrid"}
"""Recipe of FP8 -> format: with one scale for a whole tensor, gradients need the wider range of e5m2."""


def fp8_section(recipe: str | None) -> dict[str, Any]:
    """The ``megatron:`` section of a precision: bfloat16, or FP8 by this recipe."""
    return {"bf16": True} | ({"fp8": RECIPES[recipe], "fp8_recipe": recipe} if recipe else {})


def architecture(setting: Setting, layers: int, vocab_size: int | None = None) -> Architecture:
    """Qwen3-30B-A3B with this many layers, and perhaps another vocabulary."""
    config = QWEN3_30B_A3B | (_TINY if setting.tiny else {}) | {"num_hidden_layers": layers}
    if vocab_size is not None:
        config["vocab_size"] = vocab_size
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        return load_architecture(folder)


def model(
    setting: Setting, facts: Architecture, section: dict[str, Any], fp8_scope: str = "experts"
) -> tuple[TransformerConfig, Sequence[GPTModel]]:
    """Configuration and chunks with random weights, on the device."""
    config = transformer_config(facts, section, setting.layer_spec, fp8_scope)
    return config, build_model(facts, config, layer_spec=setting.layer_spec, make_vocab_size_divisible_by=128)
