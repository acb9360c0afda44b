"""What a sweep is made of: methods, mismatches and cells, read from a YAML file. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from megatron_vespo.config import AlgorithmSection, Section
from megatron_vespo.config_file import read_yaml
from megatron_vespo.errors import UserError


class Fp8Settings(Section):
    """FP8 (e4m3), emulated."""

    granularity: Literal["tensor", "block"] = "block"
    """What shares a scale: the whole tensor, or 128 x 128 of a weight and 1 x 128 of an activation."""
    scale: Literal["fp32", "ue8m0"] = "fp32"
    """Scales as float32, or powers of two."""
    linears: Literal["experts", "all"] = "experts"
    """Linears of the experts, or of attention too."""


class Mismatch(Section):
    """How sampler and trainer differ."""

    sampler_dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations of the sampler."""
    sampler_fp8: Fp8Settings | None = None
    """Quantise the sampler."""
    trainer_fp8: Fp8Settings | None = None
    """Quantise the trainer's forward pass."""
    router_noise: float = Field(default=0.0, ge=0)
    """Standard deviation of noise on the sampler's router logits: another choice of experts."""
    hold_back: int = Field(default=0, ge=0)
    """Pushes that the sampler is behind: it samples with the weights of so many rollout batches ago."""


class Method(AlgorithmSection):
    """A method: the ``algorithm:`` section of a run, where its mu comes from, and what else belongs to it."""

    behavior_logprobs: Literal["rollout", "recompute", "both"] = "rollout"
    """As ``rollout.behavior_logprobs``."""
    megatron: dict[str, Any] = Field(default={})
    """Further fields of Megatron's sections: another optimizer, say."""


class Task(Section):
    """The digits task, the model and the minibatch; the same in all cells of a sweep."""

    sampler: Literal["in-process", "sglang"] = "in-process"
    """Who samples: the laboratory's own, or a real SGLang server through the normal launch, one run at a time."""
    updates: int = Field(default=256, ge=1)
    """Optimizer steps of each run, whatever N is."""
    prompts_per_minibatch: int = Field(default=8, ge=1)
    """Groups of one optimizer step; a rollout batch has N times as many."""
    samples_per_prompt: int = Field(default=8, ge=2)
    """Responses of a group."""
    max_new_tokens: int = Field(default=20, ge=1)
    """Longest response."""
    hidden_size: int = 32
    """Of the model."""
    moe_intermediate_size: int = 64
    """Of each expert."""
    num_experts: int = 4
    """Of each layer, of which two are chosen."""
    sft_steps: int = Field(default=400, ge=1)
    """Optimizer steps of supervised training that make the start of all runs."""
    wrong_sum: float = Field(default=0.12, ge=0, le=1)
    """Share of running sums in the supervised texts that are drawn at random."""
    evaluate_every: int = Field(default=16, ge=1)
    """Optimizer steps between measurements of held-out accuracy."""
    megatron: dict[str, Any] = Field(default={})
    """Further fields of Megatron's sections, for all runs."""


class Cell(Section):
    """One run.

    Attributes are what its file is named by, and what it is rerun for where they changed.
    """

    method: str
    """Name of the method in the grid."""
    algorithm: Method
    """What it is."""
    n: int
    """Minibatches per rollout batch."""
    mismatch: str
    """Name of the mismatch in the grid."""
    perturbation: Mismatch
    """What it is."""
    lr: float
    """Learning rate."""
    seed: int
    """Of sampling and the order of prompts."""
    task: Task
    """What is trained."""

    @property
    def definition(self) -> dict[str, Any]:
        """What its file is compared with. Without defaults, so that a new field does not make old runs void."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @property
    def name(self) -> str:
        """Unique in a sweep."""
        return f"{self.method}-n{self.n}-{self.mismatch}-lr{self.lr:g}-seed{self.seed}"


class Block(Section):
    """Cells: every combination of these lists."""

    methods: list[str] | None = None
    """Names; default: all."""
    n: list[int]
    """Minibatches per rollout batch."""
    mismatch: list[str] = Field(default=["none"])
    """Names."""
    lr: list[float] = Field(default=[1e-3])
    """Learning rates."""
    seeds: list[int] = Field(default=[1, 2, 3])
    """Seeds."""


class Grid(Section):
    """A sweep."""

    title: str
    """Heading of the page."""
    task: Task = Task()
    """What is trained."""
    methods: dict[str, Method]
    """Methods by name."""
    mismatches: dict[str, Mismatch] = Field(default={})
    """Mismatches by name; ``none`` is always there."""
    blocks: list[Block]
    """Which cells."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        known = {"none", *self.mismatches}
        for block in self.blocks:
            for name in set(block.methods or ()) - set(self.methods):
                raise ValueError(f"blocks: no method {name!r}; there are {', '.join(self.methods)}")
            for name in set(block.mismatch) - known:
                raise ValueError(f"blocks: no mismatch {name!r}; there are {', '.join(sorted(known))}")
            for n in block.n:
                if self.task.updates % n:
                    raise ValueError(f"blocks: n={n} does not divide task.updates={self.task.updates}")
        return self

    def cells(self) -> list[Cell]:
        """All runs, each once, in an order in which the first seeds come first."""
        found = {cell.name: cell for block in self.blocks for cell in self._of(block)}
        return sorted(found.values(), key=lambda cell: cell.seed)

    def _of(self, block: Block) -> Iterator[Cell]:
        names = block.methods or list(self.methods)
        for lr, mismatch, n, method, seed in product(block.lr, block.mismatch, block.n, names, block.seeds):
            yield Cell(
                method=method,
                algorithm=self.methods[method],
                n=n,
                mismatch=mismatch,
                perturbation=self.mismatches.get(mismatch, Mismatch()),
                lr=lr,
                seed=seed,
                task=self.task,
            )


def read_grid(path: Path) -> Grid:
    """Read a sweep.

    Raises:
        UserError: The file is wrong.
    """
    try:
        return Grid.model_validate(read_yaml(path))
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise UserError("\n".join(lines)) from error
