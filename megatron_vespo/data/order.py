"""The order in which a data set is walked through, endlessly and resumably."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_vespo.errors import UserError


class EndlessOrder:
    """Indices of a data set, epoch after epoch; each epoch is shuffled by (seed, epoch).

    The state is one number, the position: what was drawn before decides nothing.

    Args:
        size: Number of items, at least 1.
        seed: Of the shuffling.
        shuffle: False keeps the file's order.
    """

    def __init__(self, size: int, seed: int, shuffle: bool = True) -> None:
        self.position = 0
        self._size = size
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._permutation = np.arange(size)

    def draw(self) -> tuple[int, int]:
        """The next (position in the endless stream, index in the data set)."""
        position = self.position
        epoch, offset = divmod(position, self._size)
        if self._shuffle and epoch != self._epoch:
            self._permutation = np.random.default_rng([self._seed, epoch]).permutation(self._size)
            self._epoch = epoch
        self.position += 1
        return position, int(self._permutation[offset])

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """State to resume from: at ``position``, or where the stream stands."""
        state = {"position": self.position, "size": self._size, "seed": self._seed, "shuffle": self._shuffle}
        return state if position is None else state | {"position": position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            UserError: it was saved with other data, another seed or another setting of shuffle.
        """
        own = self.state_dict(state["position"])
        different = [name for name in own if own[name] != state[name]]
        if different:
            changes = ", ".join(f"{name} {state[name]} -> {own[name]}" for name in different)
            raise UserError(
                f"the saved data position belongs to other data or settings ({changes}): "
                "restore them, or start a new run"
            )
        self.position = state["position"]
