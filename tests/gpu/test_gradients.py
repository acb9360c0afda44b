"""Gradients of the VESPO loss in FP8 point where those in bfloat16 do; FP8 for experts alone leaves attention alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from tests.gpu.place import BF16, FP8, Place, Precision, make_model, nearly_on_policy, samples, vespo

Gradients = dict[str, np.ndarray]

# Emulated on a CPU, forward and backward operands quantised as Transformer Engine does, the least cosine of any group
# below is .995 for experts alone and .984 for all linears (with a scale a tensor; block-wise .9965 and .986). Another
# three times the distance from 1 is allowed, for kernels that add up otherwise and for scales of the step before.
COSINE = {"experts": 0.98, "all": 0.95}
GROUPS = {"experts": ".mlp.experts.", "attention": ".self_attention.", "output layer": "output_layer."}


def plan() -> list[list[int]]:
    """Two microbatches."""
    return [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]


def gradients(place: Place, folder: Path, precision: Precision) -> Gradients:
    """Of each group of weights, flat.

    The sampler's log-probabilities are those of this precision but for the same noise, so that every sample has the
    same weight in all precisions: what differs is the gradient of the log-probabilities.
    """
    policy = place.policy(folder, precision)
    policy.log_probs(samples(), plan())
    some = nearly_on_policy(samples(), policy.log_probs(samples(), plan()))
    for _ in range(3):  # the delayed recipe scales by what it has seen
        policy.forward_backward(some, plan(), vespo(some))
    found: dict[str, list[np.ndarray]] = {name: [] for name in GROUPS}
    for name, parameter in policy.chunks[0].named_parameters():
        for group, part in GROUPS.items():
            if part in name:
                found[group].append(parameter.main_grad.float().cpu().numpy().ravel())
    return {group: np.concatenate(values) for group, values in found.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def in_bf16(place: Place, model: Path) -> Gradients:
    return place.run(gradients, place, model, BF16)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("precision", FP8, ids=str)
def test_fp8_points_the_same_way(place: Place, model: Path, in_bf16: Gradients, precision: Precision) -> None:
    found = place.run(gradients, place, model, precision)
    cosines = {group: cosine(found[group], in_bf16[group]) for group in GROUPS}
    lengths = {group: np.linalg.norm(found[group]) / np.linalg.norm(in_bf16[group]) for group in GROUPS}
    print(precision, cosines, lengths)  # noqa: T201 - pytest -rP shows it
    assert all(COSINE[precision.scope] < value < 1 for value in cosines.values()), cosines
    assert all(0.9 < value < 1.1 for value in lengths.values()), lengths


def first_layer(place: Place, folder: Path, precision: Precision) -> dict[str, np.ndarray]:
    """What the first layer's attention and its experts give."""
    policy = place.policy(folder, precision)
    found = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: tuple[Tensor, Any]) -> None:
            found[name] = output[0].float().cpu().numpy()

        return hook

    layer = policy.chunks[0].decoder.layers[0]
    layer.self_attention.register_forward_hook(keep("attention"))
    layer.mlp.register_forward_hook(keep("experts"))
    policy._alignment = 16  # the same tokens in both precisions
    policy.log_probs(samples(), [list(range(len(samples())))])
    return found


@pytest.mark.parametrize("precision", FP8, ids=str)
def test_fp8_is_where_it_is_wanted(place: Place, model: Path, precision: Precision) -> None:
    plain, found = (place.run(first_layer, place, model, each) for each in (BF16, precision))
    assert not np.array_equal(found["experts"], plain["experts"])
    assert np.array_equal(found["attention"], plain["attention"]) == (precision.scope == "experts")
