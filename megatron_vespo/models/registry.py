"""The model families by HF ``model_type``."""

from __future__ import annotations

from pathlib import Path

from megatron_vespo.models.deepseek_v3 import DEEPSEEK_V3
from megatron_vespo.models.glm4_moe import GLM4_MOE
from megatron_vespo.models.hf_config import Architecture, read_architecture
from megatron_vespo.models.llama import LLAMA
from megatron_vespo.models.mixtral import MIXTRAL
from megatron_vespo.models.qwen2 import QWEN2, QWEN2_MOE
from megatron_vespo.models.qwen3 import QWEN3, QWEN3_MOE

FAMILIES = {
    family.model_type: family for family in (DEEPSEEK_V3, GLM4_MOE, LLAMA, MIXTRAL, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE)
}


def load_architecture(folder: str | Path) -> Architecture:
    """The architecture of a Hugging Face folder; raises UserError where the model code does not fit it."""
    return read_architecture(folder, FAMILIES)
