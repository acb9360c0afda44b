"""Sample groups and failures as bytes (MessagePack), for the broadcast from rank 0. Exact round trip, no pickle."""

from __future__ import annotations

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
)
_PROMPT_FIELDS = ("index", "input_ids", "label", "metadata")


def encode_groups(groups: list[SampleGroup]) -> bytes:
    """All groups; the prompt that the samples of a group share is written once.

    Raises:
        UserError: a prompt's metadata holds something that is not JSON-like.
    """
    rows = [
        [_row(group.prompt, _PROMPT_FIELDS), [_row(sample, _SAMPLE_FIELDS) for sample in group.samples]]
        for group in groups
    ]
    return msgspec.msgpack.encode({"groups": rows}, enc_hook=_encode_array)


def encode_failure(error: Exception) -> bytes:
    """Why there are no groups."""
    message = str(error) if isinstance(error, UserError) else f"rank 0 failed: {type(error).__name__}: {error}"
    return msgspec.msgpack.encode({"failure": message})


def decode_groups(payload: bytes) -> list[SampleGroup]:
    """The groups, equal to those encoded; samples share their group's prompt.

    Raises:
        UserError: a failure was encoded; the same message.
    """
    content = msgspec.msgpack.decode(payload, ext_hook=_decode_array)
    if "failure" in content:
        raise UserError(content["failure"])
    return [_group(*row) for row in content["groups"]]


def _group(prompt_row: list[Any], sample_rows: list[list[Any]]) -> SampleGroup:
    prompt = Prompt(**dict(zip(_PROMPT_FIELDS, prompt_row, strict=True)))
    samples = [Sample(prompt=prompt, **dict(zip(_SAMPLE_FIELDS, row, strict=True))) for row in sample_rows]
    return SampleGroup(prompt, samples)


def _row(record: Prompt | Sample, fields: tuple[str, ...]) -> list[Any]:
    return [getattr(record, name) for name in fields]


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return msgspec.msgpack.Ext(_ARRAY, msgspec.msgpack.encode([value.dtype.str, value.shape, value.tobytes()]))
    if isinstance(value, np.generic):
        return value.item()
    raise UserError(
        f"a prompt's metadata holds {value!r} of type {type(value).__name__}, which cannot be sent to other ranks: "
        "use text, numbers, lists and dicts"
    )


def _decode_array(code: int, data: memoryview) -> Any:
    if code != _ARRAY:
        raise ValueError(f"unknown MessagePack extension {code}")
    dtype, shape, content = msgspec.msgpack.decode(data)
    # A copy, since frombuffer's arrays are read-only.
    return np.frombuffer(content, np.dtype(dtype)).reshape(shape).copy()
