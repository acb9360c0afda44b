from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_vespo import parallel
from megatron_vespo.models.naming import named_weights
from megatron_vespo.models.registry import FAMILIES


def stub(names: list[str], layers: list[int], experts: int | None = None, buffers: Sequence[str] = ()) -> Any:
    """A model with these parameters and buffers, holding these layers (numbered from 1, as Megatron does)."""
    return SimpleNamespace(
        decoder=SimpleNamespace(layers=[SimpleNamespace(layer_number=number) for number in layers]),
        config=SimpleNamespace(num_moe_experts=experts),
        named_parameters=lambda: [(name, torch.nn.Parameter(torch.zeros(1))) for name in names],
        named_buffers=lambda: [(name, torch.zeros(1)) for name in buffers],
    )


@pytest.mark.parametrize(
    "name, pattern, expert",
    [
        ("mlp.router.weight", "mlp.router.weight", None),
        ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.weight", None),
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", None),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight", None),
        ("mlp.linear_fc1.weight", "mlp.linear_fc1.weight", None),
        ("self_attention.linear_qkv.bias", "self_attention.linear_qkv.bias", None),
        ("mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.linear_fc1.weight", None),
        ("mlp.shared_experts.gate_weight", "mlp.shared_experts.gate_weight", None),
        ("self_attention.linear_q_down_proj.weight", "self_attention.linear_q_down_proj.weight", None),
        ("self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.q_layernorm.weight", None),
        ("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attention.kv_layernorm.weight", None),
        ("mlp.experts.linear_fc1.weight3", "mlp.experts.{expert}.linear_fc1.weight", 3),
        ("mlp.experts.linear_fc2.weight12", "mlp.experts.{expert}.linear_fc2.weight", 12),
        ("mlp.experts.local_experts.3.linear_fc1.weight", "mlp.experts.{expert}.linear_fc1.weight", 3),
        ("mlp.experts.local_experts.12.linear_fc2.weight", "mlp.experts.{expert}.linear_fc2.weight", 12),
    ],
)
def test_every_spec_gets_one_name(name: str, pattern: str, expert: int | None) -> None:
    (weight,) = named_weights([stub([f"decoder.layers.1.{name}"], layers=[5, 6])])
    assert weight.pattern == f"decoder.layers.{{layer}}.{pattern}"
    assert weight.layer == 5, "numbered globally, from 0"
    assert weight.expert == (None if expert is None else expert)
    assert weight.pattern in {rule.mcore for family in FAMILIES.values() for rule in family.rules}


def test_the_bias_of_the_routers_is_a_weight_and_other_buffers_are_not() -> None:
    names = ["expert_bias", "local_tokens_per_expert", "global_tokens_per_expert"]
    model = stub([], layers=[3], buffers=[f"decoder.layers.0.mlp.router.{name}" for name in names])
    assert [(w.pattern, w.layer) for w in named_weights([model])] == [
        ("decoder.layers.{layer}.mlp.router.expert_bias", 2)
    ]


def test_weights_outside_the_layers_keep_their_name() -> None:
    weights = named_weights([stub(["embedding.word_embeddings.weight", "output_layer.weight"], layers=[])])
    assert [(w.pattern, w.layer, w.expert) for w in weights] == [
        ("embedding.word_embeddings.weight", None, None),
        ("output_layer.weight", None, None),
    ]


def test_experts_are_numbered_globally(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "expert_parallel_size", lambda: 4)
    monkeypatch.setattr(parallel, "expert_parallel_rank", lambda: 3)
    (weight,) = named_weights([stub(["decoder.layers.0.mlp.experts.linear_fc1.weight1"], layers=[1], experts=8)])
    assert weight.expert == 7
    assert weight.fill("model.layers.{layer}.mlp.experts.{expert}.x") == "model.layers.0.mlp.experts.7.x"


def test_every_chunk_of_an_interleaved_pipeline_numbers_its_own_layers() -> None:
    name = "decoder.layers.0.mlp.router.weight"
    weights = named_weights([stub([name], layers=[2]), stub([name], layers=[6])])
    assert [weight.layer for weight in weights] == [1, 5]
