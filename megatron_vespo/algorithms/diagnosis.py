"""Why the sampler's log-probabilities differ from the trainer's: likely causes, from the tokens alone.

``examine`` measures, ``CAUSES`` says what each cause looks like, ``diagnose`` names those whose picture is there. What
the pictures rest on, with d = log mu - log pi of a token and H the entropy of pi where it was drawn:

- A temperature of 1 / b relative to the trainer's: d = (b - 1) (log pi + H) - (b - 1)^2 Var(log pi) / 2 + ..., so d is
  a straight line in log pi + H.
- Tokens drawn from pi have E[log pi + H] = 0, whatever the prompt; drawn from pi without its tail it is positive. By
  the Cauchy-Schwarz inequality a mismatch that log mu tells of can account for sd(log pi) sqrt(chi^2) of it only, and
  chi^2 is about twice the KL divergence. (Stopping does no harm: the sums are martingales.)
- Cut and renormalised, d is minus the log of the mass that was kept: never negative, and log W falls with every token.
- Rounding and quantisation make d noise around 0 that is small beside the spread of log pi; other weights do not.
- Staleness is no fault: d grows with it and is nothing at staleness 0. A token sampled after a push on the keys and
  values of the weights before differs more than tokens of the same weights in responses without a push.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from megatron_vespo.algorithms.health import k3
from megatron_vespo.algorithms.tokens import Bools, Doubles, Tokens
from megatron_vespo.types import FloatArray

MIN_TOKENS = 50
"""Fewer tokens prove nothing."""
MISMATCH = 2e-4
"""KL per token (nats) of fresh tokens from which on a mismatch wants an explanation; 16-bit engines stay below."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was measured. The control group is tokens of least staleness in responses without a push; None: no tokens.

    Attributes:
        tokens: Tokens of the control group.
        least_staleness: Its staleness (updates).
        kl: KL per token (k3, nats) of the control group.
        drift: Mean of d (k1, nats).
        spread: Standard deviation of d (nats).
        relative_spread: The same divided by the standard deviation of log pi.
        one_sidedness: 1 where d is never negative, 0 where it is as often and as much below 0 as above.
        temperature: The sampler's temperature as a multiple of the trainer's, if d is a straight line in log pi + H.
        temperature_fit: R^2 of that line.
        temperature_offset: Its d at log pi + H = 0, divided by ``spread``; a temperature makes it negative.
        half_share: Share of log mu that 16 bits hold exactly.
        excess: Mean of log pi + H (nats).
        excess_sigmas: The same in standard errors.
        excess_allowed: As much of it as the mismatch may account for (nats).
        kl_stale: KL per token of staler tokens, before any push; None: there are none.
        kl_after_push: KL per token of tokens sampled after a push within their response; None: there are none.
        kl_no_push: KL per token of tokens equally stale without one, or of the tokens before the push.
    """

    tokens: int
    least_staleness: int
    kl: float
    drift: float
    spread: float
    relative_spread: float
    one_sidedness: float
    temperature: float
    temperature_fit: float
    temperature_offset: float
    half_share: float
    excess: float
    excess_sigmas: float
    excess_allowed: float
    kl_stale: float | None
    kl_after_push: float | None
    kl_no_push: float | None


def examine(tokens: Tokens) -> Evidence | None:
    """Measure; None where there are too few tokens."""
    usable = np.isfinite(tokens.log_mu) & np.isfinite(tokens.log_pi)
    pushed = tokens.of_sample(tokens.per_sample(tokens.after_push.astype(np.float64)) > 0).astype(np.bool_)
    calm = usable & ~pushed
    if calm.sum() < MIN_TOKENS:
        calm = usable & ~tokens.after_push
    if calm.sum() < MIN_TOKENS:
        return None
    least = int(tokens.staleness[calm].min())
    control = calm & (tokens.staleness == least)
    while control.sum() < MIN_TOKENS:
        least += 1
        control = calm & (tokens.staleness <= least)
    divergence = k3(np.where(usable, tokens.log_ratio, 0))
    stale = usable & ~tokens.after_push & (tokens.staleness > least)
    after, like = _after_push(tokens, usable, pushed, divergence)
    return Evidence(
        tokens=int(control.sum()),
        least_staleness=least,
        kl_stale=float(divergence[stale].mean()) if stale.sum() >= MIN_TOKENS else None,
        kl_after_push=after,
        kl_no_push=like,
        **_of_control(tokens, control),
    )


def _of_control(tokens: Tokens, control: Bools) -> dict[str, float]:
    log_mu, log_pi = tokens.log_mu[control], tokens.log_pi[control].astype(np.float64)
    d = log_mu - log_pi
    surprise = log_pi + tokens.entropy[control]
    kl, spread = float(k3(-d).mean()), float(d.std())
    slope, offset, fit = _line(surprise, d)
    sure = np.abs(log_mu) < 1e-6  # every precision holds 0
    half = log_mu[~sure]
    return {
        "kl": kl,
        "drift": float(d.mean()),
        "spread": spread,
        "relative_spread": spread / max(float(log_pi.std()), 1e-9),
        "one_sidedness": 1 - float(-d[d < 0].sum() / max(d[d > 0].sum(), 1e-30)),
        "temperature": 1 / max(1 + slope, 1e-3),
        "temperature_fit": fit,
        "temperature_offset": offset / max(spread, 1e-30),
        "half_share": float(_held_by_16_bits(half).mean()) if len(half) >= MIN_TOKENS else 0.0,
        "excess": float(surprise.mean()),
        "excess_sigmas": float(surprise.mean() / _standard_error(surprise, tokens.entropy[control])),
        "excess_allowed": float(surprise.std() * np.sqrt(2 * kl)),
    }


def _standard_error(surprise: Doubles, entropy: FloatArray) -> float:
    """Of the mean of log pi + H (nats).

    Where pi is nearly certain its rare tokens, which hold all of the variance, may not be among those drawn. A choice
    between two tokens that has entropy H has a variance of about H log(1 + 1/H); it is not taken to be less than that.
    """
    certain = np.maximum(entropy.astype(np.float64), 1e-12)
    variance = max(float(surprise.var()), float((certain * np.log1p(1 / certain)).mean()))
    return float(np.sqrt(variance / len(surprise)))


def _after_push(tokens: Tokens, usable: Bools, pushed: Bools, divergence: Doubles) -> tuple[float | None, float | None]:
    """KL of tokens after a push, and of others of the same weights; without any, of those before the push."""
    after = usable & tokens.after_push
    if after.sum() < MIN_TOKENS:
        return None, None
    ages = int(tokens.staleness[usable].max()) + 1
    shifted = tokens.staleness - min(int(tokens.staleness[usable].min()), 0)

    def by_age(chosen: Bools) -> tuple[Doubles, Doubles]:
        age = shifted[chosen]
        return np.bincount(age, minlength=ages).astype(float), np.bincount(age, divergence[chosen], minlength=ages)

    (count, total), (others, other_total) = by_age(after), by_age(usable & ~pushed)
    both = (count > 0) & (others > 0)
    if min(count[both].sum(), others[both].sum()) >= MIN_TOKENS:
        expected = (count[both] * other_total[both] / others[both]).sum()
        return float(total[both].sum() / count[both].sum()), float(expected / count[both].sum())
    before = usable & pushed & ~tokens.after_push
    return float(divergence[after].mean()), float(divergence[before].mean()) if before.any() else None


def _line(x: Doubles, y: Doubles) -> tuple[float, float, float]:
    """Least squares: slope, value at 0, R^2."""
    dx, dy = x - x.mean(), y - y.mean()
    xx, xy, yy = float(dx @ dx), float(dx @ dy), float(dy @ dy)
    if xx == 0 or yy == 0:
        return 0.0, float(y.mean()), 0.0
    return xy / xx, float(y.mean() - xy / xx * x.mean()), xy * xy / (xx * yy)


def _held_by_16_bits(values: np.ndarray) -> Bools:
    """Whether bfloat16, or float16, holds each float32 exactly."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits & 0xFFFF == 0) | (values.astype(np.float16).astype(np.float32) == values)


