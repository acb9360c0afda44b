"""Figures of how sound off-policy training is, of all samples of a step at once.

A figure that has nothing to be computed from is ``None``. Divergences are estimated from tokens that mu sampled, with
the log ratio l = log pi - log mu: k1 = -l is unbiased and may be negative; k3 = exp(l) - 1 - l is unbiased as well,
never negative and of smaller variance (Schulman 2020, "Approximating KL divergence"), where mu is a distribution: with
log-probabilities that do not sum to 1, as after top-p, k1 says more.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from megatron_vespo.algorithms.importance import summarize
from megatron_vespo.algorithms.tokens import Bools, Doubles, Tokens

Figures = dict[str, float | None]

# Name and longest response; a bucket begins where the one before ends.
LENGTH_BUCKETS: tuple[tuple[str, float], ...] = (
    ("len64", 64),
    ("len256", 256),
    ("len1024", 1024),
    ("len4096", 4096),
    ("len_more", math.inf),
)
# Name and largest staleness in updates.
STALENESS_BUCKETS: tuple[tuple[str, float], ...] = (
    ("0", 0),
    ("1_3", 3),
    ("4_15", 15),
    ("16_63", 63),
    ("64_more", math.inf),
)
QUANTILES: tuple[tuple[str, float], ...] = (("log_w_p05", 0.05), ("log_w_p50", 0.5), ("log_w_p95", 0.95))
# Fields of importance.WeightSummary that buckets of lengths have.
HEARD = ("ess_w", "ess_phi", "phi_mean", "phi_small_share")
# exp() of more is never formed.
_LARGEST = 80.0


def k3(log_ratio: Doubles) -> Doubles:
    """The estimator exp(l) - 1 - l of KL(mu || pi) for each token (nats), same shape."""
    clamped = np.minimum(log_ratio, _LARGEST)
    return np.expm1(clamped) - clamped


def summarize_health(
    tokens: Tokens, log_w: Doubles, phi: Doubles, advantages: Doubles, *, log_w_limit: float | None, token_limit: float
) -> Figures:
    """The ``health/...`` figures of a step, without the prefix.

    Args:
        tokens: Response tokens of S samples.
        log_w: log W of each sample as the loss had it (nats), [S].
        phi: Its weight, [S].
        advantages: [S].
        log_w_limit: Where the kernel clamps log W from above; None: it does not.
        token_limit: |log pi - log mu| (nats) above which a token counts as an outlier.
    """
    log_ratio = tokens.log_ratio
    # Tokens that are impossible under one of the two count among the outliers and in log W, not here.
    usable = np.nan_to_num(log_ratio, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    divergence = k3(usable)
    totals = {"k1": -tokens.per_sample(usable), "k3": tokens.per_sample(divergence)}
    present = tokens.lengths > 0
    figures: Figures = {}
    groups = {"": present, "_pos": present & (advantages > 0), "_neg": present & (advantages < 0)}
    for suffix, chosen in groups.items():
        figures |= _of_group(suffix, chosen, tokens, totals, log_w, log_w_limit)
    for name, chosen in _buckets(tokens.lengths, LENGTH_BUCKETS, present).items():
        if not chosen.any():  # most runs fill two or three of them
            continue
        figures |= _of_group(f"_{name}", chosen, tokens, totals, log_w, log_w_limit)
        figures |= _heard(f"_{name}", log_w[chosen], phi[chosen])
    return figures | _of_tokens(tokens, divergence, token_limit)


def outliers(tokens: Tokens, limit: float, most: int) -> tuple[int, list[int]]:
    """How many tokens have |log pi - log mu| above ``limit``, and the places of the worst ``most``, worst first."""
    distance = np.abs(tokens.log_ratio)
    places = np.flatnonzero(~(distance <= limit))
    worst = np.argsort(-np.nan_to_num(distance[places], nan=np.inf), kind="stable")[:most]
    return len(places), places[worst].tolist()


def _of_group(
    suffix: str,
    chosen: Bools,
    tokens: Tokens,
    totals: dict[str, Doubles],
    log_w: Doubles,
    log_w_limit: float | None,
) -> Figures:
    """What every group of samples has: quantiles of log W, clamp hits, KL per token."""
    number = max(int(tokens.lengths[chosen].sum()), 1)
    values = log_w[chosen]
    values = values[~np.isnan(values)]
    if not len(values):
        names = (*(name for name, _ in QUANTILES), "clamp_share", "kl_k1", "kl_k3")
        return {name + suffix: None for name in names}
    # Infinities have a place in the order but not in an interpolation between two of them.
    quantiles = np.quantile(values, [level for _, level in QUANTILES], method="lower")
    figures: Figures = {name + suffix: float(q) for (name, _), q in zip(QUANTILES, quantiles, strict=True)}
    figures[f"clamp_share{suffix}"] = None if log_w_limit is None else float((values > log_w_limit).mean())
    figures |= {f"kl_{name}{suffix}": float(total[chosen].sum() / number) for name, total in totals.items()}
    return figures


def _heard(suffix: str, log_w: Doubles, phi: Doubles) -> Figures:
    """How much of a group is heard."""
    summary = summarize(torch.from_numpy(log_w), torch.from_numpy(phi))
    figures: Figures = {f"{name}{suffix}": getattr(summary, name) for name in HEARD}
    return figures | {f"samples{suffix}": float(len(phi))}


def _of_tokens(tokens: Tokens, divergence: Doubles, token_limit: float) -> Figures:
    """Staleness histogram, mismatch of fresh tokens, outliers, router flips."""
    if not len(tokens):
        return {}
    borders = np.array([high for _, high in STALENESS_BUCKETS[:-1]])
    counts = np.bincount(np.searchsorted(borders, tokens.staleness), minlength=len(STALENESS_BUCKETS))
    fresh = tokens.staleness == 0
    number = outliers(tokens, token_limit, 0)[0]
    flips = np.zeros(0) if tokens.router_flips is None else tokens.router_flips[~np.isnan(tokens.router_flips)]
    return {
        **{
            f"staleness_{name}_share": float(count / len(tokens))
            for (name, _), count in zip(STALENESS_BUCKETS, counts, strict=True)
        },
        "kl_fresh": float(divergence[fresh].mean()) if fresh.any() else None,
        "outlier_tokens": float(number),
        "outlier_share": number / len(tokens),
        **({"router_flip_rate": float(flips.mean())} if len(flips) else {}),
    }


def _buckets(values: np.ndarray, table: tuple[tuple[str, float], ...], among: Bools) -> dict[str, Bools]:
    """Which of ``values`` lie in each bucket of a table, by its name."""
    chosen, low = {}, -math.inf
    for name, high in table:
        chosen[name] = among & (values > low) & (values <= high)
        low = high
    return chosen
