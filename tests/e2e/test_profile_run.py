"""A window of a real run under the profiler, on both ranks."""

import gzip
import json
from pathlib import Path

from megatron_vespo.metrics.records import read_metrics
from megatron_vespo.rollout.server import SGLangServer
from tests.e2e.small_runs import make_tree, run_main_on_ranks, write_config


def test_two_ranks(sglang_server: SGLangServer, tmp_path: Path) -> None:
    tree = make_tree(sglang_server, tmp_path, profile={"steps": [2, 2], "ranks": [0, 1]}, training={"steps": 3})
    assert run_main_on_ranks(2, write_config(tmp_path, tree), ["data.evaluation={}"]) == [0, 0]
    run = tmp_path / "runs" / "run"
    for rank in (0, 1):
        with gzip.open(run / "profile" / f"rank_{rank}_steps_2_2.json.gz", "rt") as file:
            events = json.load(file)["traceEvents"]
        ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        assert [name for name in ranges if name in ("generate", "train", "sync")] == ["generate", "train", "sync"]
        assert any(event["name"].startswith("aten::mm") for event in events)
    for row in read_metrics(run / "metrics.jsonl").values[1:]:
        phases = sum(value for name, value in row.items() if name.startswith("perf/") and name.endswith("_time"))
        assert abs(phases - row["perf/rollout_idle_time"] - 2 * row["perf/step_time"]) < 1e-6
        assert row["perf/train_flops"] > 0 and row["perf/train_tflops_per_rank"] > 0
        assert "perf/mfu" not in row and "perf/gpu_memory_allocated_max" not in row
