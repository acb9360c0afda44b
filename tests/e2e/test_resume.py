"""A run that was killed and resumed is the run that was never interrupted, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vespo.rollout.batches import list_batches, load_batch
from megatron_vespo.rollout.server import SGLangServer
from tests.e2e.small_runs import make_tree, run_and_kill, run_main_on_ranks, write_config
from tests.weights import assert_bits_equal, read_weights

CHECKPOINTS = ["checkpoint.interval=5", "training.steps=10"]
RESUME = ["--resume", "auto"]


@pytest.fixture(scope="module")
def server(sglang_server: SGLangServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    """A server whose samples are determined by the requests' seeds."""
    args = {"enable_deterministic_inference": True, "context_length": 64, "max_total_tokens": 16384}
    log = tmp_path_factory.mktemp("deterministic") / "server.log"
    with SGLangServer(sglang_server.model_path, log, args=args) as server:
        server.wait_ready()
        yield server


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl but for what the clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time" and not k.startswith("perf/")} for line in lines]


def configure(server: SGLangServer, folder: Path, **rollout: Any) -> Path:
    tree = make_tree(server, folder, rollout={"save_batches": True, **rollout})
    tree["training"] |= {"lr_warmup_steps": 3, "lr_decay_style": "cosine", "minibatches_per_step": 4}
    return write_config(folder, tree)


def test_five_steps_a_kill_and_five_more_are_ten(server: SGLangServer, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for folder in (straight, broken):
        folder.mkdir()
    assert run_main_on_ranks(2, configure(server, straight), CHECKPOINTS) == [0, 0]
    path, run = configure(server, broken), broken / "runs" / "run"
    run_and_kill(path, CHECKPOINTS, run / "metrics.jsonl", step=7)
    assert [line["step"] for line in metrics(run)][-1] >= 7
    assert not (run / "hf").exists()
    assert run_main_on_ranks(2, path, [*CHECKPOINTS, *RESUME]) == [0, 0]

    ours, theirs = metrics(run), metrics(straight / "runs" / "run")
    assert [line["step"] for line in theirs] == list(range(11))
    assert ours == theirs
    assert_bits_equal(read_weights(run / "hf" / "latest"), read_weights(straight / "runs" / "run" / "hf" / "latest"))


def test_an_asynchronous_run_is_its_replay_whatever_was_interrupted(server: SGLangServer, tmp_path: Path) -> None:
    """Groups that waited in the buffer are trained on after the kill; replaying all batches gives the same weights."""
    path, run = configure(server, tmp_path, max_staleness=1), tmp_path / "runs" / "run"
    run_and_kill(path, CHECKPOINTS, run / "metrics.jsonl", step=7)
    assert run_main_on_ranks(2, path, [*CHECKPOINTS, *RESUME]) == [0, 0]
    batches = [load_batch(file) for file in list_batches(run / "rollouts")]
    assert [group.prompt.index for batch in batches for group in batch.groups] == list(range(40))
    assert any(sample.staleness(4 * 5) > 3 for group in batches[5].groups for sample in group.samples), "from before"

    replays = []
    for name, kills in (("straight", False), ("broken", True)):
        own = [*CHECKPOINTS, f"run.name={name}", f"rollout.replay={run / 'rollouts'}", "rollout.save_batches=false"]
        folder = tmp_path / "runs" / name
        if kills:
            run_and_kill(path, own, folder / "metrics.jsonl", step=6)
            own += RESUME
        assert run_main_on_ranks(2, path, own) == [0, 0]
        replays.append((metrics(folder), read_weights(folder / "hf" / "latest")))
    (straight, weights), (broken, broken_weights) = replays
    assert straight == broken
    assert_bits_equal(broken_weights, weights)
    assert_bits_equal(read_weights(run / "hf" / "latest"), weights)
    own_lines = metrics(run)[1:]  # step 0 is an evaluation, which a replay has none of
    assert [{k: line[k] for k in replayed} for line, replayed in zip(own_lines, straight, strict=True)] == straight


def test_supervised_training_resumes_as_well(sglang_server: SGLangServer, tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    tree = make_tree(sglang_server, tmp_path)
    data.write_text("".join(json.dumps({"prompt": "a b", "response": f"c {i}"}) + "\n" for i in range(37)))
    tree |= {"objective": "sft", "data": {"train": str(data)}}
    tree["training"] = {"steps": 30, "samples_per_step": 8, "max_tokens_per_microbatch": 64}
    path = write_config(tmp_path, tree)
    own = ["checkpoint.interval=10", "checkpoint.asynchronous=true"]
    assert run_main_on_ranks(2, path, [*own, "run.name=straight"]) == [0, 0]
    run, straight = tmp_path / "runs" / "run", tmp_path / "runs" / "straight"
    run_and_kill(path, own, run / "metrics.jsonl", step=19)
    assert run_main_on_ranks(2, path, [*own, *RESUME]) == [0, 0]
    assert metrics(run) == metrics(straight)
    assert_bits_equal(read_weights(run / "hf" / "latest"), read_weights(straight / "hf" / "latest"))
