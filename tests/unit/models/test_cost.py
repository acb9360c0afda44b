from pathlib import Path

import pytest

from megatron_vespo.models.cost import sample_cost
from megatron_vespo.models.registry import load_architecture
from tests.tiny_deepseek import make_tiny_sigmoid_moe
from tests.tiny_families import make_tiny
from tests.tiny_models import make_tiny_qwen3, make_tiny_qwen3_moe


def test_dense_cost_is_the_hand_count(tmp_path: Path) -> None:
    # hidden 32, 2 layers, 4 heads and 2 key-value heads of 16, MLP of 64, vocabulary 64
    cost = sample_cost(load_architecture(make_tiny_qwen3(tmp_path)))
    projections = 32 * 64 + 2 * 32 * 32 + 64 * 32
    weights = 2 * (projections + 3 * 32 * 64) + 32 * 64
    for n in (1, 7, 500):
        attention = 2 * (2 * 2 * n * n * 64) / 2  # layers * (QK^T and PV, multiply and add) * causal half
        assert cost(n) == 2 * weights * n + attention


def test_moe_cost_counts_the_router_and_the_chosen_experts_only(tmp_path: Path) -> None:
    # 4 experts of 32, of which a token goes to 2
    cost = sample_cost(load_architecture(make_tiny_qwen3_moe(tmp_path)))
    projections = 32 * 64 + 2 * 32 * 32 + 64 * 32
    weights = 2 * (projections + 32 * 4 + 2 * 3 * 32 * 32) + 32 * 64
    assert cost(100) == 2 * weights * 100 + 2 * 2 * 64 * 100 * 100


def test_shared_experts_work_on_every_token(tmp_path: Path) -> None:
    # as above with heads of 8 and a shared expert of 48
    cost = sample_cost(load_architecture(make_tiny(tmp_path, "qwen2_moe")))
    projections = 32 * 32 + 2 * 32 * 16 + 32 * 32
    weights = 2 * (projections + 32 * 4 + 3 * 32 * (2 * 32 + 48)) + 32 * 64
    assert cost(100) == 2 * weights * 100 + 2 * 2 * 32 * 100 * 100


def test_latent_attention_dense_layers_and_shared_experts_are_counted(tmp_path: Path) -> None:
    # hidden 32, 1 dense layer and 2 with experts; heads: 4 of 12 + 8 for keys, of 10 for values; ranks 24 and 20
    cost = sample_cost(load_architecture(make_tiny_sigmoid_moe(tmp_path, "deepseek_v3", num_layers=3)))
    queries = 32 * 24 + 24 * 4 * 20
    keys = 32 * (20 + 8) + 20 * 4 * (12 + 10)
    dense, experts = 3 * 32 * 48, 32 * 8 + 3 * 32 * 16 * (4 + 2)
    weights = 3 * (queries + keys + 4 * 10 * 32) + dense + 2 * experts + 32 * 64
    for n in (1, 100):
        assert cost(n) == 2 * weights * n + 3 * 4 * (20 + 10) * n * n


def test_cost_of_a_30b_a3b_model(tmp_path: Path) -> None:
    folder = make_tiny_qwen3_moe(tmp_path)
    architecture = load_architecture(folder)
    architecture.config.update(
        num_hidden_layers=48,
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        vocab_size=151_936,
    )
    cost = sample_cost(architecture)
    # 18.87e6 of attention, 0.26e6 of router and 37.75e6 of experts a layer, 311.2e6 of output layer
    assert cost(1) == pytest.approx(2 * 3.0417e9, rel=1e-3)
    assert cost(16_384) == pytest.approx(2 * 3.0417e9 * 16_384 + 393_216 * 16_384**2, rel=1e-4)
    assert cost(16_384) / (16 * cost(1024)) == pytest.approx(1.93, abs=0.01)
