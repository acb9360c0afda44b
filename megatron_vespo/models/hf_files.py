"""Hugging Face checkpoint folders on disk: lazy slices in, sharded safetensors out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_vespo.errors import UserError
from megatron_vespo.models import fp8
from megatron_vespo.models.safetensors_file import SafetensorsFile, TensorView

_INDEX = "model.safetensors.index.json"


class HfReader:
    """Reads slices of the tensors of a folder; a file is opened when the first tensor in it is asked for.

    Weights published in FP8 are read as float32, their scales multiplied in.
    """

    def __init__(self, folder: str | Path) -> None:
        """Find the tensors.

        Raises:
            UserError: The folder holds no safetensors, the index names a file that is missing, or config.json a
                quantisation that is not supported.
        """
        self.folder = Path(folder)
        self._files: dict[str, SafetensorsFile] = {}
        self._block = fp8.folder_block(self.folder)
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

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of all weights; the scales of FP8 weights are part of them."""
        return frozenset(name for name in self._file_of if not self._is_scale(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._view(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that ``read()`` gives, without reading."""
        view = self._view(name)
        return torch.float32 if view.dtype_name == fp8.DTYPE else view.dtype

    def read(self, name: str, dim: int, start: int, rows: int) -> torch.Tensor:
        """``rows`` rows of a tensor from ``start`` along dimension 0 or 1; nothing else is read from disk.

        Raises:
            UserError: The tensor is FP8 and its scales are missing or of another shape.
        """
        view = self._view(name)
        part = view.rows(dim, start, start + rows)
        if view.dtype_name != fp8.DTYPE:
            return part
        if self._block is None or name + fp8.SCALE_SUFFIX not in self._file_of:
            raise UserError(
                f"{self.folder}: {name} is FP8; {name}{fp8.SCALE_SUFFIX} and config.json's quantization_config say how"
                " to read it, and one of them is missing"
            )
        scales = self._view(name + fp8.SCALE_SUFFIX)
        shape, expected = scales.shape, fp8.scale_shape(self.shape(name), self._block)
        if shape != expected:
            raise UserError(f"{self.folder}: {name}{fp8.SCALE_SUFFIX} has shape {shape}, its weight needs {expected}")
        first, last = start // self._block[dim], (start + rows - 1) // self._block[dim]
        return fp8.dequantise(part, scales.rows(dim, first, last + 1), self._block, dim, start)

    def _is_scale(self, name: str) -> bool:
        weight = name.removesuffix(fp8.SCALE_SUFFIX)
        return self._block is not None and weight != name and weight in self._file_of

    def _view(self, name: str) -> TensorView:
        file = self._file_of[name]
        try:
            return self._open(file).get_slice(name)
        except KeyError as error:
            raise UserError(f"{self.folder}: the index says that {name} is in {file}, and it is not") from error

    def _open(self, file: str) -> SafetensorsFile:
        if file not in self._files:
            self._files[file] = SafetensorsFile(self.folder / file)
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
    """Copy what a checkpoint needs besides weights: config, generation config, tokenizer files.

    The weights are written in a plain dtype, so the config of an FP8 checkpoint loses its ``quantization_config``; and
    without layers for multi-token prediction, so ``num_nextn_predict_layers`` becomes 0.
    """
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in {".json", ".model", ".txt", ".jinja", ".py"} and path.name != _INDEX:
            shutil.copy2(path, folder / path.name)
    config = folder / "config.json"
    for edit in (fp8.without_quantization, _without_extra_layers):
        edited = edit(config.read_text(encoding="utf-8")) if config.is_file() else None
        if edited is not None:
            config.write_text(edited, encoding="utf-8")


def _without_extra_layers(config_json: str) -> str | None:
    """config.json of the same model without multi-token prediction; None where it has none already."""
    config = json.loads(config_json)
    if not config.get("num_nextn_predict_layers"):
        return None
    return json.dumps(config | {"num_nextn_predict_layers": 0}, indent=2) + "\n"
