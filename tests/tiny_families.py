"""Tiny random checkpoints of the families beside Qwen3, by declared tables."""

from pathlib import Path
from typing import Any

from tests.tiny_models import shared_config, write

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# By model_type: the class, and what its config has of its own; None takes a field of the others away. Spelt as
# transformers 4 does, as the files on the Hub are.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2ForCausalLM", {"head_dim": None, "attention_bias": None, "max_window_layers": 2}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {
            "head_dim": None,
            "attention_bias": None,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {
            "head_dim": None,
            "attention_bias": None,
            "use_sliding_window": None,
            "sliding_window": None,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        },
    ),
    "llama": (
        "LlamaForCausalLM",
        {
            "use_sliding_window": None,
            "max_position_embeddings": 131_072,  # more than the 8,192 that the scaling starts from
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA3_ROPE,
            "mlp_bias": False,
            "pretraining_tp": 1,
        },
    ),
}


def make_tiny(
    folder: Path | str,
    model_type: str,
    *,
    seed: int = 0,
    vocab_size: int = 64,
    num_layers: int = 2,
    tie_word_embeddings: bool = False,
    std: float = 0.2,
    **changes: Any,
) -> Path:
    """As :func:`tests.tiny_models.make_tiny_qwen3_moe`, of another family; ``changes`` are fields of config.json."""
    architecture, own = FAMILIES[model_type]
    config = shared_config(
        architecture,
        model_type,
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=tie_word_embeddings,
    )
    del config["rope_parameters"]
    config = {name: value for name, value in (config | own | changes).items() if value is not None}
    return write(Path(folder), config, seed, std)
