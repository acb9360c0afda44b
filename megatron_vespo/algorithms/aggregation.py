"""What the sum over tokens is divided by. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from megatron_vespo.errors import UserError


class Aggregation(StrEnum):
    """The four divisors in use, by verl's names: how much one token counts beside the others.

    Attributes:
        TOKEN_MEAN: Response tokens of the minibatch: all tokens count the same (DAPO).
        SEQ_MEAN_TOKEN_SUM: Samples of the minibatch: the policy-gradient estimator itself.
        SEQ_MEAN_TOKEN_MEAN: Samples, and each sample's own length: all samples count the same (GRPO).
        SEQ_MEAN_TOKEN_SUM_NORM: Samples times a constant length, the longest response allowed (Dr. GRPO).
    """

    TOKEN_MEAN = "token-mean"
    SEQ_MEAN_TOKEN_SUM = "seq-mean-token-sum"
    SEQ_MEAN_TOKEN_MEAN = "seq-mean-token-mean"
    SEQ_MEAN_TOKEN_SUM_NORM = "seq-mean-token-sum-norm"


@dataclass(frozen=True, slots=True)
class Denominators:
    """Sizes of the whole global minibatch: all microbatches of all data-parallel ranks.

    Attributes:
        tokens: Response tokens, those of samples with advantage 0 included.
        samples: Samples, those with an empty response or advantage 0 included.
        max_response: Longest response that sampling allows, in tokens, for ``seq-mean-token-sum-norm``.

    Raises:
        UserError: One of them is not positive.
    """

    tokens: int
    samples: int
    max_response: int = 1

    def __post_init__(self) -> None:
        if self.tokens <= 0 or self.samples <= 0:
            raise UserError(
                f"a minibatch of {self.samples} samples with {self.tokens} response tokens has nothing to learn from; "
                "every response is empty"
            )
        if self.max_response <= 0:
            raise UserError(f"the longest response must have at least 1 token, got {self.max_response}")

    def of(self, aggregation: Aggregation) -> int:
        """The number that ``aggregation`` divides by, besides a sample's own length."""
        match Aggregation(aggregation):
            case Aggregation.TOKEN_MEAN:
                return self.tokens
            case Aggregation.SEQ_MEAN_TOKEN_SUM_NORM:
                return self.samples * self.max_response
            case Aggregation.SEQ_MEAN_TOKEN_SUM | Aggregation.SEQ_MEAN_TOKEN_MEAN:
                return self.samples
