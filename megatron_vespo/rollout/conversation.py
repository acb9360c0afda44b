"""Responses of several turns: what the policy generates, with tokens between that others put there.

The function of ``rollout.generate`` gets a conversation and the prompt; docs/multi_turn.md.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import numpy as np

from megatron_vespo.dotted import load_object
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.client import TokenIds
from megatron_vespo.rollout.protocol import Generation, ServerInfo
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.types import FINISH_LENGTH, GENERATE_FAILED, Prompt, Sample

Limits = Callable[[], Awaitable[ServerInfo]]
Decode = Callable[[Sequence[int]], str]
Encode = Callable[[str], Sequence[int]]

# Of an error message that a sample keeps.
_MESSAGE_LENGTH = 300


class Turns(Protocol):
    """Where one turn is sampled, however often it is interrupted."""

    async def __call__(self, input_ids: TokenIds, sampling: SamplingParams, seed: int | None) -> Generation:
        """Sample to the end."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """What the policy said in one turn.

    Attributes:
        ids: Token ids, a stop token included; none where there was no room.
        text: The same as text, special tokens kept.
        finish_reason: ``stop``; or ``length``: there is no room for anything more.
    """

    ids: list[int]
    text: str
    finish_reason: str


class Conversation:
    """One response while it grows. It keeps account of every token, so that a function cannot get it wrong.

    Args:
        turns: Samples one turn.
        limits: The lengths that the server takes.
        prompt: What is answered.
        sampling: How; ``max_new_tokens`` is the room for all that follows the prompt.
        decode: Token ids to text.
        settings: What can be inserted.
        seed: As of :meth:`SGLangClient.generate`.
    """

    def __init__(
        self,
        turns: Turns,
        limits: Limits,
        prompt: Prompt,
        sampling: SamplingParams,
        decode: Decode,
        settings: TurnSettings,
        seed: int | None = None,
    ) -> None:
        self._turns, self._limits = turns, limits
        self._prompt, self._sampling, self._seed = prompt, sampling, seed
        self._decode, self._settings = decode, settings
        self._generated: Generation | None = None
        self._inserted: list[int] = []
        self._before: list[int] = []
        self._full = False
        self._failure: Exception | None = None

    @property
    def ids(self) -> list[int]:
        """All tokens after the prompt so far, in their order."""
        return self.sample(0).sequence_ids.tolist()

    @property
    def text(self) -> str:
        """The same as text, special tokens kept."""
        return self._decode(self.ids)

    @property
    def left(self) -> int:
        """Tokens that there is still room for."""
        return self._sampling.max_new_tokens - self._length - len(self._inserted)

    @property
    def _length(self) -> int:
        return 0 if self._generated is None else len(self._generated.response_ids)

    async def generate(self, max_new_tokens: int | None = None, stop_token_ids: Sequence[int] = ()) -> Turn:
        """Let the policy go on, after all that there is so far.

        Args:
            max_new_tokens: Limit of this turn, besides what there is room for. A turn that it ends has the finish
                reason ``stop``.
            stop_token_ids: Tokens that end this turn, besides those that end every response.
        """
        room = self.left
        if room <= 0:
            self._full = True
            return Turn([], "", FINISH_LENGTH)
        limit = room if max_new_tokens is None else min(max_new_tokens, room)
        sampling = dataclasses.replace(
            self._sampling,
            max_new_tokens=limit,
            stop_token_ids=tuple(dict.fromkeys((*self._sampling.stop_token_ids, *stop_token_ids))),
        )
        try:
            if self._generated is None and not self._inserted:
                so_far: TokenIds = self._prompt.input_ids
            else:
                so_far = [*self._prompt.input_ids.tolist(), *self.ids]
                # A few tokens before the context's end it is too long to be a prompt.
                if len(so_far) > (await self._limits()).max_prompt_tokens:
                    self._full = True
                    return Turn([], "", FINISH_LENGTH)
            part = await self._turns(so_far, sampling, self._seed)
        except Exception as error:
            self._failure = error  # the server's, or our own: no matter for the function
            raise
        if part.finish_reason == FINISH_LENGTH and len(part.response_ids) >= limit and limit < room:
            part = dataclasses.replace(part, finish_reason="stop")
        self._generated = part if self._generated is None else self._generated + part
        self._full = part.finish_reason == FINISH_LENGTH
        ids = part.response_ids.tolist()
        return Turn(ids, self._decode(ids), part.finish_reason)

    def insert(self, content: str | Sequence[int]) -> int:
        """Add what a tool says: the policy sees it and is not trained on it.

        Args:
            content: Text, or token ids.

        Returns:
            Tokens that were added. Where there is no room for all of them, the first ones are, and the response is
            over its limit.

        Raises:
            ValueError: A token id is outside the vocabulary.
            TypeError: There is no tokenizer for text.
        """
        if isinstance(content, str):
            if self._settings.encode is None:
                raise TypeError("this conversation has no tokenizer; insert token ids")
            content = self._settings.encode(content)
        wrong = [token for token in content if not 0 <= token < self._settings.vocab_size]
        if wrong:
            raise ValueError(f"token id {wrong[0]} is outside the vocabulary of {self._settings.vocab_size}")
        ids = [int(token) for token in content][: max(self.left, 0)]
        self._full = self._full or len(ids) < len(content)
        self._inserted += ids
        self._before += [self._length] * len(ids)
        return len(ids)

    def sample(self, index: int) -> Sample:
        """The sample as it stands, number ``index`` of its group."""
        made = self._generated or Generation(
            np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32), "stop"
        )
        return Sample(
            self._prompt,
            index,
            made.response_ids,
            made.log_mu,
            made.weight_versions,
            FINISH_LENGTH if self._full else made.finish_reason,
            routed_experts=made.routed_experts,
            inserted_ids=np.array(self._inserted, np.int32) if self._inserted else None,
            inserted_before=np.array(self._before, np.int32) if self._inserted else None,
        )

    def raise_failure(self) -> None:
        """Raise what went wrong in a turn, also where a function went on as if nothing had."""
        if self._failure is not None:
            raise self._failure


GenerateFunction = Callable[[Conversation, Prompt], Awaitable[None]]
"""A function of ``rollout.generate``."""


@dataclasses.dataclass(frozen=True, slots=True)
class TurnSettings:
    """How responses are made of turns.

    Attributes:
        function: Of ``rollout.generate``; None: one turn.
        encode: Text to token ids, without tokens around it such as BOS; None: text cannot be inserted.
        vocab_size: Of the model; token ids are below.
    """

    function: GenerateFunction | None = None
    encode: Encode | None = None
    vocab_size: int = 2**31


async def converse(conversation: Conversation, prompt: Prompt, function: GenerateFunction | None, index: int) -> Sample:
    """The whole response. Where the function fails, the sample has what there is, and says so.

    Args:
        conversation: A new one.
        prompt: What is answered.
        function: Of ``rollout.generate``; None: one turn.
        index: Of the sample.

    Raises:
        Exception: Whatever a turn raised.
    """
    if function is None:
        await conversation.generate()
        return conversation.sample(index)
    error = ""
    try:
        await function(conversation, prompt)
    except Exception as failure:  # noqa: BLE001 - the user's own function: it costs one sample
        error = f"{GENERATE_FAILED}{type(failure).__name__}: {failure}"[:_MESSAGE_LENGTH]
    conversation.raise_failure()
    sample = conversation.sample(index)
    sample.reward_error = error
    return sample


def load_generate(spec: str | None) -> GenerateFunction | None:
    """The function of ``rollout.generate``.

    Raises:
        UserError: There is none of that name, or it is not ``async def``.
    """
    if spec is None:
        return None
    function = load_object(spec, "rollout.generate")
    if not inspect.iscoroutinefunction(function):
        raise UserError(f"rollout.generate {spec!r}: it must be an `async def` function of (conversation, prompt)")
    return function