@dataclass(frozen=True, slots=True)
class Cause:
    """One row of the table.

    Attributes:
        name: Short, for files and tests.
        picture: How clearly the evidence shows it, in (0, 1]; 0: not at all.
        sentence: What is likely the case.
        remedy: What to do.
        is_fault: Whether something is wrong; staleness is normal.
        shown_by: Fields of the evidence that speak for it.
    """

    name: str
    picture: Callable[[Evidence], float]
    sentence: str
    remedy: str
    shown_by: tuple[str, ...]
    is_fault: bool = True


def _temperature(e: Evidence) -> float:
    # Rounding may come on top. An entropy that falls with training looks a little like a temperature.
    needed = 0.4 if e.least_staleness == 0 else 0.95
    off = abs(e.temperature - 1) > 5e-3 and 0.2 < e.temperature < 4 and e.spread > 1e-3
    return e.temperature_fit if off and e.temperature_fit > needed and e.temperature_offset < 0.1 else 0.0


def _cut_and_renormalised(e: Evidence) -> float:
    return e.one_sidedness if e.one_sidedness > 0.98 and e.drift > 1e-3 and not _temperature(e) else 0.0


def _cut_unreported(e: Evidence) -> float:
    beyond = 3 * e.excess_allowed
    clear = e.excess > 0.01 and e.excess_sigmas > 6 and e.excess > beyond and e.least_staleness == 0
    return 1 - beyond / e.excess if clear else 0.0


def _truncated(e: Evidence) -> float:
    return max(_cut_and_renormalised(e), _cut_unreported(e))


