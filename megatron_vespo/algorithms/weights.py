"""Weight kernels: how much each token's gradient counts.

Every policy-gradient method here is one detached weight kappa on grad log pi,

    loss = -sum over tokens t of  agg_t * stopgrad(kappa_t) * A_s(t) * log pi_t ,

so a method is a small pure function from the importance ratios to kappa, with the aggregation and the advantages of its
paper. A sequence-level kernel computes kappa per sample and gives it to every token of the sample; a token-level kernel
uses the per-token ratios. Clipping is a kappa of 0 at the clipped tokens. ``KERNELS`` names the methods,
``CORRECTIONS`` the factors that compose with them; ``methods`` finds them by name.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_vespo.algorithms.aggregation import Aggregation
from megatron_vespo.algorithms.importance import segment_sum, token_log_ratio
from megatron_vespo.errors import UserError

MAX_LOG_RATIO = 20.0
"""A log ratio (nats) is not exponentiated beyond this: exp(20) is 5e8, and no kernel tells it from infinity."""


@dataclass(frozen=True, slots=True)
class Ratios:
    """What a kernel may look at: real response tokens only, no padding, nothing that requires grad.

    The T tokens may be a part of the microbatch's: the loss calls the kernel once for each chunk of tokens, and a chunk
    may begin or end within a sample. What belongs to a sample is always whole. So a kernel gives each token its kappa
    from that token and its sample alone; it must not sum or count over tokens.

    Three policies are told apart. mu sampled; pi_old is the trainer's policy as the step began; pi is its policy now.
    Where pi_old is not known on its own (``behavior_logprobs`` other than ``both``), it is mu: drift is the whole ratio
    and nothing is left for the mismatch.

    Attributes:
        log_ratio: log pi - log mu of each token (nats), shape [T], float32 or float64; NaN and infinities are possible.
        log_drift: log pi - log pi_old of it, what clipping looks at, shape [T].
        log_mismatch: log pi_old - log mu of it, what corrections look at, shape [T]; None where pi_old is mu.
        sample_index: Local sample each token belongs to, in [0, S), shape [T], int64.
        log_w: Sum of the log ratio over all tokens of each sample, shape [S]; 0 for an empty response, infinite or NaN
            as ``importance.sequence_log_ratio`` says.
        sum_log_drift: Sum of the log drift over all tokens of each sample, shape [S].
        n_tokens: Response tokens of each sample, shape [S], of log_ratio's dtype.
        advantages: Advantage of each sample, shape [S].
        statistics: What ``WeightKernel.measure`` said of the whole minibatch; empty for kernels without it.
    """

    log_ratio: Tensor
    log_drift: Tensor
    log_mismatch: Tensor | None
    sample_index: Tensor
    log_w: Tensor
    sum_log_drift: Tensor
    n_tokens: Tensor
    advantages: Tensor
    statistics: tuple[float, ...] = ()

    @property
    def token_advantages(self) -> Tensor:
        """Advantage of each token's sample, shape [T]."""
        return self.spread(self.advantages)

    def spread(self, values: Tensor) -> Tensor:
        """A number of each sample, shape [S], given to each of its tokens, shape [T]."""
        return values.index_select(0, self.sample_index)


