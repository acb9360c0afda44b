"""Whole rollout batches as files, ``batch_000001.msgpack``: written before training on them, read to replay them.

A file is one MessagePack map: a header, and the groups as :mod:`codec` makes rows of them. Exact round trip.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from megatron_vespo import codec
from megatron_vespo.errors import UserError
from megatron_vespo.files import atomic_write
from megatron_vespo.types import SampleGroup

FORMAT = "megatron-vespo rollout batch"
# Of the header and of the rows that codec makes; to be raised with any change that makes older files unreadable.
VERSION = 4
_READABLE = (1, 2, 3, 4)

_NAME = re.compile(r"batch_(\d+)\.msgpack")


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """What one file holds.

    Attributes:
        groups: Scored groups in the order of training, with advantages; ``log_mu`` as it was sampled.
        step: Number of the step that trained on them, from 1.
        policy_version: Policy version that training on them began with: the optimizer steps taken until then.
        temperature: They were sampled at it, and ``log_mu`` belongs to it.
        vocab_size: Of the model that sampled; all token ids are below.
    """

    groups: list[SampleGroup]
    step: int
    policy_version: int
    temperature: float
    vocab_size: int


class _Mark(msgspec.Struct):
    """What every version of the format begins with."""

    format: str
    version: int


class _Content(msgspec.Struct):
    step: int
    policy_version: int
    temperature: float
    vocab_size: int
    groups: list[Any]


def save_batch(
    path: Path | str,
    groups: Sequence[SampleGroup],
    *,
    step: int,
    policy_version: int,
    temperature: float,
    vocab_size: int,
) -> None:
    """Write a batch: the file appears when it is complete, or not at all. See :class:`RolloutBatch` for the arguments.

    Raises:
        UserError: the file cannot be written, or a prompt's metadata holds something that is not JSON-like.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "policy_version": policy_version,
        "temperature": float(temperature),
        "vocab_size": vocab_size,
        "groups": codec.to_rows(groups),
    }
    try:
        atomic_write(path, codec.pack(content))
    except OSError as error:
        raise UserError(f"{path}: the rollout batch cannot be written: {error}") from error


def load_batch(path: Path | str) -> RolloutBatch:
    """Read a batch, equal to the one saved.

    Raises:
        UserError: the file is missing, truncated, no rollout batch, or of a newer format; names the file.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the rollout batch cannot be read: {error.strerror or error}") from error
    try:
        mark = msgspec.msgpack.decode(data, type=_Mark)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: this is not a rollout batch, it says nothing of its format") from error
    except msgspec.DecodeError as error:
        raise UserError(f"{path}: truncated, or not a rollout batch: {error}") from error
    if mark.format != FORMAT:
        raise UserError(f"{path}: this is not a rollout batch but {mark.format!r}")
    if mark.version not in _READABLE:
        raise UserError(
            f"{path}: a rollout batch of format version {mark.version}, while this Megatron-VESPO reads versions"
            f" up to {VERSION}; use the one that wrote it"
        )
    try:
        content = codec.unpack(data, _Content)
        groups = codec.from_rows(content.groups)
    except (msgspec.DecodeError, ValueError, TypeError) as error:
        raise UserError(f"{path}: a damaged rollout batch: {error}") from error
    return RolloutBatch(groups, content.step, content.policy_version, content.temperature, content.vocab_size)


def list_batches(folder: Path | str) -> list[Path]:
    """The batch files of a folder in the order of their numbers; none where there is no such folder."""
    numbered = [(int(match[1]), path) for path in Path(folder).glob("*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


class BatchSink:
    """Saves every batch of a run.

    Args:
        folder: Made when missing.
        temperature: Of sampling.
        vocab_size: Of the model.
    """

    def __init__(self, folder: Path | str, temperature: float, vocab_size: int) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._temperature, self._vocab_size = temperature, vocab_size

    def write(self, step: int, groups: Sequence[SampleGroup], policy_version: int) -> None:
        """Save the batch of a step, before training changes anything in it."""
        save_batch(
            self._folder / f"batch_{step:06d}.msgpack",
            groups,
            step=step,
            policy_version=policy_version,
            temperature=self._temperature,
            vocab_size=self._vocab_size,
        )
