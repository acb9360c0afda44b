"""Router flips: exact against transformers and against counting by hand, and the same in every layout."""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from examples.staleness_lab.rollouts import sample_groups
from examples.staleness_lab.sampler import Perturbation, Sampler
from megatron_vespo.algorithms.aggregation import Aggregation
from megatron_vespo.algorithms.methods import KERNELS
from megatron_vespo.algorithms.vespo import VespoParams
from megatron_vespo.algorithms.weights import Weighting
from megatron_vespo.megatron_options import microbatch_multiple
from megatron_vespo.policy.objectives import NextToken, PolicyGradient, denominators
from megatron_vespo.types import UNKNOWN_EXPERT, FloatArray, Prompt, Sample
from tests.hf_reference import routed_experts_in_this_process
from tests.host_syncs import count_host_syncs
from tests.policies import make_plan, make_policy, random_samples
from tests.ranks import run_ranks
from tests.tiny_deepseek import make_tiny_sigmoid_moe
from tests.tiny_models import EOS_ID, make_tiny_qwen3_moe

LAYERS, EXPERTS, CHOSEN = 4, 6, 2
TP_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP = {"expert_model_parallel_size": 2}
PP = {"pipeline_model_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "recompute": (1, FULL),
    "EP2": (2, EP),
    "PP2": (2, PP),
    "PP2 VPP2": (2, PP | {"virtual_pipeline_model_parallel_size": 2}),
    "PP2 recompute": (2, PP | FULL),
    "TP2 SP": (2, TP_SP),
    "TP2 SP recompute of experts": (2, TP_SP | SELECTIVE),
    "TP2 SP EP2": (4, TP_SP | EP),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3_moe(
        tmp_path_factory.mktemp("models") / "moe",
        num_layers=LAYERS,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
    )


def draw(folder: Path, perturbation: Perturbation) -> list[Sample]:
    """Samples of the laboratory's sampler, of many lengths."""
    sampler = Sampler(json.loads((folder / "config.json").read_text()), perturbation, 0)
    sampler.load(load_file(folder / "model.safetensors").items())
    rng = np.random.default_rng(3)
    prompts = [Prompt(i, rng.integers(0, 64, 5).astype(np.int32), "1") for i in range(5)]
    groups = sample_groups(sampler, prompts, 3, 12, [EOS_ID, *range(10, 16)], 1.0, 0)
    return [replace(sample, advantage=1.0 - sample.index) for group in groups for sample in group.samples]


def flips(folder: Path, samples: Sequence[Sample], megatron: dict[str, Any]) -> list[FloatArray] | None:
    """The policy's, on this rank."""
    objective = PolicyGradient(
        Weighting(KERNELS["vespo"], VespoParams()), Aggregation.TOKEN_MEAN, denominators(samples)
    )
    plan = make_plan(samples, 40, multiple_of=microbatch_multiple(megatron))
    assert len(plan) > 1
    return make_policy(folder, megatron).forward_backward(samples, plan, objective).tokens.router_flips


def by_transformers(folder: Path, samples: Sequence[Sample]) -> list[FloatArray]:
    """Count by hand: of each token the share of the sampler's experts that transformers does not choose."""
    texts = [np.concatenate([sample.prompt.input_ids, sample.response_ids]) for sample in samples]
    shares = []
    for sample, theirs in zip(samples, routed_experts_in_this_process(folder, texts), strict=True):
        assert sample.routed_experts is not None
        first = len(sample.prompt.input_ids) - 1
        shares.append(
            np.array(
                [
                    sum(len({*a.tolist()} - {*b.tolist()}) for a, b in zip(mine, theirs[first + t], strict=True))
                    / (LAYERS * CHOSEN)
                    for t, mine in enumerate(sample.routed_experts)
                ],
                np.float32,
            )
        )
    return shares


@pytest.fixture(scope="module")
def noisy(folder: Path) -> tuple[list[Sample], list[FloatArray]]:
    """Samples whose sampler's router had noise, and their flips."""
    samples = draw(folder, Perturbation(router_noise=0.5))
    return samples, by_transformers(folder, samples)


def test_without_mismatch_nothing_flips(folder: Path) -> None:
    samples = draw(folder, Perturbation())
    (found,) = run_ranks(1, flips, folder, samples, {})
    assert [len(values) for values in found] == [len(sample.response_ids) for sample in samples]
    assert all((values == 0).all() for values in found)


def test_flips_are_those_counted_by_hand(folder: Path, noisy: tuple[list[Sample], list[FloatArray]]) -> None:
    samples, expected = noisy
    (found,) = run_ranks(1, flips, folder, samples, {})
    assert 0.05 < np.concatenate(expected).mean() < 0.6
    for values, shares in zip(found, expected, strict=True):
        np.testing.assert_array_equal(values, shares)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_counts_the_same(folder: Path, noisy: tuple[list[Sample], list[FloatArray]], layout: str) -> None:
    (samples, expected), (size, megatron) = noisy, LAYOUTS[layout]
    for found in run_ranks(size, flips, folder, samples, megatron, **megatron):
        for values, shares in zip(found, expected, strict=True):
            np.testing.assert_array_equal(values, shares)


def test_what_is_not_known_is_not_counted(folder: Path, noisy: tuple[list[Sample], list[FloatArray]]) -> None:
    samples, expected = deepcopy(noisy)
    partly = max(range(len(samples)), key=lambda i: len(samples[i].response_ids))
    other = (partly + 1) % len(samples)
    experts = samples[partly].routed_experts
    assert experts is not None and len(experts) > 3
    experts[:3] = UNKNOWN_EXPERT
    samples[other].routed_experts = None
    expected[partly][:3] = expected[other][:] = np.nan
    (found,) = run_ranks(1, flips, folder, samples, {})
    for values, shares in zip(found, expected, strict=True):
        np.testing.assert_array_equal(values, shares)
    unknown = [replace(sample, routed_experts=None) for sample in samples]
    assert run_ranks(1, flips, folder, unknown, {}) == [None]


def flips_of_next_token(folder: Path, samples: Sequence[Sample]) -> list[FloatArray] | None:
    policy = make_policy(folder, {})
    return policy.forward_backward(
        samples, make_plan(samples, 40), NextToken(denominators(samples))
    ).tokens.router_flips


def test_layers_without_experts_are_left_out(tmp_path: Path) -> None:
    """The share is of the layers that choose: with a choice that cannot be right in any of them, all of it."""
    folder = make_tiny_sigmoid_moe(tmp_path / "model", "deepseek_v3", num_layers=3)
    facts = json.loads((folder / "config.json").read_text())
    layers, dense, chosen = (
        facts[name] for name in ("num_hidden_layers", "first_k_dense_replace", "num_experts_per_tok")
    )
    assert 0 < dense < layers
    samples = random_samples(6, facts["vocab_size"])
    for sample in samples:  # one expert throughout, which a router chooses or not
        sample.routed_experts = np.zeros((len(sample.response_ids), layers, chosen), np.int16)
    (found,) = run_ranks(1, flips_of_next_token, folder, samples)
    flipped = np.concatenate(found) * (layers - dense)
    np.testing.assert_allclose(flipped, flipped.round(), atol=1e-5)
    assert flipped.max() == layers - dense


def waits(folder: Path, samples: Sequence[Sample]) -> int:
    policy = make_policy(folder, {})
    objective, plan = NextToken(denominators(samples)), make_plan(samples, 40)
    with count_host_syncs() as syncs:
        policy.forward_backward(samples, plan, objective)
    return len(syncs)


def test_counting_makes_the_host_wait_no_more_often(folder: Path) -> None:
    samples = draw(folder, Perturbation())
    unknown = [replace(sample, routed_experts=None) for sample in samples]
    assert run_ranks(1, waits, folder, samples) == run_ranks(1, waits, folder, unknown)
