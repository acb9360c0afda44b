"""Which samples the page has, and what becomes of lines that are none."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_report_page import make_run

from megatron_vespo.metrics.records import parse_line
from megatron_vespo.page.content import content_of
from megatron_vespo.page.html import script_data
from megatron_vespo.page.run import read_run
from megatron_vespo.page.samples import (
    MAX_FILES,
    MAX_RESPONSE_TOKENS,
    MAX_SAMPLES,
    MAX_TEXT,
    _choose,
    _sample,
    read_samples,
)


def test_samples_are_capped_and_counted(tmp_path: Path) -> None:
    samples, left_out = read_samples([read_run(make_run(tmp_path / "run", steps=3, samples=MAX_SAMPLES))])
    assert len(samples) == MAX_SAMPLES
    assert left_out == 2 * MAX_SAMPLES
    assert {sample["step"] for sample in samples} == {1, 2, 3}


def test_of_long_runs_some_steps_are_shown_the_same_of_each_and_the_last(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name, steps=MAX_FILES, samples=3)) for name in "ab"]
    samples, left_out = read_samples(runs)
    steps = [{sample["step"] for sample in samples if sample["run"] == run} for run in (0, 1)]
    assert steps[0] == steps[1] and max(steps[0]) == MAX_FILES
    assert len(steps[0]) == MAX_FILES // 2
    assert len(samples) + left_out == 2 * 3 * MAX_FILES


@pytest.mark.parametrize("files", [0, 1, MAX_FILES, MAX_FILES + 1, 12_345])
def test_so_many_files_are_read_at_most(files: int) -> None:
    chosen = _choose(range(files), files)
    assert min(files, MAX_FILES // 2) <= len(chosen) <= MAX_FILES


def test_texts_and_tokens_are_cut(tmp_path: Path) -> None:
    many = MAX_RESPONSE_TOKENS + 1
    tokens = {"text": ["a"] * many, "log_mu": [0] * many, "log_pi": None, "version": [3] * many}
    sample = _sample({"step": 1, "prompt": "p" * (MAX_TEXT + 1), "tokens": tokens})
    assert sample is not None and sample["cut"]
    assert len(sample["prompt"]) == MAX_TEXT
    assert {len(sample["tokens"][name]) for name in tokens} == {MAX_RESPONSE_TOKENS}


def test_terms_source_and_inserted_tokens_are_shown(tmp_path: Path) -> None:
    sample = content_of([make_run(tmp_path / "run")])["samples"][0]
    assert (sample["reward_terms"], sample["data_source"]) == ({"format": 0.25}, "b")
    assert (sample["tokens"]["inserted_text"], sample["tokens"]["inserted_before"]) == (["<", ">"], [1, 1])


DAMAGED: dict[str, Any] = {
    "no object": [1],
    "no step": {"sample": "1/1"},
    "a step that is none": {"step": True},
    "a step beyond all numbers": {"step": 10**400},
    "a reward in words": {"step": 1, "reward": "high"},
    "a text that is none": {"step": 1, "prompt": {"a": 1}},
    "terms that are none": {"step": 1, "reward_terms": {"a": "b"}},
    "tokens that are none": {"step": 1, "tokens": "abc"},
    "lists of two lengths": {"step": 1, "tokens": {"text": ["a"], "log_mu": []}},
    "a list of other things": {"step": 1, "tokens": {"text": ["a"], "log_mu": [[]]}},
}


@pytest.mark.parametrize("record", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_no_sample(record: Any) -> None:
    assert _sample(parse_line(json.dumps(record))) is None


def test_damaged_lines_are_counted_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    damaged = ["{", "[" * 100_000, "9" * 5000, '{"step": 2, "reward": 1e999}', *map(json.dumps, DAMAGED.values())]
    with (run / "rollouts" / "step_000002.jsonl").open("a") as file:
        file.write("\n".join(damaged) + "\n\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n".join(damaged[:3]) + '\n{"step": 3, "train/loss": NaN, "train/entropy": 1' + "0" * 400 + "}\n")
    content = content_of([run])
    assert len(content["samples"]) == 6
    notes = " ".join(content["runs"][0]["notes"])
    assert f"step_000002.jsonl: {len(damaged)} unreadable" in notes
    assert "metrics.jsonl: 3 unreadable" in notes
    json.loads(script_data(content), parse_constant=pytest.fail)


def test_not_a_number_is_nothing() -> None:
    sample = _sample(
        parse_line('{"step": 1, "log_w": NaN, "phi": -Infinity, "tokens": {"log_mu": [NaN], "text": ["a"]}}')
    )
    assert sample is not None
    assert (sample["log_w"], sample["phi"], sample["tokens"]["log_mu"]) == (None, None, [None])
