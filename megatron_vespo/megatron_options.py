"""What a ``megatron:`` section asks for: the parallel layout, and options that cannot be honoured. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_vespo.errors import UserError

# Megatron's default is the tensor-parallel size; whole experts are faster at the widths of today's models.
DEFAULT_EXPERT_TENSOR_PARALLEL_SIZE = 1

# Options of Megatron that cannot work here or would make the policy another one than the server samples from.
REFUSED_MEGATRON_OPTIONS: dict[str, str] = {
    "overlap_param_gather": "weights are sent to the server right after a step, so they must all have been gathered",
    "overlap_param_gather_with_optimizer_step": "as overlap_param_gather",
    "defer_embedding_wgrad_compute": "the log-probability head makes its own weight gradient, a tile at a time",
    "moe_expert_capacity_factor": "dropping tokens makes the trainer compute another policy than the server",
    "moe_input_jitter_eps": "noise in the router makes the trainer compute another policy than the server",
    "mtp_num_layers": "multi-token prediction is not trained here",
    "transformer_impl": "model.layer_spec chooses the implementation",
    "use_mup": "the server knows nothing of its logit scaling",
    "fp8_output_proj": "log-probabilities are computed from the output weight itself",
}

# The others (sinkhorn, quantile_balancing) choose other experts than the server does.
LOAD_BALANCING = ("none", "aux_loss", "seq_aux_loss", "global_aux_loss")


def check_megatron_options(megatron: Mapping[str, Any]) -> None:
    """Refuse options that are known upstream and cannot be honoured here.

    Raises:
        UserError: One of them is set; the message says why it cannot be.
    """
    for name, reason in REFUSED_MEGATRON_OPTIONS.items():
        if megatron.get(name):
            raise UserError(f"megatron.{name}: not supported: {reason}; remove it")
    balancing = megatron.get("moe_router_load_balancing_type", "none")
    for kind in balancing if isinstance(balancing, list) else [balancing]:
        if kind not in LOAD_BALANCING:
            raise UserError(
                f"megatron.moe_router_load_balancing_type: {kind} is not supported: experts must be chosen as the"
                f" server chooses them; use {', '.join(LOAD_BALANCING)}"
            )


def data_parallel_size(megatron: Mapping[str, Any], world_size: int) -> int:
    """Check that a ``megatron:`` section fits the number of ranks, and say how many replicas it makes.

    Raises:
        UserError: It does not fit; the message names the fields and the sizes that would.
    """
    tensor, pipeline, virtual, context, expert = (
        int(megatron.get(name) or 1)
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
        )
    )
    expert_tensor = int(megatron.get("expert_tensor_parallel_size") or DEFAULT_EXPERT_TENSOR_PARALLEL_SIZE)
    if context > 1:
        raise UserError(
            "megatron.context_parallel_size: only 1 is supported: log W sums over whole sequences, and the torch-native"
            " attention needs whole segments; use tensor_model_parallel_size with sequence_parallel for long sequences"
        )
    if virtual > 1 and pipeline == 1:
        raise UserError(
            f"megatron.virtual_pipeline_model_parallel_size={virtual} interleaves the stages of a pipeline: it needs"
            " pipeline_model_parallel_size of 2 or more"
        )
    for names, needed in (
        ("tensor_model_parallel_size x pipeline_model_parallel_size", tensor * pipeline),
        (
            "expert_model_parallel_size x expert_tensor_parallel_size x pipeline_model_parallel_size",
            expert * expert_tensor * pipeline,
        ),
    ):
        if world_size % needed:
            raise UserError(
                f"megatron: {names} = {needed} does not divide the {world_size} ranks of this job;"
                f" start {needed} ranks or a multiple of it"
            )
    return world_size // (tensor * pipeline)


def microbatch_multiple(megatron: Mapping[str, Any]) -> int:
    """The number of microbatches must be a multiple of this: the interleaved pipeline runs them in groups.

    Megatron's schedule (pipeline_parallel/schedules.py:1145) also takes some other numbers; multiples always work.
    """
    if int(megatron.get("virtual_pipeline_model_parallel_size") or 1) == 1:
        return 1
    return int(megatron.get("microbatch_group_size_per_vp_stage") or megatron["pipeline_model_parallel_size"])
