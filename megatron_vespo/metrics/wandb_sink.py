"""Metrics for Weights & Biases, online or offline, under the names that they have everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_vespo.errors import UserError
from megatron_vespo.files import atomic_write
from megatron_vespo.metrics.sinks import MetricValues


class WandbSink:
    """One W&B run, in ``wandb/`` of the run's folder. A run that is resumed goes on in it.

    Args:
        folder: The run's.
        mode: ``offline`` writes files only, for ``wandb sync``.
        project: W&B project.
        name: What W&B calls the run.
        config: The run's configuration.
        entity: User or team; default: the one logged in.
        group: Group of runs.
        tags: Tags.

    Raises:
        UserError: The package is not installed, or W&B refuses.
    """

    def __init__(
        self,
        folder: Path,
        mode: Literal["offline", "online"],
        project: str,
        name: str,
        config: Mapping[str, Any],
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("logging.wandb needs the package: pip install wandb") from error
        self._wandb = wandb
        folder.mkdir(parents=True, exist_ok=True)
        # Nothing of the machine or the code leaves it: W&B gets the metrics and the configuration.
        settings = wandb.Settings(
            silent=True, console="off", x_disable_stats=True, x_disable_meta=True, disable_git=True, save_code=False
        )
        id_file = folder / "wandb_run_id.txt"
        known = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else None
        try:
            self._run = wandb.init(
                project=project,
                entity=entity,
                name=name,
                group=group,
                tags=list(tags),
                id=known,
                resume="allow" if known else None,
                dir=str(folder),
                mode=mode,
                config=dict(config),
                settings=settings,
            )
        except wandb.Error as error:
            raise UserError(f"logging.wandb: {error}") from error
        atomic_write(id_file, f"{self._run.id}\n")
        # A step of our own: W&B's counts up only, while a resumed run writes some steps again.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: MetricValues) -> None:
        """Add one point to each curve."""
        values = {name: value for name, value in metrics.items() if value is not None}
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Send or write out what is left, and end W&B's own process."""
        self._run.finish()
        self._wandb.teardown()
