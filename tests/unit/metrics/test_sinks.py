import json
import math
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vespo.metrics.records import read_metrics
from megatron_vespo.metrics.sinks import JsonlSink, RolloutSink, SampleScores, TensorBoardSink
from megatron_vespo.types import Prompt, Sample, SampleGroup


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_writes_whole_lines_at_once_and_appends(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(
        1, {"train/loss": 0.5, "train/grad_norm": math.nan, "vespo/phi_mean_neg": None, "train/tokens": math.inf}
    )
    assert path.read_bytes().endswith(b"}\n")  # before close: nothing is held back
    sink.close()
    sink = JsonlSink(path)
    sink.write(2, {"train/loss": 0.25})
    sink.close()
    first, second = lines(path)
    assert (first["step"], first["train/loss"], second["step"]) == (1, 0.5, 2)
    assert first["train/grad_norm"] is first["vespo/phi_mean_neg"] is first["train/tokens"] is None
    assert isinstance(first["time"], float)


def test_jsonl_goes_on_after_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "train/lo')
    sink = JsonlSink(path)
    sink.write(2, {"train/loss": 1.0})
    sink.close()
    records = read_metrics(path)
    assert records.steps == [1, 2]
    assert records.values[1] == {"train/loss": 1.0}
    assert records.unreadable_lines == 1


def test_numpy_and_torch_scalars_are_numbers(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.write(1, {"train/loss": np.float32(0.5)})  # type: ignore[dict-item]
    sink.close()
    assert lines(tmp_path / "m.jsonl")[0]["train/loss"] == 0.5


def test_tensorboard(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write(1, {"train/loss": 0.5, "vespo/phi_mean_neg": None})
    sink.write(2, {"train/loss": 0.25})
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]


def group(index: int) -> SampleGroup:
    prompt = Prompt(index, np.array([65, 66], np.int32), label="C", metadata={"data_source": "letters"})
    full = Sample(
        prompt,
        0,
        np.array([67, 68], np.int32),
        np.array([-0.1, -0.2], np.float32),
        np.array([3, 4], np.int32),
        "stop",
        "Cé",
        1.0,
        0.5,
        reward_terms={"math": 1.5, "overlong": -1.0},
    )
    empty = np.array([], np.int32)
    return SampleGroup(prompt, [full, Sample(prompt, 1, empty, empty.astype(np.float32), empty, "abort")])


def test_rollouts(tmp_path: Path) -> None:
    log_pi = np.array([-0.05, math.nan], np.float32)
    sink = RolloutSink(tmp_path / "rollouts", 2, decode=lambda ids: "".join(map(chr, ids)))
    sink.write(
        12,
        [group(i) for i in range(5)],
        {"0/0": SampleScores(0.25, 1.125, log_pi, 7), "0/1": SampleScores(-math.inf, 0.0, log_pi[:0], 7)},
    )
    path = tmp_path / "rollouts" / "step_000012.jsonl"
    assert "Cé" in path.read_text()
    records = lines(path)
    assert [r["sample"] for r in records] == ["0/0", "0/1", "4/0", "4/1"]
    assert records[0] == {
        "step": 12,
        "sample": "0/0",
        "prompt": "AB",
        "response": "Cé",
        "label": "C",
        "data_source": "letters",
        "reward": 1.0,
        "reward_terms": {"math": 1.5, "overlong": -1.0},
        "reward_error": "",
        "advantage": 0.5,
        "log_w": 0.25,
        "phi": 1.125,
        "length": 2,
        "finish_reason": "stop",
        "versions": [3, 4],
        "policy_version": 7,
        "tokens": {"text": ["C", "D"], "log_mu": [-0.1, -0.2], "log_pi": [-0.05, None], "version": [3, 4]},
    }
    assert records[1]["versions"] is None
    assert records[1]["reward_terms"] == {}
    assert records[1]["log_w"] is None
    assert records[2]["log_w"] is None
    assert records[2]["tokens"]["log_pi"] is None  # type: ignore[index]


@pytest.mark.parametrize(
    "wanted, given, written",
    [
        (0, 3, []),
        (1, 3, [2]),
        (2, 0, []),
        (3, 2, [0, 1]),
        (3, 5, [0, 2, 4]),
        (4, 32, [0, 11, 21, 31]),
        (5, 5, [*range(5)]),
    ],
)
def test_groups_are_spread_from_the_freshest_to_the_stalest(
    tmp_path: Path, wanted: int, given: int, written: list[int]
) -> None:
    RolloutSink(tmp_path, wanted, decode=str).write(1, [group(i) for i in range(given)])
    assert [r["sample"] for r in lines(tmp_path / "step_000001.jsonl")[::2]] == [f"{i}/0" for i in written]


def test_inserted_tokens_are_apart_from_those_of_the_policy(tmp_path: Path) -> None:
    told = group(0)
    told.samples[0].inserted_ids = np.array([69, 70], np.int32)
    told.samples[0].inserted_before = np.array([1, 2], np.int32)
    RolloutSink(tmp_path, 1, decode=lambda ids: "".join(map(chr, ids))).write(1, [told])
    tokens = lines(tmp_path / "step_000001.jsonl")[0]["tokens"]
    assert {"text": ["C", "D"], "inserted_text": ["E", "F"], "inserted_before": [1, 2]}.items() <= tokens.items()  # type: ignore[attr-defined]
