"""Tokens that tools inserted are seen and not trained on: against pieces without any, and a float64 reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vespo.algorithms.aggregation import Aggregation, Denominators
from megatron_vespo.algorithms.vespo import VespoParams
from megatron_vespo.algorithms.weights import KERNELS, Weighting
from megatron_vespo.config import AlgorithmSection
from megatron_vespo.layouts.reference import Loss, score
from megatron_vespo.policy.objectives import PolicyGradient, denominators
from megatron_vespo.types import FloatArray, Prompt, Sample
from tests.policies import make_plan, make_policy
from tests.ranks import run_ranks
from tests.tiny_models import make_tiny_qwen3_moe

VOCABULARY = 64


def make_sample(prompt: list[int], turns: list[list[int]], tools: list[list[int]], index: int = 0) -> Sample:
    """Turns with what a tool says after each; ``tools`` is as long, or one shorter."""
    response = np.array([token for turn in turns for token in turn], np.int32)
    stops = np.cumsum([len(turn) for turn in turns])
    inserted = [token for tool in tools for token in tool]
    before = [int(stop) for stop, tool in zip(stops, tools, strict=False) for _ in tool]
    return Sample(
        Prompt(index, np.array(prompt, np.int32)),
        0,
        response,
        np.zeros(len(response), np.float32),
        np.zeros(len(response), np.int32),
        "stop",
        advantage=0.8,
        inserted_ids=np.array(inserted, np.int32) if inserted else None,
        inserted_before=np.array(before, np.int32) if inserted else None,
    )


TURNS, TOOLS = [[5, 8, 11], [13, 7], [21, 1]], [[30, 31, 32, 33], [40]]
MIXED = make_sample([3, 4], TURNS, TOOLS)
ENDS_WITH_TOOL = make_sample([9], [[6, 6]], [[50, 51]], index=1)
STARTS_WITH_TOOL = replace(
    make_sample([9, 10], [[6, 12, 1]], [], index=2),
    inserted_ids=np.array([33, 34], np.int32),
    inserted_before=np.array([0, 0], np.int32),
)
PLAIN = make_sample([7, 7, 2], [[4, 4, 1]], [], index=3)
SAMPLES = [MIXED, ENDS_WITH_TOOL, STARTS_WITH_TOOL, PLAIN]


def pieces(sample: Sample) -> list[Sample]:
    """The same sampled tokens, each turn as a response to a prompt of all that stood before it."""
    places, sequence = sample.offsets, sample.sequence_ids
    starts = [i for i in range(len(places)) if i == 0 or places[i] != places[i - 1] + 1]
    parts = []
    for start, stop in zip(starts, [*starts[1:], len(places)], strict=True):
        before = np.concatenate([sample.prompt.input_ids, sequence[: places[start]]])
        parts.append(
            replace(
                sample,
                prompt=Prompt(sample.prompt.index, before),
                response_ids=sample.response_ids[start:stop],
                log_mu=sample.log_mu[start:stop],
                weight_versions=sample.weight_versions[start:stop],
                inserted_ids=None,
                inserted_before=None,
            )
        )
    return parts


Gradient = dict[str, torch.Tensor]


def update(
    folder: Path, samples: Sequence[Sample], kernel: str, divisor: int, max_tokens: int = 64
) -> tuple[Gradient, dict[str, FloatArray]]:
    """Gradient and table of one forward and backward pass, the loss divided by ``divisor`` samples."""
    policy = make_policy(folder, {})
    params: Any = VespoParams() if kernel == "vespo" else KERNELS[kernel].make_params({})
    objective = PolicyGradient(
        Weighting(KERNELS[kernel], params), Aggregation.SEQ_MEAN_TOKEN_SUM, Denominators(99, divisor, 99)
    )
    measured = policy.forward_backward(samples, make_plan(samples, max_tokens), objective)
    gradient = {name: p.main_grad.clone() for name, p in policy.chunks[0].named_parameters()}  # type: ignore[attr-defined]
    return gradient, {name: np.array(values) for name, values in measured.table.items()}


def log_probs(folder: Path, samples: Sequence[Sample], size: int) -> list[FloatArray]:
    return make_policy(folder, {}).log_probs(samples, make_plan(samples, size))


def phi(log_w: float) -> float:
    """The paper's weight of a positive advantage."""
    return math.exp(2 * log_w + 3 * (1 - math.exp(log_w)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3_moe(tmp_path_factory.mktemp("model"), vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[Sample]:
    """With log mu near log pi, so that phi says something."""
    (values,) = run_ranks(1, log_probs, folder, SAMPLES, 64)
    rng = np.random.default_rng(3)
    return [
        replace(sample, log_mu=(value + rng.normal(0, 0.2, len(value))).astype(np.float32))
        for sample, value in zip(SAMPLES, values, strict=True)
    ]


def test_log_probs_are_those_of_the_turns(folder: Path, samples: list[Sample]) -> None:
    (whole,) = run_ranks(1, log_probs, folder, samples, 64)
    parts = [part for sample in samples for part in pieces(sample)]
    assert len(parts) == 6
    (split,) = run_ranks(1, log_probs, folder, parts, 64)
    np.testing.assert_allclose(np.concatenate(whole), np.concatenate(split), atol=2e-6)
    # And not those of a policy that does not see what the tools said.
    blind = [replace(sample, inserted_ids=None, inserted_before=None) for sample in samples]
    (unseen,) = run_ranks(1, log_probs, folder, blind, 64)
    assert np.abs(whole[0] - unseen[0]).max() > 1e-2


def test_the_gradient_is_that_of_the_turns_weighed_by_the_whole_w(folder: Path, samples: list[Sample]) -> None:
    """Tool tokens moved into prompts: phi(W) A grad log pi is a sum over turns, W the product of theirs."""
    ((gradient, table),) = run_ranks(1, update, folder, samples, "vespo", len(samples))
    (values,) = run_ranks(1, log_probs, folder, samples, 64)
    parts = []
    for index, (sample, log_pi) in enumerate(zip(samples, values, strict=True)):
        log_w = float((log_pi.astype(np.float64) - sample.log_mu).sum())
        assert table["log_w"][index] == pytest.approx(log_w, abs=1e-5)
        assert table["tokens"][index] == len(sample.response_ids)
        assert table["phi"][index] == pytest.approx(phi(log_w), rel=1e-4)
        parts += [replace(part, advantage=sample.advantage * phi(log_w)) for part in pieces(sample)]
    ((wanted, _),) = run_ranks(1, update, folder, parts, "reinforce", len(samples))
    scale = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(gradient[name], value, rtol=0, atol=2e-5 * scale, msg=name)


def test_microbatches_do_not_matter(folder: Path, samples: list[Sample]) -> None:
    ((whole, _),) = run_ranks(1, update, folder, samples, "vespo", 4, 64)
    ((split, _),) = run_ranks(1, update, folder, samples, "vespo", 4, 16)
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=1e-4, atol=1e-6)


def reference(folder: str, samples: Sequence[Sample]) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Loss and gradient by transformers in float64, each sample alone."""
    from megatron_vespo.layouts.float64 import Float64
    from megatron_vespo.layouts.reference import load_model

    loss = Loss(AlgorithmSection(aggregation="seq-mean-token-sum"), Denominators(99, len(samples), 99))
    with Float64():
        model = load_model(folder)
        rows = []
        for sample in samples:
            value, row = loss(sample, score(model, sample, 1.0))
            value.backward()
            rows.append(row)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, rows


def test_a_float64_reference_agrees(folder: Path, samples: list[Sample]) -> None:
    ((gradients, rows),) = run_ranks(1, reference, str(folder), samples, initialize=False)
    ((ours, table),) = run_ranks(1, update, folder, samples, "vespo", len(samples))
    for column in ("loss", "log_w", "phi", "tokens", "entropy"):
        assert table[column] == pytest.approx([row[column] for row in rows], abs=1e-4), column
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in ours.values()))
    wanted = math.sqrt(sum(float(value.square().sum()) for value in gradients.values()))
    assert norm == pytest.approx(wanted, rel=1e-4)
    # Tool tokens learn as input: the policy's reading of them is trained. That they are said is not.
    head = gradients["lm_head.weight"]
    ours_head = ours["output_layer.weight"][: len(head)]
    torch.testing.assert_close(ours_head.double(), head, rtol=0, atol=2e-5 * float(head.abs().max()))


def test_what_is_counted_is_the_policys_own() -> None:
    assert denominators(SAMPLES).tokens == 7 + 2 + 3 + 3
    assert [sample.total_length for sample in SAMPLES] == [14, 5, 7, 6]
    assert MIXED.sequence_ids.tolist() == [5, 8, 11, 30, 31, 32, 33, 13, 7, 40, 21, 1]
    assert MIXED.offsets.tolist() == [0, 1, 2, 7, 8, 10, 11]
