"""When the health panel warns, and when it ends a run: one table of named conditions on metrics. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_vespo.errors import UserError
from megatron_vespo.upstream import nearest


@dataclass(frozen=True, slots=True)
class Condition:
    """One row of the table.

    Attributes:
        name: What the configuration calls it.
        metric: What is looked at.
        sign: 1: it holds where the metric is above the threshold; -1: below.
        threshold: Where it begins.
        steps: Steps in a row that it must hold before it is told of.
        meaning: What it says of the run.
    """

    name: str
    metric: str
    sign: int
    threshold: float
    steps: int
    meaning: str

    def holds(self, value: float | None) -> bool:
        """Whether the metric is beyond the threshold. NaN is."""
        return value is not None and not self.sign * value <= self.sign * self.threshold

    def describe(self, value: float) -> str:
        """Value and threshold in words."""
        side = "above" if self.sign > 0 else "below"
        return f"{self.metric} is {value:.3g}, {side} {self.threshold:g}: {self.meaning}"


_ABOVE, _BELOW = 1, -1

CONDITIONS: dict[str, Condition] = {
    row.name: row
    for row in (
        Condition("faint", "vespo/phi_mean", _BELOW, 0.1, 3, "the samples are hardly heard"),
        Condition("silent", "vespo/phi_mean", _BELOW, 0.02, 5, "nothing can be learned"),
        Condition("few_heard", "vespo/ess_phi", _BELOW, 0.1, 3, "few samples make up the gradient"),
        Condition("far", "vespo/log_w_abs_mean", _ABOVE, 10.0, 3, "the policy is far from what sampled"),
        Condition("infinite", "vespo/log_w_infinite_share", _ABOVE, 0.0, 1, "samples are dropped"),
        Condition("clamped", "health/clamp_share", _ABOVE, 0.01, 1, "log W is beyond what the kernel takes"),
        Condition("mismatch", "health/kl_fresh", _ABOVE, 2e-3, 1, "trainer and sampler disagree on fresh samples"),
        Condition("outliers", "health/outlier_share", _ABOVE, 1e-3, 1, "single tokens differ greatly"),
        Condition("rerouted", "health/router_flip_rate", _ABOVE, 0.2, 1, "trainer and sampler choose other experts"),
    )
}


def choose_conditions(thresholds: Mapping[str, float]) -> list[Condition]:
    """The table, with other thresholds for some.

    Raises:
        UserError: A name is not in the table.
    """
    _check_names("health.warn", thresholds)
    return [replace(row, threshold=float(thresholds.get(name, row.threshold))) for name, row in CONDITIONS.items()]


def stop_after(conditions: Sequence[str] | Mapping[str, int]) -> dict[str, int]:
    """Steps in a row by condition after which a run ends, from ``health.stop_when``: the table's, unless it says.

    Raises:
        UserError: A name is not in the table.
    """
    _check_names("health.stop_when", conditions)
    if isinstance(conditions, Mapping):
        return dict(conditions)
    return {name: CONDITIONS[name].steps for name in conditions}


def _check_names(field: str, names: Iterable[str]) -> None:
    for name in names:
        if name not in CONDITIONS:
            raise UserError(
                f"{field}: unknown condition {name!r}{nearest(name, CONDITIONS)}; there are: {', '.join(CONDITIONS)}"
            )


class Streaks:
    """For how many steps in a row each condition has held. Begins anew in a resumed run."""

    def __init__(self, conditions: list[Condition]) -> None:
        self.conditions = conditions
        self._lengths = {row.name: 0 for row in conditions}

    def update(self, values: Mapping[str, float | None]) -> list[Condition]:
        """Take a step's metrics; the conditions that have now held for their number of steps, and no longer."""
        for row in self.conditions:
            self._lengths[row.name] = self._lengths[row.name] + 1 if row.holds(values.get(row.metric)) else 0
        return [row for row in self.conditions if self._lengths[row.name] == row.steps]

    def length(self, name: str) -> int:
        """Steps in a row."""
        return self._lengths[name]
