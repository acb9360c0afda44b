import asyncio
import json
import random
from pathlib import Path

import numpy as np
import pytest

from examples.calculator.task import CLOSE, TOKENS, calculate, generate, make_text, reward, write_data
from megatron_vespo.config_file import load_config
from megatron_vespo.rollout.conversation import Conversation, TurnSettings
from megatron_vespo.rollout.protocol import Generation
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.types import Prompt, Sample

FOLDER = Path(__file__).parents[3] / "examples" / "calculator"


def ids(text: str) -> list[int]:
    return [TOKENS.index(token) for token in text.split()]


def decode(tokens: list[int]) -> str:
    return " ".join(TOKENS[token] for token in tokens)


@pytest.mark.parametrize(
    "text, said",
    [("[ 3 7 x 8 ]", "296"), ("[ 1 x 1 ] 1 [ 2 x 3 ]", "6"), ("[ x 8 ]", ""), ("3 x 8 ]", "24"), ("[ 3 x 8 x 1 ]", "")],
)
def test_the_calculator(text: str, said: str) -> None:
    assert calculate(text) == said


async def converse(*turns: str) -> Sample:
    """The sample of a policy that says these things."""
    left = list(turns)

    async def say(input_ids: object, sampling: SamplingParams, seed: int | None) -> Generation:
        said = np.array(ids(left.pop(0)), np.int32)
        return Generation(said, said * np.float32(0), said * 0, "stop")

    async def limits() -> object:
        return type("Limits", (), {"max_prompt_tokens": 99})

    prompt = Prompt(0, np.array(ids("3 7 x 8 ="), np.int32), "296")
    settings = TurnSettings(encode=ids, vocab_size=len(TOKENS))
    conversation = Conversation(say, limits, prompt, SamplingParams(40), decode, settings)  # type: ignore[arg-type]
    await generate(conversation, prompt)
    assert not left
    return conversation.sample(0)


@pytest.mark.parametrize(
    "turns, text, right",
    [
        (["[ 3 7 x 8 ]", "# 2 9 6 <eos>"], "[ 3 7 x 8 ] 2 9 6 # 2 9 6 <eos>", 1.0),
        (["[ 3 7 x 7 ]", "# 2 9 6 <eos>"], "[ 3 7 x 7 ] 2 5 9 # 2 9 6 <eos>", 1.0),
        (["[ 3 7 x 8 ]", "2 9 6 <eos>"], "[ 3 7 x 8 ] 2 9 6 2 9 6 <eos>", 0.0),
        (["# 2 9 6 <eos>"], "# 2 9 6 <eos>", 1.0),
        (["[ ]", "[ 4 x 2 ]", "# 8 <eos>"], "[ ] [ 4 x 2 ] 8 # 8 <eos>", 0.0),
    ],
)
def test_conversations(turns: list[str], text: str, right: float) -> None:
    sample = asyncio.run(converse(*turns))
    assert decode(sample.sequence_ids.tolist()) == text
    assert reward(sample) == right
    assert (CLOSE in sample.response_ids.tolist()) == (len(turns) > 1)


def test_texts_are_what_the_calculator_would_have_said(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(50):
        text = make_text((rng.randrange(1, 100), rng.randrange(1, 100)), rng)["response"]
        call, _, rest = text.partition("]")
        assert calculate(call + "]") == rest.partition("#")[0].replace(" ", "")
    write_data(tmp_path, 1)
    files = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("sft", "train", "heldout")}
    prompts = {name: {json.loads(line)["prompt"] for line in lines} for name, lines in files.items()}
    assert not prompts["heldout"] & (prompts["sft"] | prompts["train"]) and len(prompts["heldout"]) == 128


def test_configurations() -> None:
    assert load_config(FOLDER / "sft.yaml").objective == "sft"
    assert load_config(FOLDER / "rl.yaml").rollout.generate == "examples/calculator/task.py:generate"