def _half(e: Evidence) -> float:
    return e.half_share if e.half_share > 0.99 else 0.0


def _stale_cache(e: Evidence) -> float:
    if e.kl_after_push is None or e.kl_no_push is None or e.kl_after_push < 1e-5:
        return 0.0
    return 1 - e.kl_no_push / e.kl_after_push if e.kl_after_push > 4 * e.kl_no_push else 0.0


def _staleness(e: Evidence) -> float:
    pairs = [(e.kl, e.kl_stale, 4 if e.least_staleness == 0 else 2), (e.kl_after_push, e.kl_no_push, 4)]
    return max(
        1 - fresh / stale if stale > max(ratio * fresh, 1e-5) else 0.0
        for fresh, stale, ratio in ((a or 0.0, b or 0.0, ratio) for a, b, ratio in pairs)
    )


def _mismatch(e: Evidence, most_stale: int) -> bool:
    """Whether tokens differ for a reason that has no sharper picture, though they are not staler than that."""
    sharper = (_temperature, _cut_and_renormalised, *(() if e.least_staleness == 0 else (_staleness,)))
    return e.kl > MISMATCH and e.least_staleness <= most_stale and not any(picture(e) for picture in sharper)


WRONG_SPREAD = 0.3
"""Spread of d relative to that of log pi from which on it is no rounding any more."""


def _quantized(e: Evidence) -> float:
    return 1 - e.relative_spread if _mismatch(e, 0) and e.relative_spread < WRONG_SPREAD else 0.0


def _wrong_weights(e: Evidence) -> float:
    # No single update moves a policy that far.
    return min(1.0, e.relative_spread) if _mismatch(e, 1) and e.relative_spread >= WRONG_SPREAD else 0.0


CAUSES: tuple[Cause, ...] = (
    Cause(
        "temperature",
        _temperature,
        "the sampler's temperature is not the one that the trainer's log-probabilities are of",
        "set rollout.temperature to what the server really samples with, and let nothing between change it",
        ("temperature", "temperature_fit"),
    ),
    Cause(
        "truncated_sampling",
        _truncated,
        "tokens are not drawn from the distribution that the log-probabilities are of: top-p, top-k or min-p below the"
        " whole vocabulary, or a penalty",
        "sample from the whole distribution: top_p 1, top_k -1, min_p 0, no penalties, also in the server's defaults",
        ("drift", "one_sidedness", "excess", "excess_sigmas"),
    ),
    Cause(
        "half_precision_log_probs",
        _half,
        "the sampler's log-probabilities are rounded to 16 bits",
        "have the server compute and send log-probabilities in float32",
        ("half_share", "spread"),
    ),
    Cause(
        "stale_kv_cache",
        _stale_cache,
        "tokens sampled after a push build on keys and values of the weights before it",
        "set weight_sync.pause to retract or abort, and flush the server's cache at every push",
        ("kl_after_push", "kl_no_push"),
    ),
    Cause(
        "wrong_weights",
        _wrong_weights,
        "the server samples with other weights than the trainer has",
        "set weight_sync.verify: checksum; check how the server loads and orders the weights (experts, fused"
        " projections, tied embeddings), and that it serves this architecture",
        ("kl", "relative_spread"),
    ),
    Cause(
        "quantized_rollout",
        _quantized,
        "the sampler computes with rounded weights, activations or cache (FP8, INT8, FP8 KV cache)",
        "serve in the trainer's precision, or keep responses short enough: see the forecast of the pre-flight",
        ("kl", "spread", "relative_spread"),
    ),
    Cause(
        "staleness",
        _staleness,
        "samples are stale: the policy has moved since they were drawn",
        "lower megatron.lr, training.minibatches_per_step or rollout.max_staleness",
        ("kl", "kl_stale", "kl_after_push", "kl_no_push", "least_staleness"),
        is_fault=False,
    ),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """A likely cause with what speaks for it."""

    cause: Cause
    strength: float
    numbers: dict[str, float | None]

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {value:.3g}" for name, value in self.numbers.items() if value is not None)
        return f"{self.cause.sentence} ({shown}); {self.cause.remedy}"


UNEXPLAINED = "unexplained: the log-probabilities differ and no known cause fits"


def diagnose(evidence: Evidence | None) -> list[Finding]:
    """Likely causes, the clearest first; none where trainer and sampler agree, or where no known cause fits."""
    if evidence is None:
        return []
    measured = asdict(evidence)
    found = [
        Finding(cause, strength, {name: measured[name] for name in cause.shown_by})
        for cause in CAUSES
        if (strength := cause.picture(evidence)) > 0
    ]
    return sorted(found, key=lambda finding: -finding.strength)


def is_unexplained(evidence: Evidence | None) -> bool:
    """Whether the mismatch is large and no cause is named."""
    return evidence is not None and evidence.kl > MISMATCH and not diagnose(evidence)
