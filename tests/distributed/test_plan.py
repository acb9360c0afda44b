"""Plans that the check accepts are built by Megatron; those that it refuses are not."""

from pathlib import Path
from typing import Any

import pytest

from megatron_vespo.config_file import parse_config
from megatron_vespo.errors import UserError
from megatron_vespo.models.build import build_model, transformer_config
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.plan.check import check_plan
from megatron_vespo.plan.sizes import Facts
from tests.ranks import run_ranks
from tests.tiny_models import make_tiny_qwen3, make_tiny_qwen3_moe

ACCOUNTED = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}


def plan(folder: Path, ranks: int, megatron: dict[str, Any]) -> None:
    tree = {"objective": "sft", "run": {"name": "r"}, "model": {"hf_path": str(folder)}, "data": {"train": "d"}}
    architecture = load_architecture(folder)
    facts = Facts(architecture.transformer_config(), architecture.vocab_size, architecture.context_length)
    check_plan(parse_config({**tree, "megatron": megatron, "training": {"steps": 1}}), facts, ranks, ranks)


def build(folder: Path, megatron: dict[str, Any]) -> list[int]:
    """Layers of each chunk that Megatron builds on this rank."""
    architecture = load_architecture(folder)
    config = transformer_config(architecture, megatron, "local")
    chunks = build_model(architecture, config, layer_spec="local", make_vocab_size_divisible_by=16)
    return [len(chunk.decoder.layers) for chunk in chunks]


def tensor(size: int, **more: Any) -> dict[str, Any]:
    return {"tensor_model_parallel_size": size, "sequence_parallel": size > 1, **more}


@pytest.mark.parametrize(
    "ranks, megatron, layers",
    [
        (4, tensor(4, expert_model_parallel_size=2), [[6]] * 4),  # more ranks than key-value heads
        (2, tensor(2, expert_tensor_parallel_size=2), [[6]] * 2),
        (3, {"pipeline_model_parallel_size": 3, "num_layers_in_last_pipeline_stage": 4}, [[1], [1], [4]]),
        (4, {"pipeline_model_parallel_size": 2, **ACCOUNTED, "expert_model_parallel_size": 2}, [[3]] * 4),
        (
            4,
            {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2, **ACCOUNTED},
            [[0, 1], [1, 1], [1, 1], [1, 0]],
        ),
    ],
)
def test_an_accepted_plan_is_built(
    tmp_path: Path, ranks: int, megatron: dict[str, Any], layers: list[list[int]]
) -> None:
    folder = make_tiny_qwen3_moe(tmp_path, num_layers=6)
    plan(folder, ranks, megatron)
    assert run_ranks(ranks, build, folder, megatron, **megatron) == layers


@pytest.mark.parametrize(
    "ranks, megatron, refusal",
    [
        (3, tensor(3), "does not divide the model's 4 attention heads"),
        (3, {"expert_model_parallel_size": 3}, "does not divide the model's 4 experts"),
        (3, {"expert_tensor_parallel_size": 3}, "does not divide the width 32 of an expert"),
        (2, {"sequence_parallel": True}, "sequence_parallel=true"),
        (2, {"tensor_model_parallel_size": 2}, "sequence_parallel=false"),
        (4, {"pipeline_model_parallel_size": 4}, "does not divide the model's 6 layers"),
        (
            2,
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            "the 3 layers of a pipeline",
        ),
    ],
)
def test_a_refused_plan_is_not_built(tmp_path: Path, ranks: int, megatron: dict[str, Any], refusal: str) -> None:
    folder = make_tiny_qwen3_moe(tmp_path, num_layers=6)
    with pytest.raises(UserError, match=refusal):
        plan(folder, ranks, megatron)
    with pytest.raises(AssertionError):  # what run_ranks makes of an error on a rank
        run_ranks(ranks, build, folder, megatron, **megatron)


def test_a_refused_dense_plan_is_not_built(tmp_path: Path) -> None:
    folder = make_tiny_qwen3(tmp_path, intermediate_size=33)
    with pytest.raises(UserError, match="does not divide the width 33 of the model's MLP"):
        plan(folder, 2, tensor(2))
    with pytest.raises(AssertionError):
        run_ranks(2, build, folder, tensor(2), **tensor(2))
    folder = make_tiny_qwen3(tmp_path / "dense")
    with pytest.raises(UserError, match="the model has no experts"):
        plan(folder, 2, {"expert_model_parallel_size": 2})
    with pytest.raises(AssertionError):
        run_ranks(2, build, folder, {"expert_model_parallel_size": 2}, expert_model_parallel_size=2)
