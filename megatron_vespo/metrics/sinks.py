"""Where metrics and samples are written."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_vespo.errors import UserError
from megatron_vespo.files import atomic_write
from megatron_vespo.types import FloatArray, IntArray, Sample, SampleGroup

MetricValues = Mapping[str, float | None]


class MetricSink(Protocol):
    """Takes the combined metrics of a step."""

    def write(self, step: int, metrics: MetricValues) -> None:
        """Record one step."""

    def close(self) -> None:
        """Write out what is still held."""


class JsonlSink:
    """``metrics.jsonl``: one JSON object a step, ``{"step": 3, "time": <unix seconds>, "train/loss": ...}``.

    Appends, so a resumed run goes on in its file. Each line is one write to the operating system, so a reader or a
    crash sees whole lines only. Values that JSON has no number for (NaN, infinities, None) are null.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+", buffering=0)
        self._end_broken_line()

    def write(self, step: int, metrics: MetricValues) -> None:
        """Append the line of one step."""
        record = {"step": step, "time": round(time.time(), 3), **{k: _jsonable(v) for k, v in metrics.items()}}
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _end_broken_line(self) -> None:
        """A full disk may have cut the last line of an earlier run: end it, so that ours starts on its own."""
        size = self._file.seek(0, os.SEEK_END)
        if size:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")


class TensorBoardSink:
    """Scalars for TensorBoard, under the same names. A value of None leaves no point.

    Args:
        folder: Of the event files.
        purge_step: Points of an earlier attempt from this step on are hidden.

    Raises:
        UserError: The ``tensorboard`` package is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], purge_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("TensorBoard output needs the package: pip install tensorboard") from error
        self._writer = SummaryWriter(os.fspath(folder), purge_step=purge_step)

    def write(self, step: int, metrics: MetricValues) -> None:
        """Add one point to each curve."""
        for name, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


@dataclass(frozen=True, slots=True)
class SampleScores:
    """What the update that trained on a sample said of it.

    Attributes:
        log_w: log W (nats).
        phi: Weight of the sample: phi(W), or the mean kappa of its tokens with another kernel.
        log_pi: Log-probability (nats) of each response token under the weights that the gradient was taken at, [R].
        policy_version: Version of those weights.
    """

    log_w: float
    phi: float
    log_pi: FloatArray
    policy_version: int


class RolloutSink:
    """Samples for people to read: ``rollouts/step_000012.jsonl``, one line a sample, of some groups of a step.

    Args:
        folder: Made when missing.
        groups_per_step: Groups written a step, from the first to the last one trained on at equal distances: the first
            are fresh, the last as stale as they get. The rest is dropped.
        decode: Turns token ids into text, usually the tokenizer's ``decode``.
    """

    def __init__(self, folder: str | os.PathLike[str], groups_per_step: int, decode: Callable[[IntArray], str]) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._groups_per_step = groups_per_step
        self._decode = decode

    def write(self, step: int, groups: Sequence[SampleGroup], scores: Mapping[str, SampleScores] | None = None) -> None:
        """Write one step's samples.

        Args:
            step: Number of the step.
            groups: Scored groups with advantages, in order of consumption.
            scores: Of each sample by ``Sample.name``; a sample missing here gets null.
        """
        lines = []
        for group in _spread(groups, self._groups_per_step):
            prompt_text = self._decode(group.prompt.input_ids)
            for sample in group.samples:
                record = _rollout_record(step, sample, prompt_text, (scores or {}).get(sample.name))
                record["tokens"] = self._tokens(sample, (scores or {}).get(sample.name))
                lines.append(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        atomic_write(self._folder / f"step_{step:06d}.jsonl", "".join(lines))

    def _tokens(self, sample: Sample, scores: SampleScores | None) -> dict[str, Any]:
        """The policy's tokens, as parallel lists, and apart from them those that were inserted, if any."""
        tokens = {
            "text": self._words(sample.response_ids),
            "log_mu": _rounded(sample.log_mu),
            "log_pi": None if scores is None else _rounded(scores.log_pi),
            "version": [int(version) for version in sample.weight_versions],
        }
        if sample.inserted_ids is not None and sample.inserted_before is not None:
            tokens |= {
                "inserted_text": self._words(sample.inserted_ids),
                "inserted_before": [int(place) for place in sample.inserted_before],
            }
        return tokens

    def _words(self, ids: IntArray) -> list[str]:
        """Text of each token; half a character reads as U+FFFD."""
        return [self._decode(ids[i : i + 1]) for i in range(len(ids))]


def _rollout_record(step: int, sample: Sample, prompt_text: str, scores: SampleScores | None) -> dict[str, Any]:
    versions = sample.weight_versions
    return {
        "step": step,
        "sample": sample.name,
        "prompt": prompt_text,
        "response": sample.text,
        "label": sample.prompt.label,
        "data_source": sample.prompt.data_source,
        "reward": _jsonable(sample.reward),
        "reward_terms": {name: _jsonable(value) for name, value in sample.reward_terms.items()},
        "reward_error": sample.reward_error,
        "advantage": _jsonable(sample.advantage),
        "log_w": _jsonable(scores.log_w if scores else None),
        "phi": _jsonable(scores.phi if scores else None),
        "length": len(sample.response_ids),
        "finish_reason": sample.finish_reason,
        "versions": [int(versions.min()), int(versions.max())] if len(versions) else None,
        "policy_version": scores.policy_version if scores else None,
    }


def _spread(groups: Sequence[SampleGroup], number: int) -> list[SampleGroup]:
    """So many of them at equal distances, the first and the last among them; only the last where one is asked for."""
    last, number = len(groups) - 1, min(number, len(groups))
    return [groups[last - (number - 1 - i) * last // max(number - 1, 1)] for i in range(number)]


def _rounded(values: FloatArray) -> list[float | None]:
    """For people: 4 decimals; null where it is no number."""
    return [round(float(value), 4) if math.isfinite(value) else None for value in values]


def _jsonable(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
