import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megatron_vespo.config_file import parse_config
from megatron_vespo.errors import UserError
from megatron_vespo.evaluation import EvaluationSet, Evaluator
from megatron_vespo.inputs import evaluation_sampling
from megatron_vespo.metrics.evaluations import EvaluationSink, Scoring, console_table, markdown_table, read_results
from megatron_vespo.metrics.registry import StepMetrics
from megatron_vespo.metrics.rollback import roll_back
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.types import Prompt, Sample, SampleGroup


def group(index: int, *rewards: float | None) -> SampleGroup:
    """None: could not be scored."""
    prompt = Prompt(index, np.array([65, 66], np.int32), label="C")
    samples = []
    for number, reward in enumerate(rewards):
        ids = np.arange(number + 1, dtype=np.int32)
        sample = Sample(prompt, number, ids, ids.astype(np.float32), ids, "length" if number else "stop", "sí")
        sample.reward, sample.reward_error = (0.0, "took too long") if reward is None else (reward, "")
        samples.append(sample)
    return SampleGroup(prompt, samples)


class Sampler:
    """Gives a set's groups in turn; none once asked to stop."""

    def __init__(self, *answers: list[SampleGroup]) -> None:
        self.answers, self.asked = list(answers), list[tuple[int, SamplingParams]]()

    def evaluate(self, prompts: object, n: int, sampling: SamplingParams) -> list[SampleGroup]:
        self.asked.append((n, sampling))
        return self.answers.pop(0)


GREEDY, WARM = SamplingParams(4, temperature=0, evaluation=True), SamplingParams(9, top_p=0.9, evaluation=True)
SETS = [EvaluationSet("aime", (), 2, WARM), EvaluationSet("gsm", (), 1, GREEDY)]


def make(folder: Path, sampler: Sampler, keep: bool = True) -> Evaluator:
    sink = EvaluationSink(folder / "evaluation", lambda ids: "".join(map(chr, ids)), keep)
    return Evaluator(sampler, SETS, 2, Scoring(), sink)


def test_an_evaluation(tmp_path: Path) -> None:
    sampler = Sampler([group(0, 1.0, None), group(1, 1.0, 1.0), group(2, 0.0, 0.0)], [group(0, 1.0)])
    values = make(tmp_path, sampler).run(12)
    assert sampler.asked == [(2, WARM), (1, GREEDY)]
    assert values["eval/aime/accuracy"] == 0.5  # what could not be scored counts as 0
    assert values["eval/aime/pass_at_1"] == 0.5
    assert values["eval/aime/pass_at_2"] == pytest.approx(2 / 3)
    low, high = values["eval/aime/pass_at_2_low"], values["eval/aime/pass_at_2_high"]
    assert low == 0 and high == 1
    assert values["eval/aime/reward_failed_share"] == pytest.approx(1 / 6)
    assert values["eval/aime/response_length_mean"] == 1.5
    assert values["eval/aime/truncated_share"] == 0.5
    assert values["eval/gsm/accuracy"] == 1.0 and "eval/gsm/pass_at_1" not in values
    StepMetrics().update(values)  # all names are declared

    folder = tmp_path / "evaluation"
    (record,) = read_results(folder)
    assert (
        record["step"] == 12 and record["label"] == "step_000012" and "bootstrap over problems" in record["intervals"]
    )
    assert record["sets"]["aime"]["sampling"]["top_p"] == 0.9 and record["sets"]["gsm"]["problems"] == 1
    assert record["sets"]["aime"]["passes"]["2"]["value"] == pytest.approx(2 / 3)
    answers = [json.loads(line) for line in (folder / "aime" / "step_000012.jsonl").read_text().splitlines()]
    assert len(answers) == 6
    assert answers[1] == {
        "prompt_index": 0,
        "sample": 1,
        "prompt": "AB",
        "response": "sí",
        "label": "C",
        "reward": 0.0,
        "reward_error": "took too long",
        "length": 2,
        "finish_reason": "length",
    }
    table = (folder / "results.md").read_text()
    assert "| step_000012 | aime | 3 | @2 0.500 [0.000, 1.000] | @2 0.667 [" in table and "bootstrap" in table
    assert not list(folder.rglob(".*"))


