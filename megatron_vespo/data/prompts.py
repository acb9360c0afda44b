"""Prompts: a jsonl file, and the endless, resumable stream that a run draws from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.data.jsonl import read_jsonl
from megatron_vespo.data.order import EndlessOrder
from megatron_vespo.data.tokenizer import Tokenizer
from megatron_vespo.errors import UserError
from megatron_vespo.types import IntArray, Prompt


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One line of the file; what becomes a Prompt each time it is drawn."""

    input_ids: IntArray
    label: str
    metadata: dict[str, Any]

    def prompt(self, index: int) -> Prompt:
        """This prompt as number ``index`` of a stream. It has its own metadata, but shares the ids."""
        return Prompt(index, self.input_ids, self.label, dict(self.metadata))


class PromptDataset:
    """Prompts read and tokenised once.

    Each line is an object: ``prompt`` as text (tokenised as it is), as a list of messages (by the chat template) or as
    a list of token ids; ``label``; ``metadata``. verl's ``reward_model.ground_truth`` is read where there is no
    ``label``. All other keys go to the metadata.
    """

    def __init__(self, records: list[PromptRecord], source: str) -> None:
        self.records = records
        self.source = source

    @classmethod
    def from_jsonl(cls, path: Path | str, tokenizer: Tokenizer, max_prompt_tokens: int) -> PromptDataset:
        """Read a file.

        Raises:
            UserError: no file, no lines, a line that is wrong or a prompt that is too long; names ``file:line``.
        """
        records = []
        for where, line in read_jsonl(path):
            records.append(_record(where, line, tokenizer))
            length = len(records[-1].input_ids)
            if length > max_prompt_tokens:
                raise UserError(
                    f"{where}: the prompt has {length} tokens, the limit is {max_prompt_tokens}; raise the limit on "
                    "prompt tokens, or shorten or remove this line"
                )
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
    """

    def __init__(self, dataset: PromptDataset, seed: int, shuffle: bool = True) -> None:
        self._records = dataset.records
        self._order = EndlessOrder(len(dataset), seed, shuffle)

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
        """Go on from a saved state. A UserError if data, seed or shuffle are not the same."""
        self._order.load_state_dict(state)


def _record(where: str, line: dict[str, Any], tokenizer: Tokenizer) -> PromptRecord:
    line = dict(line)
    if "prompt" not in line:
        raise UserError(f"{where}: no 'prompt'; the line has {', '.join(line) or 'no keys'}")
    ids = _prompt_ids(where, line.pop("prompt"), tokenizer)
    metadata = line.pop("metadata", None) or {}
    if not isinstance(metadata, dict):
        raise UserError(f"{where}: 'metadata' must be an object, it is a {type(metadata).__name__}")
    label = line.pop("label", None)
    reward_model = line.get("reward_model")
    if label is None and isinstance(reward_model, dict):
        label = reward_model.get("ground_truth")
    return PromptRecord(ids, "" if label is None else str(label), {**line, **metadata})


def _prompt_ids(where: str, prompt: Any, tokenizer: Tokenizer) -> IntArray:
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    elif isinstance(prompt, list) and prompt and all(isinstance(item, dict) for item in prompt):
        try:
            ids = tokenizer.encode_chat(prompt)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    elif isinstance(prompt, list) and all(type(item) is int for item in prompt):
        ids = prompt
    else:
        raise UserError(f"{where}: 'prompt' must be text, a list of messages or a list of token ids")
    if not ids:
        raise UserError(f"{where}: the prompt is empty")
    if min(ids) < 0 or max(ids) >= tokenizer.vocab_size:
        raise UserError(f"{where}: the prompt has token ids outside the vocabulary of {tokenizer.vocab_size}")
    return np.asarray(ids, np.int32)
