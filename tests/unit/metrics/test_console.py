import io

import pytest

from megatron_vespo.metrics.console import HEADER_EVERY, SFT_COLUMNS, Console, format_seconds


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


METRICS = {
    "rollout/reward_mean": 0.4567,
    "vespo/log_w_abs_mean": 0.1234,
    "vespo/phi_mean": 0.98,
    "vespo/ess_w": 0.9,
    "vespo/ess_phi": 0.95,
    "train/grad_norm": 1.25,
    "perf/tokens_per_second": 12345.6,
    "perf/step_time": 2.0,
    "perf/generate_time": 1.2,
    "perf/train_time": 0.7,
    "perf/sync_time": 0.1,
}


def test_plain_lines_are_aligned_under_a_repeated_header() -> None:
    stream = io.StringIO()
    console = Console(100, stream=stream)
    for step in range(1, HEADER_EVERY + 2):
        console.step(step, METRICS if step % 2 else {})
    console.close()
    lines = stream.getvalue().splitlines()
    headers = [i for i, line in enumerate(lines) if "reward" in line]
    assert headers == [0, HEADER_EVERY + 1]
    assert len({len(line) for line in lines}) == 1
    assert "\x1b" not in stream.getvalue()
    assert lines[1].split() == [
        "1/100", "0.457", "0.123", "0.980", "0.900", "0.950", "1.25", "12,346", "1.2/0.7/0.1", "3", "m", "18", "s",
    ]  # fmt: skip
    assert lines[2].split()[:3] == ["2/100", "-", "-"]


def test_sft_columns() -> None:
    stream = io.StringIO()
    Console(10, SFT_COLUMNS, stream).step(
        1, {"train/loss": 1.5, "train/accuracy": 0.25, "perf/tokens_per_second": 10.0}
    )
    assert stream.getvalue().splitlines()[1].split()[:5] == ["1/10", "1.5000", "0.250", "-", "10"]


def test_phases_say_how_long_they_took() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(10, stream=stream, clock=clock)
    with console.phase("starting SGLang"):
        clock.now += 21
    with pytest.raises(RuntimeError), console.phase("loading weights"):
        clock.now += 3
        raise RuntimeError
    assert stream.getvalue().splitlines() == [
        "starting SGLang ...",
        "starting SGLang: ready in 21 s",
        "loading weights ...",
        "loading weights: failed after 3.0 s",
    ]


def test_eta_without_step_time_leaves_phases_out() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(11, stream=stream, clock=clock)
    with console.phase("starting"):
        clock.now += 1000
    clock.now += 2
    console.step(1, {})
    assert stream.getvalue().splitlines()[-1].endswith(" 20 s")


def test_a_terminal_gets_a_bar_and_the_same_lines() -> None:
    stream = Terminal()
    console = Console(3, stream=stream)
    console.message("starting [bold]SGLang[/bold] ...")
    for step in (1, 2, 3):
        console.step(step, METRICS)
    console.close()
    text = stream.getvalue()
    assert "starting [bold]SGLang[/bold] ..." in text
    assert "0.457" in text and "ETA" in text and "3/3" in text


@pytest.mark.parametrize(
    "seconds, text",
    [(0.84, "0.8 s"), (9.97, "10 s"), (21.4, "21 s"), (59.6, "1 m 00 s"), (185, "3 m 05 s"), (7620, "2 h 07 m")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
