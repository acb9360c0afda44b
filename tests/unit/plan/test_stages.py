import itertools
from typing import Any

import pytest

from megatron_vespo import parallel  # noqa: F401 - prepares Megatron
from megatron_vespo.errors import UserError
from megatron_vespo.plan.stages import split_layers

OPTIONS: list[dict[str, Any]] = [
    {},
    {"account_for_embedding_in_pipeline_split": True},
    {"account_for_loss_in_pipeline_split": True},
    {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
    {"num_layers_in_first_pipeline_stage": 1},
    {"num_layers_in_first_pipeline_stage": 2, "account_for_loss_in_pipeline_split": True},
    {"num_layers_in_last_pipeline_stage": 2},
    {"num_layers_in_last_pipeline_stage": 0},
    {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 3},
    {"num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 2},
]


def megatrons_split(megatron: dict[str, Any], layers: int) -> list[list[int]] | None:
    """What Megatron itself would build on each stage; None where it refuses."""
    import torch
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig

    stages = megatron["pipeline_model_parallel_size"]
    chunks = megatron.get("virtual_pipeline_model_parallel_size")
    try:
        config = TransformerConfig(
            num_layers=layers, hidden_size=8, num_attention_heads=2, pipeline_dtype=torch.float32, **megatron
        )
        split = [
            [get_num_layers_to_build(config, vp, stage) for vp in (range(chunks) if chunks else [None])]
            for stage in range(stages)
        ]
    except (ValueError, AssertionError):
        return None
    # It does not notice that more layers were given away than there are.
    return split if min(map(min, split)) >= 0 else None


def test_stages_are_those_of_megatron_and_refused_where_it_refuses() -> None:
    refused = agreed = 0
    for layers, stages, chunks, options in itertools.product((2, 4, 6, 7, 10), (2, 3, 4), (None, 2, 3), OPTIONS):
        megatron = {
            "pipeline_model_parallel_size": stages,
            **({"virtual_pipeline_model_parallel_size": chunks} if chunks else {}),
            **options,
        }
        expected = megatrons_split(megatron, layers)
        if expected is None:
            refused += 1
            with pytest.raises(UserError, match=r"megatron\."):
                split_layers(megatron, layers)
        else:
            agreed += 1
            assert split_layers(megatron, layers) == expected, (megatron, layers)
            assert sum(map(sum, expected)) == layers
    assert refused > 100 and agreed > 50


def test_94_layers_over_8_stages() -> None:
    section: dict[str, Any] = {"pipeline_model_parallel_size": 8, "virtual_pipeline_model_parallel_size": 2}
    with pytest.raises(UserError, match=r"does not divide the model's 94 layers; set both account_for_embedding_in"):
        split_layers(section, 94)
    section |= {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
    assert split_layers(section, 94) == [[5, 6], *[[6, 6]] * 6, [6, 5]]
    with pytest.raises(UserError, match=r"virtual_pipeline_model_parallel_size=5 .* 12 layers .* one of 1, 2, 3, 4, 6"):
        split_layers(section | {"virtual_pipeline_model_parallel_size": 5}, 94)


def test_a_free_layout_is_megatrons_business() -> None:
    with pytest.raises(UserError, match="pipeline_model_parallel_layout: not read here"):
        split_layers({"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tL"}, 2)
