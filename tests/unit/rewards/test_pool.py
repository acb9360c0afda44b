"""The pool with real worker processes and reward functions that do what they must not."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_vespo.errors import UserError
from megatron_vespo.rewards.failures import RewardCounts, RewardFailure
from megatron_vespo.rewards.loader import load_reward
from megatron_vespo.rewards.pool import RewardPool
from megatron_vespo.types import Prompt, Sample

Start = Callable[..., RewardPool]
Outcome = float | BaseException

EXAMPLES = Path(__file__).parents[3] / "examples"
TASK = Path(__file__).with_name("bad_rewards.py")


def line_of(code: str) -> str:
    """Where the task has this line, as error messages say it."""
    lines = [line.strip() for line in TASK.read_text().splitlines()]
    assert lines.count(code) == 1
    return f"(task.py:{lines.index(code) + 1})"


def make_sample(number: int, text: str = "") -> Sample:
    prompt = Prompt(number, np.array([1], np.int32))
    ids = np.array([number], np.int32)
    return Sample(prompt, 0, ids, np.zeros(1, np.float32), ids, "stop", text)


def score(pool: RewardPool, samples: Sequence[Sample]) -> list[Outcome]:
    async def all_of_them() -> list[Outcome]:
        return await asyncio.gather(*map(pool.score, samples), return_exceptions=True)

    return asyncio.run(all_of_them())


def messages(outcomes: Sequence[Outcome]) -> list[str]:
    assert all(isinstance(outcome, RewardFailure) for outcome in outcomes), outcomes
    return [str(outcome) for outcome in outcomes]


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a pool in a folder where TASK is task.py; nothing is left of it afterwards."""
    shutil.copy(TASK, tmp_path / "task.py")
    monkeypatch.chdir(tmp_path)
    pools = []

    def start(spec: str, workers: int = 1, timeout: float = 30.0) -> RewardPool:
        pool = RewardPool(spec, workers=workers, timeout=timeout)
        pools.append(pool)
        pool.start()
        return pool

    before = set(processes())
    yield start
    for pool in pools:
        pool.close()
    assert set(processes()) <= before


@pytest.mark.parametrize(
    "text, message",
    [
        ("spin", "took longer than reward.timeout=0.3 s"),
        ("sleep", "took longer than reward.timeout=0.3 s"),
        ("deaf", "took longer than reward.timeout=0.3 s"),
        ("stop", "took longer than reward.timeout=0.3 s"),
        ("raise", f"KeyError: 'no such key' {line_of('return {}["no such key"]')}"),
        ("exit", f"SystemExit: 3 {line_of('sys.exit(3)')}"),
        ("_exit", "took its process down, which ended with exit status 1"),
        ("kill", "took its process down, which ended by SIGKILL, out of memory perhaps"),
        ("segfault", "took its process down, which ended by SIGSEGV"),
    ],
)
def test_what_goes_wrong_costs_one_sample(start: Start, text: str, message: str) -> None:
    pool = start("task.py:misbehave", timeout=0.3)
    begin = time.monotonic()
    outcomes = score(pool, [make_sample(1), make_sample(2, text), make_sample(3), make_sample(4)])
    assert time.monotonic() - begin < 10
    assert messages(outcomes[1:2]) == [message]
    assert [outcomes[i] for i in (0, 2, 3)] == [1.0, 3.0, 4.0]
    timed_out, crashed = "longer" in message, "process" in message
    failed = not (timed_out or crashed)
    assert pool.take_counts() == RewardCounts(3, failed, timed_out, crashed, restarts=not failed)
    assert pool.take_counts() == RewardCounts()


def test_the_time_counts_from_when_a_worker_begins(start: Start) -> None:
    pool = start("task.py:misbehave", timeout=1.0)
    naps = [make_sample(i, "nap") for i in range(4)]
    begin = time.monotonic()
    outcomes = score(pool, [*naps, make_sample(4, "spin")])
    assert outcomes[:4] == [0.0, 1.0, 2.0, 3.0]  # though the last one waited longer than that
    assert messages(outcomes[4:]) == ["took longer than reward.timeout=1 s"]
    assert 2.5 < time.monotonic() - begin < 4.5  # 4.6 if the worker did not say when it began


