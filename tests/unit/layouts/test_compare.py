"""The verdict: what agrees passes, and each quantity that alone is off is found and named."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_vespo.layouts.compare import QUANTITIES, Row, compare
from megatron_vespo.layouts.layout import Layout
from megatron_vespo.layouts.outcome import Outcome
from megatron_vespo.layouts.report import as_json, as_markdown, as_text
from megatron_vespo.layouts.run import Comparison, verdict
from megatron_vespo.types import Prompt, Sample

NAMES = ("0/0", "0/1", "1/0")
TABLE = {
    "loss": [0.01, -0.02, 0.0],
    "log_w": [0.5, -40.0, 0.0],
    "phi": [0.9, 1.1, 1.0],
    "entropy": [30.0, 5.0, 0.0],
    "abs_log_ratio": [2.0, 50.0, 0.0],
    "tokens": [8.0, 60.0, 0.0],
}
REFERENCE = Outcome(
    table=TABLE,
    metrics={"train/entropy": 3.5, "vespo/ess_w": 0.9, "vespo/phi_mean_neg": None},
    grad_norm=0.25,
    facts={"largest_change": 5e-4, "router_gap": 1e-3},
)
WEIGHTS = {"a.weight": np.arange(6.0).reshape(2, 3) / 7, "b.weight": np.ones(3)}
FACTS = {"microbatches": 2.0, "lockstep_efficiency": 0.75}


def changed(name: str, sample: int, value: float) -> dict[str, Any]:
    column = list(TABLE[name])
    column[sample] = value
    return {"table": TABLE | {name: column}}


def run(weights: dict[str, np.ndarray] | None = None, **changes: Any) -> Row:
    """A layout whose outcome is the reference's in float32, with changes."""
    ours = replace(REFERENCE, facts=FACTS, **changes)
    own = {name: value.astype(np.float32) for name, value in WEIGHTS.items()} | (weights or {})
    found = compare(ours, REFERENCE, NAMES, own.items(), WEIGHTS)
    return Row(Layout(tp=2), 1.0, ours.facts, found)


def test_rounding_is_accepted() -> None:
    row = run()
    assert row.agrees and row.off == [] and verdict(row) == "ok"
    assert row.differences.keys() == QUANTITIES.keys()
    assert 0 < row.differences["weights"].value < 1e-7
    within = [
        changed("log_w", 1, -40.0 * (1 + 9e-6)),
        changed("log_w", 2, 9e-6),
        changed("phi", 0, 0.9 + 9e-6),
        {"grad_norm": 0.25 * (1 + 9e-5)},
    ]
    assert all(run(**change).agrees for change in within)


@pytest.mark.parametrize(
    "change, off, where",
    [
        # The losses of two samples, so that their sum stays.
        ({"table": TABLE | {"loss": [0.01 + 1e-6, -0.02 - 1e-6, 0.0]}}, ["figures"], "loss of sample 0/"),
        (changed("log_w", 2, 2e-5), ["log_w"], "log_w of sample 1/0"),
        (changed("log_w", 1, -40.0 * (1 + 2e-5)), ["log_w"], "log_w of sample 0/1"),
        (changed("log_w", 1, math.nan), ["log_w"], "log_w of sample 0/1"),
        (changed("log_w", 1, -math.inf), ["log_w"], "log_w of sample 0/1"),
        (changed("phi", 0, 0.9 + 2e-5), ["phi"], "phi of sample 0/0"),
        (changed("entropy", 0, 30.0 * (1 + 2e-5)), ["entropy"], "entropy of sample 0/0"),
        (changed("tokens", 1, 61.0), ["figures"], "tokens of sample 0/1"),
        (changed("abs_log_ratio", 1, 50.01), ["figures"], "abs_log_ratio of sample 0/1"),
        ({"table": {name: TABLE[name] for name in TABLE if name != "tokens"}}, ["figures"], "the layout lacks"),
        ({"table": TABLE | {"surprise": [0.0] * 3}}, ["figures"], "the reference lacks"),
        ({"table": TABLE | {"tokens": [8.0, 60.0]}}, ["figures"], "2 samples"),
        ({"metrics": REFERENCE.metrics | {"train/entropy": 3.6}}, ["metrics"], "train/entropy"),
        ({"metrics": REFERENCE.metrics | {"vespo/phi_mean_neg": 1.0}}, ["metrics"], "vespo/phi_mean_neg"),
        ({"metrics": {"train/entropy": 3.5, "vespo/phi_mean_neg": None}}, ["metrics"], "vespo/ess_w"),
        ({"grad_norm": 0.25 * (1 + 2e-4)}, ["grad_norm"], ""),
        ({"grad_norm": math.nan}, ["grad_norm"], ""),
        ({"rank_spread": 1e-12}, ["ranks"], ""),
    ],
)
def test_each_quantity_alone_is_caught(change: dict[str, Any], off: list[str], where: str) -> None:
    row = run(**change)
    assert row.off == off and not row.agrees
    assert where in row.differences[off[0]].where
    assert verdict(row) == f"OFF: {QUANTITIES[off[0]].heading}"


