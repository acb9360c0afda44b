"""A policy that leaves its device between updates, part by part, computes what one does that stays: to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vespo.models.export import HfExporter
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.policy import offload
from megatron_vespo.policy.offload import ALL_PARTS, Part
from megatron_vespo.policy.policy import Policy
from megatron_vespo.types import Sample
from tests.checkpoints import SCHEDULE, differences, state_of, update
from tests.policies import make_policy, random_samples
from tests.ranks import run_ranks
from tests.tiny_models import make_tiny_qwen3_moe

VOCABULARY = 50
# What leaves, in the order of a step's turns.
TURNS = [
    frozenset({Part.PARAMETERS}),
    frozenset(),
    frozenset({Part.PARAMETERS, Part.OPTIMIZER}),
    frozenset(),
    ALL_PARTS,
]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "DP2": (2, {}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3_moe(tmp_path_factory.mktemp("model") / "moe", vocab_size=VOCABULARY)


def device_bytes(policy: Policy) -> int:
    """Of all storages that the policy's tensors lie in."""
    storages = {}
    for ddp in policy._ddp:
        tensors = [parameter.data for parameter in ddp.parameters()]
        tensors += [buffer.grad_data for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)]
        storages |= {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    for part in policy._optimizer.chained_optimizers:
        tensors = [parameter.data for group in part.optimizer.param_groups for parameter in group["params"]]
        tensors += [value for state in part.optimizer.state.values() for value in state.values()]
        storages |= {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def train(model: Path, samples: list[Sample], megatron: dict[str, Any]) -> tuple[list[str], list[list[int]], list[Any]]:
    """What differs between the two after four updates, bytes on the device after each turn, weights that differ."""
    offload._CHUNK_BYTES = 1001  # of this rank alone: tensors lie across pieces of host memory
    away, stays = (make_policy(model, megatron, **SCHEDULE) for _ in range(2))
    exporters = [
        HfExporter(policy.chunks, load_architecture(model), complete=policy.finish_param_gather)
        for policy in (away, stays)
    ]
    sizes = []
    for _ in range(4):
        sizes.append([device_bytes(away)])
        for parts in TURNS:
            away.memory.keep(parts)
            away.memory.bring(parts)
            sizes[-1].append(device_bytes(away))
        for policy in (away, stays):
            update(policy, samples, megatron)
    exported = [[item for bucket in exporter.stream() for item in bucket] for exporter in exporters]
    wrong = [name for (name, ours), (_, theirs) in zip(*exported, strict=True) if not torch.equal(ours, theirs)]
    return differences(state_of(away), state_of(stays)), sizes, wrong


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_away_is_what_it_was(model: Path, layout: str, distributed: bool, half: bool) -> None:
    size, megatron = LAYOUTS[layout]
    options = megatron | {"use_distributed_optimizer": distributed, "bf16": half}
    for differing, sizes, wrong in run_ranks(size, train, model, random_samples(8, VOCABULARY), options, **megatron):
        assert not differing and not wrong
        for everything, parameters, nothing, saved, nothing_again, back in sizes:
            assert nothing == nothing_again == 0, "not a byte stays"
            assert 0 < parameters <= saved < everything == back
        assert sizes[1][3] > sizes[1][1], "after the first update there are moments"


def test_weights_that_are_gathered_late_are_complete_before_they_leave(model: Path) -> None:
    options = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    for differing, _, wrong in run_ranks(2, train, model, random_samples(8, VOCABULARY), options):
        assert not differing and not wrong


def use_what_is_away(model: Path) -> list[str]:
    policy = make_policy(model, {"use_distributed_optimizer": True})
    exporter = HfExporter(policy.chunks, load_architecture(model))
    samples = random_samples(4, VOCABULARY)
    uses = {
        "score": lambda: policy.log_probs(samples, [[0, 1, 2, 3]]),
        "train": lambda: policy.optim_step(),
        "save": lambda: policy.sharded_state_dict({}),
        "push": lambda: list(exporter.stream()),
    }
    refused = []
    for parts in (frozenset[Part](), frozenset({Part.PARAMETERS})):
        policy.memory.keep(parts)
        for name, use in uses.items():
            try:
                use()
            except (AssertionError, RuntimeError) as error:
                assert "it is the servers' turn" in str(error), error
                refused.append(f"{name} with {len(parts)}")
        policy.memory.bring(ALL_PARTS)
    return refused


def test_what_is_away_is_not_used(model: Path) -> None:
    (refused,) = run_ranks(1, use_what_is_away, model)
    assert refused == ["score with 0", "train with 0", "save with 0", "push with 0", "train with 1", "save with 1"]
