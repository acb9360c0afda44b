"""A tiny random Qwen3-MoE whose tokenizer reads characters, and each task's standing phrases as one token.

    python -m examples.reasoning_cpu.model examples/reasoning_cpu/rl.yaml runs/reasoning-model

The phrases are what all prompts of a task in the configuration begin or end with: they cost no more than its name.
"""

from __future__ import annotations

import argparse
import json
import string
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from examples.digits_cpu.task import write_model
from megatron_vespo.config_file import load_config
from megatron_vespo.data.sources import rows_of

SPECIAL = ["<pad>", "<eos>", "<unk>"]
PAD, EOS = SPECIAL.index("<pad>"), SPECIAL.index("<eos>")
PROMPTS = 50
"""Prompts of a source from which its phrase is found."""


def beginning_of(texts: list[str]) -> str:
    """What all of them begin with, whole words only."""
    first, last = min(texts), max(texts)  # what these two share, all between them have too
    different = (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return first[: next(different, len(first))].rpartition(" ")[0]


def phrases_of(prompts: list[str]) -> set[str]:
    """What all of them begin with, and what they end with."""
    backwards = beginning_of([prompt[::-1] for prompt in prompts])
    return {beginning_of(prompts), backwards[::-1]}


def make_tokenizer(phrases: list[str]) -> Tokenizer:
    tokens = [*SPECIAL, *string.printable.strip(), " ", "\n"]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases if phrase])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="whose training prompts it shall read")
    parser.add_argument("folder", type=Path, help="where the model goes")
    options = parser.parse_args()
    sources = load_config(options.config).data.train_sources.values()
    prompts = [[row["prompt"] for _, row in islice(rows_of(source), PROMPTS)] for source in sources]
    tokenizer = make_tokenizer(sorted(set().union(*map(phrases_of, prompts))))
    options.folder.mkdir(parents=True, exist_ok=True)
    write_model(options.folder, vocab_size=tokenizer.get_vocab_size(), pad_token_id=PAD, eos_token_id=EOS)
    tokenizer.save(str(options.folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    (options.folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


if __name__ == "__main__":
    main()
