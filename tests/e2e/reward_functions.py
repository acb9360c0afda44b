"""Rewards for the tests; reward workers import this file, so it is light."""

from megatron_vespo.types import Sample


def of_ids(sample: Sample) -> float:
    """Something that differs between samples of a group."""
    return float(sample.response_ids.sum() % 7)


def of_length(sample: Sample) -> float:
    return float(len(sample.response_ids))


def failing(sample: Sample) -> float:
    raise ZeroDivisionError("no partial credit")
