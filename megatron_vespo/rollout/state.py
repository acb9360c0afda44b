"""What rollouts were doing, as bytes: the prompt stream, finished groups that wait, finished samples of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from megatron_vespo import codec
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.buffer import Entry
from megatron_vespo.types import Sample, SampleGroup


@dataclass(slots=True)
class Held:
    """A prompt admitted and not yet taken.

    Attributes:
        entry: Its place in the buffer.
        finished: Its samples that are finished; the others are drawn again.
    """

    entry: Entry
    finished: list[Sample] = field(default_factory=list)


@dataclass(slots=True)
class RolloutState:
    """All that a resumed run needs.

    Attributes:
        prompts: State of the prompt stream.
        held: What is in flight or waits, in order of admission.
    """

    prompts: dict[str, Any]
    held: list[Held]

    def keep_prompts_only(self, deadline: int) -> None:
        """Forget the samples, all to be drawn anew, and give the prompts the deadline of those admitted now."""
        self.held = [Held(Entry(held.entry.prompt, deadline)) for held in self.held]


def encode_state(state: RolloutState, settings: Mapping[str, Any]) -> bytes:
    """The state, with the settings that its samples belong to."""
    rows = []
    for held in state.held:
        entry = held.entry
        done = entry.group is not None
        (row,) = codec.to_rows([entry.group or SampleGroup(entry.prompt, held.finished)])
        rows.append([entry.deadline, entry.passed_over, done, row])
    return codec.pack({"prompts": state.prompts, "held": rows, "settings": dict(settings)})


def decode_state(data: bytes, settings: Mapping[str, Any], max_staleness: int) -> tuple[RolloutState, list[str]]:
    """The state.

    Args:
        data: From :func:`encode_state`.
        settings: Of this run. Samples drawn under others are not kept, their prompts are.
        max_staleness: Batches that generation may run ahead.

    Returns:
        The state, and in words the settings that differ.

    Raises:
        UserError: The data is damaged.
    """
    try:
        content = codec.unpack(data, dict[str, Any])
        held = []
        for deadline, passed_over, done, row in content["held"]:
            (group,) = codec.from_rows([row])
            entry = Entry(group.prompt, deadline, group if done else None, passed_over)
            held.append(Held(entry, [] if done else group.samples))
        saved = content["settings"]
        state = RolloutState(content["prompts"], held)
    except (msgspec.DecodeError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"the rollout state of the checkpoint cannot be read: {error}") from error
    changed = [f"{name} {saved.get(name)} -> {value}" for name, value in settings.items() if saved.get(name) != value]
    if changed:
        state.keep_prompts_only(max_staleness)
    return state, changed
