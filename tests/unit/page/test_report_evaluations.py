"""The table of held-out results."""

import json
from pathlib import Path

import pytest
from test_report_page import make_run

from megatron_vespo.metrics.records import Records
from megatron_vespo.page.charts import charts_of
from megatron_vespo.page.content import content_of


def test_runs_stand_beside_each_other_with_first_last_and_best(tmp_path: Path) -> None:
    table = content_of([make_run(tmp_path / "a"), make_run(tmp_path / "b")])["evaluation"]
    assert [(row["measure"], row["run"]) for row in table["steps"]] == [
        ("avg@4", 0),
        ("avg@4", 1),
        ("pass@4", 0),
        ("pass@4", 1),
    ]
    row = table["steps"][0]
    assert row["set"] == "heldout" and row["problems"] == 9
    assert [(row[name]["step"], row[name]["value"]) for name in ("first", "last", "best")] == [
        (0, 0.25),
        (3, 0.5),
        (2, 0.75),
    ]
    assert (row["last"]["low"], row["last"]["high"]) == (0.375, 0.625)
    assert table["methods"] == ["by hand"]


def test_a_model_evaluated_by_itself_is_apart(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    record = json.loads((run / "evaluation" / "step_000000.json").read_text())
    del record["step"]
    (run / "evaluation" / "model_latest.json").write_text(json.dumps({**record, "label": "model_latest"}))
    table = content_of([run])["evaluation"]
    assert [(row["measure"], row["only"]["label"]) for row in table["others"]] == [
        ("avg@4", "model_latest"),
        ("pass@4", "model_latest"),
    ]
    assert all(row["first"]["step"] == 0 for row in table["steps"])


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"sets": {"a": {}}}', '{"label": "x", "intervals": "y", "sets": 5}', "[" * 100_000]
    + [
        '{"label": "x", "step": 1, "intervals": "y", "sets": {"heldout": {"problems": 9, "samples_per_prompt": 4,'
        f' "passes": {{}}, "average": {{"value": {value}, "low": 0, "high": 1}}}}}}}}'
        for value in ("NaN", "1e999", '"a"', "null")
    ],
)
def test_a_damaged_file_is_named_and_the_others_are_shown(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path / "run")
    (run / "evaluation" / "step_000009.json").write_text(text)
    content = content_of([run])
    assert [note for note in content["runs"][0]["notes"] if "evaluation/step_000009.json" in note]
    assert content["evaluation"]["steps"][0]["last"]["step"] == 3


def test_curves_have_intervals_and_a_line_for_each_k() -> None:
    fields = {"accuracy": 0.5, "accuracy_low": 0.25, "accuracy_high": 0.75, "pass_at_1": 0.5, "pass_at_2": 0.625}
    fields |= {"pass_at_16": 0.875, "pass_at_16_low": 0.75, "pass_at_16_high": 1.0}
    row = {f"eval/aime/{name}": value for name, value in fields.items()}
    average, passes = charts_of([Records([0, 5], [row, row], [0.0, 0.0], 0)])
    assert (average["title"], average["lines"][0]["points"]) == (
        "aime: avg@k",
        [[0, 5], [0.5, 0.5], [0.25, 0.25], [0.75, 0.75]],
    )
    assert [line["label"] for line in passes["lines"]] == ["pass@16", "pass@2"]
    assert passes["lines"][0]["points"][1:] == [[0.875] * 2, [0.75] * 2, [1.0] * 2]
