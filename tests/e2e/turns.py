"""Generate functions for the tests."""

import asyncio

from megatron_vespo.rollout.conversation import Conversation
from megatron_vespo.types import Prompt

INSERTED = [20, 21, 22]


async def three_turns(conversation: Conversation, prompt: Prompt) -> None:
    """A tool between the turns, slow enough for pushes to come between and into them."""
    for turn in range(3):
        await conversation.generate(max_new_tokens=6)
        if turn < 2:
            await asyncio.sleep(0.05 * (1 + prompt.index % 5))
            conversation.insert(INSERTED)


async def failing(conversation: Conversation, prompt: Prompt) -> None:
    """Fails for one prompt of four."""
    await three_turns(conversation, prompt)
    if prompt.index % 4 == 1:
        raise LookupError("no such tool")