def test_output_and_forks_do_not_disturb_the_protocol(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    pool = start("task.py:misbehave")
    texts = ["print", "fork", "print", "", "fork"]
    assert score(pool, [make_sample(i, text) for i, text in enumerate(texts)]) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert pool.take_counts() == RewardCounts(scored=5)
    pool.close()
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("x") == err.count("y") == 10_000_000 and err.count("z") == 200_000


def test_a_closed_connection_costs_one_sample(start: Start) -> None:
    outcomes = score(start("task.py:misbehave"), [make_sample(1, "close"), make_sample(2)])
    assert "exit status 1" in messages(outcomes[:1])[0]
    assert outcomes[1] == 2.0


def test_numbers_are_rewards(start: Start) -> None:
    rewards = {"2": 2.0, "True": 1.0, "np.float32(.5)": 0.5, "np.bool_(1)": 1.0, "-1e300": -1e300}
    values = [value.replace("np", "__import__('numpy')") for value in rewards]
    found = score(start("task.py:evaluate"), [make_sample(i, value) for i, value in enumerate(values)])
    assert found == list(rewards.values())


def test_other_results_are_failures(start: Start) -> None:
    values = ["float('nan')", "-math.inf", "'1.0'", "None", "TensorLike()", "[1.0]", "1j", "'x' * 10000"]
    pool = start("task.py:evaluate")
    found = messages(score(pool, [make_sample(i, value) for i, value in enumerate(values)]))
    expected = ["nan", "-inf", "'1.0'", "None", "<", "[1.0]", "1j", "'xxx"]
    for message, value in zip(found, expected, strict=True):
        assert message.startswith(f"returned {value}")
        assert message.endswith("; it must return one finite number")
        assert len(message) < 600
    (message,) = messages(score(pool, [make_sample(0, "10 ** 400")]))
    assert message.startswith("OverflowError")


def test_a_sample_arrives_whole(start: Start) -> None:
    prompt = Prompt(7, np.array([1, 2], np.int32), "l", {"a": [1, None, "é"]})
    arrays = np.array([5], np.int32), np.array([-0.5], np.float32), np.array([2], np.int32)
    assert score(start("task.py:is_whole"), [Sample(prompt, 3, *arrays, "length", "text")]) == [1.0]


@pytest.mark.parametrize("task", ["digits_cpu", "layouts_cpu"])
def test_the_rewards_of_the_examples_run(start: Start, task: str) -> None:
    spec = f"{EXAMPLES}/{task}/task.py:reward"
    wrong, right = make_sample(1), make_sample(2)
    for sample in (wrong, right):
        sample.prompt.label = "1"
    right.response_ids = np.array([3, 11, 1, 12], np.int32)  # 3 # 1 <eos>
    reward = load_reward(spec)
    outcomes = score(start(spec), [wrong, right])
    assert outcomes == [reward(wrong), reward(right)]
    assert outcomes[0] != outcomes[1]


def test_metadata_that_cannot_be_sent_is_the_users_error(start: Start) -> None:
    sample = make_sample(1)
    sample.prompt.metadata["checker"] = object()
    (outcome,) = score(start("task.py:misbehave"), [sample])
    assert isinstance(outcome, UserError) and "metadata" in str(outcome)


def test_the_worker_sees_the_trainers_surroundings(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/the/trainer")
    monkeypatch.setattr(sys, "path", ["/somewhere/first", *sys.path])
    with (tmp_path / "of the trainer").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        pool = start("task.py:evaluate")
        questions = [
            f"sys.path == {sys.path!r}",
            f"os.getcwd() == {str(Path.cwd())!r}",
            "os.environ['PYTHONPATH'] == '/of/the/trainer'",
            "'torch' not in sys.modules and 'asyncio' in sys.modules",  # the task imports it
            "threading.current_thread() is threading.main_thread()",
            "os.getsid(0) != " + str(os.getsid(0)),
            "sys.stdin.read() == ''",
            "not any('of the trainer' in os.path.realpath(file) for file in Path('/proc/self/fd').iterdir())",
            # The connection, the mark and the log are not for what the function starts.
            "subprocess.run('ls -l /proc/self/fd', shell=True, close_fds=False, capture_output=True)"
            ".stdout.count(b'socket') == 0",
            # An ordinary function may have an event loop of its own, and signals.
            "asyncio.run(asyncio.sleep(0, result=True))",
            "signal.signal(signal.SIGALRM, lambda *_: None) is not None",
        ]
        assert score(pool, [make_sample(i, question) for i, question in enumerate(questions)]) == [1.0] * len(questions)


def test_what_a_function_started_is_gone_after_close(start: Start, tmp_path: Path) -> None:
    pool = start("task.py:leave_orphan")
    assert score(pool, [make_sample(1)]) == [1.0]
    grandchild = int((tmp_path / "grandchild").read_text())
    assert psutil.pid_exists(grandchild)
    pool.close()
    pool.close()
    assert not psutil.pid_exists(grandchild)
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(pool.score(make_sample(1)))


def test_close_from_another_thread_ends_what_is_in_flight(start: Start) -> None:
    pool = start("task.py:misbehave")
    threading.Timer(0.3, pool.close).start()
    begin = time.monotonic()
    outcomes = score(pool, [make_sample(1, "spin"), make_sample(2), make_sample(3, "raise")])
    assert time.monotonic() - begin < 5
    assert [str(outcome) for outcome in outcomes] == ["the reward pool was closed"] * 3


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1])
def test_close_while_a_worker_is_replaced(start: Start, delay: float) -> None:
    pool = start("task.py:misbehave", workers=2)

    async def crash_and_close() -> None:
        with pytest.raises(RewardFailure):
            await pool.score(make_sample(1, "_exit"))
        await asyncio.sleep(delay)
        pool.close()

    asyncio.run(crash_and_close())
    assert not [child for child in processes() if "megatron_vespo.rewards.worker" in child.cmdline()]


