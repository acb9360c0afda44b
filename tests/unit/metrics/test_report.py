import json
from pathlib import Path

import pytest

from megatron_vespo.errors import UserError
from megatron_vespo.metrics.records import read_metrics
from megatron_vespo.metrics.report import write_report


def write(folder: Path, records: list[dict[str, object]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def rl_records(steps: int) -> list[dict[str, object]]:
    records: list[dict[str, object]] = [{"step": 0, "time": 0.0, "eval/test/accuracy": 0.25}]
    for step in range(1, steps + 1):
        record: dict[str, object] = {
            "step": step,
            "time": float(step),
            "rollout/reward_mean": step / 100,
            "rollout/staleness_max": 3,
            "perf/step_time": 2.0,
            "perf/generate_time": 1.5,
            "perf/train_time": 0.4,
            "perf/tokens_per_second": 1000.0,
            "train/tokens": 2000.0,
            "vespo/log_w_abs_mean": 0.5,
            "vespo/log_w_abs_max": float(step),
            "vespo/phi_mean_neg": None,
        }
        for sign in ("", "_pos"):
            record |= {f"vespo/{name}{sign}": 0.75 for name in ("ess_w", "ess_phi", "phi_mean", "phi_small_share")}
        if step % 10 == 0:
            record["eval/test/accuracy"] = 0.25 + step / 100
        records.append(record)
    return records


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_a_finished_run(tmp_path: Path) -> None:
    write(tmp_path, rl_records(40))
    (tmp_path / "config.yaml").touch()
    write_report(tmp_path, {"model": "tiny-moe", "algorithm": "vespo"}, total_steps=40)
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith(f"# {tmp_path.name}\n")
    for expected in (
        "| state | finished, 40 steps |",
        "| model | tiny-moe |",
        "| held-out accuracy, test | 0.250 (step 0) | 0.650 (step 40) | 0.650 (step 40) |",
        "| reward of training samples (mean of 5 steps) | 0.030 | 0.380 |",
        "| max \\|log W\\| (nats) | 40.000 | - | - |",
        "| mean phi | 0.750 | 0.750 | - |",
        "| largest staleness (updates) | 3 |",
        "| generate | 1.5 | 75% |",
        "80,000 tokens",
        f"- `{tmp_path}/config.yaml`: configuration",
        "![learning curve](learning_curve.png)",
    ):
        assert expected in text
    assert "checkpoints" not in text  # there are none
    assert "Warnings" not in text
    assert is_png(tmp_path / "learning_curve.png")
    assert not list(tmp_path.glob(".*"))


def test_a_run_cut_short(tmp_path: Path) -> None:
    write(tmp_path, rl_records(3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rollout/rew')
    write_report(tmp_path, total_steps=40)
    text = (tmp_path / "summary.md").read_text()
    assert "stopped after step 3 of 40" in text
    assert "| unreadable lines in metrics.jsonl | 1 |" in text
    assert "| held-out accuracy, test | 0.250 (step 0) | - |" in text
    assert is_png(tmp_path / "learning_curve.png")


@pytest.mark.parametrize("records", [[], rl_records(0), [{"step": 1}]])
def test_a_run_with_almost_nothing(tmp_path: Path, records: list[dict[str, object]]) -> None:
    write(tmp_path, records)
    write_report(tmp_path, total_steps=40)
    assert "stopped after step" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "learning_curve.png").exists() == (len(records) == 1 and "eval/test/accuracy" in records[0])


def test_supervised_runs_show_loss_and_accuracy(tmp_path: Path) -> None:
    write(
        tmp_path, [{"step": s, "train/loss": 2.0 / s, "train/accuracy": s / 10, "perf/step_time": 1} for s in (1, 2, 3)]
    )
    write_report(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "3 steps done" in text
    assert "| loss (mean of 3 steps) |" in text
    assert "Off-policy" not in text
    assert is_png(tmp_path / "learning_curve.png")


def test_a_run_that_cannot_learn_says_why(tmp_path: Path) -> None:
    bad = {"vespo/phi_mean": 0.03, "rollout/equal_reward_share": 0.95, "vespo/log_w_infinite_share": 0.01}
    bad["rollout/reward_failed_share"] = 0.125
    write(tmp_path, [{"step": s, **bad, "rollout/truncated_share": 0.8} for s in (1, 2)])
    write_report(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    for expected in ("Mean phi is 0.030", "95% of the groups", "1.0% of the samples", "80% of the responses"):
        assert expected in text
    assert "12.5% of the samples could not be scored" in text


def test_no_metrics_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no metrics file"):
        write_report(tmp_path)


def test_records_merge_a_step_and_forget_an_abandoned_attempt(tmp_path: Path) -> None:
    write(
        tmp_path,
        [
            {"step": 1, "time": 1.0, "train/loss": 1.0},
            {"step": 2, "train/loss": 2.0},
            {"step": 2, "eval/test/accuracy": 0.5},
            {"step": 3, "train/loss": 3.0},
            {"step": 2, "train/loss": 20.0, "train/grad_norm": None},
            {"no": "step"},
        ],
    )
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records.steps == [1, 2]
    assert records.values == [{"train/loss": 1.0}, {"train/loss": 20.0, "eval/test/accuracy": 0.5}]
    assert records.times[0] == 1.0
    assert records.series("train/loss") == ([1, 2], [1.0, 20.0])
    assert records.eval_sets() == ["test"]
    assert records.unreadable_lines == 1
