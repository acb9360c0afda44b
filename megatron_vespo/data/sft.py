"""Supervised examples: prompt and response, or plain text, as token ids with a loss mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.data.jsonl import read_jsonl
from megatron_vespo.data.order import EndlessOrder
from megatron_vespo.data.tokenizer import Tokenizer
from megatron_vespo.errors import UserError
from megatron_vespo.types import IntArray, Prompt, Sample


@dataclass(frozen=True, slots=True)
class SupervisedExample:
    """One sequence to learn.

    Attributes:
        input_ids: Token ids, shape [T].
        loss_mask: Which of them are to be predicted from those before, shape [T]; never the first.
    """

    input_ids: IntArray
    loss_mask: NDArray[np.bool_]


def read_supervised(path: Path | str, tokenizer: Tokenizer, max_tokens: int) -> list[SupervisedExample]:
    """Read a jsonl file. Lines have ``prompt`` (text or messages) and ``response``, or ``text`` alone for pretraining.

    The end of sequence is appended to responses and texts.

    Raises:
        UserError: no file, no lines, a wrong line or one that is too long (names ``file:line``), or a tokenizer that
            names no end of sequence.
    """
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer names no eos_token; a model cannot learn to stop without: add it to its config")
    examples = []
    for where, line in read_jsonl(path):
        prompt_ids, target_ids = _tokenise(where, line, tokenizer)
        ids = np.asarray([*prompt_ids, *target_ids, tokenizer.eos_id], np.int32)
        if len(ids) > max_tokens:
            raise UserError(
                f"{where}: the example has {len(ids)} tokens, the limit is {max_tokens}; "
                "raise the limit, or shorten or remove this line"
            )
        mask = np.arange(len(ids)) >= max(len(prompt_ids), 1)
        examples.append(SupervisedExample(ids, mask))
    return examples


class SupervisedStream:
    """Endless iterator of examples, resumable as :class:`megatron_vespo.data.prompts.PromptStream` is."""

    def __init__(self, examples: list[SupervisedExample], seed: int, shuffle: bool = True) -> None:
        self._examples = examples
        self._order = EndlessOrder(len(examples), seed, shuffle)

    @property
    def position(self) -> int:
        """Number of the next example."""
        return self._order.position

    def __iter__(self) -> Iterator[SupervisedExample]:
        return self

    def __next__(self) -> SupervisedExample:
        return self._examples[self._order.draw()[1]]

    def state_dict(self) -> dict[str, Any]:
        """State to resume from."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. A UserError if data, seed or shuffle are not the same."""
        self._order.load_state_dict(state)


def _tokenise(where: str, line: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(ids that are given, ids that are learned)."""
    if isinstance(line.get("text"), str) and "response" not in line:
        return [], tokenizer.encode(line["text"])
    prompt, response = line.get("prompt"), line.get("response")
    if not isinstance(response, str):
        raise UserError(f"{where}: needs 'prompt' and 'response' as text, or 'text' alone; it has {', '.join(line)}")
    # The response is tokenised by itself: joined with the prompt, a token could straddle the border.
    if isinstance(prompt, str):
        prompt_ids = tokenizer.encode(prompt)
    elif isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        try:
            prompt_ids = tokenizer.encode_chat(prompt)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    else:
        raise UserError(f"{where}: 'prompt' must be text or a list of messages")
    return prompt_ids, tokenizer.encode(response, add_special_tokens=False)


def sft_batches(stream: SupervisedStream, samples_per_step: int) -> Iterator[list[Sample]]:
    """Minibatches of texts."""
    while True:
        first = stream.position
        yield [_as_sample(next(stream), first + number) for number in range(samples_per_step)]


def _as_sample(example: SupervisedExample, number: int) -> Sample:
    """A text as the policy sees it: the tokens to predict are the response."""
    first = int(example.loss_mask.argmax())
    response = example.input_ids[first:]
    return Sample(
        Prompt(number, example.input_ids[:first]),
        0,
        response,
        log_mu=np.zeros(len(response), dtype=np.float32),
        weight_versions=response * 0,
        finish_reason="stop",
    )
