"""Write docs/metrics.md from the table of metrics: ``python tools/write_metrics_doc.py``."""

from __future__ import annotations

from pathlib import Path

from megatron_vespo.files import atomic_write
from megatron_vespo.metrics.registry import METRICS, Combine, Metric

TARGET = Path(__file__).parents[1] / "docs" / "metrics.md"

HEAD = """\
# Metrics

Made by `tools/write_metrics_doc.py` from `megatron_vespo/metrics/registry.py`: change it there.

Every step's metrics go, under the same names, to

- `metrics.jsonl` in the run's folder, one JSON object a step; a value that could not be measured is null or missing;
- TensorBoard, `tensorboard --logdir runs` (`logging.tensorboard: false` turns it off);
- Weights & Biases with `logging.wandb: {mode: online}`, after `pip install wandb`. `mode: offline` writes the run into
  `wandb/` of the run's folder, for `wandb sync`. The configuration goes along; console, code and facts of the machine
  do not. A resumed run goes on in its W&B run. The x axis is the run's own `step`.

A step may make several updates, each on a minibatch with values of its own. "Of a step" says how they become one.
`<set>` is the name of an evaluation set, `<term>` of one of `reward.terms`, `<source>` a prompt's `data_source`
([data.md](data.md)), `<k>` a number. A name that is not in the table is an error.

## Time, throughput and profiles

`perf/<phase>_time` and `perf/other_time` add up to `perf/step_time`. `perf/mfu` counts what the model's equations need:
the backward pass as twice the forward pass, attention with its causal half, no recomputation; `train_time`, which it is
divided by, has forward passes of recomputed log-probabilities in it too. The peak is that of dense bfloat16, also where
experts compute in FP8, and is known for A100, H100, H200 and B200 (SXM); elsewhere the metric is left out.

    profile: {steps: [5, 6], ranks: [0, 4]}

profiles these steps with `torch.profiler` and writes `profile/rank_0_steps_5_6.json.gz`, for Perfetto
(https://ui.perfetto.dev) or chrome://tracing. The loop's phases (generate, train, sync, ...) are ranges in it. With
`tool: nsys` CUDA's profiler is started and stopped instead, and the phases and Megatron's own ranges are NVTX ranges:

    nsys profile --trace cuda,nvtx --capture-range=cudaProfilerApi --capture-range-end=stop \\
        python -m megatron_vespo.launch --ranks 8 config.yaml 'profile={steps: [5, 6], tool: nsys}'
"""

SECTIONS = {
    "train": "Updates",
    "vespo": "Importance weights",
    "rollout": "Samples",
    "reward": "Rewards by term and by source",
    "eval": "Held-out problems",
    "health": "Health panel",
    "perf": "Time and devices",
}
HOW = {
    Combine.MEAN: "mean of the updates",
    Combine.MAX: "largest of the updates",
    Combine.SUM: "sum",
    Combine.LAST: "one value",
}


def render() -> str:
    """The document."""
    parts = [HEAD]
    for prefix, title in SECTIONS.items():
        rows = [row for row in METRICS.values() if row.name.split("/")[0] == prefix]
        parts.append(f"## {title}\n\n| name | unit | of a step | what it is |\n| --- | --- | --- | --- |")
        parts[-1] += "".join(_row(row) for row in rows) + "\n"
    return "\n".join(parts)


def _row(row: Metric) -> str:
    text = row.description.replace("|", "\\|")
    return f"\n| `{row.name}` | {row.unit or '-'} | {HOW[row.combine]} | {text} |"


if __name__ == "__main__":
    atomic_write(TARGET, render())
