"""A tiny random Qwen3-MoE, prompts for it, and a reward that even a random model gets varied values for.

The sizes are chosen to be awkward for parallel layouts: 307 tokens, so that the vocabulary needs padding at every
tensor-parallel size, and 4 layers of 8 experts, so that two pipeline stages of two virtual stages each have one layer.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_vespo.types import Sample

VOCABULARY, EOS, PAD = 307, 1, 0
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "torch_dtype": "float32",
}


def reward(sample: Sample) -> float:
    """The share of even tokens in the response."""
    return float(np.mean(sample.response_ids % 2 == 0)) if len(sample.response_ids) else 0.0


def make_weights(seed: int) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face names."""
    rng = np.random.default_rng(seed)
    hidden, head = CONFIG["hidden_size"], CONFIG["head_dim"]
    heads, groups = CONFIG["num_attention_heads"] * head, CONFIG["num_key_value_heads"] * head
    weights: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        weights[f"{name}.weight"] = rng.normal(0, CONFIG["initializer_range"], (rows, columns)).astype(np.float32)

    def norm(name: str, size: int) -> None:
        weights[f"{name}.weight"] = rng.uniform(0.8, 1.2, size).astype(np.float32)

    matrix("model.embed_tokens", VOCABULARY, hidden)
    for number in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        norm(f"{layer}.input_layernorm", hidden)
        norm(f"{layer}.post_attention_layernorm", hidden)
        for name, rows in (("q", heads), ("k", groups), ("v", groups)):
            matrix(f"{layer}.self_attn.{name}_proj", rows, hidden)
        matrix(f"{layer}.self_attn.o_proj", hidden, heads)
        norm(f"{layer}.self_attn.q_norm", head)
        norm(f"{layer}.self_attn.k_norm", head)
        matrix(f"{layer}.mlp.gate", CONFIG["num_experts"], hidden)
        for expert in range(CONFIG["num_experts"]):
            for name in ("gate_proj", "up_proj"):
                matrix(f"{layer}.mlp.experts.{expert}.{name}", CONFIG["moe_intermediate_size"], hidden)
            matrix(f"{layer}.mlp.experts.{expert}.down_proj", hidden, CONFIG["moe_intermediate_size"])
    norm("model.norm", hidden)
    matrix("lm_head", VOCABULARY, hidden)
    return weights


def write_model(folder: Path, seed: int) -> None:
    """Architecture, weights and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1), encoding="utf-8")
    save_file(make_weights(seed), folder / "model.safetensors", metadata={"format": "pt"})
    words = ["<pad>", "<eos>", *(f"w{number}" for number in range(2, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    companion = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(companion), encoding="utf-8")


def write_prompts(path: Path, seed: int, count: int = 64) -> None:
    """Token ids, 1 to 9 of them, one prompt a line."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(2, VOCABULARY) for _ in range(rng.randint(1, 9))] for _ in range(count)]
    path.write_text("".join(json.dumps({"prompt": ids}) + "\n" for ids in prompts), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where model and prompts go")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    write_model(options.folder / "model", options.seed)
    write_prompts(options.folder / "prompts.jsonl", options.seed)


if __name__ == "__main__":
    main()
