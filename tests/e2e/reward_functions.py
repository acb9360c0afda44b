"""Rewards for the tests; reward workers import this file, so it is light."""

import time
from pathlib import Path

from megatron_vespo.types import Sample


def of_ids(sample: Sample) -> float:
    """Something that differs between samples of a group."""
    return float(sample.response_ids.sum() % 7)


def of_ids_slowly(sample: Sample, while_there: str) -> float:
    """For runs that go on while a server starts, which gets the processors then: slow while there is this file."""
    if Path(while_there).exists():
        time.sleep(0.2)
    return of_ids(sample)


def of_length(sample: Sample) -> float:
    return float(len(sample.response_ids))


def failing(sample: Sample) -> float:
    raise ZeroDivisionError("no partial credit")
