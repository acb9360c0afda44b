"""``learning_curve.png``: how a run went, in one picture."""

from __future__ import annotations

import io
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_vespo.metrics.records import Records

# Okabe and Ito's colours, which people with colour-vision deficiencies can tell apart.
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
_EVAL_COLORS = (_ORANGE, _GREEN, _RED, "#CC79A7", "#56B4E9")

_Panel = Callable[[Axes, Records], None]


def draw_learning_curve(records: Records, title: str) -> bytes | None:
    """Draw the panels a run has data for; PNG bytes, or None where it has none."""
    panels: list[_Panel] = []
    if records.series("rollout/reward_mean")[0] or records.eval_sets():
        panels.append(_reward_panel)
    if records.series("train/accuracy")[0]:
        panels.append(_supervised_panel)
    if records.series("vespo/log_w_abs_mean")[0]:
        panels += [_weight_panel, _ess_panel]
    if not panels:
        return None

    # Figure and canvas by hand: pyplot would keep global state and may look for a display.
    figure = Figure(figsize=(8, 0.6 + 2.5 * len(panels)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        panel(axis, records)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _plot(axis: Axes, records: Records, name: str, label: str, color: str, *, dots: bool = False) -> None:
    """One curve; many steps get a thin raw line under its running mean. Nothing where there is no data."""
    steps, values = records.series(name)
    if not steps:
        return
    if dots or len(steps) < 30:
        axis.plot(steps, values, label=label, color=color, linewidth=1.6, marker="o", markersize=3.5)
        return
    axis.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
    axis.plot(steps, _running_mean(values, len(values) // 15), label=label, color=color, linewidth=1.8)


def _running_mean(values: list[float], window: int) -> list[float]:
    """Mean of up to ``window`` neighbours on each side."""
    parts = (values[max(0, i - window) : i + window + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def _legend(*axes: Axes) -> None:
    """One legend for an axis and its twin, above the panel where it hides no data."""
    parts = [axis.get_legend_handles_labels() for axis in axes]
    handles, labels = [h for p in parts for h in p[0]], [label for p in parts for label in p[1]]
    axes[0].legend(
        handles, labels, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(labels), frameon=False, fontsize=8
    )


def _reward_panel(axis: Axes, records: Records) -> None:
    _plot(axis, records, "rollout/reward_mean", "reward (training samples)", _BLUE)
    for i, name in enumerate(records.eval_sets()):
        color = _EVAL_COLORS[i % len(_EVAL_COLORS)]
        _plot(axis, records, f"eval/{name}/accuracy", f"held-out accuracy: {name}", color, dots=True)
    axis.set_ylabel("reward, accuracy")
    _legend(axis)


def _supervised_panel(axis: Axes, records: Records) -> None:
    _plot(axis, records, "train/loss", "loss (left)", _BLUE)
    axis.set_ylabel("loss")
    twin = _twin(axis)
    _plot(twin, records, "train/accuracy", "token accuracy (right)", _ORANGE)
    twin.set_ylabel("accuracy")
    _legend(axis, twin)


def _weight_panel(axis: Axes, records: Records) -> None:
    _plot(axis, records, "vespo/log_w_abs_mean", "mean |log W| (left)", _GREY)
    axis.set_ylabel("|log W|, nats")
    axis.set_ylim(bottom=0)
    twin = _twin(axis)
    _plot(twin, records, "vespo/phi_mean_pos", "phi, A > 0 (right)", _BLUE)
    _plot(twin, records, "vespo/phi_mean_neg", "phi, A < 0 (right)", _RED)
    twin.set_ylabel("mean phi")
    twin.set_ylim(0, 1.25)
    _legend(axis, twin)


def _ess_panel(axis: Axes, records: Records) -> None:
    _plot(axis, records, "vespo/ess_w", "ESS of W", _GREY)
    _plot(axis, records, "vespo/ess_phi", "ESS of phi", _BLUE)
    axis.set_ylabel("ESS / samples")
    axis.set_ylim(0, 1.05)
    _legend(axis)


def _twin(axis: Axes) -> Axes:
    twin = axis.twinx()
    twin.spines["top"].set_visible(False)
    return twin
