from __future__ import annotations

import numpy as np
import pytest

from examples.dapo_math.reward import final_answer, last_boxed, normalise, reward
from megatron_vespo.types import Prompt, Sample


def score(text: str, label: str) -> float:
    ids = np.zeros(1, np.int32)
    return reward(Sample(Prompt(0, ids, label=label), 0, ids, np.zeros(1, np.float32), ids, "stop", text=text))


@pytest.mark.parametrize(
    "ending",
    [
        "Answer: 34",
        "Answer: $34$",
        "answer:34.",
        "**Answer:** 34",
        "Answer: \\boxed{34}",
        "Answer: \\(34\\)<|im_end|>",
        "Answer: x = 34",
        "Answer: 034",
        "Answer: \\text{34}",
        "So it is \\boxed{34}",
        "So it is $\\boxed{\\text{34}}$.<|im_end|>\n",
        "Answer: 7, no.\nAnswer: 34",
        "Answer: 34^\\circ",
        "Answer: 34\\%",
    ],
)
def test_a_right_answer(ending: str) -> None:
    assert score(f"Let me think.\n{ending}", "34") == 1.0


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "34",
        "Answer: 35",
        "Answer: -34",
        "Answer:",
        "Answer: 34 or 35",
        "Answer: 3.4",
        "Answer: 34\nAnswer: 35",
        "\\boxed{34} is wrong.\nAnswer: 12",
        "\\boxed{34",
        "Answer: 34" + " and so on" * 40,
    ],
)
def test_a_wrong_answer(ending: str) -> None:
    assert score(f"Let me think.\n{ending}", "34") == 0.0


def test_integers_are_compared_as_numbers_and_others_as_text() -> None:
    assert score("Answer: 1,234,567", "1234567") == 1.0
    assert score("Answer: 1{,}234", "1234") == 1.0
    assert score("Answer: -0", "0") == 1.0
    assert score("Answer: \\frac{1}{2}", "\\frac{1}{2}") == 1.0
    assert score("Answer: 0.50", "0.5") == 0.0
    assert score("Answer: .", ".") == 0.0


def test_braces_are_matched() -> None:
    assert last_boxed("a \\boxed{1} b \\boxed{\\frac{1}{2}} c") == "\\frac{1}{2}"
    assert last_boxed("nothing") is None
    assert final_answer("\\boxed{\\frac{3}{4}}") == "\\frac{3}{4}"
    assert normalise("$ 1 + 2 $.") == "1+2"
