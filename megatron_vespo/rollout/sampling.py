"""How responses are sampled, and what of that training can use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_vespo.errors import UserError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How responses are sampled.

    SGLang's log-probs are those of the temperature-scaled distribution **before** top-p and top-k cut it. With either,
    ``log_mu`` is not the log-probability the token was really sampled with, and importance weights built on it are
    biased; with temperature 0 there is no distribution at all. So all three are for evaluation only.

    Attributes:
        max_new_tokens: Limit of the response, in tokens.
        temperature: Softmax temperature; 0 is greedy decoding.
        top_p: Nucleus sampling; 1 is off.
        top_k: Sample among the k likeliest tokens; -1 is off.
        stop_token_ids: Further tokens that end a response, besides the model's end of sequence; they stay part of it.
        ignore_eos: Go on after the end of sequence, up to ``max_new_tokens``.
        evaluation: These samples will not be trained on.

    Raises:
        UserError: a value out of range, or one that training cannot use.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    evaluation: bool = False

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0 and math.isfinite(self.temperature), "a number >= 0"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k == -1 or self.top_k >= 1, "-1 (off) or at least 1"),
        }
        for name, (right, wanted) in checks.items():
            if not right:
                raise UserError(f"sampling.{name}: {getattr(self, name)} is wrong, it must be {wanted}")
        if self.evaluation:
            return
        reason = (
            "SGLang reports log-probabilities from before this is applied, so they are not those of the behaviour "
            "policy and the importance weights would be biased; it is allowed for evaluation only"
        )
        for name, off in (("top_p", 1.0), ("top_k", -1)):
            if getattr(self, name) != off:
                raise UserError(
                    f"sampling.{name}: {getattr(self, name)} cannot be trained on, leave it {off}: {reason}"
                )
        if self.temperature == 0:
            raise UserError("sampling.temperature: 0 (greedy) cannot be trained on: it is not a distribution")

    def body(self, max_new_tokens: int) -> dict[str, Any]:
        """SGLang's ``sampling_params``. Everything is said, as a model's own defaults would fill what is left out."""
        return {
            "max_new_tokens": max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "min_new_tokens": 0,
            "stop_token_ids": list(self.stop_token_ids),
            "ignore_eos": self.ignore_eos,
        }
