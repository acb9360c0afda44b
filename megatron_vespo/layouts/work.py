"""The task that the reference and the ranks of a layout are given, on their command lines. No torch here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.config import Config
from megatron_vespo.config_file import load_config
from megatron_vespo.rollout.batches import RolloutBatch, load_batch
from megatron_vespo.types import Sample


@dataclass(frozen=True)
class Work:
    """One update to be made.

    Attributes:
        config: Configuration, the layout's overrides applied.
        batch: The saved rollout batch.
        out: Folder that the outcome goes to.
    """

    config: Config
    batch: RolloutBatch
    out: Path

    @property
    def samples(self) -> list[Sample]:
        """All samples of the batch: one minibatch."""
        return [sample for group in self.batch.groups for sample in group.samples]


def work_arguments(config: Path, batch: Path, out: Path, overrides: Sequence[str]) -> list[str]:
    """The command line that ``read_work`` reads."""
    return ["--config", str(config), "--batch", str(batch), "--out", str(out), *overrides]


def read_work(program: str, arguments: Sequence[str] | None = None) -> Work:
    """Read command line, configuration and batch.

    Raises:
        UserError: One of them is wrong.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {program}")
    for name in ("config", "batch", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)
    return Work(load_config(options.config, options.overrides), load_batch(options.batch), options.out)
