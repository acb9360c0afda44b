"""Reading slices of a safetensors file into memory of their own.

The safetensors library maps the file: every page read counts as memory of the process until the file is closed, and a
slice costs several times what reading a small tensor does. Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vespo.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of the format -> dtypes."""

_LENGTH = 8  # bytes of the header's length, which the file begins with


@dataclass(frozen=True, slots=True)
class TensorView:
    """A tensor in a file: its shape and dtype, and slices of it on demand."""

    file: SafetensorsFile
    name: str
    shape: tuple[int, ...]
    dtype_name: str
    offset: int

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return DTYPES[self.dtype_name]

    def rows(self, dim: int, start: int, stop: int) -> torch.Tensor:
        """Rows ``start:stop`` along dimension 0 or 1. Along 1 the rest is read as well, and let go."""
        if dim == 1:
            return self.rows(0, 0, self.shape[0])[:, start:stop]
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        part = self.file.read(self.name, self.offset + start * row, (stop - start) * row)
        return part.view(self.dtype).view(stop - start, *self.shape[1:])


class SafetensorsFile:
    """An open file; closed when the object goes.

    Raises:
        UserError: The header is not one, or the file is shorter than it says.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            self._views = self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a valid safetensors file: {error}") from error

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._views)

    def get_slice(self, name: str) -> TensorView:
        """A tensor, not read yet."""
        return self._views[name]

    def read(self, name: str, offset: int, count: int) -> torch.Tensor:
        """``count`` bytes of the file."""
        data = torch.empty(count, dtype=torch.uint8)
        buffer = memoryview(data.numpy())
        done = 0
        while done < count:  # a single call reads at most 2 GiB
            got = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            if got == 0:
                raise UserError(f"{self._path}: ends within {name}; the file is truncated")
            done += got
        return data

    def _read_header(self) -> dict[str, TensorView]:
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, _LENGTH, 0), "little")
        if size < _LENGTH or length > size - _LENGTH:
            raise ValueError(f"its header would have {length} bytes, the file has {size}")
        header: dict[str, Any] = json.loads(os.pread(self._descriptor, length, _LENGTH))
        header.pop("__metadata__", None)
        views = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            view = TensorView(self, name, tuple(entry["shape"]), entry["dtype"], _LENGTH + length + begin)
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
            if end - begin != math.prod(view.shape) * view.dtype.itemsize or begin < 0:
                raise ValueError(f"{name} has {end - begin} bytes, its shape {view.shape} says otherwise")
            if view.offset + end - begin > size:
                raise ValueError(f"{name} ends beyond the end of the file; the file is truncated")
            views[name] = view
        return views
