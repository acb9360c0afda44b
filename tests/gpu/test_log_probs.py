"""What the model says of tokens, on the GPU: as Hugging Face, as each sample alone, and closely enough in FP8."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.types import FloatArray
from tests.gpu.place import BF16, FP8, Place, Precision, make_model, samples
from tests.hf_reference import hf_log_probs

# Root mean square of differences in log-probability (nats). On a CPU, with the local spec, bfloat16 is .010 from
# float32, and FP8, emulated, .042 (experts) and .10 (all linears) from bfloat16, block-wise or with a scale a tensor.
TOLERANCE = {"bf16": 0.03, "experts": 0.12, "all": 0.25}


def log_probs(
    place: Place, folder: Path, precision: Precision, plan: list[list[int]], pad: int = 0
) -> list[FloatArray]:
    policy = place.policy(folder, precision)
    policy._alignment = pad or policy._alignment
    return policy.log_probs(samples(), plan)


def together() -> list[list[int]]:
    return [list(range(len(samples())))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def in_bf16(place: Place, model: Path) -> list[FloatArray]:
    return place.run(log_probs, place, model, BF16, together())


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("routed"), chosen=2)


@pytest.fixture(scope="module")
def hugging_face(model: Path, routed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[FloatArray]]:
    """Log-probabilities of both models, by their folder's name."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    sequences = [[*sample.prompt.input_ids, *sample.response_ids] for sample in samples()]
    return {
        name: [
            log_p[len(sample.prompt.input_ids) - 1 : -1][np.arange(len(sample.response_ids)), sample.response_ids]
            for sample, log_p in zip(samples(), found, strict=True)
        ]
        for name, found in hf_log_probs([model, routed], sequences, tmp_path_factory.mktemp("scratch")).items()
    }


def distance(ours: list[FloatArray], wanted: list[FloatArray]) -> float:
    return float(np.sqrt(np.mean((np.concatenate(ours) - np.concatenate(wanted)) ** 2)))


def test_they_are_those_of_hugging_face(
    model: Path, in_bf16: list[FloatArray], hugging_face: dict[str, list[FloatArray]]
) -> None:
    wanted = hugging_face[model.name]
    assert np.std(np.concatenate(wanted)) > 10 * TOLERANCE["bf16"], "a constant would do"
    assert distance(in_bf16, wanted) < TOLERANCE["bf16"]


def test_routers_choose_the_experts_of_hugging_face(
    place: Place, routed: Path, hugging_face: dict[str, list[FloatArray]]
) -> None:
    """Nearly always: rounding makes a router choose another expert for some tokens, which are far off then."""
    wanted, found = hugging_face[routed.name], place.run(log_probs, place, routed, BF16, together())
    differences = np.abs(np.concatenate(found) - np.concatenate(wanted))
    assert np.median(differences) < TOLERANCE["bf16"] and np.quantile(differences, 0.9) < 3 * TOLERANCE["bf16"]


@pytest.mark.parametrize("precision", FP8, ids=str)
def test_fp8_is_near(place: Place, model: Path, in_bf16: list[FloatArray], precision: Precision) -> None:
    found = place.run(log_probs, place, model, precision, together())
    assert 0 < distance(found, in_bf16) < TOLERANCE[precision.scope]


def test_transformer_engine_says_what_the_local_layers_say(
    place: Place, model: Path, in_bf16: list[FloatArray]
) -> None:
    local = Place("local", place.rehearsal)
    assert distance(in_bf16, place.run(log_probs, local, model, BF16, together())) < TOLERANCE["bf16"]


def test_packed_samples_do_not_see_each_other(place: Place, model: Path, in_bf16: list[FloatArray]) -> None:
    alone = place.run(log_probs, place, model, BF16, [[number] for number in range(len(samples()))])
    assert distance(alone, in_bf16) < TOLERANCE["bf16"] / 2
    assert max(np.abs(a - b).max() for a, b in zip(alone, in_bf16, strict=True)) < 0.1


@pytest.mark.parametrize("pad", [16, 512])
def test_padding_behind_the_samples_does_no_harm(
    place: Place, model: Path, in_bf16: list[FloatArray], pad: int
) -> None:
    padded = place.run(log_probs, place, model, BF16, together(), pad)
    assert distance(padded, in_bf16) < TOLERANCE["bf16"] / 2
