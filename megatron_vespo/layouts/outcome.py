"""What one update of the policy on one batch did: the reference's and every layout's, in the same form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from megatron_vespo.errors import UserError
from megatron_vespo.files import atomic_write

WEIGHTS = "weights"
_FIGURES = "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """One update. Its weights lie in ``weights/*.safetensors`` of its folder, under Hugging Face names.

    Attributes:
        table: Figures of every sample by name, each [samples].
        metrics: Metrics of the minibatch; None where one has nothing to be computed from.
        grad_norm: Norm of the whole gradient before clipping.
        facts: What is shown but not compared, such as the number of microbatches.
        rank_spread: Largest difference between two ranks' tables, norms or metrics; they must all hold the same.
    """

    table: Mapping[str, list[float]]
    metrics: Mapping[str, float | None]
    grad_norm: float
    facts: Mapping[str, float]
    rank_spread: float = 0.0

    def column(self, name: str) -> np.ndarray:
        """Figures of every sample, [samples] float64."""
        return np.asarray(self.table[name], dtype=np.float64)

    def write(self, folder: Path) -> None:
        """Write the figures to ``folder``, beside the weights that are there already."""
        atomic_write(folder / _FIGURES, json.dumps(asdict(self), indent=1))

    @staticmethod
    def read(folder: Path) -> Outcome:
        """Read what ``write`` wrote.

        Raises:
            UserError: There is none.
        """
        path = folder / _FIGURES
        if not path.is_file():
            raise UserError(f"{path} is missing: the run that should have written it did not finish")
        return Outcome(**json.loads(path.read_text(encoding="utf-8")))


def read_weights(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of an outcome's weights, one at a time."""
    for path in sorted((folder / WEIGHTS).glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                yield name, file.get_tensor(name)
