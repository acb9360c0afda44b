"""Every cause of a mismatch is produced on purpose, and named, and none is named for another's fault.

The samplers are Hugging Face transformers with a fault, the trainer is the real policy on the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.algorithms.diagnosis import CAUSES, Evidence, diagnose, examine, is_unexplained
from megatron_vespo.algorithms.tokens import Tokens, gather_tokens
from megatron_vespo.policy.figures import TokenScores
from megatron_vespo.types import Sample
from tests.faulty_sampler import Job, changed_weights, drift, permute_experts, sample_from, through_fp8
from tests.policies import make_plan, make_policy
from tests.ranks import run_ranks
from tests.tiny_models import make_tiny_qwen3_moe

VERSION = 8
# What the sampler does, and what must be named for it.
NAMED: dict[str, set[str]] = {
    "healthy": set(),
    "temperature 0.9": {"temperature"},
    "temperature 1.2": {"temperature"},
    "temperature 0.98": {"temperature"},
    "top-p, renormalised": {"truncated_sampling"},
    "top-p, as SGLang reports": {"truncated_sampling"},
    "bf16 log-probs": {"half_precision_log_probs"},
    "FP8 weights": {"quantized_rollout"},
    "permuted experts": {"wrong_weights"},
    "stale": {"staleness"},
    "stale from 1 on": {"staleness"},
    "push, cache kept": {"stale_kv_cache", "staleness"},
    "push, cache flushed": {"staleness"},
    "push within all, cache flushed": {"staleness"},
    "push within all, cache kept": set(),  # nothing to compare with: see UNEXPLAINED
    "temperature and FP8 weights": {"temperature"},  # which is to be mended first
}

UNEXPLAINED = {"push within all, cache kept"}


def make_jobs(folder: Path) -> dict[str, list[Job]]:
    model = make_tiny_qwen3_moe(folder / "model", vocab_size=128)
    right = (str(model),)
    fp8 = (str(changed_weights(model, folder / "fp8", through_fp8)),)
    permuted = (str(changed_weights(model, folder / "permuted", permute_experts)),)
    old = {age: str(changed_weights(model, folder / f"old{age}", drift(0.01 * age))) for age in (1, 2, 4, 8)}
    job = partial(Job, right, (VERSION,))
    stale = [Job((old[age],), (VERSION - age,), number=24) for age in old]
    calm = job(number=32)
    return {
        "healthy": [job()],
        "temperature 0.9": [job(temperature=0.9)],
        "temperature 1.2": [job(temperature=1.2)],
        "temperature 0.98": [job(temperature=0.98)],
        "top-p, renormalised": [job(top_p=0.9, renormalized=True)],
        "top-p, as SGLang reports": [job(top_p=0.9)],
        "bf16 log-probs": [job(half=True)],
        "FP8 weights": [Job(fp8, (VERSION,))],
        "permuted experts": [Job(permuted, (VERSION,))],
        "stale": [job(number=24), *stale],
        "stale from 1 on": stale,
        "push, cache kept": [calm, Job((old[8], *right), (0, VERSION), number=32)],
        "push, cache flushed": [calm, Job((old[8], *right), (0, VERSION), number=32, flush=True)],
        "push within all, cache flushed": [Job((old[8], *right), (0, VERSION), flush=True)],
        "push within all, cache kept": [Job((old[8], *right), (0, VERSION))],
        "temperature and FP8 weights": [Job(fp8, (VERSION,), temperature=0.8)],
    }


def score(folder: Path, batches: Sequence[Sequence[Sample]], temperature: float | None = None) -> list[TokenScores]:
    policy = make_policy(folder, {})
    return [policy.score(samples, make_plan(samples, 4096), temperature) for samples in batches]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokens]:
    folder = tmp_path_factory.mktemp("samplers")
    jobs = make_jobs(folder)
    drawn = iter(sample_from([job for group in jobs.values() for job in group], folder / "scratch"))
    batches = [[sample for _ in group for sample in next(drawn)] for group in jobs.values()]
    (scores,) = run_ranks(1, score, folder / "model", batches)
    return {
        name: gather_tokens(samples, [s.log_mu for s in samples], result.log_pi, result.entropy, VERSION)
        for name, samples, result in zip(jobs, batches, scores, strict=True)
    }


@pytest.fixture(scope="module")
def evidence(tokens: dict[str, Tokens]) -> dict[str, Evidence]:
    found = {name: examine(these) for name, these in tokens.items()}
    return {name: measured for name, measured in found.items() if measured is not None}


def test_every_cause_is_produced() -> None:
    assert {cause.name for cause in CAUSES} == set().union(*NAMED.values())


@pytest.mark.parametrize("fault", NAMED)
def test_the_cause_is_named_and_no_other(evidence: dict[str, Evidence], fault: str) -> None:
    findings = diagnose(evidence[fault])
    assert {finding.cause.name for finding in findings} == NAMED[fault], str(evidence[fault])
    assert is_unexplained(evidence[fault]) == (fault in UNEXPLAINED)
    for finding in findings:
        assert 0 < finding.strength <= 1
        assert any(value is not None for value in finding.numbers.values())
        assert str(finding).startswith(finding.cause.sentence)


def test_the_numbers_are_those_of_the_fault(evidence: dict[str, Evidence]) -> None:
    for name, temperature in (("temperature 0.9", 0.9), ("temperature 1.2", 1.2), ("temperature 0.98", 0.98)):
        assert evidence[name].temperature == pytest.approx(temperature, abs=2e-3)
    assert evidence["healthy"].kl < 1e-10
    assert 0 < evidence["top-p, renormalised"].drift < -np.log(0.9)
    assert evidence["top-p, as SGLang reports"].kl < 1e-10, "nothing differs but which tokens were drawn"
    flushed = evidence["push, cache flushed"].kl_after_push
    assert flushed is not None and flushed < 1e-10
    kept = evidence["push, cache kept"].kl_after_push
    assert kept is not None and kept > 1e-3


def test_log_w_drifts_with_length_after_top_p_alone(tokens: dict[str, Tokens]) -> None:
    """Half a response has half the log W, where log-probabilities are renormalised; a temperature's goes both ways."""
    signs = {}
    for name in ("top-p, renormalised", "temperature 0.9"):
        half = tokens[name].log_ratio.reshape(len(tokens[name].lengths), -1)
        first, whole = half[:, : half.shape[1] // 2].sum(1), half.sum(1)
        signs[name] = float((whole < 0).mean())
        if name.startswith("top-p"):
            assert whole.mean() == pytest.approx(2 * first.mean(), rel=0.1)
    assert signs["top-p, renormalised"] == 1 and signs["temperature 0.9"] < 0.9


def test_too_few_tokens_prove_nothing(tokens: dict[str, Tokens]) -> None:
    few = tokens["permuted experts"]
    assert examine(Tokens(*(getattr(few, name)[:40] for name in few.__slots__[:5]), np.array([40]))) is None
    assert diagnose(None) == []


def test_what_nobody_knows_is_called_unexplained(tokens: dict[str, Tokens]) -> None:
    """A mismatch of stale tokens alone, and no fresher ones to compare with."""
    healthy = tokens["permuted experts"]
    old = Tokens(
        healthy.log_mu, healthy.log_pi, healthy.entropy, healthy.staleness + 5, healthy.after_push, healthy.lengths
    )
    evidence = examine(old)
    assert diagnose(evidence) == [] and is_unexplained(evidence)
