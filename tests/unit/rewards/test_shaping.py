import pytest

from megatron_vespo.rewards.shaping import format_rule, overlong, truncated
from tests.unit.rewards.scored import make


@pytest.mark.parametrize("tokens, value", [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (101, -1), (500, -1)])
def test_overlong_is_equation_13_of_dapo(tokens: int, value: float) -> None:
    assert overlong(make("", tokens=tokens), max_tokens=100, buffer_tokens=20) == pytest.approx(value)


def test_overlong_buffers_that_make_no_sense() -> None:
    for buffer in (0, -1, 101):
        with pytest.raises(ValueError, match="buffer_tokens"):
            overlong(make(""), max_tokens=100, buffer_tokens=buffer)


def test_truncated() -> None:
    assert [truncated(make("", finish=reason)) for reason in ("length", "stop", "abort")] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "text, reward",
    [
        ("<think>a\nb</think>\n<answer>4</answer><|im_end|>", 1),
        ("<think></think><answer></answer>", 1),
        ("<think>a</think>", 0),
        ("a <think>b</think><answer>4</answer>", 0),
        ("<think>b</think> so <answer>4</answer>", 0),
        ("<think>b</think><answer>4</answer> ha", 0),
        ("<answer>4</answer><think>b</think>", 0),
        ("<think><answer>4</answer></think>", 0),
        ("<think>b</think><answer>4</answer><answer>5</answer>", 0),
        ("</think>b<think><answer>4</answer>", 0),
        ("", 0),
    ],
)
def test_tags(text: str, reward: float) -> None:
    assert format_rule(make(text), tags=["think", "answer"]) == reward


def test_patterns() -> None:
    assert format_rule(make("a\nAnswer: 5<|im_end|>"), pattern=r".*Answer: \d+") == 1.0
    assert format_rule(make("Answer: 5 or so"), pattern=r".*Answer: \d+") == 0.0
    assert format_rule(make("<a>1</a>"), pattern="<a>x</a>", tags=["a"]) == 0.0
    for params, message in (({}, "needs params"), ({"pattern": "("}, "no regular expression")):
        with pytest.raises(ValueError, match=message):
            format_rule(make(""), **params)
