"""Sample groups as bytes (MessagePack), for other ranks and for files. Exact round trip, no pickle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from megatron_vespo.errors import UserError
from megatron_vespo.types import Prompt, Sample, SampleGroup

_ARRAY = 1  # MessagePack extension code of a numpy array
_SAMPLE_FIELDS = (
    "index",
    "response_ids",
    "log_mu",
    "weight_versions",
    "finish_reason",
    "text",
    "reward",
    "advantage",
    "reward_error",  # not in rows of version 1
    "routed_experts",  # nor of version 2
    "inserted_ids",  # nor of version 3
    "inserted_before",
    "reward_terms",
)
# Fields that samples of older versions lack.
_LATER_FIELDS = 5
_PROMPT_FIELDS = ("index", "input_ids", "label", "metadata")


def encode_groups(groups: list[SampleGroup]) -> bytes:
    """All groups; the prompt that the samples of a group share is written once.

    Raises:
        UserError: a prompt's metadata holds something that is not JSON-like.
    """
    return pack({"groups": to_rows(groups)})


def decode_groups(payload: bytes) -> list[SampleGroup]:
    """The groups, equal to those encoded; samples share their group's prompt."""
    return from_rows(unpack(payload, dict[str, Any])["groups"])


def to_rows(groups: Sequence[SampleGroup]) -> list[Any]:
    """The groups as lists that :func:`pack` takes. Files hold them: a change raises ``batches.VERSION``."""
    return [
        [_row(group.prompt, _PROMPT_FIELDS), [_row(sample, _SAMPLE_FIELDS) for sample in group.samples]]
        for group in groups
    ]


def from_rows(rows: Sequence[Any]) -> list[SampleGroup]:
    """The groups that :func:`to_rows` was given.

    Raises:
        ValueError, TypeError: these are no such rows.
    """
    return [_group(*row) for row in rows]


def pack(content: Any) -> bytes:
    """JSON-like content with numpy arrays in it, as MessagePack."""
    return msgspec.msgpack.encode(content, enc_hook=_encode_array)


def unpack[T](data: bytes, kind: type[T]) -> T:
    """What :func:`pack` was given, checked to be a ``kind``.

    Raises:
        msgspec.DecodeError: it is not, or the data is damaged.
    """
    return msgspec.msgpack.decode(data, type=kind, ext_hook=_decode_array)


def _group(prompt_row: list[Any], sample_rows: list[list[Any]]) -> SampleGroup:
    prompt = Prompt(**dict(zip(_PROMPT_FIELDS, prompt_row, strict=True)))
    samples = []
    for row in sample_rows:
        missing = len(_SAMPLE_FIELDS) - len(row)
        fields = _SAMPLE_FIELDS[: len(row)] if 0 < missing <= _LATER_FIELDS else _SAMPLE_FIELDS
        samples.append(Sample(prompt=prompt, **dict(zip(fields, row, strict=True))))
    return SampleGroup(prompt, samples)


def _row(record: Prompt | Sample, fields: tuple[str, ...]) -> list[Any]:
    return [getattr(record, name) for name in fields]


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return msgspec.msgpack.Ext(_ARRAY, msgspec.msgpack.encode([value.dtype.str, value.shape, value.tobytes()]))
    if isinstance(value, np.generic):
        return value.item()
    raise UserError(
        f"a prompt's metadata holds {value!r} of type {type(value).__name__}, which cannot be sent or saved: "
        "use text, numbers, lists and dicts"
    )


def _decode_array(code: int, data: memoryview) -> Any:
    if code != _ARRAY:
        raise ValueError(f"unknown MessagePack extension {code}")
    dtype, shape, content = msgspec.msgpack.decode(data)
    # A copy, since frombuffer's arrays are read-only.
    return np.frombuffer(content, np.dtype(dtype)).reshape(shape).copy()
