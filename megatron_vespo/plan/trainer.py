"""How a model fits the ranks that train it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_vespo.config import Config
from megatron_vespo.errors import UserError
from megatron_vespo.megatron_options import microbatch_multiple, padded_vocab_size
from megatron_vespo.plan.sizes import Facts, Parallelism, Problem, longest_sample, samples_per_minibatch
from megatron_vespo.plan.stages import divisors, split_layers

# Share of a pipeline's time without work, and of the vocabulary's rows that are padding, from which a warning is due.
_MUCH_BUBBLE, _MUCH_PADDING = 0.25, 0.01


def find_trainer_problems(config: Config, facts: Facts, sizes: Parallelism) -> Iterator[Problem]:
    """What Megatron refuses when it builds the model, and what slows it down."""
    yield from _attention(facts, sizes)
    yield from _feed_forward(facts, sizes)
    yield from _sequence_parallel(config.megatron, facts, sizes)
    yield from _stages(config.megatron, facts, sizes)
    yield from _vocabulary(config, facts, sizes)
    yield from _nodes(facts, sizes)
    yield from _microbatches(config, facts, sizes)


def _attention(facts: Facts, sizes: Parallelism) -> Iterator[Problem]:
    heads, groups, tensor = facts.transformer["num_attention_heads"], facts.query_groups, sizes.tensor
    if heads % tensor:
        yield Problem(
            f"megatron.tensor_model_parallel_size={tensor} does not divide the model's {heads} attention heads;"
            f" use one of {divisors(heads)}"
        )
    elif groups % tensor and tensor % groups:
        fit = [n for n in range(1, heads + 1) if heads % n == 0 and (groups % n == 0 or n % groups == 0)]
        yield Problem(
            f"megatron.tensor_model_parallel_size={tensor} is neither a divisor nor a multiple of the model's {groups}"
            f" key-value heads; use one of {', '.join(map(str, fit))}"
        )
    elif tensor > groups:
        yield Problem(
            f"megatron.tensor_model_parallel_size={tensor} is more than the model's {groups} key-value heads: Megatron"
            f" gathers queries, keys and values of all ranks in every layer; {groups} or less avoids that",
            fatal=False,
        )


def _feed_forward(facts: Facts, sizes: Parallelism) -> Iterator[Problem]:
    transformer, tensor = facts.transformer, sizes.tensor
    widths = {
        "ffn_hidden_size": ("MLP", tensor if not all(facts.moe_layers) else 1),
        "moe_shared_expert_intermediate_size": ("shared experts", tensor if facts.experts else 1),
    }
    for field, (what, parts) in widths.items():
        width = transformer.get(field) or 0
        if width % parts:
            yield Problem(
                f"megatron.tensor_model_parallel_size={parts} does not divide the width {width} of the model's {what};"
                f" use one of {divisors(width, 64)}"
            )
    if not facts.experts:
        if sizes.expert > 1:
            yield Problem(f"megatron.expert_model_parallel_size={sizes.expert}: the model has no experts; leave it out")
        return
    if facts.experts % sizes.expert:
        yield Problem(
            f"megatron.expert_model_parallel_size={sizes.expert} does not divide the model's {facts.experts} experts;"
            f" use one of {divisors(facts.experts)}"
        )
    width = transformer["moe_ffn_hidden_size"]
    if width % sizes.expert_tensor:
        yield Problem(
            f"megatron.expert_tensor_parallel_size={sizes.expert_tensor} does not divide the width {width} of an"
            f" expert; use one of {divisors(width, 64)}"
        )


def _sequence_parallel(megatron: Mapping[str, Any], facts: Facts, sizes: Parallelism) -> Iterator[Problem]:
    wanted = bool(megatron.get("sequence_parallel"))
    if wanted and sizes.tensor == 1:
        yield Problem(
            "megatron.sequence_parallel=true splits the sequence over tensor-parallel ranks, of which there is one;"
            " leave it out, or set tensor_model_parallel_size"
        )
    if not wanted and sizes.tensor > 1 and facts.experts:
        yield Problem(
            f"megatron.sequence_parallel=false: must be true for a mixture of experts with tensor_model_parallel_size="
            f"{sizes.tensor}"
        )


def _stages(megatron: Mapping[str, Any], facts: Facts, sizes: Parallelism) -> Iterator[Problem]:
    if megatron.get("pipeline_model_parallel_layout") is not None:
        yield Problem("megatron.pipeline_model_parallel_layout: only Megatron checks it, when it builds", fatal=False)
        return
    try:
        split = split_layers(megatron, facts.layers)
    except UserError as error:
        yield Problem(str(error))
        return
    numbers = [sum(chunks) for chunks in split]
    if max(numbers) > 1.25 * facts.layers / sizes.pipeline + 1:
        yield Problem(
            f"megatron.pipeline_model_parallel_size={sizes.pipeline}: the stages get {', '.join(map(str, numbers))}"
            " layers, and all wait for the largest",
            fatal=False,
        )


def _vocabulary(config: Config, facts: Facts, sizes: Parallelism) -> Iterator[Problem]:
    padding = (
        padded_vocab_size(facts.vocab_size, config.model.make_vocab_size_divisible_by, sizes.tensor) - facts.vocab_size
    )
    if padding > max(_MUCH_PADDING * facts.vocab_size, 1024):
        yield Problem(
            f"model.make_vocab_size_divisible_by={config.model.make_vocab_size_divisible_by}: with"
            f" tensor_model_parallel_size={sizes.tensor} the vocabulary of {facts.vocab_size} gets {padding} rows of"
            " padding; 128 is Megatron-LM's",
            fatal=False,
        )


def _nodes(facts: Facts, sizes: Parallelism) -> Iterator[Problem]:
    """Groups that talk in every layer should share a node."""
    if sizes.ranks <= sizes.ranks_per_node:
        return
    groups = {"tensor_model_parallel_size": sizes.tensor}
    if facts.experts:
        groups["expert_model_parallel_size x expert_tensor_parallel_size"] = sizes.expert * sizes.expert_tensor
    for names, size in groups.items():
        if size > 1 and sizes.ranks_per_node % size:
            yield Problem(
                f"megatron.{names} = {size}: its groups reach over nodes of {sizes.ranks_per_node} ranks, and talk in"
                f" every layer; one of {divisors(sizes.ranks_per_node)} stays within a node",
                fatal=False,
            )


def _microbatches(config: Config, facts: Facts, sizes: Parallelism) -> Iterator[Problem]:
    samples, field = samples_per_minibatch(config), "training.minibatches_per_step"
    each = samples // sizes.data
    if config.objective != "rl":
        field = "training.samples_per_step"
    if sizes.pipeline == 1 or each < 1:  # too few samples are refused without knowing the model
        return
    multiple = microbatch_multiple(config.megatron)
    if each < multiple:
        yield Problem(
            f"{field}: {samples} samples of a minibatch are {each} for each of {sizes.data} data-parallel ranks, but an"
            f" interleaved pipeline runs {multiple} microbatches at a time, of which some would be empty; use fewer,"
            " larger minibatches or fewer stages",
            fatal=False,
        )
        return
    # At most one sample a microbatch; fewer microbatches where several samples fit into one.
    bubble = (sizes.pipeline - 1) / sizes.virtual / each
    if bubble > _MUCH_BUBBLE:
        yield Problem(
            f"megatron.pipeline_model_parallel_size={sizes.pipeline}: with at most {each} microbatches on a rank the"
            f" stages idle for {bubble:.0%} of the time that they work, or longer; use larger minibatches, fewer stages"
            " or virtual_pipeline_model_parallel_size",
            fatal=False,
        )


def find_length_problems(config: Config, facts: Facts) -> Iterator[Problem]:
    """Samples that neither a microbatch nor the server can hold."""
    rollout, limit = config.rollout, config.training.max_tokens_per_microbatch
    if config.samples_from_server and rollout.max_new_tokens >= facts.context_length:
        yield Problem(
            f"rollout.max_new_tokens={rollout.max_new_tokens} leaves no room for a prompt in the model's context of"
            f" {facts.context_length} tokens"
        )
    elif config.objective == "rl" and rollout.max_new_tokens > limit:
        yield Problem(
            f"training.max_tokens_per_microbatch={limit} cannot hold a response of rollout.max_new_tokens="
            f"{rollout.max_new_tokens} with its prompt; raise it to {longest_sample(config, facts)}"
        )
    elif config.objective == "rl" and rollout.max_prompt_tokens and longest_sample(config, facts) > limit:
        yield Problem(
            f"training.max_tokens_per_microbatch={limit} cannot hold the longest sample allowed, of"
            f" rollout.max_prompt_tokens={rollout.max_prompt_tokens} and max_new_tokens={rollout.max_new_tokens};"
            f" {longest_sample(config, facts)} would",
            fatal=False,
        )
    context = config.sglang.get("context_length")
    if context is not None and context <= rollout.max_new_tokens:
        yield Problem(
            f"sglang.context_length={context} leaves no room for a prompt beside rollout.max_new_tokens="
            f"{rollout.max_new_tokens}"
        )
