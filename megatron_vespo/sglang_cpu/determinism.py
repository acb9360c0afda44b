"""Deterministic inference on a CPU: SGLang's ``enable_deterministic_inference``, whose own parts are Triton and CUDA.

With it a request that names a ``sampling_seed`` gets the same tokens and log-probs, bit for bit, whatever else is in
the batch. Imports SGLang.
"""

from __future__ import annotations

import torch
from sglang.srt.arg_groups.choices import add_deterministic_attention_backend_choices
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

_MASK = 0xFFFFFFFF
# Rows of every matrix product. A product sums up in an order that depends on the number of rows, hence on the batch.
_ROWS = 16
_LIBRARIES: list[torch.library.Library] = []


def register() -> None:
    """Allow the torch-native attention and replace what needs Triton; ``HookRegistry.apply_hooks()`` must follow."""
    add_deterministic_attention_backend_choices(["torch_native"])
    mode = "sglang.srt.batch_invariant_ops.enable_batch_invariant_mode"
    HookRegistry.register(mode, enable_batch_invariant_mode, HookType.REPLACE)
    HookRegistry.register("sglang.kernels.ops.sampling.murmur_hash.murmur_hash32", murmur_hash32, HookType.REPLACE)
    # The sampler is compiled by a decorator, with a C++ compiler that may be missing.
    torch._dynamo.config.disable = True


def enable_batch_invariant_mode(enable_bmm: bool = True) -> None:
    """Compute matrix products in blocks of equal size; PyTorch's other CPU kernels treat each row for itself."""
    if not _LIBRARIES:
        library = torch.library.Library("aten", "IMPL")
        library.impl("mm", mm_in_blocks, "CPU")
        library.impl("addmm", _addmm_in_blocks, "CPU")
        _LIBRARIES.append(library)  # the replacement ends with the object


def mm_in_blocks(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right``; a row of the result depends on that row of ``left`` alone, to the bit."""
    rows = left.shape[0]
    padding = -rows % _ROWS
    if padding:
        left = torch.cat([left, left.new_zeros(padding, left.shape[1])])
    result = left.new_empty(rows + padding, right.shape[1])
    for start in range(0, rows, _ROWS):
        torch.mm(left[start : start + _ROWS], right, out=result[start : start + _ROWS])
    return result[:rows]


def _addmm_in_blocks(
    bias: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return beta * bias + alpha * mm_in_blocks(left, right)


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 of (seed, position, column), as SGLang's Triton kernel of that name computes it.

    Args:
        seed: [rows], 64 bits.
        positions: [rows].
        columns: [columns].

    Returns:
        [rows, columns], uint32.
    """
    wide = seed.to(torch.int64)
    state = torch.zeros_like(wide)
    for word in (wide & _MASK, (wide >> 32) & _MASK, positions.to(torch.int64) & _MASK):
        state = _mix(state, word)
    state = _mix(state[:, None], columns.to(torch.int64)[None, :] & _MASK) ^ 16
    state = _multiply(state ^ (state >> 16), 0x85EBCA6B)
    state = _multiply(state ^ (state >> 13), 0xC2B2AE35)
    return (state ^ (state >> 16)).to(torch.uint32)


def _mix(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    word = _multiply(_rotate(_multiply(word, 0xCC9E2D51), 15), 0x1B873593)
    return (_multiply(_rotate(state ^ word, 13), 5) + 0xE6546B64) & _MASK


def _rotate(value: torch.Tensor, bits: int) -> torch.Tensor:
    return ((value << bits) | (value >> (32 - bits))) & _MASK


def _multiply(value: torch.Tensor, factor: int) -> torch.Tensor:
    """Product modulo 2**32; the int64 product wraps, which leaves its lower half right."""
    return (value * factor) & _MASK
