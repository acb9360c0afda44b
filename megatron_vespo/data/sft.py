"""Supervised examples: prompt and response, or plain text, as token ids with a loss mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.data.order import EndlessOrder, Stage
from megatron_vespo.data.prompts import AS_IT_IS, PromptForm, prompt_ids, rename
from megatron_vespo.data.rows import Row, read_rows
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
    """Read a file. Raises as :func:`make_supervised`."""
    return make_supervised(read_rows(path), tokenizer, max_tokens)[0]


def make_supervised(
    rows: Iterable[Row], tokenizer: Tokenizer, max_tokens: int, form: PromptForm = AS_IT_IS
) -> tuple[list[SupervisedExample], int]:
    """Examples of rows, which have ``prompt`` (text or messages) and ``response``, or ``text`` alone for pretraining.

    The end of sequence is appended to responses and texts.

    Returns:
        The examples, and how many were left out because they are longer than ``max_tokens``.

    Raises:
        UserError: a wrong row or, unless they are to be left out, one that is too long (names where it stands), or a
            tokenizer that names no end of sequence.
    """
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer names no eos_token; a model cannot learn to stop without: add it to its config")
    examples, dropped = [], 0
    for where, row in rows:
        prompt_ids, target_ids = _tokenise(where, rename(where, row, form.keys), tokenizer, form)
        ids = np.asarray([*prompt_ids, *target_ids, tokenizer.eos_id], np.int32)
        if len(ids) > max_tokens:
            if form.long_prompts == "drop":
                dropped += 1
                continue
            raise UserError(
                f"{where}: the example has {len(ids)} tokens, the limit is {max_tokens}; raise the limit, shorten or"
                " remove this line, or set data.long_prompts: drop"
            )
        mask = np.arange(len(ids)) >= max(len(prompt_ids), 1)
        examples.append(SupervisedExample(ids, mask))
    return examples, dropped


class SupervisedStream:
    """Endless iterator of examples, resumable as :class:`megatron_vespo.data.prompts.PromptStream` is."""

    def __init__(
        self,
        examples: list[SupervisedExample],
        seed: int,
        shuffle: bool = True,
        stages: Sequence[Stage] | None = None,
    ) -> None:
        self._examples = examples
        several = stages is not None and len(stages[0].weights) > 1
        identity = {"weights": list(stages[0].weights)} if stages is not None and several else None
        self._order = EndlessOrder(len(examples), seed, shuffle, stages, identity)

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


def _tokenise(where: str, row: dict[str, Any], tokenizer: Tokenizer, form: PromptForm) -> tuple[list[int], list[int]]:
    """(ids that are given, ids that are learned)."""
    if isinstance(row.get("text"), str) and "response" not in row:
        return [], tokenizer.encode(row["text"])
    response = row.get("response")
    if not isinstance(response, str):
        raise UserError(f"{where}: needs 'prompt' and 'response' as text, or 'text' alone; it has {', '.join(row)}")
    # The response is tokenised by itself: joined with the prompt, a token could straddle the border.
    return prompt_ids(where, row.get("prompt"), tokenizer, form), tokenizer.encode(response, add_special_tokens=False)


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
