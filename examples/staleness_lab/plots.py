"""The pictures of a sweep: curves over updates, and the summary."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.staleness_lab.outcome import Outcome
from examples.staleness_lab.tables import Results, setting_name

# Neighbouring updates averaged in the curves.
_WINDOW = 8
_STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "axes.axisbelow": True,
    "font.size": 9,
    "axes.titlesize": 10,
}
_COLORS = (
    "#1f5fbf", "#d6278c", "#8c8c8c", "#e08214", "#c0392b", "#2e9e5b", "#8e5bb5",
    "#a0622d", "#16a3b8", "#9aa61e", "#444444", "#f2b134", "#7a9ccf",
)  # fmt: skip

type Curve = tuple[np.ndarray, np.ndarray]


def _history(column: str) -> Callable[[Outcome], Curve]:
    """Values of a column over updates, smoothed."""

    def curve(outcome: Outcome) -> Curve:
        values = np.array(outcome.history[column], dtype=float)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a window without values
            means = [np.nanmean(values[i : i + _WINDOW]) for i in range(0, len(values), _WINDOW)]
        return np.arange(len(means)) * _WINDOW + _WINDOW / 2, np.array(means)

    return curve


def _accuracy(outcome: Outcome) -> Curve:
    updates, shares = zip(*outcome.accuracy, strict=True)
    return np.array(updates, dtype=float), np.array(shares)


PANELS: tuple[tuple[str, Callable[[Outcome], Curve], str], ...] = (
    ("held-out accuracy", _accuracy, "linear"),
    ("reward of training samples", _history("reward"), "linear"),
    ("entropy (nats)", _history("entropy"), "linear"),
    ("gradient norm", _history("grad_norm"), "log"),
    ("mean |log W| (nats)", _history("log_w_abs"), "symlog"),
    ("ESS of W / samples", _history("ess_w"), "linear"),
    ("ESS of kappa / samples", _history("ess_phi"), "linear"),
    ("share of kappa < 0.1", _history("phi_small_share"), "linear"),
)
"""Rows of the curves: label, values, scale."""


def color_of(results: Results, method: str) -> str:
    """The same in every picture of a sweep."""
    return _COLORS[list(results.grid.methods).index(method) % len(_COLORS)]


def save_curves(results: Results, mismatch: str, lr: float, path: Path) -> None:
    """One setting: a row a figure, a column an N, a line a method with a band from the lowest to the highest seed."""
    ns = results.ns(mismatch, lr)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.2 * len(ns) + 0.6, 2.3 * len(PANELS)), layout="constrained")
        axes = figure.subplots(len(PANELS), len(ns), squeeze=False, sharex=True, sharey="row")
        for row, (label, curve, scale) in enumerate(PANELS):
            for column, n in enumerate(ns):
                axis = axes[row][column]
                for method in results.methods:
                    outcomes = [outcome for _, outcome in results.of(method, n, mismatch, lr)]
                    _draw_band(axis, [curve(outcome) for outcome in outcomes], method, color_of(results, method))
                if scale != "linear":
                    axis.set_yscale(scale)
                if row == 0:
                    axis.set_title(f"N = {n}")
            axes[row][0].set_ylabel(label)
        for axis in axes[-1]:
            axis.set_xlabel("updates")
        _legend(figure, axes.flat)
        figure.suptitle(setting_name(mismatch, lr))
        figure.savefig(path, dpi=90)


def _draw_band(axis: Axes, curves: Sequence[Curve], label: str, color: str) -> None:
    if not curves:
        return
    length = min(len(x) for x, _ in curves)
    x, values = curves[0][0][:length], np.array([y[:length] for _, y in curves])
    first = label.startswith("vespo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        axis.plot(x, np.nanmean(values, 0), label=label, color=color, linewidth=2.2 if first else 1.3, zorder=3 + first)
        axis.fill_between(x, np.nanmin(values, 0), np.nanmax(values, 0), color=color, alpha=0.10, linewidth=0)


def _legend(figure: Any, axes: Any) -> None:
    """One for the whole picture."""
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=6, frameon=False)


def _draw_dots(axis: Axes, results: Results, methods: Sequence[str], groups: Sequence[Sequence[Any]]) -> None:
    """Final accuracies: a group of bars for each list of keys, a bar a method, as high as the mean; dots are seeds."""
    width = 0.8 / max(len(methods), 1)
    for place, keys in enumerate(groups):
        for number, method in enumerate(methods):
            finals = [outcome.final for _, outcome in results.of(method, *keys)]
            x = place - 0.4 + width * (number + 0.5)
            color = color_of(results, method)
            if finals:
                axis.bar(x, float(np.mean(finals)), width * 0.9, color=color, alpha=0.35, linewidth=0)
                axis.plot([x] * len(finals), finals, "o", color=color, markersize=4, clip_on=False)
    axis.set_ylim(0, 1)
    axis.set_ylabel("held-out accuracy at the end")
    axis.grid(axis="x", visible=False)


def save_summary(results: Results, path: Path) -> None:
    """Final accuracies by method and N, and learning curves at the largest N, of the first setting."""
    mismatch, lr = results.settings[0]
    ns = results.ns(mismatch, lr)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11, 3.9), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_dots(left, results, results.methods, [(n, mismatch, lr) for n in ns])
        left.set_xticks(range(len(ns)), [f"N = {n}" for n in ns])
        left.set_title("accuracy over the last quarter (dots: seeds)")
        for method in results.methods:
            curves = [_accuracy(outcome) for _, outcome in results.of(method, ns[-1], mismatch, lr)]
            _draw_band(right, curves, method, color_of(results, method))
        right.set_ylim(0, 1)
        right.set_xlabel("updates")
        right.set_title(f"held-out accuracy at N = {ns[-1]} (band: seeds)")
        _legend(figure, [right])
        figure.savefig(path, dpi=110)


def save_mismatches(results: Results, n: int, lr: float, path: Path) -> None:
    """Final accuracies by method and mismatch."""
    mismatches = [mismatch for mismatch, rate in results.settings if rate == lr and n in results.ns(mismatch, rate)]
    methods = [name for name in results.methods if any(results.of(name, n, m, lr) for m in mismatches if m != "none")]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(max(6.0, 1.7 * len(mismatches) + 1), 3.6), layout="constrained")
        axis = figure.subplots()
        _draw_dots(axis, results, methods, [(n, mismatch, lr) for mismatch in mismatches])
        axis.set_xticks(range(len(mismatches)), mismatches)
        axis.set_title(f"N = {n}, learning rate {lr:g} (dots: seeds)")
        handles = [mpl.patches.Patch(color=color_of(results, name), alpha=0.6) for name in methods]
        figure.legend(handles, methods, loc="outside lower center", ncols=6, frameon=False)
        figure.savefig(path, dpi=100)
