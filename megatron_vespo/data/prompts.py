"""Prompts: rows made into token ids, and the endless, resumable stream that a run draws from."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_vespo.data.order import EndlessOrder, Stage
from megatron_vespo.data.rows import Row, look_up, read_rows
from megatron_vespo.data.tokenizer import Messages, Tokenizer
from megatron_vespo.errors import UserError
from megatron_vespo.types import DATA_SOURCE, IntArray, Prompt


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One row of the data; what becomes a Prompt each time it is drawn."""

    input_ids: IntArray
    label: str
    metadata: dict[str, Any]

    def prompt(self, index: int) -> Prompt:
        """This prompt as number ``index`` of a stream. It has its own metadata, but shares the ids."""
        return Prompt(index, self.input_ids, self.label, dict(self.metadata))


@dataclass(frozen=True, slots=True)
class PromptForm:
    """How a row becomes a prompt.

    Attributes:
        keys: Where rows hold what is needed, if not under its own name.
        chat: Whether a prompt that is text is a user's message of the chat template.
        system_prompt: First message of every chat, unless it begins with one of its own.
        template_kwargs: Variables of the chat template.
        long_prompts: Whether prompts that are too long are an error or left out.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    chat: bool = False
    system_prompt: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    long_prompts: Literal["refuse", "drop"] = "refuse"


AS_IT_IS = PromptForm()


@dataclass(frozen=True, slots=True)
class Source:
    """Prompts that belong together.

    Attributes:
        name: What messages call it, and ``data_source`` in the metadata.
        records: The prompts.
        weight: Share among the prompts drawn; None: their number.
        dropped: Prompts left out because they are too long.
    """

    name: str
    records: Sequence[PromptRecord]
    weight: float | None = None
    dropped: int = 0


class PromptDataset:
    """Prompts read and tokenised once, of one source or several.

    Each row is an object: ``prompt`` as text (tokenised as it is, or as a chat), as a list of messages (by the chat
    template) or as a list of token ids; ``label``; ``metadata``. That is slime's spelling; verl's
    ``reward_model.ground_truth`` is read where there is no ``label``. All other keys go to the metadata.
    """

    def __init__(
        self, records: list[PromptRecord], source: str, sources: Sequence[Source] | None = None, dropped: int = 0
    ) -> None:
        self.records = records
        self.source = source
        self.sources = sources or [Source(source, records, dropped=dropped)]

    @classmethod
    def of(cls, sources: Sequence[Source]) -> PromptDataset:
        """One data set of these sources. ``data_source`` in the metadata is the source's name, unless a row has one."""
        for source in sources:
            for record in source.records:
                if not record.metadata.get(DATA_SOURCE):  # a column may be there and empty
                    record.metadata[DATA_SOURCE] = source.name
        records = [record for source in sources for record in source.records]
        return cls(records, ", ".join(source.name for source in sources), sources)

    @classmethod
    def from_jsonl(cls, path: Path | str, tokenizer: Tokenizer, max_prompt_tokens: int) -> PromptDataset:
        """Read a file, jsonl or another that :func:`read_rows` knows. Raises as :func:`read_prompts`."""
        records, _ = read_prompts(read_rows(path), tokenizer, max_prompt_tokens)
        return cls(records, str(path))

    def __len__(self) -> int:
        return len(self.records)

    def prompts(self, limit: int | None = None) -> list[Prompt]:
        """All prompts, or the first ``limit``, in the file's order; for evaluation."""
        return [record.prompt(index) for index, record in enumerate(self.records[:limit])]


