"""From the configuration's ``algorithm`` section to what it names; importing this fills the registries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megatron_vespo.algorithms import baselines, corrections, vespo  # noqa: F401  they register themselves
from megatron_vespo.algorithms.advantages import GroupNormalizedParams, get_advantage_estimator
from megatron_vespo.algorithms.aggregation import Aggregation
from megatron_vespo.algorithms.loss import Regularization
from megatron_vespo.algorithms.weights import CORRECTIONS, KERNELS, Weighting, WeightKernel
from megatron_vespo.config import AlgorithmSection
from megatron_vespo.dotted import load_object
from megatron_vespo.errors import UserError
from megatron_vespo.types import SampleGroup

__all__ = [
    "CORRECTIONS",
    "KERNELS",
    "get_correction",
    "get_kernel",
    "make_advantages",
    "make_aggregation",
    "make_regularization",
    "make_weighting",
]


def get_kernel(name: str) -> WeightKernel[Any]:
    """The kernel of that name, or one of the user's.

    Args:
        name: A built-in name, ``path/to/file.py:name`` or ``package.module:name`` of a ``WeightKernel``.

    Raises:
        UserError: There is none, or it is no kernel.
    """
    return _find(name, KERNELS, "kernel")


def get_correction(name: str) -> WeightKernel[Any]:
    """The correction of that name, or one of the user's, as ``get_kernel``."""
    return _find(name, CORRECTIONS, "correction")


def _find(name: str, table: dict[str, WeightKernel[Any]], kind: str) -> WeightKernel[Any]:
    if ":" not in name:
        if name not in table:
            raise UserError(
                f"unknown {kind} {name!r}; there are: {', '.join(sorted(table))}; or write path/to/file.py:name or"
                " package.module:name"
            )
        return table[name]
    kernel = load_object(name, kind)
    if not isinstance(kernel, WeightKernel):
        raise UserError(
            f"{kind} {name!r} is a {type(kernel).__name__}; make it a WeightKernel with the decorator"
            f" megatron_vespo.algorithms.weights.{'weight_kernel' if table is KERNELS else 'correction'}"
        )
    return kernel


def make_weighting(section: AlgorithmSection, *, knows_old: bool) -> Weighting:
    """The kernel and its corrections.

    Args:
        section: Configuration.
        knows_old: Whether pi_old is known apart from mu (``behavior_logprobs: both``).

    Raises:
        UserError: A name or parameter is unknown or refused, or a correction would count a ratio twice.
    """
    try:
        kernel = get_kernel(section.kernel)
        params = kernel.make_params(section.kernel_params)
    except UserError as error:
        raise UserError(f"algorithm.kernel, algorithm.kernel_params: {error}") from error
    try:
        factors = [(get_correction(name), values) for name, values in section.corrections.items()]
        corrections = tuple((factor, factor.make_params(values)) for factor, values in factors)
    except UserError as error:
        raise UserError(f"algorithm.corrections: {error}") from error
    if corrections and kernel.corrects and not knows_old:
        raise UserError(
            f"algorithm.corrections: {section.kernel} has the ratio pi / mu in its weight already, which a correction"
            " would count again; set rollout.behavior_logprobs: both, so that the correction gets pi_old / mu and the"
            " kernel pi / pi_old"
        )
    return Weighting(kernel, params, corrections)


def make_advantages(section: AlgorithmSection) -> Callable[[Sequence[SampleGroup]], None]:
    """Sets the advantages of complete groups: as the configuration says, or else as the kernel's paper does."""
    kernel = get_kernel(section.kernel)
    estimator = get_advantage_estimator(section.advantage or kernel.advantage)
    if estimator.params_type is not GroupNormalizedParams:
        return partial(estimator, params=estimator.params_type())
    normalize_std = kernel.normalize_std if section.normalize_std is None else section.normalize_std
    return partial(estimator, params=GroupNormalizedParams(normalize_std))


def make_aggregation(section: AlgorithmSection) -> Aggregation:
    """The divisor of the loss: as the configuration says, or else the kernel's own."""
    return Aggregation(section.aggregation or get_kernel(section.kernel).aggregation)


def make_regularization(section: AlgorithmSection) -> Regularization:
    """KL and entropy terms."""
    return Regularization(section.kl_coef, section.kl_estimator, section.entropy_coef)
