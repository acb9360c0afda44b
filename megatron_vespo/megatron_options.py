"""What a ``megatron:`` section asks for: the parallel layout, and options that cannot be honoured. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_vespo.errors import UserError

# Megatron's default is the tensor-parallel size; whole experts are faster at the widths of today's models.
DEFAULT_EXPERT_TENSOR_PARALLEL_SIZE = 1

# Options of Megatron that cannot work here or would make the policy another one than the server samples from.
REFUSED_MEGATRON_OPTIONS: dict[str, str] = {
    "overlap_param_gather_with_optimizer_step": "a step may be skipped on every rank, but its gathering has begun then",
    "defer_embedding_wgrad_compute": "the log-probability head makes its own weight gradient, a tile at a time",
    "moe_expert_capacity_factor": "dropping tokens makes the trainer compute another policy than the server",
    "moe_input_jitter_eps": "noise in the router makes the trainer compute another policy than the server",
    "mtp_num_layers": "multi-token prediction is not trained here",
    "transformer_impl": "model.layer_spec chooses the implementation",
    "use_mup": "the server knows nothing of its logit scaling",
    "fp8_output_proj": "log-probabilities are computed from the output weight itself",
    "fp8_param": "weights are loaded, sent to the server and saved in bfloat16, so they are kept in it",
    "fp8_param_gather": "as fp8_param",
    "reuse_grad_buf_for_mxfp8_param_ag": "as fp8_param",
    "fp8_dot_product_attention": "cuDNN's attention in FP8 takes no packed sequences",
    "fp8_multi_head_attention": "as fp8_dot_product_attention",
    "fp8_quantizer_factory": "there is no custom recipe",
    "fp4": "training in 4 bits is not supported",
    "quant_recipe": "model.fp8_scope says which layers are in FP8",
    "moe_single_grouped_weight": "weights are loaded and sent expert by expert",
    "tp_comm_overlap": "its buffers have one size, and packed microbatches differ in length",
    "overlap_moe_expert_parallel_comm": "its schedule runs the model in pieces, past the log-probability head",
}

FP8_FORMATS = ("e4m3", "hybrid")
FP8_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")

# The others (sinkhorn, quantile_balancing) choose other experts than the server does.
LOAD_BALANCING = ("none", "aux_loss", "seq_aux_loss", "global_aux_loss")


def check_megatron_options(megatron: Mapping[str, Any], layer_spec: str = "local") -> None:
    """Refuse options that are known upstream and cannot be honoured here.

    Args:
        megatron: The ``megatron:`` section.
        layer_spec: ``model.layer_spec``.

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

    _check_overlap(megatron)
    _check_fp8(megatron, layer_spec)


def _check_overlap(megatron: Mapping[str, Any]) -> None:
    """Megatron-LM's own conditions (training/arguments.py), which Megatron-Core does not look at."""
    if megatron.get("align_param_gather") and not megatron.get("overlap_param_gather"):
        raise UserError("megatron.align_param_gather: is a way of overlap_param_gather; set both or neither")
    if not megatron.get("overlap_param_gather"):
        return
    for name, reason in (
        ("use_distributed_optimizer", "nothing is to be gathered without it"),
        ("overlap_grad_reduce", "weights are gathered in its buckets"),
    ):
        if not megatron.get(name):
            raise UserError(f"megatron.overlap_param_gather: needs {name}: true; {reason}")
    if megatron.get("moe_shared_expert_overlap"):
        raise UserError(
            "megatron.overlap_param_gather: not with moe_shared_expert_overlap, which reads the shared expert's gate"
            " before it has been gathered; leave out one of them"
        )


def _check_fp8(megatron: Mapping[str, Any], layer_spec: str) -> None:
    """What can be said of FP8 without a device; ``models.precision`` looks at the device and the model."""
    fp8, recipe = megatron.get("fp8"), megatron.get("fp8_recipe")
    if not fp8:
        if recipe:
            raise UserError(f"megatron.fp8_recipe: {recipe} does nothing without megatron.fp8; set e4m3 or hybrid")
        return
    for name, value, known in (("fp8", fp8, FP8_FORMATS), ("fp8_recipe", recipe, (None, *FP8_RECIPES))):
        if value not in known:
            choices = ", ".join(choice for choice in known if choice)
            raise UserError(f"megatron.{name}: {value!r} is not supported; use one of {choices}")
    if layer_spec != "transformer_engine":
        raise UserError(f"megatron.fp8: layer_spec {layer_spec} has no FP8; set model.layer_spec: transformer_engine")
    if not megatron.get("bf16"):
        raise UserError("megatron.fp8: needs bf16: true; what is not in FP8 is in bfloat16")
    if recipe != "delayed":
        return
    again = {"layernorm", "moe_act"} & set(megatron.get("recompute_modules") or ())
    if megatron.get("recompute_granularity") == "selective" and again:
        raise UserError(
            f"megatron.recompute_modules: {', '.join(sorted(again))} cannot be recomputed with the delayed recipe; use"
            " another megatron.fp8_recipe"
        )
    if megatron.get("first_last_layers_bf16"):
        raise UserError("megatron.first_last_layers_bf16: not with the delayed recipe; use another megatron.fp8_recipe")


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


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """Vocabulary rounded up to a multiple of ``divisible_by`` x tensor-parallel size, as Megatron-LM pads it."""
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple
