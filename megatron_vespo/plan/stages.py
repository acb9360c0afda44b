"""Which layers go to which pipeline stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_vespo.errors import UserError


def split_layers(megatron: Mapping[str, Any], layers: int) -> list[list[int]]:
    """Layers of each chunk of each pipeline stage, as Megatron deals them (transformer_block.py:78).

    Raises:
        UserError: They cannot be dealt so.
    """
    stages = int(megatron.get("pipeline_model_parallel_size") or 1)
    chunks = int(megatron.get("virtual_pipeline_model_parallel_size") or 1)
    if megatron.get("pipeline_model_parallel_layout") is not None:
        raise UserError(
            "megatron.pipeline_model_parallel_layout: not read here; with num_layers_in_first_pipeline_stage and"
            " num_layers_in_last_pipeline_stage the plan can be checked"
        )
    first, last = (megatron.get(f"num_layers_in_{end}_pipeline_stage") for end in ("first", "last"))
    embedding, loss = (int(bool(megatron.get(f"account_for_{end}_in_pipeline_split"))) for end in ("embedding", "loss"))
    if (first, last) == (None, None):
        each = _even(layers + embedding + loss, stages, layers)
        split = [[_share(each, chunks, layers)] * chunks for _ in range(stages)]
        split[0][0] -= embedding
        split[-1][-1] -= loss
        return split
    if embedding or loss:
        raise UserError(
            "megatron.num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage do not go together with"
            " account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split; use one way or the other"
        )
    per_stage = _with_given_ends(layers, stages, first, last)
    return [[_share(number, chunks, layers)] * chunks for number in per_stage]


def _even(layers: int, stages: int, of_model: int) -> int:
    if layers % stages:
        counted = "" if layers == of_model else f" (with embedding or loss counted as layers: {layers})"
        even = [n for n in (of_model, of_model + 1, of_model + 2) if n % stages == 0]
        ways = {
            of_model: "none of account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split",
            of_model + 1: "one of account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split",
            of_model + 2: "both account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split",
        }
        advice = f"set {ways[even[0]]}" if even else f"use one of {divisors(layers)} stages"
        raise UserError(
            f"megatron.pipeline_model_parallel_size={stages} does not divide the model's {of_model} layers{counted};"
            f" {advice}, or num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage"
        )
    return layers // stages


def _with_given_ends(layers: int, stages: int, first: int | None, last: int | None) -> list[int]:
    given = [number for number in (first, last) if number is not None]
    middle, left = stages - len(given), layers - sum(given)
    if min(given) < 1 or middle < 0 or left < 0 or bool(middle) != bool(left) or (middle and left % middle):
        raise UserError(
            f"megatron.num_layers_in_first_pipeline_stage={first} and num_layers_in_last_pipeline_stage={last} leave"
            f" {left} of the model's {layers} layers for {middle} other stages; each of those must get equally many,"
            " and at least one"
        )
    each = left // middle if middle else 0
    split = [each] * stages
    if first is not None:
        split[0] = first
    if last is not None:
        split[-1] = last
    return split


def _share(of_stage: int, chunks: int, layers: int) -> int:
    if of_stage % chunks:
        raise UserError(
            f"megatron.virtual_pipeline_model_parallel_size={chunks} does not divide the {of_stage} layers of a"
            f" pipeline stage (of the model's {layers}); use one of {divisors(of_stage)}"
        )
    return of_stage // chunks


def divisors(number: int, most: int | None = None) -> str:
    """Divisors of a number as a list in words, up to ``most``."""
    return ", ".join(str(n) for n in range(1, (most or number) + 1) if number % n == 0)
