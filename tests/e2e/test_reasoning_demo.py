"""The reasoning example runs without data files: its whole script, shortened, report and closing lines included."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_vespo.metrics.evaluations import read_results

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which ``run.sh SEED short`` ran, and what it printed."""
    folder = tmp_path_factory.mktemp("reasoning")
    (folder / "examples").symlink_to(ROOT / "examples")  # the script writes to runs/ where it is started
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    command = ["examples/reasoning_cpu/run.sh", "2", "short"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "reasoning", done.stdout


def test_sources_have_equal_weights_and_the_tasks_own_reward(demo: tuple[Path, str]) -> None:
    run, _ = demo
    files = sorted((run / "rollouts").glob("step_*.jsonl"))
    assert len(files) == 2
    for file in files:
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        long = Counter(len(sample["label"]) == 5 for sample in samples)
        assert long == {True: 128, False: 128}, "a prompt has eight samples"
        assert not any(sample["reward_error"] for sample in samples)
        for sample in samples:
            right = sample["response"].removesuffix("<eos>").strip() == sample["label"]
            assert (sample["reward"] == 1.0) is right


def test_it_closes_with_what_was_learnt_and_where_to_look(demo: tuple[Path, str]) -> None:
    run, printed = demo
    before, *_, after = read_results(run / "evaluation")
    assert (before["step"], after["step"]) == (0, 2)
    closing = printed[printed.index("What was learnt in 2 steps") :]
    for name in ("short", "long"):
        values = [record["sets"][name]["average"]["value"] for record in (before, after)]
        (line,) = [line for line in closing.splitlines() if line.startswith(f"  {name:6} avg@4 ")]
        assert line.split()[2::4] == [f"{value:.3f}" for value in values]
    places = [line.partition(":")[0].strip() for line in closing[closing.index("Where to look") :].splitlines()[1:]]
    assert len(places) == 4 and all((run.parents[1] / place).exists() for place in places)


def test_the_report_is_written(demo: tuple[Path, str]) -> None:
    run, _ = demo
    page = (run / "report.html").read_text()
    assert '"short"' in page and '"long"' in page and "Spell this word backward" in page
