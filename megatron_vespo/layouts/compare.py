"""How far a layout's update is from the reference's, and whether that is too far. Pure functions of two outcomes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_vespo.layouts.layout import Layout
from megatron_vespo.layouts.outcome import Outcome


@dataclass(frozen=True, slots=True)
class Quantity:
    """Something that is compared.

    Attributes:
        heading: Its column in the table.
        tolerance: Largest difference that is accepted.
        measure: What is compared, and how the difference is taken.
    """

    heading: str
    tolerance: float
    measure: str


QUANTITIES: dict[str, Quantity] = {
    "loss": Quantity("loss", 1e-5, "loss of the batch, relative to the sum of the samples' |losses|"),
    "log_w": Quantity("log W", 1e-5, "log W of each sample, relative to max(1, |log W|)"),
    "phi": Quantity("phi", 1e-5, "phi of each sample, relative to max(1, phi)"),
    "entropy": Quantity("entropy", 1e-5, "entropy summed over each sample, relative to max(1, entropy)"),
    "figures": Quantity(
        "figures", 1e-5, "all other figures of each sample, relative to max(1, |figure|); its loss as the batch's"
    ),
    "metrics": Quantity("metrics", 1e-5, "metrics of the minibatch, relative to max(1, |metric|)"),
    "grad_norm": Quantity("grad norm", 1e-4, "norm of the whole gradient before clipping, relative"),
    "weights": Quantity("weights", 1e-6, "every weight after one optimizer step, absolute"),
    "step": Quantity("of step", 1e-3, "the same, divided by the largest change of a weight"),
    "ranks": Quantity("ranks", 0.0, "figures of the samples and gradient norm, between the ranks of the layout"),
}
_OWN_COLUMN = ("log_w", "phi", "entropy")


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest difference of a quantity, and where it is: a sample, a metric or a weight."""

    value: float
    where: str = ""


@dataclass(frozen=True)
class Row:
    """One layout.

    Attributes:
        layout: Which.
        seconds: Wall time of its run.
        facts: ``Outcome.facts``; empty where it failed.
        differences: Of every quantity by its key; empty where it failed.
        error: What went wrong, where it failed.
    """

    layout: Layout
    seconds: float
    facts: Mapping[str, float] = field(default_factory=dict)
    differences: Mapping[str, Difference] = field(default_factory=dict)
    error: str = ""

    @property
    def off(self) -> list[str]:
        """Keys of the quantities that are out of tolerance; a NaN is."""
        return [key for key, found in self.differences.items() if not found.value <= QUANTITIES[key].tolerance]

    @property
    def agrees(self) -> bool:
        """Whether it ran and nothing is off."""
        return not self.error and not self.off and self.differences.keys() == QUANTITIES.keys()


def compare(
    ours: Outcome,
    reference: Outcome,
    names: Sequence[str],
    our_weights: Iterable[tuple[str, np.ndarray]],
    weights: Mapping[str, np.ndarray],
) -> dict[str, Difference]:
    """Differences of every quantity.

    Args:
        ours: A layout's outcome.
        reference: The reference's.
        names: Names of the samples.
        our_weights: The layout's weights after the step.
        weights: The reference's.
    """
    found = {name: _samples(name, ours, reference, names) for name in _OWN_COLUMN}
    others = sorted((ours.table.keys() | reference.table.keys()) - set(_OWN_COLUMN))
    moved = _weights(our_weights, weights)
    return {
        "loss": Difference(abs(sum(ours.table["loss"]) - sum(reference.table["loss"])) / _loss_scale(reference)),
        **found,
        "figures": _largest(_samples(name, ours, reference, names) for name in others),
        "metrics": _metrics(ours.metrics, reference.metrics),
        "grad_norm": Difference(_relative(ours.grad_norm, reference.grad_norm)),
        "weights": moved,
        "step": Difference(moved.value / reference.facts["largest_change"], moved.where),
        "ranks": Difference(ours.rank_spread),
    }


def _largest(differences: Iterable[Difference]) -> Difference:
    """The first NaN, or the largest."""
    return max(differences, key=lambda found: math.inf if math.isnan(found.value) else found.value)


def _relative(ours: float, reference: float) -> float:
    return abs(ours - reference) / abs(reference) if reference else abs(ours)


def _loss_scale(reference: Outcome) -> float:
    """What differences of losses are relative to.

    Losses of both signs cancel in their sum, often to a small part of their size, and phi carries the rounding of log W
    into each. The sum of their magnitudes is at least the magnitude of the sum.
    """
    return float(np.abs(reference.column("loss")).sum()) or 1.0


def _distance(ours: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """|ours - reference|; 0 where both are the same infinity."""
    with np.errstate(invalid="ignore"):
        return np.where(ours == reference, 0.0, np.abs(ours - reference))


def _samples(name: str, ours: Outcome, reference: Outcome, names: Sequence[str]) -> Difference:
    """Largest difference of a figure over the samples."""
    if name not in ours.table or name not in reference.table:
        return Difference(
            math.inf, f"{name}, which {'the layout' if name in reference.table else 'the reference'} lacks"
        )
    mine, theirs = ours.column(name), reference.column(name)
    if mine.shape != theirs.shape or len(theirs) != len(names):
        return Difference(math.inf, f"{name} of {len(mine)} samples, not {len(names)}")
    finite = np.where(np.isfinite(theirs), np.abs(theirs), 0.0)
    scale = _loss_scale(reference) if name == "loss" else np.maximum(1.0, finite)
    distance = _distance(mine, theirs) / scale
    worst = int(np.argmax(np.where(np.isnan(distance), np.inf, distance)))
    return Difference(float(distance[worst]), f"{name} of sample {names[worst]}")


def _metrics(ours: Mapping[str, float | None], reference: Mapping[str, float | None]) -> Difference:
    differences = [Difference(0.0)]
    for name in sorted(ours.keys() | reference.keys()):
        mine, theirs = ours.get(name, math.nan), reference.get(name, math.nan)
        if mine is None or theirs is None:
            differences.append(Difference(0.0 if mine is theirs else math.inf, name))
        else:
            distance = _distance(np.array(mine), np.array(theirs))
            scale = max(1.0, abs(theirs)) if math.isfinite(theirs) else 1.0
            differences.append(Difference(float(distance) / scale, name))
    return _largest(differences)


def _weights(ours: Iterable[tuple[str, np.ndarray]], reference: Mapping[str, np.ndarray]) -> Difference:
    missing = set(reference)
    differences = [Difference(0.0)]
    for name, values in ours:
        if name not in reference:
            differences.append(Difference(math.inf, f"{name}, which the reference lacks"))
            continue
        missing.discard(name)
        theirs = reference[name]
        if values.shape != theirs.shape:
            differences.append(Difference(math.inf, f"{name} of shape {values.shape}, not {theirs.shape}"))
        else:
            distance = np.abs(values.astype(np.float64) - theirs)
            worst = np.unravel_index(np.argmax(np.where(np.isnan(distance), np.inf, distance)), distance.shape)
            differences.append(Difference(float(distance[worst]), f"{name}{[int(index) for index in worst]}"))
    differences += [Difference(math.inf, f"{name}, which the layout lacks") for name in sorted(missing)]
    return _largest(differences)
