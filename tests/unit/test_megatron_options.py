from typing import Any

import pytest

from megatron_vespo.errors import UserError
from megatron_vespo.megatron_options import (
    FP8_RECIPES,
    REFUSED_MEGATRON_OPTIONS,
    check_megatron_options,
    data_parallel_size,
    microbatch_multiple,
)
from megatron_vespo.upstream import megatron_fields

TE = "transformer_engine"


@pytest.mark.parametrize(
    "megatron, world, replicas",
    [
        ({}, 3, 3),
        ({"tensor_model_parallel_size": 2}, 4, 2),
        ({"expert_model_parallel_size": 4}, 4, 4),
        ({"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4}, 4, 2),
        ({"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}, 4, 2),
    ],
)
def test_replicas_of_a_layout(megatron: dict[str, Any], world: int, replicas: int) -> None:
    assert data_parallel_size(megatron, world) == replicas


@pytest.mark.parametrize(
    "megatron, words",
    [
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size x pipeline_model_parallel_size = 2"),
        ({"expert_model_parallel_size": 2}, "expert_model_parallel_size x expert_tensor_parallel_size"),
        ({"context_parallel_size": 3}, "megatron.context_parallel_size"),
        ({"virtual_pipeline_model_parallel_size": 2}, "megatron.virtual_pipeline_model_parallel_size=2"),
    ],
)
def test_a_layout_that_does_not_fit_is_named(megatron: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        data_parallel_size(megatron, 3)
    assert words in str(caught.value)


def test_refused_options_exist_upstream_and_say_why() -> None:
    known = megatron_fields()
    assert known is not None
    for name, reason in REFUSED_MEGATRON_OPTIONS.items():
        assert name in known, f"{name} is no option of this Megatron-Core any more"
        with pytest.raises(UserError, match=f"megatron.{name}: not supported: {reason[:20]}"):
            check_megatron_options({name: 1.5})
        check_megatron_options({name: None} | {"lr": 1e-6})


def test_a_router_that_samples_otherwise_than_the_server_is_refused() -> None:
    with pytest.raises(UserError, match="sinkhorn"):
        check_megatron_options({"moe_router_load_balancing_type": "sinkhorn"})
    check_megatron_options({"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-3})


DISTRIBUTED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"use_distributed_optimizer": False}, "overlap_param_gather: needs use_distributed_optimizer"),
        ({"overlap_grad_reduce": False}, "overlap_param_gather: needs overlap_grad_reduce"),
        ({"moe_shared_expert_overlap": True}, "overlap_param_gather: not with moe_shared_expert_overlap"),
        ({"overlap_param_gather": False, "align_param_gather": True}, "align_param_gather: is a way of"),
    ],
)
def test_gathering_weights_in_the_forward_pass_has_conditions(changes: dict[str, Any], words: str) -> None:
    check_megatron_options(DISTRIBUTED)
    check_megatron_options(DISTRIBUTED | {"align_param_gather": True})
    with pytest.raises(UserError, match=words):
        check_megatron_options(DISTRIBUTED | changes)


@pytest.mark.parametrize(
    "changes, layer_spec, words",
    [
        ({}, "local", "megatron.fp8: layer_spec local has no FP8"),
        ({"bf16": False}, TE, "megatron.fp8: needs bf16: true"),
        ({"fp8": "e5m2"}, TE, "megatron.fp8: 'e5m2' is not supported; use one of e4m3, hybrid"),
        ({"fp8_recipe": "custom"}, TE, "megatron.fp8_recipe: 'custom' is not supported; use one of delayed, tens"),
        ({"fp8": None, "fp8_recipe": "blockwise"}, TE, "megatron.fp8_recipe: blockwise does nothing without"),
        ({"fp8_recipe": "delayed", "first_last_layers_bf16": True}, TE, "megatron.first_last_layers_bf16: "),
        (
            {
                "fp8_recipe": "delayed",
                "recompute_granularity": "selective",
                "recompute_modules": ["core_attn", "moe_act", "layernorm"],
            },
            TE,
            "megatron.recompute_modules: layernorm, moe_act cannot be recomputed with the delayed recipe",
        ),
    ],
)
def test_fp8_has_conditions(changes: dict[str, Any], layer_spec: str, words: str) -> None:
    fp8 = {"bf16": True, "fp8": "hybrid"}
    for recipe in FP8_RECIPES:
        check_megatron_options(fp8 | {"fp8_recipe": recipe}, TE)
    check_megatron_options(fp8 | {"fp8_recipe": "delayed", "recompute_granularity": "full"}, TE)
    with pytest.raises(UserError) as caught:
        check_megatron_options(fp8 | changes, layer_spec)
    assert str(caught.value).startswith(words)


def test_only_an_interleaved_pipeline_needs_a_multiple_of_microbatches() -> None:
    interleaved = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}
    assert microbatch_multiple({}) == 1
    assert microbatch_multiple({"pipeline_model_parallel_size": 4}) == 1
    assert microbatch_multiple(interleaved) == 4
    assert microbatch_multiple(interleaved | {"microbatch_group_size_per_vp_stage": 6}) == 6