class PromptStream:
    """Endless iterator of Prompts; ``Prompt.index`` counts them, over all epochs and resumed runs.

    Args:
        dataset: Where they come from.
        seed: Of the shuffling.
        shuffle: Whether each epoch has its own order; False keeps the file's.
        stages: What is drawn when, from :func:`megatron_vespo.data.sources.make_stages`; None: everything, always.
    """

    def __init__(
        self, dataset: PromptDataset, seed: int, shuffle: bool = True, stages: Sequence[Stage] | None = None
    ) -> None:
        self._records = dataset.records
        self._order = EndlessOrder(len(dataset), seed, shuffle, stages, _identity(dataset, stages))

    @property
    def position(self) -> int:
        """Index of the next prompt."""
        return self._order.position

    def __iter__(self) -> Iterator[Prompt]:
        return self

    def __next__(self) -> Prompt:
        position, index = self._order.draw()
        return self._records[index].prompt(position)

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """State to resume from: at ``position``, where prompts beyond it were drawn in vain, or where it stands."""
        return self._order.state_dict(position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. A UserError if data, seed, or settings of the order are not the same."""
        self._order.load_state_dict(state)


def read_prompts(
    rows: Iterable[Row], tokenizer: Tokenizer, max_prompt_tokens: int, form: PromptForm = AS_IT_IS
) -> tuple[list[PromptRecord], int]:
    """Prompts of rows, and how many were left out because they are longer than ``max_prompt_tokens``.

    Raises:
        UserError: A row is wrong (names where it stands), prompts are too long and not to be left out, or all are.
    """
    records, total, too_long, first = [], 0, 0, ""
    for total, (where, row) in enumerate(rows, start=1):  # noqa: B007 - read after the loop
        record = _record(where, row, tokenizer, form)
        if len(record.input_ids) > max_prompt_tokens:
            first = first or f"{where}: the prompt has {len(record.input_ids)} tokens, the limit is {max_prompt_tokens}"
            too_long += 1
        else:
            records.append(record)
    if too_long and (form.long_prompts == "refuse" or not records):
        raise UserError(
            f"{first}; {too_long} of {total} prompts are longer: raise the limit on prompt tokens"
            " (rollout.max_prompt_tokens), shorten them, or leave them out (data.long_prompts: drop)"
        )
    return records, too_long


def prompt_ids(where: str, prompt: Any, tokenizer: Tokenizer, form: PromptForm) -> list[int]:
    """Token ids of a prompt that is text, messages or ids. A UserError that names ``where`` if it is none of them."""
    if isinstance(prompt, str) and not form.chat:
        return tokenizer.encode(prompt)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and prompt and all(isinstance(item, dict) for item in prompt):
        try:
            return tokenizer.encode_chat(_messages(prompt, form), variables=form.template_kwargs)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if isinstance(prompt, list) and all(type(item) is int for item in prompt):
        return prompt
    raise UserError(f"{where}: 'prompt' must be text, a list of messages or a list of token ids")


def _messages(messages: Messages, form: PromptForm) -> Messages:
    # Parquet gives every message all the keys that any message has.
    own = [{name: value for name, value in message.items() if value is not None} for message in messages]
    if form.system_prompt is not None and own[0].get("role") != "system":
        return [{"role": "system", "content": form.system_prompt}, *own]
    return own


def _record(where: str, row: dict[str, Any], tokenizer: Tokenizer, form: PromptForm) -> PromptRecord:
    row = rename(where, row, form.keys)
    if "prompt" not in row:
        raise UserError(f"{where}: no 'prompt'; the line has {', '.join(row) or 'no keys'}")
    ids = prompt_ids(where, row.pop("prompt"), tokenizer, form)
    if not ids:
        raise UserError(f"{where}: the prompt is empty")
    if min(ids) < 0 or max(ids) >= tokenizer.vocab_size:
        raise UserError(f"{where}: the prompt has token ids outside the vocabulary of {tokenizer.vocab_size}")
    metadata = row.pop("metadata", None) or {}
    if not isinstance(metadata, dict):
        raise UserError(f"{where}: 'metadata' must be an object, it is a {type(metadata).__name__}")
    label = row.pop("label", None)
    if label is None:
        label = look_up(row, "reward_model.ground_truth")
    return PromptRecord(np.asarray(ids, np.int32), _as_text(label), {**row, **metadata})


def rename(where: str, row: dict[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """The row with what ``keys`` names under the names it has here; a column renamed is no longer under its own."""
    renamed = {name: value for name, value in row.items() if name not in keys.values()}
    for name, column in keys.items():
        value = look_up(row, column)
        if value is None:
            raise UserError(f"{where}: no {column!r}, which data.keys takes as {name!r}; the line has {', '.join(row)}")
        renamed[name] = value
    return renamed


def _as_text(label: Any) -> str:
    if label is None:
        return ""
    return json.dumps(label, ensure_ascii=False) if isinstance(label, dict | list) else str(label)


def _identity(dataset: PromptDataset, stages: Sequence[Stage] | None) -> dict[str, Any]:
    """What must be the same for a position to mean the same prompt."""
    digest = 0
    for record in dataset.records:
        digest = zlib.crc32(record.label.encode(), zlib.crc32(record.input_ids.tobytes(), digest))
    identity: dict[str, Any] = {"digest": f"{digest:08x}"}
    if len(dataset.sources) > 1:
        identity["sources"] = {source.name: [len(source.records), source.weight] for source in dataset.sources}
    if stages is not None and len(stages) > 1:
        identity["stages"] = [[stage.length, *(len(members) for members in stage.members)] for stage in stages]
    return identity
