"""Before the first step: one small rollout, scored by the trainer, says whether anything would be learned.

The prompts are the first of the training file and go the way of an evaluation's, so that the training stream does not
notice. What each token adds to log W is measured, and how much would be heard of responses of the lengths to be
expected is forecast from it (``algorithms.forecast``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_vespo import parallel
from megatron_vespo.algorithms.diagnosis import UNEXPLAINED, Evidence, Finding, diagnose, examine, is_unexplained
from megatron_vespo.algorithms.forecast import (
    Heard,
    Kappa,
    TokenDrift,
    forecast,
    measure_drift,
    observed_weight,
)
from megatron_vespo.algorithms.tokens import Tokens, gather_tokens
from megatron_vespo.config import PreflightSection
from megatron_vespo.errors import UserError
from megatron_vespo.files import atomic_write
from megatron_vespo.policy.policy import Policy
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.types import FloatArray, Prompt, Sample, SampleGroup
from megatron_vespo.weight_sync.turns import Turns

REPORT_FILE = "preflight.json"
# Share of the mismatch that must go away at another temperature to convict it.
_CONVICTS = 0.9


class Rollouts(Protocol):
    """Where samples come from, besides those to train on."""

    def evaluate(self, prompts: Sequence[Prompt], n: int, sampling: SamplingParams) -> list[SampleGroup]:
        """``n`` samples for each prompt, the same on every rank; none where the run shall stop. A collective."""
        ...


class Planner(Protocol):
    """Who plans microbatches."""

    def rank_plan(self, samples: Sequence[Sample]) -> Sequence[Sequence[int]]:
        """Microbatches for this rank."""
        ...


class Teller(Protocol):
    """Who speaks on the console."""

    def message(self, text: str) -> None:
        """Say something."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Announce something slow."""
        ...


@dataclass(frozen=True, slots=True)
class Report:
    """What the pre-flight found; ``preflight.json``.

    Attributes:
        samples: Responses scored.
        drift: What a token adds to log W.
        observed: Mean |kappa| of the responses as they are, over both signs; None: the kernel says nothing.
        expected: Forecast for a response of mean length.
        longest: Forecast for a response of ``rollout.max_new_tokens``.
        evidence: Of the diagnosis.
        findings: Likely causes of the mismatch, the clearest first.
        temperature_confirmed: Sampling temperature at which the mismatch goes away, if one was tried and it does.
        min_phi: The limit.
    """

    samples: int
    drift: TokenDrift
    observed: float | None
    expected: Heard
    longest: Heard
    evidence: Evidence | None
    findings: list[Finding]
    temperature_confirmed: float | None
    min_phi: float

    @property
    def is_silent(self) -> bool:
        """Whether learning would be."""
        return self.expected.weight is not None and self.expected.weight < self.min_phi

    def cause(self) -> str:
        """The likely causes in words; empty where there is nothing to explain."""
        if not self.findings:
            return UNEXPLAINED if is_unexplained(self.evidence) else ""
        text = "; or: ".join(map(str, self.findings))
        if self.temperature_confirmed is not None:
            text += f"; confirmed: at temperature {self.temperature_confirmed:.3g} trainer and sampler agree"
        return text

    def lines(self) -> list[str]:
        """The report for people."""
        drift, causes = self.drift, self.cause()
        return [
            f"pre-flight: {self.samples} responses, {drift.tokens} tokens; KL per token {drift.drift:.3g} nats (k1"
            f" {drift.k1:.3g}, k3 {drift.k3:.3g}), log-probabilities differ by {drift.variance**0.5:.3g} nats a token",
            *_observed_line(self.observed),
            *(_heard_line(name, heard) for name, heard in (("mean", self.expected), ("longest", self.longest))),
            *([f"pre-flight: likely cause: {causes}"] if causes else []),
        ]

    def refusal(self) -> str:
        """Why the run must not start."""
        return (
            f"pre-flight: learning would be silent: E[phi] {self.expected.weight or 0.0:.3f} is predicted for responses"
            f" of {self.expected.length:.0f} tokens, below preflight.min_phi={self.min_phi:g}; KL per token"
            f" {self.drift.drift:.3g} nats. Likely cause: {self.cause() or UNEXPLAINED}. Start all the same with"
            " preflight.force=true"
        )

    def as_json(self) -> dict[str, Any]:
        """For ``preflight.json``."""
        return {
            "verdict": "silent" if self.is_silent else "ok",
            "samples": self.samples,
            "min_phi": self.min_phi,
            "observed": self.observed,
            "drift": dataclasses.asdict(self.drift),
            "expected": dataclasses.asdict(self.expected),
            "longest": dataclasses.asdict(self.longest),
            "evidence": None if self.evidence is None else dataclasses.asdict(self.evidence),
            "temperature_confirmed": self.temperature_confirmed,
            "causes": [
                {"name": f.cause.name, "strength": f.strength, "sentence": f.cause.sentence, "remedy": f.cause.remedy}
                | {"evidence": f.numbers}
                for f in self.findings
            ],
        }


