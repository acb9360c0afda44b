"""Gathering weights while the forward pass runs changes no bit of what is trained, scored, saved or sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vespo import parallel
from megatron_vespo.megatron_options import microbatch_multiple
from megatron_vespo.models.export import HfExporter
from megatron_vespo.models.registry import load_architecture
from tests.checkpoints import checkpoints_of, differences, state_of, update
from tests.policies import make_plan, make_policy, random_samples
from tests.ranks import run_ranks
from tests.tiny_models import make_tiny_qwen3_moe

VOCABULARY = 64
# Buckets so small that the output layer has one of its own. No clipping: ranks sum the norm over other pieces of the
# gradient where buckets are cut elsewhere.
DISTRIBUTED = {"use_distributed_optimizer": True, "bucket_size": 1000, "clip_grad": 0.0}
WAYS: dict[str, dict[str, Any]] = {
    "neither": {},
    "gradients": {"overlap_grad_reduce": True},
    "both": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "aligned": {"overlap_grad_reduce": True, "overlap_param_gather": True, "align_param_gather": True},
}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "EP2, bf16": (2, {"expert_model_parallel_size": 2, "bf16": True}),
    # Sums over more than two ranks would depend on where buckets are cut.
    "TP2 DP2": (
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2},
    ),
    "PP2 DP2": (4, {"pipeline_model_parallel_size": 2}),
    "PP2 VPP2 EP2": (4, INTERLEAVED | {"expert_model_parallel_size": 2}),
}
TIED = "PP2 DP2"


def train(model: Path, megatron: dict[str, Any], folder: Path) -> list[Any]:
    """Everything that reads weights, some of it right after a step and some after several."""
    samples = random_samples(12, VOCABULARY)
    policy = make_policy(model, megatron)
    exporter = HfExporter(policy.chunks, load_architecture(model), complete=policy.finish_param_gather)
    plan = make_plan(samples, 40, multiple_of=microbatch_multiple(megatron))
    seen: list[Any] = [update(policy, samples, megatron)[0] for _ in range(2)]
    seen.append([values.tolist() for values in policy.log_probs(samples, plan)])
    seen += [update(policy, samples, megatron)[0] for _ in range(2)]
    seen.append({name: tensor.tolist() for tensors in exporter.stream() for name, tensor in tensors})
    seen.append(update(policy, samples, megatron)[0])
    policy.keep_reference()
    seen.append(update(policy, samples, megatron)[0])
    with policy.reference():
        seen.append([values.tolist() for values in policy.log_probs(samples, plan)])
    seen.append(update(policy, samples, megatron)[0])
    checkpoints_of(policy, folder).save(1, {"x": b""} if parallel.is_main() else None)
    after_save = {name: tensor.tolist() for name, tensor in state_of(policy).items() if hasattr(tensor, "tolist")}
    other = make_policy(model, megatron)
    checkpoints_of(other, folder).load(None)
    assert not differences(state_of(policy), state_of(other))
    seen.append(update(other, samples, megatron)[0])
    # By name: with other buckets the optimizer's own pieces are cut elsewhere.
    return [*seen, {name: value for name, value in after_save.items() if not name.startswith("optimizer")}]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_overlap_changes_no_bit(layout: str, tmp_path: Path) -> None:
    ranks, section = LAYOUTS[layout]
    layers = 4 if INTERLEAVED.items() <= section.items() else 2  # one in each stage; many buckets in each layer
    model = make_tiny_qwen3_moe(tmp_path / "model", num_layers=layers, tie_word_embeddings=layout == TIED)
    further = {"DP2": ["neither"], "PP2 VPP2 EP2": ["aligned"]}.get(layout, [])
    results = {}
    for way in ["gradients", "both", *further]:
        megatron = DISTRIBUTED | section | WAYS[way]
        results[way] = run_ranks(ranks, train, model, megatron, tmp_path / way, **megatron)
    for way, result in results.items():
        assert result == results["gradients"], way
