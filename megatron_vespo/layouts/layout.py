"""Names of parallel layouts, such as ``tp2-ep2`` or ``pp2-vpp2-mb512``. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from megatron_vespo.errors import UserError
from megatron_vespo.megatron_options import DEFAULT_EXPERT_TENSOR_PARALLEL_SIZE

SMALLEST = "min"
"""Size of microbatches that hold the longest sample and no more: as many microbatches as there can be."""

DEFAULT_LAYOUTS = (
    "1",
    "1-mbmin",
    "tp2",
    "pp2",
    "ep2",
    "dp2",
    "tp2-ep2",
    "pp2-vpp2",
    "tp2-pp2",
    "pp2-ep2",
    "dp2-ep2",
    "dp2-mbmin",
    "tp2-etp2",
)

_SIZES = ("tp", "pp", "vpp", "dp", "ep", "etp")
_PART = re.compile(r"(tp|pp|vpp|dp|ep|etp|mb)(\d+|min)")


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ranks share what.

    Attributes:
        tp: Tensor-parallel size; more than 1 also means sequence parallelism, which MoE needs.
        pp: Pipeline stages.
        vpp: Virtual stages on each rank of an interleaved pipeline.
        dp: Copies of everything else.
        ep: Ranks that share the experts. It multiplies the ranks: the dense weights of ``ep2`` are on two ranks.
        etp: Ranks that share each expert.
        max_tokens: Most tokens of a microbatch; None: as the configuration says; 0: the longest sample's.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = DEFAULT_EXPERT_TENSOR_PARALLEL_SIZE
    max_tokens: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a name: parts such as ``tp2`` with ``-``, ``x`` or spaces between them, in any order and case.

        ``mb512`` sets training.max_tokens_per_microbatch, ``mbmin`` makes it the length of the longest sample. ``1`` is
        a single rank.

        Raises:
            UserError: A part is not known, appears twice or is 0, or the sizes do not go together.
        """
        sizes: dict[str, int | None] = {}
        for part in re.split(r"\s*[-x\s]\s*", text.strip().lower()):
            if part == "1":
                continue
            match = _PART.fullmatch(part)
            if match is None or (match[2] == SMALLEST and match[1] != "mb") or match[2].strip("0") == "":
                raise UserError(
                    f"layout '{text}': '{part}' is not a size such as tp2, pp2, vpp2, dp2, ep2, etp2, mb512 or mbmin"
                )
            name = "max_tokens" if match[1] == "mb" else match[1]
            if name in sizes:
                raise UserError(f"layout '{text}': {match[1]} appears twice")
            sizes[name] = 0 if match[2] == SMALLEST else int(match[2])
        layout = cls(**sizes)  # type: ignore[arg-type]
        if layout.vpp > 1 and layout.pp == 1:
            raise UserError(f"layout '{text}': vpp interleaves the stages of a pipeline, so it needs pp2 or more")
        return layout

    @property
    def name(self) -> str:
        """The name again, its parts in one order."""
        parts = [f"{name}{getattr(self, name)}" for name in _SIZES if getattr(self, name) > 1]
        microbatch = [] if self.max_tokens is None else [f"mb{self.max_tokens or SMALLEST}"]
        return "-".join([*(parts or ["1"]), *microbatch])

    @property
    def ranks(self) -> int:
        """Number of ranks: tp * pp * dp * ep, and as many more as sharing experts by ``etp`` needs."""
        unit = math.lcm(self.tp * self.pp, self.pp * self.ep * self.etp)
        return -(-self.tp * self.pp * self.dp * self.ep // unit) * unit

    def megatron(self) -> Mapping[str, int | bool | None]:
        """The fields of a ``megatron:`` section that say this; all of them, so that a configuration's own are gone."""
        return {
            "tensor_model_parallel_size": self.tp,
            "sequence_parallel": self.tp > 1,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": self.vpp if self.vpp > 1 else None,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
        }

    def overrides(self, longest: int) -> list[str]:
        """``section.key=value`` overrides of a configuration.

        Args:
            longest: Positions that the longest sample takes in a microbatch.
        """
        yaml = {True: "true", False: "false", None: "null"}
        values = [
            f"megatron.{name}={yaml[value] if value is None or isinstance(value, bool) else value}"
            for name, value in self.megatron().items()
        ]
        if self.max_tokens is not None:
            values.append(f"training.max_tokens_per_microbatch={self.max_tokens or longest}")
        return values
