"""The samples that the viewer shows: some of each step, whatever the length of the runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_vespo.metrics.records import is_finite, parse_line
from megatron_vespo.page.run import Run

# Of all runs together: files that are read (a step of a run each), samples on the page, and tokens of these. A file
# that is read has room for 8 samples and 2,000 tokens at least.
MAX_FILES, MAX_SAMPLES, MAX_TOKENS = 150, 1200, 300_000
# Characters of a prompt or of a response, and tokens of a response, that the page holds.
MAX_TEXT, MAX_RESPONSE_TOKENS = 8_000, 2_000


def _is_number(value: Any) -> bool:
    return value is None or is_finite(value)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _are_terms(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_is_number, value.values())))


# What the page shows of a sample, and what it must be to be shown. Any may be missing.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "sample": _is_text,
    "prompt": _is_text,
    "response": _is_text,
    "label": _is_text,
    "data_source": _is_text,
    "reward": _is_number,
    "reward_terms": _are_terms,
    "reward_error": _is_text,
    "advantage": _is_number,
    "log_w": _is_number,
    "phi": _is_number,
    "length": _is_number,
    "finish_reason": _is_text,
    "policy_version": _is_number,
}
# The parallel lists of ``tokens``, and what is in them.
_OF_POLICY: dict[str, Callable[[Any], bool]] = {
    "text": _is_text,
    "log_mu": _is_number,
    "log_pi": _is_number,
    "version": _is_number,
}
_OF_OTHERS: dict[str, Callable[[Any], bool]] = {"inserted_text": _is_text, "inserted_before": _is_number}


def read_samples(runs: list[Run]) -> tuple[list[dict[str, Any]], int]:
    """Samples of all runs for the viewer and how many were left out; steps share the limits evenly.

    Lines that are no samples are counted in their run's notes.
    """
    files = {(place, step): path for place, run in enumerate(runs) for step, path in _files(run)}
    chosen = _choose({step for _, step in files}, len(files))
    read = [place for place in files if place[1] in chosen]
    room = max(1, MAX_SAMPLES // max(1, len(read))), MAX_TOKENS // max(1, len(read))
    found: list[dict[str, Any]] = []
    left_out = 0
    for (run, step), path in files.items():
        try:
            stat = path.stat()
            key = (path, stat.st_size, stat.st_mtime_ns)
            samples, bad, rest = _read(*key, *room) if step in chosen else ((), 0, _count(*key))
        except OSError as error:
            runs[run].notes.append(f"{path.name} could not be read: {error.strerror}")
            continue
        found += [{"run": run, **sample} for sample in samples]
        left_out += rest
        if bad:
            runs[run].notes.append(f"{path.name}: {bad} unreadable lines were left out")
    return found, left_out


def _choose(steps: Iterable[int], files: int) -> set[int]:
    """Steps at equal distances, the last one among them, the same ones of all runs; all where there is room."""
    ordered = sorted(steps)
    return set(ordered[:: -max(1, -(-files // MAX_FILES))])


def _files(run: Run) -> list[tuple[int, Path]]:
    """Steps that an earlier attempt made beyond the last one of this run are not its."""
    last = max(run.records.steps, default=0)
    names = sorted((run.folder / "rollouts").glob("step_*.jsonl"))
    steps = [(int(path.stem[5:]), path) for path in names if path.stem[5:].isdecimal()]
    return [(step, path) for step, path in steps if step <= last]


# A page that is watched asks again and again, and most files stay as they are: their size and time are of the key.
@lru_cache(maxsize=100_000)
def _count(path: Path, size: int, time: int) -> int:
    return path.read_bytes().count(b"\n")


@lru_cache(maxsize=2 * MAX_FILES)
def _read(path: Path, size: int, time: int, room: int, tokens: int) -> tuple[tuple[dict[str, Any], ...], int, int]:
    """Samples for which there is room, one at least; lines that are none; and how many lines more there are."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    found: list[dict[str, Any]] = []
    bad = 0
    for place, line in enumerate(lines):
        sample = _sample(parse_line(line))
        if sample is None:
            bad += 1
            continue
        tokens -= sum(len(sample["tokens"][name]) for name in ("text", "inserted_text"))
        if found and (tokens < 0 or len(found) == room):
            return tuple(found), bad, len(lines) - place
        found.append(sample)
    return tuple(found), bad, 0


def _sample(line: dict[str, Any] | None) -> dict[str, Any] | None:
    """A line as the page shows it; None where something in it is not what it must be."""
    if line is None or not all(fits(line.get(name)) for name, fits in _FIELDS.items()):
        return None
    tokens = line.get("tokens") or {}  # runs from before they were kept have none
    if not isinstance(tokens, dict):
        return None
    of_policy, of_others = _columns(tokens, _OF_POLICY), _columns(tokens, _OF_OTHERS)
    if of_policy is None or of_others is None:
        return None
    texts = {name: line.get(name) or "" for name in ("prompt", "response")}
    shown = {name: text[:MAX_TEXT] for name, text in texts.items()}
    kept = {name: column[:MAX_RESPONSE_TOKENS] for name, column in (of_policy | of_others).items()}
    is_cut = shown != texts or kept != of_policy | of_others
    fields = {name: line.get(name) for name in _FIELDS}
    return {"step": line["step"], **fields, **shown, "tokens": kept, "cut": is_cut}


def _columns(tokens: dict[str, Any], kinds: dict[str, Callable[[Any], bool]]) -> dict[str, list[Any]] | None:
    """Lists of equal length, of None where there is no such list; None where they are something else."""
    given = {name: tokens[name] for name in kinds if tokens.get(name) is not None}
    if not all(isinstance(column, list) and all(map(kinds[name], column)) for name, column in given.items()):
        return None
    lengths = {len(column) for column in given.values()}
    if len(lengths) > 1:
        return None
    return {name: given.get(name, [None] * max(lengths, default=0)) for name in kinds}
