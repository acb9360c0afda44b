import json
from pathlib import Path

from megatron_vespo.metrics.rollback import roll_back


def test_what_came_after_the_checkpoint_is_taken_back(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "train/loss": 0.1 * step}) + "\n" for step in range(8)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(lines) + '{"step": 3, "train/lo')  # a crash cut the last line
    rollouts = tmp_path / "rollouts"
    rollouts.mkdir()
    for step in (4, 5, 6):
        (rollouts / f"step_{step:06d}.jsonl").touch()
        (rollouts / f"batch_{step:06d}.msgpack").touch()
    (rollouts / "notes_000009.txt").touch()
    roll_back(tmp_path, 5)
    assert metrics.read_text() == "".join(lines[:6]), "the kept lines have their bytes"
    assert sorted(path.name for path in rollouts.iterdir()) == [
        "batch_000004.msgpack",
        "batch_000005.msgpack",
        "notes_000009.txt",
        "step_000004.jsonl",
        "step_000005.jsonl",
    ]


def test_a_run_that_wrote_nothing_is_left_alone(tmp_path: Path) -> None:
    roll_back(tmp_path, 5)
    assert not list(tmp_path.iterdir())
