"""Lines of a jsonl file, each with the place to name when it is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vespo.errors import UserError


def read_jsonl(path: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (``file:line``, object) of each line that is not blank.

    Raises:
        UserError: no such file, another format, no lines, or a line that is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such data file")
    if path.suffix not in (".jsonl", ".json"):
        raise UserError(f"{path}: data must be a .jsonl file, one JSON object a line")
    empty = True
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            empty = False
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
            if not isinstance(record, dict):
                raise UserError(f"{where}: a line must be a JSON object, this one is a {type(record).__name__}")
            yield where, record
    if empty:
        raise UserError(f"{path}: the data file is empty")
