"""What a checkpoint folder holds, as text, from its headers alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vespo import parallel  # noqa: F401 - prepares Megatron, which the next imports need
from megatron_vespo.checkpoint_folder import TRACKER
from megatron_vespo.errors import UserError
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.models.safetensors_file import SafetensorsFile
from megatron_vespo.models.torch_dist_files import TorchDistReader

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def describe(folder: Path, *, every_tensor: bool = False) -> str:
    """Architecture, parameters, dtypes, sizes, files and tensors of a Hugging Face or Megatron folder.

    Args:
        folder: The folder.
        every_tensor: A line for each tensor instead of one for all that differ in their numbers only.

    Raises:
        UserError: It is neither, or its headers are damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return _describe_hf(folder, files, every_tensor)
    return _describe_torch_dist(folder, every_tensor)


def _describe_hf(folder: Path, files: list[Path], every_tensor: bool) -> str:
    tensors = []
    for file in files:
        opened = SafetensorsFile(file)
        for name in opened.keys():  # noqa: SIM118 - not a dict
            view = opened.get_slice(name)
            tensors.append(_Tensor(name, view.shape, view.dtype))
    try:
        architecture = load_architecture(folder).family.model_type
    except UserError as error:
        architecture = f"not one that is supported: {error}"
    head = [("format", "Hugging Face safetensors"), ("architecture", architecture)]
    return _text(head, tensors, files, every_tensor)


def _describe_torch_dist(folder: Path, every_tensor: bool) -> str:
    try:
        reader = TorchDistReader(folder)
    except UserError as error:
        if (folder / TRACKER).exists() or (folder / ".metadata").exists():
            raise
        raise UserError(f"{folder}: neither *.safetensors nor a Megatron checkpoint ({error})") from error
    stored = [_Tensor(key, tuple(entry.size), entry.properties.dtype) for key, entry in sorted(reader.tensors.items())]
    weights = [tensor for tensor in stored if "optimizer." not in tensor.name]
    optimizer = [tensor for tensor in stored if "optimizer." in tensor.name]
    chunks = sum(len(entry.chunks) for entry in reader.tensors.values())
    head = [
        ("format", "Megatron torch_dist"),
        ("iteration", reader.folder.name.removeprefix("iter_").lstrip("0") or "0"),
        ("chunks", f"{chunks:,}"),
        ("objects", f"{len(reader.objects):,}"),
    ]
    if optimizer:
        nbytes = sum(tensor.numel * tensor.dtype.itemsize for tensor in optimizer)
        head.append(("optimizer", f"{len(optimizer):,} tensors, {_size(nbytes)}"))
    files = sorted(reader.folder.glob("*.distcp"))
    return _text(head, weights, files, every_tensor)


def _text(head: list[tuple[str, str]], tensors: list[_Tensor], files: list[Path], every_tensor: bool) -> str:
    dtypes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        dtypes[tensor.dtype] += tensor.numel
    nbytes = sum(count * dtype.itemsize for dtype, count in dtypes.items())
    largest = max(tensors, key=lambda tensor: tensor.numel, default=None)
    on_disk = sum(file.stat().st_size for file in files)
    rows = [
        *head,
        ("parameters", f"{sum(dtypes.values()):,} in {len(tensors):,} tensors"),
        ("dtypes", ", ".join(f"{_dtype(dtype)} {count:,}" for dtype, count in dtypes.most_common())),
        ("size", f"{_size(nbytes)}; files {_size(on_disk)}"),
        ("files", f"{len(files)}: {_shortened([file.name for file in files])}"),
    ]
    if largest is not None:
        rows.append(("largest", f"{largest.name} {list(largest.shape)}"))
    lines = [f"{label + ':':14}{value}" for label, value in rows]
    return "\n".join([*lines, "", *_listed(tensors, every_tensor)])


def _listed(tensors: Iterable[_Tensor], every_tensor: bool) -> list[str]:
    if every_tensor:
        return [f"{_dtype(tensor.dtype):9} {tensor.name} {list(tensor.shape)}" for tensor in tensors]
    kinds = Counter(_Tensor(_NUMBER.sub("*", tensor.name), tensor.shape, tensor.dtype) for tensor in tensors)
    width = len(f"{max(kinds.values(), default=0):,}")
    return [
        f"{count:>{width},} x {_dtype(kind.dtype):9} {kind.name} {list(kind.shape)}" for kind, count in kinds.items()
    ]


def _shortened(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} ... {names[-1]}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(nbytes: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024  # type: ignore[assignment]
    raise AssertionError
