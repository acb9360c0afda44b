"""The order in which data is walked through, endlessly and resumably: several sources by weight, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.errors import UserError

MAX_PERIOD = 1 << 16
"""Draws after which the interleaving of sources repeats, at most: weights are rounded to shares of it."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What is drawn for a while.

    Attributes:
        members: Of each source the indices that are drawn; a source without any sits the stage out.
        weights: Of each source, above 0.
        length: Draws; None: it lasts.
    """

    members: Sequence[NDArray[np.int64]]
    weights: Sequence[float]
    length: int | None = None


class Interleaving:
    """Sources taken in turns by weight: of the first n draws a source has its share of n, rounded down or up.

    So in any n draws in a row it has its share to within 2. The rule is Balinski and Young's quota method (American
    Mathematical Monthly 82, 1975): of the sources that stay within their share rounded up, the one that is furthest
    behind its weight.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = _integer_shares(weights)
        self.period = sum(shares)
        self._shares = shares
        self._source = np.zeros(self.period, np.int32)
        self._before = np.zeros(self.period, np.int64)
        counts = [0] * len(shares)
        for number in range(self.period):
            # count < (number + 1) * share / period, and the lowest (count + 1) / share.
            within = [i for i, share in enumerate(shares) if counts[i] * self.period < (number + 1) * share]
            chosen = min(within, key=lambda i: (counts[i] + 1) / shares[i])
            self._source[number], self._before[number] = chosen, counts[chosen]
            counts[chosen] += 1

    def locate(self, position: int) -> tuple[int, int]:
        """(source of this draw, how often that source was drawn before)."""
        periods, offset = divmod(position, self.period)
        source = int(self._source[offset])
        return source, periods * self._shares[source] + int(self._before[offset])


class EndlessOrder:
    """Indices of a data set, epoch after epoch; each epoch of each source is shuffled anew.

    What is drawn at a position depends on nothing but the arguments here and the position, so that is the state.

    Args:
        size: Number of items, at least 1.
        seed: Of the shuffling.
        shuffle: False keeps the file's order.
        stages: What is drawn when; the last one lasts. Default: one stage, one source with everything.
        identity: What else must be the same for a saved position to mean the same, JSON-like.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        shuffle: bool = True,
        stages: Sequence[Stage] | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.position = 0
        self._seed = seed
        self._shuffle = shuffle
        self._settings = {"size": size, "seed": seed, "shuffle": shuffle, **(identity or {})}
        self._stages = stages or [Stage([np.arange(size)], [1.0])]
        self._interleavings: dict[int, tuple[list[int], Interleaving]] = {}
        self._epochs: dict[tuple[int, int], tuple[int, NDArray[np.int64]]] = {}

    def draw(self) -> tuple[int, int]:
        """The next (position in the endless stream, index in the data set)."""
        position = self.position
        self.position += 1
        return position, self.at(position)

    def at(self, position: int) -> int:
        """The index at a position."""
        number, stage = 0, self._stages[0]
        while stage.length is not None and position >= stage.length:
            position -= stage.length
            number, stage = number + 1, self._stages[number + 1]
        if number not in self._interleavings:
            present = [source for source, members in enumerate(stage.members) if len(members)]
            self._interleavings[number] = present, Interleaving([stage.weights[source] for source in present])
        present, interleaving = self._interleavings[number]
        place, drawn = interleaving.locate(position)
        source = present[place]
        epoch, offset = divmod(drawn, len(stage.members[source]))
        return int(self._epoch(number, source, epoch, stage.members[source])[offset])

    def _epoch(self, stage: int, source: int, epoch: int, members: NDArray[np.int64]) -> NDArray[np.int64]:
        """The source's members in the order of this epoch."""
        if not self._shuffle:
            return members
        kept, order = self._epochs.get((stage, source), (-1, members))
        if kept != epoch:
            # Zeros at the end change nothing: one source in one stage is shuffled by (seed, epoch).
            order = members[np.random.default_rng([self._seed, epoch, source, stage]).permutation(len(members))]
            self._epochs[stage, source] = epoch, order
        return order

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """State to resume from: at ``position``, or where the stream stands."""
        return {"position": self.position if position is None else position, **self._settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            UserError: it was saved with other data, another seed, or other settings of order.
        """
        saved = {name: value for name, value in state.items() if name != "position"}
        # States that were saved before there was one have no digest.
        own = {name: value for name, value in self._settings.items() if name != "digest" or name in saved}
        different = [name for name in {**own, **saved} if own.get(name) != saved.get(name)]
        if different:
            changes = ", ".join(f"{name} {saved.get(name)} -> {own.get(name)}" for name in different)
            raise UserError(
                f"the saved data position belongs to other data or settings ({changes}): "
                "restore them, or start a new run"
            )
        self.position = state["position"]


def _integer_shares(weights: Sequence[float]) -> list[int]:
    """The weights as the smallest whole numbers of the same ratio, rounded where their sum would be too large."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    whole = [share // gcd(*whole) for share in whole]
    total = sum(whole)
    if total > MAX_PERIOD:
        whole = [max(1, round(Fraction(share * MAX_PERIOD, total))) for share in whole]
    return whole
