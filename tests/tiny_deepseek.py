"""Tiny random checkpoints of DeepSeek-V3 and GLM-4.5-MoE, spelt as the published ones are."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny_models import EOS_ID, PAD_ID, write_weights

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,  # the published ones have equal mscales, whose quotient is 1
}
_SHARED: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "pad_token_id": PAD_ID,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "use_cache": True,
    "torch_dtype": "float32",
}
_DEEPSEEK: dict[str, Any] = {
    **_SHARED,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_group": 4,
    "topk_group": 2,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "rope_scaling": YARN,
    "num_nextn_predict_layers": 0,
}
_GLM: dict[str, Any] = {
    **_SHARED,
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "num_key_value_heads": 2,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "use_qk_norm": True,
    "n_group": 1,
    "topk_group": 1,
    "rope_scaling": None,
    "num_nextn_predict_layers": 0,
}
_CONFIGS = {"deepseek_v3": _DEEPSEEK, "glm4_moe": _GLM}


def make_tiny_sigmoid_moe(
    folder: Path | str, model_type: str, *, num_layers: int = 2, vocab_size: int = 64, seed: int = 0, **changes: Any
) -> Path:
    """A random fp32 model of either family; ``changes`` replace fields of its config, None included."""
    config = _CONFIGS[model_type] | {"num_hidden_layers": num_layers, "vocab_size": vocab_size} | changes
    return write_weights(Path(folder), config, _Weights(config, seed).all())


class _Weights:
    """Random tensors under the published names."""

    def __init__(self, config: dict[str, Any], seed: int) -> None:
        self.config = config
        self.rng = np.random.default_rng(seed)
        self.tensors: dict[str, np.ndarray] = {}

    def all(self) -> dict[str, np.ndarray]:
        config = self.config
        self.matrix("model.embed_tokens", config["vocab_size"], config["hidden_size"])
        # A layer for multi-token prediction is one more, with experts.
        for i in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
            layer = f"model.layers.{i}"
            self.norm(f"{layer}.input_layernorm", config["hidden_size"])
            self.norm(f"{layer}.post_attention_layernorm", config["hidden_size"])
            attention = self.latent_attention if config["model_type"] == "deepseek_v3" else self.grouped_attention
            attention(f"{layer}.self_attn")
            if i < config["first_k_dense_replace"]:
                self.mlp(f"{layer}.mlp", config["intermediate_size"])
            else:
                self.experts(f"{layer}.mlp")
        self.norm("model.norm", config["hidden_size"])
        if not config["tie_word_embeddings"]:
            self.matrix("lm_head", config["vocab_size"], config["hidden_size"])
        return self.tensors

    def grouped_attention(self, name: str) -> None:
        config = self.config
        heads, groups, head_dim = (config[size] for size in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        for projection, rows in (("q", heads), ("k", groups), ("v", groups)):
            self.matrix(f"{name}.{projection}_proj", rows * head_dim, config["hidden_size"])
            if config["attention_bias"]:
                self.vector(f"{name}.{projection}_proj.bias", rows * head_dim)
        self.matrix(f"{name}.o_proj", config["hidden_size"], heads * head_dim)
        if config["use_qk_norm"]:
            self.norm(f"{name}.q_norm", head_dim)
            self.norm(f"{name}.k_norm", head_dim)

    def latent_attention(self, name: str) -> None:
        config = self.config
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
        nope, rope, value = (config[f"{part}_head_dim"] for part in ("qk_nope", "qk_rope", "v"))
        self.matrix(f"{name}.q_a_proj", q_rank, hidden)
        self.norm(f"{name}.q_a_layernorm", q_rank)
        self.matrix(f"{name}.q_b_proj", heads * (nope + rope), q_rank)
        self.matrix(f"{name}.kv_a_proj_with_mqa", kv_rank + rope, hidden)
        self.norm(f"{name}.kv_a_layernorm", kv_rank)
        self.matrix(f"{name}.kv_b_proj", heads * (nope + value), kv_rank)
        self.matrix(f"{name}.o_proj", hidden, heads * value)

    def experts(self, name: str) -> None:
        number, inner = self.config["n_routed_experts"], self.config["moe_intermediate_size"]
        self.matrix(f"{name}.gate", number, self.config["hidden_size"])
        # Large beside the differences of the scores, and none of them a bfloat16.
        self.vector(f"{name}.gate.e_score_correction_bias", number)
        for expert in range(number):
            self.mlp(f"{name}.experts.{expert}", inner)
        self.mlp(f"{name}.shared_experts", inner * self.config["n_shared_experts"])

    def mlp(self, name: str, inner: int) -> None:
        for projection in ("gate_proj", "up_proj"):
            self.matrix(f"{name}.{projection}", inner, self.config["hidden_size"])
        self.matrix(f"{name}.down_proj", self.config["hidden_size"], inner)

    def matrix(self, name: str, rows: int, columns: int) -> None:
        self.tensors[f"{name}.weight"] = self.rng.normal(0, 0.2, (rows, columns)).astype(np.float32)

    def vector(self, name: str, size: int) -> None:
        self.tensors[name] = self.rng.normal(0, 0.2, size).astype(np.float32)

    def norm(self, name: str, size: int) -> None:
        # Away from 1, so that a norm weight that gets lost shows.
        self.tensors[f"{name}.weight"] = self.rng.uniform(0.8, 1.2, size).astype(np.float32)