def test_the_loss_of_the_batch_is_caught() -> None:
    changes = [changed("loss", 0, 0.01 + size) for size in (2.9e-7, 3.1e-7)]  # the sum of |losses| is 0.03
    assert [run(**change).off for change in changes] == [[], ["loss", "figures"]]
    each = {"table": TABLE | {"loss": [0.01 + 1.6e-7, -0.02 + 1.6e-7, 0.0]}}
    assert run(**each).off == ["loss"], "each sample is within"


@pytest.mark.parametrize(
    "weights, where",
    [
        ({"a.weight": WEIGHTS["a.weight"] + np.array([[0, 2e-6, 0], [0, 0, 0]])}, "a.weight"),
        ({"a.weight": np.full((2, 3), np.nan)}, "a.weight"),
        ({"a.weight": WEIGHTS["a.weight"].T}, "a.weight of shape (3, 2)"),
        ({"c.weight": np.ones(1)}, "c.weight, which the reference lacks"),
    ],
)
def test_weights_are_caught(weights: dict[str, np.ndarray], where: str) -> None:
    row = run(weights)
    assert row.off == ["weights", "step"] and where in row.differences["weights"].where


def test_a_missing_weight_is_caught() -> None:
    found = compare(REFERENCE, REFERENCE, NAMES, [("a.weight", WEIGHTS["a.weight"])], WEIGHTS)
    assert found["weights"].value == math.inf and "b.weight, which the layout lacks" in found["weights"].where


def test_a_small_step_is_judged_by_its_own_size() -> None:
    """5e-7 is within the tolerance of weights, but half of a step of 1e-6."""
    tiny = replace(REFERENCE, facts={"largest_change": 1e-6})
    found = compare(REFERENCE, tiny, NAMES, (WEIGHTS | {"b.weight": np.ones(3) + 5e-7}).items(), WEIGHTS)
    assert Row(Layout(), 0, FACTS, found).off == ["step"]


def test_equal_infinities_agree() -> None:
    reference = replace(REFERENCE, **changed("log_w", 1, -math.inf))
    found = compare(reference, reference, NAMES, WEIGHTS.items(), WEIGHTS)
    assert found["log_w"].value == 0


def test_a_failed_layout_does_not_agree() -> None:
    row = Row(Layout(tp=2), 1.0, error="rank 1 ended with exit status 1: error: no")
    assert not row.agrees and verdict(row) == "FAILED"
    assert not Row(Layout(), 1.0).agrees, "nothing was compared"


# --- the table ---


def make_comparison(*rows: Row) -> Comparison:
    samples = [
        Sample(Prompt(0, np.zeros(1, np.int32)), 0, np.zeros(n, np.int32), np.zeros(n, np.float32), np.zeros(n), "stop")
        for n in (8, 60, 0)
    ]
    return Comparison(samples, REFERENCE, rows)


def test_the_text_names_layout_quantity_and_place() -> None:
    bad = replace(run(**changed("phi", 0, 0.8)), layout=Layout(dp=2))
    failed = Row(Layout(pp=2), 1.0, error="rank 1 ended with exit status 1: error: no such thing")
    comparison = make_comparison(run(), bad, failed)
    lines = as_text(comparison).splitlines()
    assert not comparison.agrees
    assert "3 samples, responses of 0 to 60 tokens; log W from -40 to 0.5" in lines[0]
    rows = {line.split()[0]: line for line in lines if line and line.split()[0] in ("tp2", "dp2", "pp2", "tolerance")}
    assert rows["tp2"].endswith("ok") and rows["dp2"].endswith("OFF") and rows["pp2"].endswith("FAILED")
    assert "1.0e-01!" in rows["dp2"] and "!" not in rows["tp2"]
    assert rows["tolerance"].split()[1:] == [f"{quantity.tolerance:.0e}" for quantity in QUANTITIES.values()]
    assert "dp2: phi is off by 0.1 (tolerance 1e-05; phi of each sample" in lines[-2]
    assert lines[-2].endswith("phi of sample 0/0")
    assert lines[-1] == "pp2: rank 1 ended with exit status 1: error: no such thing"


def test_a_batch_that_compares_nothing_is_remarked_on() -> None:
    on_policy = replace(REFERENCE, table=TABLE | {"log_w": [1e-6, 0.0, 0.0]}, grad_norm=0.0)
    text = as_text(replace(make_comparison(run()), reference=on_policy))
    assert "note: the samples are on-policy" in text and "note: the gradient is 0" in text
    assert "note" not in as_text(make_comparison(run()))


def test_a_near_tie_is_offered_as_an_explanation() -> None:
    tie = replace(REFERENCE, facts=REFERENCE.facts | {"router_gap": 1e-7})
    assert "nearly tied" not in as_text(replace(make_comparison(run()), reference=tie))
    assert "nearly tied" in as_text(replace(make_comparison(run(**changed("phi", 0, 0.8))), reference=tie))


def test_json_and_markdown_hold_the_same() -> None:
    comparison = make_comparison(run(), run(**changed("log_w", 1, math.nan)))
    tree = json.loads(as_json(comparison), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert tree["agrees"] is False and tree["tolerances"]["grad_norm"] == 1e-4
    assert tree["layouts"][0]["off"] == [] and tree["layouts"][0]["lockstep_efficiency"] == 0.75
    assert tree["layouts"][1]["differences"]["log_w"] == {"value": "nan", "where": "log_w of sample 0/1"}
    table = [line for line in as_markdown(comparison).splitlines() if line.startswith("|")]
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1