def _observed_line(observed: float | None) -> list[str]:
    return [] if observed is None else [f"pre-flight: mean weight of these responses {observed:.3f}"]


def _heard_line(name: str, heard: Heard) -> str:
    weight = "-" if heard.weight is None else f"{heard.weight:.3f}"
    signs = "" if heard.weight is None else f" (A > 0: {heard.weight_pos:.3f}, A < 0: {heard.weight_neg:.3f})"
    return (
        f"pre-flight: {name} length {heard.length:.0f}: log W {heard.log_w_mean:.2f} +- {heard.log_w_sd:.2f}, predicted"
        f" ESS of W {heard.ess_w:.3f}, mean weight {weight}{signs}"
    )


@dataclass(frozen=True)
class Preflight:
    """On every rank; ``run`` is a collective.

    Attributes:
        settings: How many samples, and the limit.
        rollouts: Where they come from.
        prompts: Of rank 0; others have none.
        sampling: As training samples are drawn.
        kappa: The weight.
        temperature: Of the trainer's log-probabilities.
        folder: Of the run.
        turns: Whose turn it is on devices that trainer and servers share.
    """

    settings: PreflightSection
    rollouts: Rollouts
    prompts: Sequence[Prompt]
    sampling: SamplingParams
    kappa: Kappa
    temperature: float
    folder: Path
    turns: Turns = field(default_factory=Turns)

    def run(self, policy: Policy, schedule: Planner, policy_version: int, teller: Teller) -> None:
        """Check, with the server's weights being the policy's, and tell.

        Raises:
            UserError: On every rank: learning would be silent, and the run is not forced; names the likely cause.
        """
        with teller.phase("pre-flight"):
            samples = self._sample()
            if not any(len(sample.response_ids) for sample in samples):  # asked to stop, or nothing was said
                return
            with self.turns.scoring():
                plan = schedule.rank_plan(samples)
                scores = policy.score(samples, plan)
                tokens = gather_tokens(
                    samples, [sample.log_mu for sample in samples], scores.log_pi, scores.entropy, policy_version
                )
                suspected = self._suspected(tokens)
                again = policy.score(samples, plan, suspected) if suspected else None

        def conclude() -> None:
            log_pi = None if again is None else np.concatenate(again.log_pi)
            report = self._report(tokens, suspected if _agrees(tokens, log_pi) else None)
            atomic_write(self.folder / REPORT_FILE, json.dumps(report.as_json(), indent=1) + "\n")
            for line in report.lines():
                teller.message(line)
            if report.is_silent and not self.settings.force:
                raise UserError(report.refusal())

        parallel.on_main(conclude)

    def _sample(self) -> list[Sample]:
        """The small rollout."""
        # Every data-parallel rank needs a sample; a file of few prompts gets more responses to each.
        wanted = max(self.settings.prompts * self.settings.samples_per_prompt, parallel.data_parallel_size())
        number = -(-wanted // max(len(self.prompts), 1))
        groups = self.rollouts.evaluate(self.prompts, number, self.sampling)
        return [sample for group in groups for sample in group.samples]

    def _suspected(self, tokens: Tokens) -> float:
        """The temperature to try; 0: none. Rank 0 decides: ranks must not differ about what they do together."""
        word = b""
        if parallel.is_main():
            evidence = examine(tokens)
            named = {finding.cause.name for finding in diagnose(evidence)}
            relative = evidence.temperature if evidence is not None and "temperature" in named else 0.0
            word = repr(relative * self.temperature).encode()
        return float(parallel.broadcast_bytes(word if parallel.is_main() else None))

    def _report(self, tokens: Tokens, confirmed: float | None) -> Report:
        log_ratio = tokens.log_ratio
        usable = log_ratio[np.isfinite(log_ratio)]
        if not len(usable):
            raise UserError("pre-flight: no token of the rollout has a finite log-probability in trainer and sampler")
        drift, evidence = measure_drift(usable), examine(tokens)
        present = tokens.lengths > 0
        return Report(
            samples=int(present.sum()),
            drift=drift,
            observed=observed_weight(
                tokens.per_sample(log_ratio)[present], tokens.lengths[present].astype(np.float64), usable, self.kappa
            ),
            expected=forecast(drift, usable, float(tokens.lengths[present].mean()), self.kappa),
            longest=forecast(drift, usable, float(self.sampling.max_new_tokens), self.kappa),
            evidence=evidence,
            findings=diagnose(evidence),
            temperature_confirmed=confirmed,
            min_phi=self.settings.min_phi,
        )


def _agrees(tokens: Tokens, log_pi: FloatArray | None) -> bool:
    """Whether most of the mismatch is gone with these log-probabilities of the trainer."""
    if log_pi is None:
        return False
    return bool(np.nanvar(log_pi - tokens.log_mu) < (1 - _CONVICTS) * np.nanvar(tokens.log_pi - tokens.log_mu))


class NoPreflight:
    """Where there is nothing to check."""

    def run(self, policy: Policy, schedule: Planner, policy_version: int, teller: Teller) -> None:
        """Nothing."""
