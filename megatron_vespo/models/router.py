"""Megatron's router with two repairs to the bias that experts are chosen with (``moe_router_enable_expert_bias``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor


class Router(TopKRouter):
    """Keeps bias and token counts in float32, and leaves padding out of the counts."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # Float16Module casts every buffer (transformer/module.py:464); the router casts its bias back at the next
        # forward pass (transformer/moe/router.py:259), when the digits are gone, and the counts never.
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        # [tokens] where [tokens, experts] is masked: Megatron leaves out the new dimension (moe/router.py:738).
        super()._apply_expert_bias(routing_map, None if padding_mask is None else padding_mask.reshape(-1, 1))


def with_router(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """The same layers, those with experts behind this router."""
    return replace(block, layer_specs=[_with_router(spec) for spec in block.layer_specs])


def _with_router(spec: ModuleSpec) -> ModuleSpec:
    mlp: Any = spec.submodules.mlp
    if mlp.func is not MoELayer:
        return spec
    submodules = replace(mlp.keywords["submodules"], router=Router)
    mlp = partial(mlp.func, *mlp.args, **{**mlp.keywords, "submodules": submodules})
    return replace(spec, submodules=replace(spec.submodules, mlp=mlp))
