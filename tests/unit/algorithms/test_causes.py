"""Pictures of the diagnosis that need no model; tests/distributed/test_diagnosis.py has those that do."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vespo.algorithms.diagnosis import diagnose, examine
from megatron_vespo.algorithms.tokens import Tokens


def coin_tokens(rare: float, number: int, drawn: int) -> Tokens:
    """Fresh tokens of a policy that chooses between two, ``drawn`` of them the rare one."""
    log_pi = np.full(number, np.log1p(-rare), np.float32)
    log_pi[:drawn] = np.log(rare)
    entropy = np.full(number, -rare * np.log(rare) - (1 - rare) * np.log1p(-rare), np.float32)
    zeros = np.zeros(number, np.int64)
    return Tokens(log_pi, log_pi, entropy, zeros, zeros.astype(np.bool_), np.array([number]))


@pytest.mark.parametrize("rare", [0.002, 0.01])
def test_a_nearly_certain_policy_without_its_rare_tokens_is_no_truncation(rare: float) -> None:
    evidence = examine(coin_tokens(rare, number=int(0.7 / rare), drawn=0))
    assert evidence is not None and evidence.excess > 0.01
    assert diagnose(evidence) == []


def test_rare_tokens_that_never_come_are_truncation() -> None:
    (finding,) = diagnose(examine(coin_tokens(0.05, number=5000, drawn=0)))
    assert finding.cause.name == "truncated_sampling"
    assert diagnose(examine(coin_tokens(0.05, number=5000, drawn=250))) == []
