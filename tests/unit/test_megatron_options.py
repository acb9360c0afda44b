from typing import Any

import pytest

from megatron_vespo.errors import UserError
from megatron_vespo.megatron_options import (
    REFUSED_MEGATRON_OPTIONS,
    check_megatron_options,
    data_parallel_size,
    microbatch_multiple,
)
from megatron_vespo.upstream import megatron_fields


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


def test_only_an_interleaved_pipeline_needs_a_multiple_of_microbatches() -> None:
    interleaved = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}
    assert microbatch_multiple({}) == 1
    assert microbatch_multiple({"pipeline_model_parallel_size": 4}) == 1
    assert microbatch_multiple(interleaved) == 4
    assert microbatch_multiple(interleaved | {"microbatch_group_size_per_vp_stage": 6}) == 6