def test_a_cancelled_sample_is_not_scored(start: Start) -> None:
    pool = start("task.py:misbehave", timeout=1.0)

    async def cancel_two() -> float:
        running, waiting = (asyncio.create_task(pool.score(make_sample(1, text))) for text in ("sleep", "_exit"))
        await asyncio.sleep(0.2)
        running.cancel()
        waiting.cancel()
        return await pool.score(make_sample(2))

    assert asyncio.run(cancel_two()) == 2.0
    assert pool.take_counts() == RewardCounts(scored=1, timed_out=1, restarts=1)


@pytest.mark.parametrize("function", ["remote", "judge"])
def test_coroutines_run_at_once(start: Start, function: str) -> None:
    pool = start(f"task.py:{function}")
    begin = time.monotonic()
    assert score(pool, [make_sample(i) for i in range(100)]) == [float(i) for i in range(100)]
    assert time.monotonic() - begin < 5  # 10 s one after the other


def test_awaitables_of_ordinary_functions(start: Start) -> None:
    assert score(start("task.py:awaitable"), [make_sample(1), make_sample(2)]) == [2.0, 2.0]


@pytest.mark.parametrize(
    "text, message",
    [
        ("spin", "took longer than reward.timeout=1 s"),
        ("await", "took longer than reward.timeout=1 s"),
        ("swallow", "took longer than reward.timeout=1 s"),
        ("raise", f"ValueError: no judge {line_of('raise ValueError("no judge")')}"),
        ("timeout", f"TimeoutError: of the judge {line_of('raise TimeoutError("of the judge")')}"),
        ("exit", f"SystemExit: 4 {line_of('sys.exit(4)')}"),
        ("_exit", "took its process down, which ended with exit status 1"),
        ("thread", "took its process down, which ended with exit status 1"),
    ],
)
def test_one_coroutine_among_forty(start: Start, text: str, message: str) -> None:
    pool = start("task.py:remote", timeout=1.0)
    samples = [make_sample(i, text if i == 20 else "") for i in range(40)]
    outcomes = score(pool, samples)
    assert messages(outcomes[20:21]) == [message]
    del outcomes[20]
    assert outcomes == [float(i) for i in range(40) if i != 20]
    assert score(pool, [make_sample(1)]) == [1.0]  # by the process that replaced the first one, if one did
    counts = pool.take_counts()
    assert (counts.scored, counts.failed + counts.timed_out + counts.crashed) == (40, 1)
    assert counts.restarts == {"spin": 1, "_exit": 1, "swallow": 1, "thread": 3}.get(text, 0)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("task.py:nothing", "reward 'task.py:nothing': task.py has no 'nothing'"),
        ("task.py:NOT_A_FUNCTION", "NOT_A_FUNCTION' is a int, not a function"),
        ("missing.py:reward", "missing.py does not exist"),
        ("exact", "built in: code, exact_match"),
        ("broken.py:reward", r"ModuleNotFoundError: No module named 'no_such_thing' \(broken.py:2\)"),
        ("syntax.py:reward", r"(?s)syntax.py.*line 1.*SyntaxError"),
        ("exits.py:reward", r"(?s)its process ended with exit status 9; the end of its output:\n  goodbye"),
    ],
)
def test_functions_that_cannot_be_used_are_refused_at_start(
    start: Start, tmp_path: Path, spec: str, message: str
) -> None:
    (tmp_path / "broken.py").write_text("import os\nimport no_such_thing\n")
    (tmp_path / "syntax.py").write_text("def reward(:\n")
    (tmp_path / "exits.py").write_text("import os\nprint('goodbye', flush=True)\nos._exit(9)\n")
    with pytest.raises(UserError, match=message) as caught:
        start(spec, workers=2)
    assert str(caught.value).startswith(f"reward function {spec} cannot be used: ")


