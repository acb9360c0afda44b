"""Hugging Face checkpoint folders on disk: lazy slices in, sharded safetensors out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_vespo.errors import UserError

_INDEX = "model.safetensors.index.json"


class HfReader:
    """Reads slices of the tensors of a folder; a file is opened when the first tensor in it is asked for."""

    def __init__(self, folder: str | Path) -> None:
        """Find the tensors.

        Raises:
            UserError: The folder holds no safetensors, or the index names a file that is missing.
        """
        self.folder = Path(folder)
        self._files: dict[str, safe_open] = {}
        index = self.folder / _INDEX
        if index.is_file():
            self._file_of: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            files = sorted(path.name for path in self.folder.glob("*.safetensors"))
            self._file_of = {name: file for file in files for name in self._open(file).keys()}  # noqa: SIM118
        if not self._file_of:
            raise UserError(f"model.hf_path: no *.safetensors in {self.folder}; give a Hugging Face checkpoint folder")
        for file in sorted(set(self._file_of.values())):
            if not (self.folder / file).is_file():
                raise UserError(f"{index}: names {file}, which is missing")

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._open(self._file_of[name]).get_slice(name).get_shape())

    def read(self, name: str, dim: int, start: int, rows: int) -> torch.Tensor:
        """``rows`` rows of a tensor from ``start`` along dimension 0 or 1; nothing else is read from disk."""
        view = self._open(self._file_of[name]).get_slice(name)
        return view[start : start + rows] if dim == 0 else view[:, start : start + rows]

    def _open(self, file: str) -> safe_open:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            except SafetensorError as error:
                raise UserError(f"{self.folder / file}: not a valid safetensors file: {error}") from error
        return self._files[file]


def write_weights(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = 5 * 2**30) -> None:
    """Write a stream of tensors as safetensors of at most ``shard_bytes`` each, with an index.

    Args:
        folder: An existing folder. Make it under a temporary name and rename it when everything is in it.
        tensors: Name and tensor; consumed one at a time.
        shard_bytes: A file is written when the tensors held reach this size.
    """
    file_of: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        file = f"model-{len(set(file_of.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        file_of.update(dict.fromkeys(shard, file))
        shard.clear()
        size = 0

    for name, tensor in tensors:
        shard[name] = tensor.detach().cpu().contiguous()
        size += shard[name].nbytes
        total += shard[name].nbytes
        if size >= shard_bytes:
            flush()
    if shard:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    (folder / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what a checkpoint needs besides weights: config, generation config, tokenizer files."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in {".json", ".model", ".txt", ".jinja", ".py"} and path.name != _INDEX:
            shutil.copy2(path, folder / path.name)
