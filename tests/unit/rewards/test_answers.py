import pytest

from megatron_vespo.rewards.answers import Where, exact_match, find_answer, last_boxed, multiple_choice, response_text
from tests.unit.rewards.scored import make


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{4}", "4"),
        (r"first \boxed{1}, then \boxed{2}.", "2"),
        (r"\boxed{\frac{a_{1}}{b}}", r"\frac{a_{1}}{b}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\fbox{7}", "7"),
        (r"\boxed {8}", "8"),
        (r"\boxed{}", ""),
        (r"\boxed{\text{星期三}}", r"\text{星期三}"),
        (r"\boxed{4", None),
        (r"\boxed{1} and \boxed{2", None),  # the last one counts, and it was cut off
        (r"\boxed 4", None),
        ("4", None),
        ("", None),
    ],
)
def test_the_last_box(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    "text, left",
    [
        ("4<|im_end|>\n", "4"),
        ("<think>\\boxed{1}</think>\n4", "4"),
        ("hm \\boxed{1}</think> 4", "4"),  # the template opened it
        ("<think> for ever \\boxed{1}", ""),
        ("no thoughts", "no thoughts"),
    ],
)
def test_thoughts_and_end_tokens_are_no_answer(text: str, left: str) -> None:
    assert response_text(text) == left


@pytest.mark.parametrize(
    "text, where, answer",
    [
        ("so\nAnswer: 5\n", "line", "5"),
        ("Answer: 1\nno, answer: 2", "line", "2"),
        ("The answer is 12", "line", "12"),
        ("所以答案是\uff1a42", "line", "42"),
        ("答案: 甲", "line", "甲"),
        ("<answer> 3 </answer>", "tag", "3"),
        ("<answer>1</answer><answer>2\n</answer>", "tag", "2"),
        ("<answer>1", "tag", None),
        ("Answer: 1 \\boxed{2} <answer>3</answer>", "any", "2"),
        ("Answer: 1 <answer>3</answer>", "any", "3"),
        ("Answer: 1", "any", "1"),
        ("Answer: 1", "boxed", None),
        (" 5 ", "whole", "5"),
    ],
)
def test_where_an_answer_is_found(text: str, where: Where, answer: str | None) -> None:
    assert find_answer(text, where) == answer


def test_an_unknown_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of whole, boxed"):
        exact_match(make("4", "4"), answer="somewhere")  # type: ignore[arg-type]


def test_exact_match_by_place_and_case() -> None:
    assert exact_match(make("so \\boxed{Paris}<|im_end|>", " Paris "), answer="boxed") == 1.0
    assert exact_match(make("so \\boxed{paris}", "Paris"), answer="boxed") == 0.0
    assert exact_match(make("so \\boxed{paris}", "Paris"), answer="boxed", ignore_case=True) == 1.0
    assert exact_match(make("\uff14\uff12", "42"), ignore_case=True) == 1.0
    assert exact_match(make("<think>4</think>4", "4")) == 0.0  # nothing but the answer was asked for
    assert exact_match(make("none", ""), answer="boxed") == 0.0


@pytest.mark.parametrize(
    "text, label, reward",
    [
        (r"\boxed{B}", "B", 1),
        (r"\boxed{\text{B}}", "B", 1),
        (r"\boxed{(B)}", "(B)", 1),
        (r"\boxed{\mathrm{(B)}\ 12}", "B", 1),
        ("The answer is (B).", "B", 1),
        ("Answer: **B**", "B", 1),
        ("Answer: B. Because", "B", 1),
        ("<answer>B</answer>", "B", 1),
        ("答案\uff1a\uff08B\uff09", "B", 1),
        ("答案是B", "B", 1),
        ("B", "B", 1),
        ("B<|im_end|>", "B", 1),
        (r"\boxed{B}", "1", 1),  # counted from 0
        (r"\boxed{A}", "1", 0),
        (r"\boxed{A} or \boxed{B}", "A", 0),
        (r"\boxed{AB}", "A", 0),
        (r"\boxed{A, B}", "A", 0),
        ("Answer: Because of that", "B", 0),
        ("Answer: A dog", "A", 0),
        ("A dog it is", "A", 0),
        ("", "A", 0),
        (r"\boxed{}", "A", 0),
        ("Answer: K", "A", 0),
    ],
)
def test_multiple_choice(text: str, label: str, reward: float) -> None:
    assert multiple_choice(make(text, label)) == reward


def test_a_label_that_is_no_choice_is_an_error() -> None:
    for label in ("E", "", "4", "yes"):
        with pytest.raises(ValueError, match="not one of the letters ABCD"):
            multiple_choice(make("A", label), letters="ABCD")