def test_output_of_the_import_is_shown(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "talks.py").write_text("print('loading the checker')\ndef reward(sample): return 1\n")
    start("talks.py:reward")
    assert "loading the checker" in capsys.readouterr().err


def test_a_pool_that_cannot_start_again_refuses_all_samples(start: Start, tmp_path: Path) -> None:
    pool = start("task.py:misbehave", workers=2)
    (tmp_path / "task.py").write_text("import os\nos.write(2, b'no licence today\\n')\nos._exit(4)\n")
    outcomes = score(pool, [make_sample(1, "_exit"), *(make_sample(i, "sleep") for i in range(5))])
    assert isinstance(outcomes[0], RewardFailure)
    later = score(pool, [make_sample(1), make_sample(2)])
    for outcome in [*outcomes[1:], *later]:
        assert isinstance(outcome, UserError)
        assert "task.py:misbehave: its process cannot be started again" in str(outcome)
        assert "exit status 4; the end of its output:\n  no licence today" in str(outcome)


def test_a_death_while_idle_costs_nothing(start: Start) -> None:
    pool = start("task.py:misbehave")
    (worker,) = (child for child in processes() if "megatron_vespo.rewards.worker" in child.cmdline()[3:5])
    worker.kill()
    assert score(pool, [make_sample(i) for i in range(3)]) == [0.0, 1.0, 2.0]
    assert pool.take_counts() == RewardCounts(scored=3, restarts=1)


def test_a_thousand_samples_of_which_some_hang(start: Start) -> None:
    pool = start("task.py:misbehave", workers=4, timeout=0.2)
    hanging = set(range(7, 1000, 20))
    outcomes = score(pool, [make_sample(i, "sleep" if i in hanging else "") for i in range(1000)])
    assert {i for i, outcome in enumerate(outcomes) if isinstance(outcome, RewardFailure)} == hanging
    assert all(outcome == float(i) for i, outcome in enumerate(outcomes) if i not in hanging)
    wait_until(lambda: pool._counts.restarts == len(hanging))
    assert pool.take_counts() == RewardCounts(950, 0, 50, 0, restarts=50)


def test_nothing_is_left_of_a_killed_trainer(start: Start, tmp_path: Path) -> None:
    trainer = textwrap.dedent(
        """
        import asyncio, sys, time
        sys.path[:] = sys.argv[1].split(":")
        from megatron_vespo.rewards.pool import RewardPool
        from tests.unit.rewards.test_pool import make_sample
        pool = RewardPool("task.py:leave_orphan", workers=3, timeout=60)
        pool.start()
        asyncio.run(pool.score(make_sample(1)))
        print("started", flush=True)
        time.sleep(60)
        """
    )
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", trainer, ":".join([str(root), *sys.path])]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"started\n"
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) >= 3 * 2 + 2  # guards and workers, and what the function started
        process.send_signal(signal.SIGKILL)
    assert psutil.wait_procs(below, timeout=10)[1] == []
