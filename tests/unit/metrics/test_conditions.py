import math

import pytest

from megatron_vespo.errors import UserError
from megatron_vespo.metrics.conditions import CONDITIONS, Streaks, choose_conditions, stop_after
from megatron_vespo.metrics.registry import METRICS


def test_every_condition_looks_at_a_metric() -> None:
    for name, row in CONDITIONS.items():
        assert row.name == name and row.metric in METRICS and row.sign in (1, -1) and row.steps >= 1


def test_above_and_below() -> None:
    low, high = CONDITIONS["silent"], CONDITIONS["outliers"]
    assert low.holds(0.019) and not low.holds(0.02) and not low.holds(0.5)
    assert high.holds(0.002) and not high.holds(0.001)
    assert not low.holds(None), "nothing to measure is no condition"
    assert low.holds(math.nan) and high.holds(math.nan), "a number that went wrong is"
    assert low.describe(0.01) == "vespo/phi_mean is 0.01, below 0.02: nothing can be learned"


def test_other_thresholds_and_names_that_are_wrong() -> None:
    chosen = {row.name: row for row in choose_conditions({"mismatch": 1})}
    assert chosen["mismatch"].threshold == 1.0 and chosen["silent"] == CONDITIONS["silent"]
    with pytest.raises(UserError, match=r"health.warn: unknown condition 'mismach'; did you mean 'mismatch'\?"):
        choose_conditions({"mismach": 1})
    assert stop_after(["silent"]) == {"silent": 5} and stop_after({"silent": 2}) == {"silent": 2}
    with pytest.raises(UserError, match=r"health.stop_when: unknown condition 'x'; there are: faint, silent, "):
        stop_after(["x"])


def test_a_condition_begins_once_it_has_held_long_enough() -> None:
    streaks = Streaks(choose_conditions({}))
    begun = [
        [row.name for row in streaks.update({"vespo/phi_mean": phi})] for phi in (0.05, 0.05, 0.5, 0.05, 0.05, 0.05, 0)
    ]
    assert begun == [[], [], [], [], [], ["faint"], []]
    assert streaks.length("faint") == 4 and streaks.length("silent") == 1
