"""FP8 with one scale for each block of a weight: multiplied back in when a published checkpoint is read, and found anew
when weights are pushed to servers that sample from FP8.

Format: ``quantization_config`` in config.json, weights in ``float8_e4m3fn`` and beside each ``<name>_scale_inv`` with
one number a block; weight = stored value * scale. Source: DeepSeek-V3 ``inference/kernel.py`` (``weight_dequant``),
transformers ``integrations/finegrained_fp8.py``; Qwen3-*-FP8 are published the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_vespo.errors import UserError
from megatron_vespo.fp8_format import SCALE_SUFFIX as SCALE_SUFFIX

DTYPE = "F8_E4M3"
"""The safetensors name of the dtype of a quantised weight."""

Block = tuple[int, int]
"""Rows and columns that share a scale."""

# What the stored numbers mean. The rest (activation_scheme, modules_to_not_convert, scale_fmt) is about the server's
# arithmetic, or said by the dtypes of the tensors.
_FIELDS = {
    "quant_method": lambda value: value == "fp8",
    "fmt": lambda value: value in (None, "e4m3"),
    "weight_block_size": lambda value: isinstance(value, list) and len(value) == 2 and min(value) > 0,
}


def weight_block(path: Path, config: Mapping[str, Any]) -> Block | None:
    """Block size of the checkpoint's scales, or None where it is not quantised.

    Args:
        path: The config.json, for messages.
        config: Its content.

    Raises:
        UserError: The checkpoint is quantised in another way.
    """
    section = config.get("quantization_config")
    if section is None:
        return None
    for name, accepts in _FIELDS.items():
        if not accepts(section.get(name)):
            raise UserError(
                f"{path}: quantization_config.{name}={section.get(name)!r} is not supported; weights are read where"
                " they are plain or FP8 in blocks (quant_method fp8, fmt e4m3, weight_block_size [128, 128])"
            )
    rows, columns = section["weight_block_size"]
    return rows, columns


def folder_block(folder: Path) -> Block | None:
    """``weight_block()`` of a folder; None where it has no config.json."""
    path = folder / "config.json"
    return weight_block(path, json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Shape of the scales of a weight; blocks at the edges may be cut."""
    return tuple(-(-size // extent) for size, extent in zip(shape, block, strict=True))


def dequantise(part: torch.Tensor, scales: torch.Tensor, block: Block, dim: int, start: int) -> torch.Tensor:
    """Multiply a slice of a weight by the scales of its blocks.

    Args:
        part: [rows, columns] of the weight, which begin at ``start`` along ``dim`` and at 0 along the other.
        scales: [row blocks, column blocks] that the slice touches, the first the one that ``start`` lies in.
        block: Rows and columns of a block.
        dim: Dimension that was sliced.
        start: Where the slice begins.

    Returns:
        [rows, columns], float32.
    """
    scales = scales.float()
    for axis, extent in enumerate(block):
        offset = start if axis == dim else 0
        index = torch.arange(offset, offset + part.shape[axis]) // extent - offset // extent
        scales = scales.index_select(axis, index)
    return part.float() * scales


LARGEST = torch.finfo(torch.float8_e4m3fn).max
# Exponent below which no scale goes: of a block of zeros, or of numbers that no model has.
_LEAST_EXPONENT = -100


def quantise_blocks(weight: torch.Tensor, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to e4m3, with the least power of two for each block's scale that makes it fit.

    A power of two costs no precision, e4m3 being floating point, and keeps what is exact: a weight that was read from
    e4m3 with such scales comes out as it was, and kernels that know only powers of two (Blackwell's) need not round
    again.

    Args:
        weight: [rows, columns], finite.
        block: Rows and columns of a block; those at the edges may be cut.

    Returns:
        The stored values, float8_e4m3fn, of the weight's shape, and the scales, float32, [row blocks, column blocks]:
        weight = value * scale within 2**-4 of each number, or within 2**-10 of the scale where that is more.
    """
    rows, columns = scale_shape(tuple(weight.shape), block)
    padding = (0, columns * block[1] - weight.shape[1], 0, rows * block[0] - weight.shape[0])
    blocks = torch.nn.functional.pad(weight.float(), padding).view(rows, block[0], columns, block[1])
    mantissa, exponent = torch.frexp(blocks.abs().amax(dim=(1, 3)) / LARGEST)  # mantissa in [1/2, 1), or 0
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp_(min=_LEAST_EXPONENT)
    scales = torch.ldexp(torch.ones_like(mantissa), exponent)
    values = (blocks / scales[:, None, :, None]).view(rows * block[0], columns * block[1])
    return values[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn).contiguous(), scales


def without_quantization(config_json: str) -> str | None:
    """config.json of the same model in a plain dtype; None where it is plain already."""
    config = json.loads(config_json)
    if config.pop("quantization_config", None) is None:
        return None
    return json.dumps(config, indent=2) + "\n"