def test_the_table_has_steps_in_order_and_then_single_models(tmp_path: Path) -> None:
    for step in (10, 9):
        make(tmp_path, Sampler([group(0, 1.0, 0.0)], [group(0, 1.0)]), keep=False).run(step)
    make(tmp_path, Sampler([group(0, 1.0, 0.0)], [group(0, 1.0)]), keep=False).evaluate("base", {})
    labels = [
        line.split("|")[1].strip() for line in markdown_table(read_results(tmp_path / "evaluation")).splitlines()[4:9]
    ]
    assert labels == ["step_000009", "step_000009", "step_000010", "step_000010", "base"]
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_terminal_of_80_columns_has_every_k_in_one_piece(tmp_path: Path) -> None:
    groups = [group(index, *[float(index % 2)] * 32) for index in range(4)]
    make(tmp_path, Sampler(groups, [group(0, 1.0)])).evaluate("model_Qwen3-30B-A3B", {})
    (record,) = read_results(tmp_path / "evaluation")
    terminal = StringIO()
    Console(width=80, file=terminal).print(console_table(record))
    shown = terminal.getvalue()
    assert "model_Qwen3-30B-A3B" in shown and "4 problems x 32" in shown and "1 problems x 1 " in shown
    for score in ("avg@32", "pass@2", "pass@4", "pass@8", "pass@16", "pass@32"):
        assert f"{score:8} 0.500 [0.000, 1.000]" in shown


def test_half_an_evaluation_is_none(tmp_path: Path) -> None:
    assert make(tmp_path, Sampler([group(0, 1.0, 1.0)], [])).run(3) == {}
    assert not list(tmp_path.rglob("*.json"))


def test_a_resumed_run_takes_later_evaluations_back(tmp_path: Path) -> None:
    for step in (4, 8):
        make(tmp_path, Sampler([group(0, 1.0, 0.0)], [group(0, 1.0)])).run(step)
    roll_back(tmp_path, 5)
    assert {path.name for path in tmp_path.rglob("step*")} == {"step_000004.json", "step_000004.jsonl"}


def tree(**evaluation: object) -> dict[str, object]:
    return {
        "run": {"name": "x"},
        "model": {"hf_path": "m"},
        "data": {"train": "t", "evaluation": {"aime": "a.jsonl", "gsm": "b.jsonl"}},
        "training": {"steps": 1},
        "rollout": {"max_new_tokens": 100, "stop_token_ids": [7]},
        "evaluation": evaluation,
    }


def test_sets_have_their_own_sampling() -> None:
    sets = {"aime": {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 900, "samples_per_prompt": 32}}
    config = parse_config(tree(temperature=0.0, samples_per_prompt=2, sets=sets))
    assert evaluation_sampling(config, "aime") == SamplingParams(900, 0.6, 0.95, -1, (7,), evaluation=True)
    assert evaluation_sampling(config, "gsm") == SamplingParams(100, 0.0, 1.0, -1, (7,), evaluation=True)
    assert config.evaluation.of_set("aime").samples_per_prompt == 32
    assert config.evaluation.of_set("gsm").samples_per_prompt == 2


def test_a_set_that_is_not_there_and_names_that_are_no_names() -> None:
    with pytest.raises(UserError, match=r"evaluation.sets.aim: data.evaluation has no such set.*aime"):
        parse_config(tree(sets={"aim": {}}))
    wrong = tree()
    wrong["data"] = {"train": "t", "evaluation": {"../a": "a.jsonl"}}
    with pytest.raises(UserError, match=r"data.evaluation.*\.\./a"):
        parse_config(wrong)
