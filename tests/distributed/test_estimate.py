"""Estimates of parameters and memory against models, gradient buffers and optimizers that are really built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vespo import parallel
from megatron_vespo.config_file import parse_config
from megatron_vespo.estimate.activations import LayerMemory, layer_memory
from megatron_vespo.estimate.assumptions import Assumptions
from megatron_vespo.estimate.parameters import count_model, count_stages
from megatron_vespo.estimate.trainer import StateBytes, TrainerMemory, trainer_memory
from megatron_vespo.models.build import build_model, transformer_config
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.plan.sizes import Facts, Parallelism
from megatron_vespo.plan.stages import split_layers
from megatron_vespo.policy.logprobs import TokenLogProbs
from megatron_vespo.policy.objectives import Columns, NextToken, denominators
from megatron_vespo.policy.packing import PackedBatch
from megatron_vespo.types import Prompt, Sample
from tests.policies import make_policy, random_samples
from tests.ranks import run_ranks
from tests.tiny_deepseek import make_tiny_sigmoid_moe
from tests.tiny_families import make_tiny
from tests.tiny_models import make_tiny_qwen3, make_tiny_qwen3_moe

SIZES = {"hidden_size": 64, "intermediate_size": 256, "moe_intermediate_size": 128, "vocab_size": 512, "num_layers": 4}


def facts_of(folder: Path) -> tuple[Facts, bool]:
    architecture = load_architecture(folder)
    facts = Facts(architecture.transformer_config(), architecture.vocab_size, architecture.context_length)
    return facts, architecture.tied_embeddings


def built(folder: Path, megatron: dict[str, Any]) -> tuple[int, int]:
    """Parameters of this rank: of experts, and all others."""
    architecture = load_architecture(folder)
    config = transformer_config(architecture, megatron, "local")
    chunks = build_model(architecture, config, layer_spec="local", make_vocab_size_divisible_by=16)
    counts = [0, 0]
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            counts[".mlp.experts." not in name] += parameter.numel()
    return counts[0], counts[1]


MAKERS: dict[str, Callable[[Path], Path]] = {
    "qwen3": lambda folder: make_tiny_qwen3(folder),
    "qwen3 tied": lambda folder: make_tiny_qwen3(folder, tie_word_embeddings=True),
    "qwen3_moe": lambda folder: make_tiny_qwen3_moe(folder, num_layers=3),
    **{
        name: (lambda folder, name=name: make_tiny(folder, name)) for name in ("qwen2", "qwen2_moe", "mixtral", "llama")
    },
    "glm4_moe": lambda folder: make_tiny_sigmoid_moe(folder, "glm4_moe", num_layers=3),
    "deepseek_v3": lambda folder: make_tiny_sigmoid_moe(folder, "deepseek_v3", num_layers=3),
}


@pytest.mark.parametrize("family", MAKERS)
def test_parameters_of_every_family_are_those_of_the_model(tmp_path: Path, family: str) -> None:
    folder = MAKERS[family](tmp_path)
    facts, tied = facts_of(folder)
    count = count_model(facts, tied)
    (result,) = run_ranks(1, built, folder, {})
    assert (count.experts, count.dense) == result


@pytest.mark.parametrize(
    "ranks, megatron",
    [
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"expert_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2}),
        (3, {"pipeline_model_parallel_size": 3, "num_layers_in_first_pipeline_stage": 2}),
        (
            4,
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "expert_model_parallel_size": 2,
            },
        ),
    ],
)
def test_parameters_of_every_rank_are_those_that_are_built(
    tmp_path: Path, ranks: int, megatron: dict[str, Any]
) -> None:
    folder = make_tiny_qwen3_moe(tmp_path, num_layers=4, vocab_size=70)
    facts, tied = facts_of(folder)
    sizes = Parallelism.of(megatron, ranks, ranks)
    padded = -(-70 // (16 * sizes.tensor)) * 16 * sizes.tensor
    stages = count_stages(facts, tied, split_layers(megatron, facts.layers), padded)
    expected = [stage.on_rank(sizes) for stage in stages]
    results = run_ranks(ranks, built, folder, megatron, **megatron)
    per_stage = ranks // sizes.pipeline
    for rank, result in enumerate(results):
        count = expected[rank // per_stage]
        assert (count.experts, count.dense) == result


def test_a_copy_of_a_tied_embedding_is_counted_on_the_last_stage(tmp_path: Path) -> None:
    folder, megatron = make_tiny_qwen3(tmp_path, tie_word_embeddings=True), {"pipeline_model_parallel_size": 2}
    facts, tied = facts_of(folder)
    stages = count_stages(facts, tied, [[1], [1]], 64)
    assert [(0, int(stage.dense)) for stage in stages] == run_ranks(2, built, folder, megatron, **megatron)


def held(folder: Path, megatron: dict[str, Any]) -> dict[str, int]:
    """Bytes of weights, gradient buffers and optimizer state on this rank, after a step."""
    policy = make_policy(folder, megatron)
    samples = random_samples(4, 64)
    plan = [list(range(parallel.data_parallel_rank(), 4, parallel.data_parallel_size()))]
    policy.forward_backward(samples, plan, NextToken(denominators(samples)))
    policy.optim_step()
    weights = {
        p.untyped_storage().data_ptr(): p.untyped_storage() for chunk in policy.chunks for p in chunk.parameters()
    }
    gradients = {}
    for ddp in policy._ddp:
        for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers):
            gradients[buffer.grad_data.data_ptr()] = buffer.grad_data
    states = {}
    for part in policy._optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                tensors = [parameter.data, *(x for x in part.optimizer.state[parameter].values() if torch.is_tensor(x))]
                for tensor in tensors:
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in weights and tensor.numel() > 1:
                        states[storage.data_ptr()] = storage
    return {
        "weights": sum(storage.nbytes() for storage in weights.values()),
        "gradients": sum(buffer.nbytes for buffer in gradients.values()),
        "optimizer": sum(storage.nbytes() for storage in states.values()),
    }


def estimated(folder: Path, megatron: dict[str, Any], ranks: int) -> TrainerMemory:
    tree = {"objective": "sft", "run": {"name": "r"}, "data": {"train": "d"}, "training": {"steps": 1}}
    model = {"hf_path": str(folder), "make_vocab_size_divisible_by": 16}
    facts, tied = facts_of(folder)
    config = parse_config({**tree, "model": model, "megatron": megatron})
    return trainer_memory(config, facts, tied, Parallelism.of(megatron, ranks, ranks), Assumptions())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "ranks, megatron",
    [
        (1, {}),
        (1, {"use_distributed_optimizer": True}),
        (2, {"use_distributed_optimizer": True, "expert_model_parallel_size": 2}),
        (2, {"use_distributed_optimizer": True}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "use_distributed_optimizer": True}),
    ],
)
def test_states_take_what_is_estimated(tmp_path: Path, ranks: int, megatron: dict[str, Any], bf16: bool) -> None:
    folder = make_tiny_qwen3_moe(tmp_path, **SIZES)
    megatron = {**megatron, "bf16": bf16}
    memory = estimated(folder, megatron, ranks)
    real = run_ranks(ranks, held, folder, megatron, **megatron)
    largest = {name: max(rank[name] for rank in real) for name in real[0]}
    for name, expected in (
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
    ):
        # Buffers are padded, so that they can be cut into equal parts.
        assert largest[name] == pytest.approx(expected, rel=0.04), name


def test_gradients_in_bfloat16_take_half(tmp_path: Path) -> None:
    folder = make_tiny_qwen3_moe(tmp_path, **SIZES)
    megatron = {"bf16": True, "grad_reduce_in_fp32": False, "use_distributed_optimizer": True}
    (real,) = run_ranks(1, held, folder, megatron)
    assert real["gradients"] == pytest.approx(estimated(folder, megatron, 1).gradients, rel=0.04)
    assert StateBytes.of(megatron).gradient == 2


TOKENS = 1024


class Forward(NextToken):
    """Notes when the forward pass is over."""

    over = False

    def __call__(self, batch: PackedBatch, logprobs: TokenLogProbs) -> tuple[torch.Tensor, Columns]:
        Forward.over = True
        return super().__call__(batch, logprobs)


def kept(folder: Path, megatron: dict[str, Any]) -> int:
    """Bytes that the forward pass over one microbatch of ``TOKENS`` keeps on this rank, weights left out."""
    policy = make_policy(folder, megatron)
    ids, zeros = np.arange(253, dtype=np.int32) % 64, np.zeros(253, np.float32)
    samples = [Sample(Prompt(i, ids[:4]), 0, ids, zeros, np.zeros(253, np.int32), "stop") for i in range(4)]
    weights = {p.untyped_storage().data_ptr() for chunk in policy.chunks for p in chunk.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not Forward.over and storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        policy.forward_backward(samples, [[0, 1, 2, 3]], Forward(denominators(samples)))
    return sum(seen.values())


BASE = {"hidden_size": 64, "intermediate_size": 128}
BASE_MOE = {**BASE, "moe_intermediate_size": 64}


def layer(folder: Path, make: Callable[..., Path], megatron: dict[str, Any], **sizes: Any) -> tuple[float, LayerMemory]:
    """Bytes of a token in a layer, measured (two layers more, halved) and estimated, on the first rank."""
    ranks = megatron.get("tensor_model_parallel_size", 1)
    measured = []
    for layers in (2, 4):
        model = make(folder / str(layers), num_layers=layers, **sizes)
        measured.append(run_ranks(ranks, kept, model, megatron, **megatron)[0])
    facts, _ = facts_of(model)
    parallelism = Parallelism.of(megatron, ranks, ranks)
    memory = layer_memory(facts, parallelism, megatron, bool(facts.experts), 4, imbalance=1.0)
    return (measured[1] - measured[0]) / 2 / TOKENS, memory


FUSED = {"bias_activation_fusion": True}


@pytest.mark.parametrize(
    "make, base, megatron, change",
    [
        (make_tiny_qwen3, BASE, {}, {"intermediate_size": 256}),
        (make_tiny_qwen3, BASE, FUSED, {"intermediate_size": 256}),
        (make_tiny_qwen3_moe, BASE_MOE, {}, {"moe_intermediate_size": 128}),
        (make_tiny_qwen3_moe, BASE_MOE, FUSED, {"moe_intermediate_size": 128}),
        (make_tiny_qwen3_moe, BASE_MOE, {}, {"num_experts_per_tok": 3}),
    ],
)
def test_what_mlp_and_experts_keep_is_what_is_estimated(
    tmp_path: Path, make: Callable[..., Path], base: dict[str, Any], megatron: dict[str, Any], change: dict[str, Any]
) -> None:
    measured, memory = layer(tmp_path / "base", make, megatron, **base)
    more, more_memory = layer(tmp_path / "more", make, megatron, **{**base, **change})
    assert more - measured == pytest.approx(more_memory.kept - memory.kept, rel=0.02)


@pytest.mark.parametrize("make, base", [(make_tiny_qwen3, BASE), (make_tiny_qwen3_moe, BASE_MOE)])
def test_a_whole_layer_keeps_about_what_is_estimated(
    tmp_path: Path, make: Callable[..., Path], base: dict[str, Any]
) -> None:
    """Torch's own norm keeps its normalised input too, and attention one sequence at a time copies."""
    measured, memory = layer(tmp_path / "one", make, {}, **base)
    assert 1 < measured / memory.kept < 1.4
    tensor = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    halved, half = layer(tmp_path / "two", make, tensor, **base)
    assert (measured, memory.kept) == pytest.approx((2 * halved, 2 * half.kept), rel=0.01)


def test_full_recomputation_keeps_the_input_of_each_layer(tmp_path: Path) -> None:
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    measured, memory = layer(tmp_path, make_tiny_qwen3_moe, full, **BASE_MOE)
    assert measured == pytest.approx(memory.input, rel=0.02)


def test_experts_that_are_computed_again_keep_their_input_alone(tmp_path: Path) -> None:
    moe = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    measured, memory = layer(tmp_path / "all", make_tiny_qwen3_moe, {}, **BASE_MOE)
    less, less_memory = layer(tmp_path / "less", make_tiny_qwen3_moe, moe, **BASE_MOE)
    assert measured - less == pytest.approx(memory.kept - less_memory.kept, rel=0.05)
