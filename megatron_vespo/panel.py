"""The health panel: figures of each step, what they warn of, and when they end the run. On rank 0 beside the loop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo import parallel
from megatron_vespo.algorithms.diagnosis import UNEXPLAINED, Evidence, Finding, diagnose, examine, is_unexplained
from megatron_vespo.algorithms.health import outliers, summarize_health
from megatron_vespo.algorithms.tokens import Doubles, Tokens, gather_tokens, join_tokens
from megatron_vespo.config import HealthSection
from megatron_vespo.errors import UserError
from megatron_vespo.files import atomic_write
from megatron_vespo.metrics.conditions import Streaks, choose_conditions, stop_after
from megatron_vespo.metrics.measure import Values
from megatron_vespo.metrics.registry import StepMetrics
from megatron_vespo.policy.figures import Measured
from megatron_vespo.types import FloatArray, Sample

# A warning is repeated after as many steps in which there was no cause for it.
_QUIET_STEPS = 20
# Tokens of text shown around an outlier.
_CONTEXT = 5

Decode = Callable[[Sequence[int]], str]


class HealthPanel:
    """Used on every rank; only rank 0 looks at anything.

    Args:
        settings: Thresholds.
        folder: Of the run; ``health/`` is made in it when there is something to write.
        decode: Token ids to text.
        warn: Says something on the console.
        log_w_limit: Where the kernel clamps log W from above; None: it does not.
    """

    def __init__(
        self,
        settings: HealthSection,
        folder: Path,
        decode: Decode,
        warn: Callable[[str], None],
        log_w_limit: float | None = None,
    ) -> None:
        self._settings, self._folder, self._decode, self._warn = settings, folder / "health", decode, warn
        self._log_w_limit = log_w_limit
        self._looks = settings.enabled and parallel.is_main()
        self._streaks = Streaks(choose_conditions(settings.warn))
        self._stop_after = stop_after(settings.stop_when)
        self._last_told: dict[str, int] = {}
        self._reason = ""
        self._log_mu: dict[str, FloatArray] = {}
        self._forget()

    def begin(self, samples: Sequence[Sample]) -> None:
        """A step's samples as they were drawn, before the trainer may put log-probabilities of its own in."""
        if self._looks:
            self._log_mu = {sample.name: sample.log_mu for sample in samples}
            self._forget()

    def observe(self, minibatch: Sequence[Sample], measured: Measured, policy_version: int) -> None:
        """What was measured of a minibatch, and the policy version it was measured at."""
        if not self._looks:
            return
        log_mu = [self._log_mu[sample.name] for sample in minibatch]
        self._tokens.append(
            gather_tokens(
                minibatch,
                log_mu,
                measured.tokens.log_pi,
                measured.tokens.entropy,
                policy_version,
                measured.tokens.router_flips,
            )
        )
        self._samples += minibatch
        self._log_w.append(measured.table["log_w"])
        self._phi.append(measured.table["phi"])

    def conclude(self, step: int, metrics: StepMetrics) -> Values:
        """The ``health/...`` metrics of a finished step, numbered from 1; warns, writes down, and may decide to stop.

        Args:
            step: Its number.
            metrics: The step's other metrics.
        """
        if not self._looks or not self._tokens:
            return {}
        tokens = join_tokens(self._tokens)
        figures = summarize_health(
            tokens,
            np.concatenate(self._log_w),
            np.concatenate(self._phi),
            np.array([sample.advantage for sample in self._samples], np.float64),
            log_w_limit=self._log_w_limit,
            token_limit=self._settings.token_limit,
        )
        values: Values = {f"health/{name}": value for name, value in figures.items()}
        evidence = examine(tokens)
        self._write_outliers(step, tokens, evidence)
        self._judge(step, {**metrics.result(), **values}, evidence)
        self._forget()
        return values

    def hopeless(self) -> bool:
        """Whether a condition of ``health.stop_when`` has held for its number of steps. A collective."""
        self._reason = parallel.broadcast_bytes(self._reason.encode() if parallel.is_main() else None).decode()
        return bool(self._reason)

    def raise_if_hopeless(self) -> None:
        """End the run where it was found hopeless.

        Raises:
            UserError: On every rank; names figure, value, threshold, likely cause and remedy.
        """
        if self._reason:
            raise UserError(self._reason)

    def _forget(self) -> None:
        self._tokens: list[Tokens] = []
        self._samples: list[Sample] = []
        self._log_w: list[Doubles] = []
        self._phi: list[Doubles] = []

    def _judge(self, step: int, values: Mapping[str, float | None], evidence: Evidence | None) -> None:
        findings = diagnose(evidence)
        begun = self._streaks.update(values)
        if begun:
            likely = likely_cause(findings, evidence)
            for row in begun:
                self._tell(step, row.name, f"{row.describe(values[row.metric] or 0.0)}{likely}")
        else:
            for finding in findings:
                if finding.cause.is_fault:
                    self._tell(step, finding.cause.name, f"{finding}")
        for finding in findings:
            self._last_told[finding.cause.name] = step
        for row in self._streaks.conditions:
            if self._streaks.length(row.name) >= row.steps:
                self._last_told[row.name] = step
            if self._streaks.length(row.name) >= self._stop_after.get(row.name, float("inf")):
                self._reason = (
                    f"health.stop_when: {row.describe(values[row.metric] or 0.0)}, for {self._streaks.length(row.name)}"
                    f" steps in a row{likely_cause(findings, evidence)}"
                )

    def _tell(self, step: int, name: str, text: str) -> None:
        """Warn once when something begins, on the console and in ``health/warnings.jsonl``."""
        told = self._last_told.get(name)
        if told is not None and step - told <= _QUIET_STEPS:
            return
        self._warn(f"warning: step {step}: {text}")
        self._folder.mkdir(exist_ok=True)
        with (self._folder / "warnings.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "name": name, "text": text}) + "\n")

    def _write_outliers(self, step: int, tokens: Tokens, evidence: Evidence | None) -> None:
        """``health/step_000012.json``: the tokens that differ most, where some differ by more than the limit."""
        number, places = outliers(tokens, self._settings.token_limit, self._settings.tokens_written)
        if not number:
            return
        whose, where = tokens.sample_index, tokens.position
        record = {
            "step": step,
            "limit": self._settings.token_limit,
            "tokens_beyond": number,
            "tokens": [self._describe(tokens, place, int(whose[place]), int(where[place])) for place in places],
            "evidence": None if evidence is None else dataclasses.asdict(evidence),
        }
        self._folder.mkdir(exist_ok=True)
        text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
        atomic_write(self._folder / f"step_{step:06d}.json", text)

    def _describe(self, tokens: Tokens, place: int, number: int, position: int) -> dict[str, Any]:
        """The token at a place of all, which is one of a sample's."""
        sample = self._samples[number]
        ids, at = sample.sequence_ids.tolist(), int(sample.offsets[position])
        return {
            "sample": sample.name,
            "position": position,
            "id": ids[at],
            "text": self._decode([ids[at]]),
            "before": self._decode(ids[max(at - _CONTEXT, 0) : at]),
            "log_mu": _number(tokens.log_mu[place]),
            "log_pi": _number(tokens.log_pi[place]),
            "staleness": int(tokens.staleness[place]),
        }


def likely_cause(findings: Sequence[Finding], evidence: Evidence | None) -> str:
    """The causes as the rest of a sentence, the clearest first; empty where trainer and sampler agree."""
    if findings:
        return f"; likely cause: {'; or: '.join(map(str, findings))}"
    return f"; likely cause {UNEXPLAINED}" if is_unexplained(evidence) else ""


def _number(value: np.floating[Any]) -> float | None:
    return float(value) if np.isfinite(value) else None
