"""The calculator task: say the product of two numbers, with a calculator at hand.

    prompt    3 7 x 8 =
    response  [ 3 7 x 8 ] 2 9 6 # 2 9 6 <eos>
                         ^^^^^ inserted by the calculator, not trained on

The policy writes an expression in brackets; at the closing one the calculator answers. What it then says after ``#`` is
its answer. A policy of 0.2 M parameters cannot multiply, but it can learn to copy the question and the result. The
supervised texts that it starts from copy with mistakes on purpose.

``python -m examples.calculator.task`` writes prompts (disjoint for supervised training, reinforcement learning and
evaluation), and a tiny random Qwen3-MoE with its tokenizer.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from examples.digits_cpu.task import write_model
from megatron_vespo.rollout.conversation import Conversation
from megatron_vespo.types import Prompt, Sample

TOKENS = [*map(str, range(10)), "x", "=", "[", "]", "#", "<eos>", "<pad>"]
CLOSE, ANSWER, EOS = TOKENS.index("]"), TOKENS.index("#"), TOKENS.index("<eos>")
MAX_CALLS = 2
WRONG_TOKEN = 0.08
"""Share of tokens in the supervised texts that are copied wrong."""


async def generate(conversation: Conversation, prompt: Prompt) -> None:
    """Let the policy write, and answer what it asks the calculator, at most ``MAX_CALLS`` times."""
    for _ in range(MAX_CALLS):
        turn = await conversation.generate(stop_token_ids=[CLOSE])
        if turn.ids[-1:] != [CLOSE]:  # the end of its response, or of its room
            return
        conversation.insert(" ".join(calculate(turn.text)))
    await conversation.generate()


def calculate(text: str) -> str:
    """The product in the last brackets; nothing where there is none."""
    left, times, right = text.rpartition("[")[2].rstrip("] ").replace(" ", "").partition("x")
    return str(int(left) * int(right)) if times and left.isdigit() and right.isdigit() else ""


def reward(sample: Sample) -> float:
    """1 if the policy itself ends with ``# product <eos>``."""
    digits = [TOKENS.index(digit) for digit in sample.prompt.label]
    expected = [ANSWER, *digits, EOS]
    return float(sample.response_ids[-len(expected) :].tolist() == expected)


def make_prompt(pair: tuple[int, int]) -> dict[str, str]:
    left, right = (" ".join(str(number)) for number in pair)
    return {"prompt": f"{left} x {right} =", "label": str(pair[0] * pair[1])}


def make_text(pair: tuple[int, int], rng: random.Random) -> dict[str, str]:
    """A conversation with mistakes in what is copied."""

    def copied(text: str) -> str:
        return "".join(str(rng.randrange(10)) if c.isdigit() and rng.random() < WRONG_TOKEN else c for c in text)

    left, right = copied(str(pair[0])), copied(str(pair[1]))
    product = str(int(left) * int(right))
    return {
        "prompt": make_prompt(pair)["prompt"],
        "response": " ".join(f"[{left}x{right}]{product}#{copied(product)}"),
    }


def write_data(folder: Path, seed: int, *, sft: int = 6000, train: int = 2000, heldout: int = 128) -> None:
    rng = random.Random(seed)
    numbers = [*range(1, 100)]
    pairs = [(left, right) for left in numbers for right in numbers]
    rng.shuffle(pairs)
    files = {
        "sft.jsonl": [make_text(pair, rng) for pair in pairs[:sft]],
        "train.jsonl": [make_prompt(pair) for pair in pairs[sft : sft + train]],
        "heldout.jsonl": [make_prompt(pair) for pair in pairs[sft + train : sft + train + heldout]],
    }
    for name, lines in files.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where data and model go")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    model = options.folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    write_data(options.folder, options.seed)
    write_model(model, TOKENS)


if __name__ == "__main__":
    main()
