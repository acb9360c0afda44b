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


class HfWriter:
    """Writes a stream of tensors as sharded safetensors with an index.

    Args:
        folder: An existing folder. Make it under a temporary name and rename it when ``finish()`` has returned.
        shard_bytes: A file is written when the tensors held reach this size.
    """

    def __init__(self, folder: Path, shard_bytes: int = 5 * 2**30) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._shard: dict[str, torch.Tensor] = {}
        self._file_of: dict[str, str] = {}
        self._held = self._total = self._files = 0

    def add(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take tensors; they are copied to the CPU at once.

        Raises:
            OSError: A file could not be written.
        """
        for name, tensor in tensors:
            self._shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
            self._held += tensor.nbytes
            if self._held >= self._shard_bytes:
                self._flush()

    def finish(self) -> None:
        """Write what is held, and the index."""
        self._flush()
        index = {"metadata": {"total_size": self._total}, "weight_map": self._file_of}
        (self._folder / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _flush(self) -> None:
        if not self._shard:
            return
        self._files += 1
        file = f"model-{self._files:05d}.safetensors"
        try:
            save_file(self._shard, self._folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # not an OSError, even where the disk is full
            raise OSError(str(error)) from error
        self._file_of.update(dict.fromkeys(self._shard, file))
        self._total += self._held
        self._shard, self._held = {}, 0


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what a checkpoint needs besides weights: config, generation config, tokenizer files."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in {".json", ".model", ".txt", ".jinja", ".py"} and path.name != _INDEX:
            shutil.copy2(path, folder / path.name)
