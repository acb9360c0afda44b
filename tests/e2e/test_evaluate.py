"""Evaluation of a model by itself, and during training, with the real SGLang."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.evaluate import main
from megatron_vespo.metrics.evaluations import read_results
from megatron_vespo.metrics.records import read_metrics
from megatron_vespo.rollout.server import SGLangServer
from tests.e2e.small_runs import PROMPTS, make_tree, run_main_on_ranks, write_config

SETS = {"held": {"samples_per_prompt": 4, "max_new_tokens": 6, "top_p": 0.9}, "greedy": {"temperature": 0.0}}


def make_config(server: SGLangServer, folder: Path) -> Path:
    tree = make_tree(server, folder, evaluation={"interval": 1, "sets": SETS, "correct_from": 3.0})
    data = tree["data"]["train"]
    tree["data"]["evaluation"] = {"held": data, "greedy": data}
    tree["checkpoint"] = {"interval": 2, "hf_interval": 2}
    return write_config(folder, tree)


def read_answers(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_during_training_then_of_its_checkpoint(
    sglang_server: SGLangServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(sglang_server, tmp_path)
    assert run_main_on_ranks(2, config, []) == [0, 0]
    run = tmp_path / "runs" / "run"
    folder = run / "evaluation"
    records = read_metrics(run / "metrics.jsonl")
    assert records.series("eval/held/pass_at_4")[0] == [0, 1, 2]
    assert [record["step"] for record in read_results(folder)] == [0, 1, 2]
    for step in (0, 1, 2):
        held = read_answers(folder / "held" / f"step_{step:06d}.jsonl")
        assert len(held) == 4 * len(PROMPTS)
        assert all(answer["length"] <= 6 for answer in held)  # type: ignore[operator]
        mean = np.mean([answer["reward"] for answer in held])  # type: ignore[misc]
        assert records.values[step]["eval/held/accuracy"] == pytest.approx(mean)
        assert len(read_answers(folder / "greedy" / f"step_{step:06d}.jsonl")) == len(PROMPTS)

    # The server of the session has the weights of the last step; so has the checkpoint, on a server of its own.
    assert main([str(config), "--url", sglang_server.url]) == 0
    checkpoint = ["--checkpoint", str(run / "checkpoints")]  # the newest in it
    assert main([str(run), *checkpoint, "rollout.server.url=null", "sglang.max_total_tokens=4096"]) == 0
    assert "checkpoint_iter_0000002" in capfd.readouterr().out
    assert [record["label"] for record in read_results(folder)][3:] == ["checkpoint_iter_0000002", "server"]
    greedy = [
        [answer["response"] for answer in read_answers(folder / "greedy" / f"{label}.jsonl")]
        for label in ("step_000002", "server", "checkpoint_iter_0000002")
    ]
    assert greedy[0] == greedy[1] == greedy[2]
    start = [answer["response"] for answer in read_answers(folder / "greedy" / "step_000000.jsonl")]
    assert start != greedy[0]
    assert not list(folder.glob(".converted*"))


def test_what_cannot_be_evaluated(
    sglang_server: SGLangServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(sglang_server, tmp_path)
    for arguments, message in (
        (["data.evaluation={}", "evaluation.sets={}"], "data.evaluation: no set"),
        (["--checkpoint", "nowhere", "rollout.server.url=null"], "nowhere is no folder"),
        (["--checkpoint", "x", "--url", sglang_server.url], "leave out --checkpoint or --url"),
        (["--model", "nowhere"], "nowhere"),
        # Before a checkpoint is converted or a server started.
        (["--checkpoint", "nowhere", "rollout.server.url=null", "reward.function=no_such"], "unknown reward 'no_such'"),
    ):
        assert main([str(config), *arguments]) == 1
        assert message in capfd.readouterr().err
    assert main([str(tmp_path)]) == 1  # a run's folder without a trained model
    assert f"{tmp_path / 'hf' / 'latest' / 'config.json'} not found" in capfd.readouterr().err