def token_ratios(log_pi: Tensor, log_mu: Tensor, log_old: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The ``log_ratio``, ``log_drift`` and ``log_mismatch`` of ``Ratios``, from log-probabilities of shape [T]."""
    log_ratio = token_log_ratio(log_pi, log_mu)
    if log_old is None:
        return log_ratio, log_ratio, None
    return log_ratio, token_log_ratio(log_pi, log_old), token_log_ratio(log_old, log_mu)


def whole_ratios(
    log_pi: Tensor,
    log_mu: Tensor,
    log_old: Tensor | None,
    sample_index: Tensor,
    advantages: Tensor,
) -> Ratios:
    """The ratios of all tokens of some samples at once, where memory does not matter. All finite.

    Args:
        log_pi: Log-probabilities under the policy (nats), shape [T].
        log_mu: Under the behaviour policy, shape [T].
        log_old: Under the policy that began the step, shape [T]; None: it is mu.
        sample_index: Sample of each token, shape [T], int64.
        advantages: Shape [S].
    """
    size = len(advantages)
    log_ratio, log_drift, log_mismatch = token_ratios(log_pi, log_mu, log_old)
    return Ratios(
        log_ratio,
        log_drift,
        log_mismatch,
        sample_index,
        segment_sum(log_ratio, sample_index, size),
        segment_sum(log_drift, sample_index, size),
        segment_sum(torch.ones_like(log_ratio), sample_index, size),
        advantages,
    )


@dataclass(frozen=True, slots=True)
class WeightKernel[P]:
    """A named weight function with the dataclass of its parameters. Call it to get kappa, shape [T].

    kappa of a sample whose log W is not finite is never used: ``policy_loss`` drops such samples.

    Attributes:
        name: What the configuration calls it.
        params_type: Frozen dataclass of its parameters, which checks them.
        function: From ratios to kappa.
        aggregation: The method's own divisor.
        advantage: The method's own advantage estimator.
        normalize_std: Whether that divides by the standard deviation of the group's rewards.
        corrects: Whether kappa contains an importance ratio already. A correction on top needs pi_old known on its own.
        measure: From the ratios of the whole minibatch to numbers that kappa needs, which cost one more forward pass.
        bound: Largest kappa that the parameters allow, where that is worth asserting.
        aliases: Other implementations' names of parameters.
    """

    name: str
    params_type: type[P]
    function: Callable[[Ratios, P], Tensor]
    aggregation: Aggregation = Aggregation.TOKEN_MEAN
    advantage: str = "group_normalized"
    normalize_std: bool = True
    corrects: bool = True
    measure: Callable[[Ratios, P], tuple[float, ...]] | None = None
    bound: Callable[[P], float] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, ratios: Ratios, params: P) -> Tensor:
        """Kappa of each token, shape [T], of the ratios' dtype."""
        return self.function(ratios, params)

    def make_params(self, values: Mapping[str, Any]) -> P:
        """Parameters from the configuration; what is missing keeps its default.

        Raises:
            UserError: A name is unknown, given twice (under an alias), or a value is refused.
        """
        known = [item.name for item in dataclasses.fields(self.params_type)]  # type: ignore[arg-type]
        named: dict[str, Any] = {}
        for key, value in values.items():
            name = self.aliases.get(key, key)
            if name not in known:
                near = difflib.get_close_matches(key, [*known, *self.aliases], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known) or 'none'}"
                raise UserError(f"{self.name} has no parameter {key!r}{hint}")
            if name in named:
                raise UserError(f"{self.name}: {name} is given twice ({', '.join(k for k in values if k != name)})")
            named[name] = value
        return self.params_type(**named)


KERNELS: dict[str, WeightKernel[Any]] = {}
CORRECTIONS: dict[str, WeightKernel[Any]] = {}


def weight_kernel[P](
    name: str, params_type: type[P], **properties: Any
) -> Callable[[Callable[[Ratios, P], Tensor]], WeightKernel[P]]:
    """Decorator that registers a weight function as method ``name``, with the properties of ``WeightKernel``."""
    return _registered(KERNELS, name, params_type, properties)


def correction[P](name: str, params_type: type[P]) -> Callable[[Callable[[Ratios, P], Tensor]], WeightKernel[P]]:
    """Decorator that registers a factor of kappa as correction ``name``."""
    return _registered(CORRECTIONS, name, params_type, {})


def _registered[P](
    table: dict[str, WeightKernel[Any]], name: str, params_type: type[P], properties: dict[str, Any]
) -> Callable[[Callable[[Ratios, P], Tensor]], WeightKernel[P]]:
    def register(function: Callable[[Ratios, P], Tensor]) -> WeightKernel[P]:
        if name in table:
            raise ValueError(f"weight kernel {name!r} is defined twice")
        table[name] = WeightKernel(name, params_type, function, **properties)
        return table[name]

    return register


@dataclass(frozen=True, slots=True)
class Weighting:
    """A kernel with its parameters, times any corrections with theirs: all that kappa is made of.

    Attributes:
        kernel: The method.
        params: Its parameters.
        corrections: Factors with their parameters.
        statistics: ``kernel.measure`` of this minibatch.
    """

    kernel: WeightKernel[Any]
    params: Any
    corrections: tuple[tuple[WeightKernel[Any], Any], ...] = ()
    statistics: tuple[float, ...] = ()

    def __call__(self, ratios: Ratios) -> Tensor:
        """Kappa of each token, shape [T]."""
        kappa = self.kernel(ratios, self.params)
        for factor, params in self.corrections:
            kappa = kappa * factor(ratios, params)
        return kappa

    @property
    def needs_minibatch(self) -> bool:
        """Whether the log-probabilities of the whole minibatch must be known first."""
        return self.kernel.measure is not None

    def measured(self, ratios: Ratios) -> Weighting:
        """The same for a minibatch of these ratios."""
        assert self.kernel.measure is not None
        return dataclasses.replace(self, statistics=self.kernel.measure(ratios, self.params))

    def of_minibatch(self, ratios: Ratios) -> Tensor:
        """Kappa of each token, shape [T], where the ratios are those of a whole minibatch."""
        if not self.needs_minibatch:
            return self(ratios)
        weighting = self.measured(ratios)
        return weighting(dataclasses.replace(ratios, statistics=weighting.statistics))

    @property
    def bound(self) -> float | None:
        """Largest kappa possible, where it is known."""
        return None if self.kernel.bound is None or self.corrections else self.kernel.bound(self.params)
