"""Rows of data files, data sets and functions, each with the place to name when it is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_vespo.dotted import load_object
from megatron_vespo.errors import UserError

Row = tuple[str, dict[str, Any]]
"""(where it stands, the row)."""

FILES = (".jsonl", ".json", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_ROWS_AT_ONCE = 1024


def is_hub_name(path: str) -> bool:
    """Whether this can only be the name of a data set on the Hub."""
    return _HUB_NAME.fullmatch(path) is not None and Path(path).suffix not in FILES and not Path(path).exists()


def read_rows(
    path: Path | str, subset: str | None = None, split: str | None = None, default_split: str = "train"
) -> Iterator[Row]:
    """Yield (``file:line`` or ``data set:number``, object) of each row.

    Args:
        path: A .jsonl file, a .json file (lines, or one list), a .parquet file, a folder that
            ``datasets.load_dataset`` or ``datasets.load_from_disk`` reads, or a name on the Hugging Face Hub.
        subset: Of a folder or name.
        split: Of a folder or name; None: the only one, or ``default_split``.
        default_split: See ``split``.

    Raises:
        UserError: there is no such thing, it has another format, no rows, or one that is not an object.
    """
    file = Path(path)
    if file.is_dir() or is_hub_name(str(path)):
        rows = _read_data_set(str(path), subset, split, default_split)
    elif not file.is_file():
        raise UserError(f"{path}: no such data file")
    elif file.suffix == ".parquet":
        rows = _read_parquet(file)
    elif file.suffix in FILES:
        rows = _read_json(file)
    else:
        raise UserError(f"{path}: data must be a .jsonl file, one JSON object a line, or a .parquet file")
    return _objects(rows, f"{path}: the data file is empty")


def rows_of_function(spec: str, arguments: Mapping[str, Any]) -> Iterator[Row]:
    """The rows that a user's function returns.

    Raises:
        UserError: It cannot be imported, returns no rows, or something else.
    """
    function = load_object(spec, "data")
    if not callable(function):
        raise UserError(f"data function {spec!r} is a {type(function).__name__}, not a function")
    rows = function(**arguments)
    if not isinstance(rows, Iterable):
        raise UserError(f"data function {spec!r} must return rows, it returned a {type(rows).__name__}")
    numbered = ((f"{spec}:{number}", row) for number, row in enumerate(rows, start=1))
    return _objects(numbered, f"data function {spec!r} returned no rows")


def look_up(row: Mapping[str, Any], key: str) -> Any:
    """The value under a key; dots go into objects, where the row has no key with the dots. None: it is not there."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _objects(rows: Iterable[tuple[str, Any]], empty: str) -> Iterator[Row]:
    count = 0
    for count, (where, row) in enumerate(rows, start=1):  # noqa: B007 - read after the loop
        if not isinstance(row, dict):
            raise UserError(f"{where}: a line must be a JSON object, this one is a {type(row).__name__}")
        yield where, row
    if count == 0:
        raise UserError(empty)


def _read_json(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        if file.suffix == ".json" and lines.read(1) == "[":
            lines.seek(0)
            try:
                yield from ((f"{file}:{number}", row) for number, row in enumerate(json.load(lines), start=1))
            except json.JSONDecodeError as error:
                raise UserError(f"{file}:{error.lineno}: not valid JSON ({error.msg})") from error
            return
        lines.seek(0)
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"{file}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{file}:{number}: not valid JSON ({error.msg} at column {error.colno})") from error


def _read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            number = 0
            for batch in opened.iter_batches(_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}:{number}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: not a readable parquet file: {error}") from error


def _read_data_set(name: str, subset: str | None, split: str | None, default_split: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name}: folders and names of data sets need the package datasets: pip install datasets"
        ) from error

    datasets.disable_progress_bars()
    saved = any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))
    try:
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # datasets' own errors are among them
        raise UserError(f"{name}: cannot be read as a data set: {error}") from error
    if isinstance(found, Mapping):
        found = found[_choose_split(name, list(found), split, default_split)]
    yield from ((f"{name}:{number}", dict(row)) for number, row in enumerate(found, start=1))


def _choose_split(name: str, splits: list[str], split: str | None, default: str) -> str:
    chosen = split or (splits[0] if len(splits) == 1 else default)
    if chosen not in splits:
        raise UserError(f"{name}: no split {chosen!r}, it has {', '.join(splits)}; name one of them as `split`")
    return chosen
