import asyncio
import signal
import time

import pytest
from math_verify.errors import TimeoutException

from megatron_vespo.rewards import mathematics
from megatron_vespo.rewards.failures import RewardCounts, RewardFailure
from megatron_vespo.rewards.mathematics import math_answer
from megatron_vespo.rewards.pool import RewardPool
from megatron_vespo.rewards.protocol import Term
from tests.unit.rewards.scored import make


@pytest.mark.parametrize(
    "text, label, reward",
    [
        (r"so \boxed{42}", "42", 1),
        (r"so \boxed{43}", "42", 0),
        (r"\boxed{\frac{1}{2}}", "0.5", 1),
        (r"\boxed{\dfrac{3}{4}}", r"\frac{6}{8}", 1),
        (r"\boxed{\frac{\sqrt{3}}{3}}", r"\frac{1}{\sqrt{3}}", 1),
        (r"\boxed{1} no, \boxed{2}", "2", 1),
        (r"\boxed{2} no, \boxed{1}", "2", 0),
        (r"\boxed{42", "42", 0),
        (r"\boxed{41} or \boxed{42", "42", 0),
        (r"\boxed{\{3, 1, 2\}}", r"\{1,2,3\}", 1),
        (r"\boxed{\{3, 1\}}", r"\{1,2,3\}", 0),
        (r"\boxed{[0, 1)}", "[0,1)", 1),
        (r"\boxed{(0, 1)}", "[0,1]", 0),
        (r"\boxed{(-\infty, 2] \cup [3, \infty)}", r"[3,\infty)\cup(-\infty,2]", 1),
        (r"\boxed{(1, 2)}", "(2,1)", 0),
        (r"\boxed{5\text{ cm}}", "5", 1),
        (r"\boxed{90^\circ}", "90", 1),
        (r"\boxed{50\%}", "0.5", 1),
        (r"\boxed{1{,}000}", "1000", 1),
        (r"\boxed{x = 3}", "3", 1),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", 1),
        (r"\boxed{\text{星期三}}", r"\text{星期三}", 1),
        (r"\boxed{星期四}", "星期三", 0),
        (r"所以答案是 $\frac{3}{4}$", "3/4", 1),
        ("The final answer is $7$.", "7", 1),
        ("Answer: 5", "5", 1),
        (r"$\boxed{7}$", r"\boxed{7}", 1),
        (r"<think>\boxed{7}</think> It is \boxed{8}.<|im_end|>", "8", 1),
        (r"<think>\boxed{8}", "8", 0),
        (r"\boxed{}", "8", 0),
        ("", "8", 0),
        (r"\boxed{\frac{1}{}}", "8", 0),
        ("}{}{\\boxed{\\\\}}", "8", 0),
    ],
)
def test_answers(text: str, label: str, reward: float) -> None:
    assert math_answer(make(text, label)) == reward


def test_only_a_box_counts_where_it_is_asked_for() -> None:
    assert math_answer(make("The answer is $7$.", "7"), answer="boxed") == 0.0
    assert math_answer(make(r"\boxed{7.0}", "7"), answer="boxed") == 1.0
    with pytest.raises(ValueError, match="neither anywhere nor boxed"):
        math_answer(make("7", "7"), answer="everywhere")  # type: ignore[arg-type]


def test_a_label_without_an_answer_is_an_error() -> None:
    with pytest.raises(ValueError, match="no mathematical answer"):
        math_answer(make(r"\boxed{7}", ""))


def test_an_answer_that_takes_too_long_is_a_failure_and_leaves_no_alarm() -> None:
    begin = time.monotonic()
    with pytest.raises(RewardFailure, match="SymPy took longer than 1 s"):
        math_answer(make(r"\boxed{\sum_{k=1}^{10^{9}} \frac{\sin(k!)}{k}}", "8"), seconds=1)
    assert time.monotonic() - begin < 10
    time.sleep(1.2)
    assert math_answer(make(r"\boxed{8.0}", "8")) == 1.0


def test_an_alarm_that_is_swallowed_rings_again() -> None:
    swallowed = []

    def think() -> None:
        while True:
            try:
                time.sleep(60)
            except BaseException as error:
                if swallowed:
                    raise
                swallowed.append(error)

    with pytest.raises(TimeoutException):
        mathematics._within(1, think)
    assert len(swallowed) == 1
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0) and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_an_answer_that_no_signal_stops_in_time_is_killed_and_the_next_is_scored() -> None:
    pool = RewardPool([Term("", "math", params={"seconds": 1000})], workers=1, timeout=2.0)
    pool.start()

    async def both() -> list[float | BaseException]:
        samples = make(r"\boxed{(10^8)!}", "8"), make(r"\boxed{8}", "8")
        return await asyncio.gather(*map(pool.score, samples), return_exceptions=True)

    try:
        hanging, right = asyncio.run(both())
    finally:
        pool.close()
    assert isinstance(hanging, RewardFailure) and "took longer than reward.timeout=2 s" in str(hanging)
    assert right == 1.0
    assert pool.take_counts() == RewardCounts(scored=1, timed_out=1, restarts=1)
