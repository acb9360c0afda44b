"""The digits task: add up eight digits modulo 5, one running sum at a time, then say the answer.

    prompt    3 1 4 1 5 9 2 6 =
    response  3 4 3 4 4 3 0 1 # 1 <eos>

The response before ``#`` is a scratchpad: nothing rewards it, only the answer counts. The supervised texts contain
wrong running sums on purpose, so that the policy that reinforcement learning starts from is a mediocre one.

Run as a script it writes prompts (disjoint for supervised training, reinforcement learning and evaluation), and a tiny
random Qwen3-MoE with its tokenizer.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_vespo.types import Sample

DIGITS, MODULUS = 8, 5
TOKENS = [*map(str, range(10)), "=", "#", "<eos>", "<pad>"]
ANSWER, EOS = TOKENS.index("#"), TOKENS.index("<eos>")
WRONG_SUM = 0.12
"""Share of running sums in the supervised texts that are drawn at random."""


def reward(sample: Sample) -> float:
    """1 if the response ends in ``# answer <eos>``. Token ids are compared: text could hide a digit elsewhere."""
    expected = [ANSWER, TOKENS.index(sample.prompt.label), EOS]
    return float(sample.response_ids[-3:].tolist() == expected)


def make_prompt(digits: tuple[int, ...]) -> dict[str, str]:
    return {"prompt": " ".join(map(str, digits)) + " =", "label": str(sum(digits) % MODULUS)}


def make_text(digits: tuple[int, ...], rng: random.Random, wrong_sum: float = WRONG_SUM) -> dict[str, str]:
    """A worked example with mistakes; the answer repeats the last running sum, right or wrong."""
    total, sums = 0, []
    for digit in digits:
        total = rng.randrange(MODULUS) if rng.random() < wrong_sum else (total + digit) % MODULUS
        sums.append(str(total))
    return {"prompt": make_prompt(digits)["prompt"], "response": " ".join([*sums, "#", str(total)])}


def draw_digits(count: int, rng: random.Random) -> list[tuple[int, ...]]:
    """Distinct digit strings."""
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < count:
        drawn[tuple(rng.randrange(10) for _ in range(DIGITS))] = None
    return list(drawn)


def make_rows(
    seed: int, *, sft: int = 8192, train: int = 4096, heldout: int = 256, wrong_sum: float = WRONG_SUM
) -> dict[str, list[dict[str, str]]]:
    rng = random.Random(seed)
    digits = draw_digits(sft + train + heldout, rng)
    return {
        "sft": [make_text(d, rng, wrong_sum) for d in digits[:sft]],
        "train": [make_prompt(d) for d in digits[sft : sft + train]],
        "heldout": [make_prompt(d) for d in digits[sft + train :]],
    }


def rows(name: str, seed: int = 1) -> list[dict[str, str]]:
    """The rows of one file, without the file: a data source ``function`` of a configuration."""
    return make_rows(seed)[name]


def write_data(
    folder: Path, seed: int, *, sft: int = 8192, train: int = 4096, heldout: int = 256, wrong_sum: float = WRONG_SUM
) -> None:
    for name, lines in make_rows(seed, sft=sft, train=train, heldout=heldout, wrong_sum=wrong_sum).items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def write_model(folder: Path, tokens: Sequence[str] = TOKENS, **sizes: int) -> None:
    """Architecture and tokenizer of a Qwen3-MoE, the weights of which come from supervised training.

    Args:
        folder: Must exist.
        tokens: The vocabulary, words between spaces; ``<eos>`` and ``<pad>`` among them.
        **sizes: Fields of config.json in place of those here, which make 0.2 M parameters.
    """
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": len(tokens),
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
        "bos_token_id": None,
        "eos_token_id": tokens.index("<eos>"),
        "pad_token_id": tokens.index("<pad>"),
        "torch_dtype": "float32",
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    companion = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(companion), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where data and model go")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    model = options.folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    write_data(options.folder, options.seed)
    write_model(model)


if __name__ == "__main__":
    main()
