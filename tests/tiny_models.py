"""Tiny random Hugging Face checkpoints, written without transformers: seconds matter in every test that wants one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

SPECIAL_TOKENS = ["<pad>", "<eos>", "<unk>"]
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2

# One message a line, so that a chat prompt is easy to read in a failing test.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def make_tiny_qwen3_moe(
    folder: Path | str,
    *,
    seed: int = 0,
    vocab_size: int = 64,
    hidden_size: int = 32,
    intermediate_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    num_experts: int = 4,
    num_experts_per_tok: int = 2,
    moe_intermediate_size: int = 32,
    norm_topk_prob: bool = True,
    max_position_embeddings: int = 512,
    tie_word_embeddings: bool = False,
    std: float = 0.2,
) -> Path:
    """A random fp32 Qwen3-MoE with a word-level tokenizer; returns the folder. Equal arguments, equal weights."""
    config = shared_config(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
    )
    config |= {
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "moe_intermediate_size": moe_intermediate_size,
        "norm_topk_prob": norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
    }
    return write(Path(folder), config, seed, std)


def make_tiny_qwen3(
    folder: Path | str,
    *,
    seed: int = 0,
    vocab_size: int = 64,
    hidden_size: int = 32,
    intermediate_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    max_position_embeddings: int = 512,
    tie_word_embeddings: bool = False,
    std: float = 0.2,
) -> Path:
    """The dense variant of :func:`make_tiny_qwen3_moe`."""
    config = shared_config(
        "Qwen3ForCausalLM",
        "qwen3",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
    )
    return write(Path(folder), config, seed, std)


def make_tiny_tokenizer(folder: Path | str, vocab_size: int = 64) -> Path:
    """Word-level tokenizer, words split on spaces: specials, digits, a few words, ``w<i>`` up to ``vocab_size``."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = [*SPECIAL_TOKENS, *"0123456789", *"+-*/=:.,?!", "user", "assistant", "system", "sum", "of", "is", "answer"]
    words = (words + [f"w{i}" for i in range(len(words), vocab_size)])[:vocab_size]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([word for word in SPECIAL_TOKENS if word in words])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return folder


def shared_config(
    architecture: str,
    model_type: str,
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_position_embeddings: int,
    tie_word_embeddings: bool,
) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-6,
        # transformers 4 reads rope_theta, transformers 5 rope_parameters.
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": tie_word_embeddings,
        "pad_token_id": PAD_ID,
        "bos_token_id": None,
        "eos_token_id": EOS_ID,
        "use_cache": True,
        "dtype": "float32",
    }


def write(folder: Path, config: dict[str, Any], seed: int, std: float) -> Path:
    return write_weights(folder, config, _weights(config, seed, std))


def write_weights(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray]) -> Path:
    """A checkpoint folder with this config and these weights, and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS_ID, "pad_token_id": PAD_ID}))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return make_tiny_tokenizer(folder, config["vocab_size"])


def _weights(config: dict[str, Any], seed: int, std: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    hidden = config["hidden_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    weights: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        weights[f"{name}.weight"] = rng.normal(0, std, (rows, columns)).astype(np.float32)

    def bias(name: str, size: int) -> None:
        weights[f"{name}.bias"] = rng.normal(0, std, size).astype(np.float32)

    def norm(name: str, size: int) -> None:
        # Away from 1, so that a norm weight that gets lost shows.
        weights[f"{name}.weight"] = rng.uniform(0.8, 1.2, size).astype(np.float32)

    def mlp(name: str, inner: int, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> None:
        matrix(f"{name}.{gate}", inner, hidden)
        matrix(f"{name}.{up}", inner, hidden)
        matrix(f"{name}.{down}", hidden, inner)

    def attention_extras(layer: str) -> None:
        if config["model_type"].startswith("qwen3"):
            norm(f"{layer}.self_attn.q_norm", head_dim)
            norm(f"{layer}.self_attn.k_norm", head_dim)
        if config["model_type"].startswith("qwen2"):
            bias(f"{layer}.self_attn.q_proj", queries)
            bias(f"{layer}.self_attn.k_proj", keys)
            bias(f"{layer}.self_attn.v_proj", keys)

    matrix("model.embed_tokens", config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm", hidden)
        matrix(f"{layer}.self_attn.q_proj", queries, hidden)
        matrix(f"{layer}.self_attn.k_proj", keys, hidden)
        matrix(f"{layer}.self_attn.v_proj", keys, hidden)
        matrix(f"{layer}.self_attn.o_proj", hidden, queries)
        attention_extras(layer)
        norm(f"{layer}.post_attention_layernorm", hidden)
        if "num_experts" in config:
            matrix(f"{layer}.mlp.gate", config["num_experts"], hidden)
            for expert in range(config["num_experts"]):
                mlp(f"{layer}.mlp.experts.{expert}", config["moe_intermediate_size"])
        elif "num_local_experts" in config:
            matrix(f"{layer}.block_sparse_moe.gate", config["num_local_experts"], hidden)
            for expert in range(config["num_local_experts"]):
                mlp(f"{layer}.block_sparse_moe.experts.{expert}", config["intermediate_size"], "w1", "w3", "w2")
        else:
            mlp(f"{layer}.mlp", config["intermediate_size"])
        if "shared_expert_intermediate_size" in config:
            mlp(f"{layer}.mlp.shared_expert", config["shared_expert_intermediate_size"])
            matrix(f"{layer}.mlp.shared_expert_gate", 1, hidden)
    norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        matrix("lm_head", config["vocab_size"], hidden)
    return weights
