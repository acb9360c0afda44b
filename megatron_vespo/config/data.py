"""The section about data: where prompts come from, how they become token ids, in which order they are drawn."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from megatron_vespo.config.section import Section

SPLITS = {"train": "train", "evaluation": "test"}
"""Split of a data set with several that is read where none is named."""
_ORIGINS = ("path", "reasoning_gym", "function")


class ReasoningGymSection(Section):
    """Prompts of a task of the package reasoning_gym, made when the run starts."""

    task: str
    """Name of the task: chain_sum, spell_backward, ..."""
    size: int = Field(ge=1)
    """Number of prompts."""
    seed: int = Field(default=0, ge=0)
    """The prompts have the seeds seed to seed + size - 1, which training and evaluation must not share."""
    config: dict[str, Any] = {}
    """Settings of the task, under its own names."""
    levels: int | None = Field(default=None, ge=1)
    """Of the task's own curriculum: prompts are spread evenly over the first so many levels, easiest first, and have
    theirs in ``difficulty``."""


class SourceSection(Section):
    """One source of prompts: exactly one of path, reasoning_gym and function."""

    path: str | None = None
    """A .jsonl, .json or .parquet file, a data set's folder, or its name on the Hugging Face Hub."""
    subset: str | None = None
    """Of a folder or name: the subset (Hugging Face: configuration)."""
    split: str | None = None
    """Of a folder or name: the split; default: the only one, or train (data.train) and test (data.evaluation)."""
    reasoning_gym: ReasoningGymSection | None = None
    """A task of reasoning_gym."""
    function: str | None = None
    """path/to/file.py:function or package.module:function, which returns rows, each a dictionary."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the function."""
    weight: float | None = Field(default=None, gt=0)
    """Share of this source among the prompts drawn; for all sources or none. Default: its number of prompts."""
    keys: dict[str, str] = {}
    """As data.keys, for this source, whose own come first."""
    chat: bool | None = None
    """As data.chat, for this source."""
    system_prompt: str | None = None
    """As data.system_prompt, for this source."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in _ORIGINS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a source needs exactly one of {', '.join(_ORIGINS)}; it has {' and '.join(given) or 0}")
        return self


class StageSection(Section):
    """A stage of a curriculum."""

    prompts: int | None = Field(default=None, ge=1)
    """Prompts drawn in it; the last stage has none: it lasts."""
    at_least: float | None = None
    """Lowest difficulty, included."""
    at_most: float | None = None
    """Highest difficulty, included."""


class CurriculumSection(Section):
    """Which prompts are drawn when, by a number in their metadata. Prompts without it are drawn in every stage."""

    field: str = "difficulty"
    """Key of the metadata; ``extra_info.level`` is a key of an object in it."""
    stages: list[StageSection] = Field(min_length=1)
    """The stages, in order."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(stage.prompts is None for stage in self.stages[:-1]) or self.stages[-1].prompts is not None:
            raise ValueError("every stage but the last needs `prompts`, and the last has none: it lasts")
        return self


def _kind(value: Any) -> str:
    if isinstance(value, SourceSection):
        return "(source)"
    if not isinstance(value, dict):
        return "(path)"
    return "(source)" if any(name in value for name in _ORIGINS) else "(sources)"


def _kind_of_one(value: Any) -> str:
    return "(source)" if isinstance(value, dict | SourceSection) else "(path)"


# Errors name what the tags choose; in brackets, so that they can be told from keys.
Source = Annotated[
    Annotated[str, Tag("(path)")] | Annotated[SourceSection, Tag("(source)")], Discriminator(_kind_of_one)
]
Sources = Annotated[
    Annotated[str, Tag("(path)")]
    | Annotated[SourceSection, Tag("(source)")]
    | Annotated[dict[str, Source], Tag("(sources)")],
    Discriminator(_kind),
]


class DataSection(Section):
    """Prompts: files (jsonl, parquet), data sets, reasoning_gym tasks or functions; docs/data.md."""

    train: Sources | None = None
    """Training prompts (objectives rl and rollout) or texts (sft: ``prompt`` and ``response``, or ``text``): a path, a
    source, or several sources by name, each a path or a source."""
    evaluation: dict[Annotated[str, Field(pattern=r"^\w[^/]*$")], Source] = {}
    """Held-out prompts by the name that their metrics get, which begins with a letter or digit and has no slash: paths
    or sources."""
    shuffle: bool = True
    """Reshuffle the training data in every epoch, by run.seed."""
    keys: dict[str, str] = {}
    """Where rows hold what is needed, if not under its own name: {prompt: question, label: answer}. Dots go into
    objects. Names other than prompt, label, metadata, response and text are put into the metadata."""
    chat: bool = False
    """Prompts that are text become a user's message of the tokenizer's chat template."""
    system_prompt: str | None = None
    """First message of every chat, unless it begins with one of its own."""
    template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, such as {enable_thinking: false}."""
    long_prompts: Literal["refuse", "drop"] = "refuse"
    """Prompts longer than the limit (rollout.max_prompt_tokens) are an error or left out; either way they are
    counted."""
    curriculum: CurriculumSection | None = None
    """Draw prompts by difficulty, in stages."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        weights = [source.weight for source in self.train_sources.values()]
        if None in weights and any(weight is not None for weight in weights):
            raise ValueError("train: give every source a weight, or none")
        for name, source in self.train_sources.items():
            for other, held_out in self.evaluation_sources.items():
                if _share_seeds(source.reasoning_gym, held_out.reasoning_gym):
                    raise ValueError(
                        f"evaluation.{other}: shares seeds of reasoning_gym task {source.reasoning_gym.task} with"  # type: ignore[union-attr]
                        f" training source {name}; the seeds are seed to seed + size - 1"
                    )
        return self

    @property
    def train_sources(self) -> dict[str, SourceSection]:
        """All training sources; one without a name is called train."""
        if self.train is None:
            return {}
        if isinstance(self.train, dict):
            return {name: _as_source(source) for name, source in self.train.items()}
        return {"train": _as_source(self.train)}

    @property
    def evaluation_sources(self) -> dict[str, SourceSection]:
        """The evaluation sets as sources."""
        return {name: _as_source(source) for name, source in self.evaluation.items()}


def _as_source(source: str | SourceSection) -> SourceSection:
    return SourceSection(path=source) if isinstance(source, str) else source


def _share_seeds(one: ReasoningGymSection | None, other: ReasoningGymSection | None) -> bool:
    if one is None or other is None or one.task != other.task:
        return False
    return one.seed < other.seed + other.size and other.seed < one.seed + one.size
