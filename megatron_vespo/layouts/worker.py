"""One rank of a layout: the update as a run makes it, on a saved batch. Started by torchrun's engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_vespo import assemble, parallel
from megatron_vespo.errors import UserError
from megatron_vespo.files import atomic_folder
from megatron_vespo.layouts.outcome import WEIGHTS, Outcome
from megatron_vespo.layouts.work import Work, read_work
from megatron_vespo.metrics.measure import minibatch_metrics
from megatron_vespo.models.export import HfExporter
from megatron_vespo.models.hf_files import HfWriter
from megatron_vespo.models.registry import load_architecture

_TIMEOUT_MINUTES = 10


def measure(work: Work) -> tuple[HfExporter, Outcome]:
    """Make one update on the whole batch; what it did, and what streams the weights out. A collective."""
    config, samples = work.config, work.samples
    architecture = load_architecture(config.model.hf_path)
    trainer = assemble.make_trainer(config, architecture)
    algorithm, schedule = assemble.make_algorithm(config), assemble.make_schedule(config, architecture)
    algorithm.assign_advantages(work.batch.groups)
    plan = schedule.plan(samples)
    objective = algorithm.objective(trainer.policy, samples, schedule)
    measured = trainer.policy.forward_backward(samples, schedule.rank_plan(samples), objective)
    table = measured.table
    result = trainer.policy.optim_step()
    if result.skipped:
        raise UserError(f"the gradient of the batch is not finite: its norm is {result.grad_norm}")
    outcome = Outcome(
        table={name: column.tolist() for name, column in table.items()},
        metrics=minibatch_metrics(samples, table, work.batch.policy_version),
        grad_norm=result.grad_norm,
        facts={
            "microbatches": plan.num_microbatches,
            "lockstep_efficiency": plan.efficiency,
            "data_parallel_size": parallel.data_parallel_size(),
        },
        rank_spread=_spread([*table.values(), np.array([result.grad_norm])]),
    )
    return trainer.exporter, outcome


def _spread(figures: Sequence[np.ndarray]) -> float:
    """Largest difference between two ranks' figures, which should be equal to the last bit. A collective."""
    ranks = [np.array(values) for values in parallel.gather_values(np.concatenate(figures).tolist(), list[float])]
    if len({len(values) for values in ranks}) > 1:
        return float("inf")
    # Equal infinities differ by NaN, which is no difference.
    equal = np.all([(values == ranks[0]) | (np.isnan(values) & np.isnan(ranks[0])) for values in ranks], axis=0)
    if bool(equal.all()):
        return 0.0
    apart = np.stack(ranks)[:, ~equal]
    return float(np.nan_to_num(apart.max(axis=0) - apart.min(axis=0), nan=np.inf).max())


def write(exporter: HfExporter, outcome: Outcome, out: Path) -> None:
    """Write figures and weights, on rank 0. A collective."""
    if not parallel.is_main():
        for _ in exporter.stream():
            pass
        return
    with atomic_folder(out) as folder:
        (folder / WEIGHTS).mkdir()
        writer = HfWriter(folder / WEIGHTS)
        for tensors in exporter.stream():
            writer.add(tensors)
        writer.finish()
        outcome.write(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank.

    Returns:
        Exit status: 0, or 1 after an error that the user can mend, which is printed as one line.
    """
    try:
        work = read_work("megatron_vespo.layouts.worker", arguments)
        parallel.initialize(work.config.megatron, work.config.run.seed, timeout_minutes=_TIMEOUT_MINUTES)
        write(*measure(work), work.out)
        parallel.barrier()
        parallel.shutdown()
    except UserError as error:
        print(f"error: rank {os.environ['RANK']}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
