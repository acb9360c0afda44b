"""Folders of Megatron ``torch_dist`` checkpoints: read part by part, written tensor by tensor.

The files are those of torch.distributed.checkpoint; what Megatron adds is its folder layout
(megatron/training/checkpointing.py), ``metadata.json`` and the common state (dist_checkpointing/serialization.py).
"""

from __future__ import annotations

import io
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, maybe_load_config, save_config
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import BytesIOWriteData, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_vespo.checkpoint_folder import TRACKER, ChecksummedWriter, FileRecord, Writable, tracked
from megatron_vespo.errors import UserError
from megatron_vespo.files import naming
from megatron_vespo.models.archive import Archives
from megatron_vespo.models.torch_dist import Part
from megatron_vespo.models.untrusted import DAMAGE, first_line, read_metadata

_COMMON_STATE = "common_state/shard_0_1"


def iteration_folder(folder: Path) -> Path:
    """The newest checkpoint in a folder of checkpoints, or the folder itself where it is one.

    Raises:
        UserError: There is none.
    """
    if maybe_load_config(str(folder)) is not None:
        return folder
    chosen = tracked(folder)
    config = maybe_load_config(str(chosen))
    if config is None or config.sharded_backend != "torch_dist":
        raise UserError(f"{chosen}: not a torch_dist checkpoint, though {folder / TRACKER} names it")
    return chosen


class TorchDistReader:
    """Reads parts of the stored tensors of a checkpoint.

    Args:
        folder: A checkpoint, or a folder of checkpoints, of which the newest is read.

    Raises:
        UserError: The folder is not a checkpoint, or its metadata is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = iteration_folder(folder)
        self._files: dict[str, IO[bytes]] = {}
        self._archives = Archives()
        metadata = read_metadata(self.folder)
        self._storage: dict[MetadataIndex, Any] = metadata.storage_data
        entries = metadata.state_dict_metadata
        self.tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        self.objects = [key for key, entry in entries.items() if isinstance(entry, BytesStorageMetadata)]
        self._chunks: dict[str, tuple[int, dict[tuple[int, ...], list[ChunkStorageMetadata]]]] = {}

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a stored tensor."""
        return self.tensors[key].properties.dtype

    def read(self, part: Part) -> torch.Tensor:
        """A part, in the shape of its rows, without the axes for layer and expert.

        Raises:
            UserError: Some of it is not stored, or a file is damaged.
        """
        target: torch.Tensor | None = None
        found, dtype = 0, self.dtype(part.key)
        for chunk in self._candidates(part):
            low = [max(a, b) for a, b in zip(chunk.offsets, part.offset, strict=True)]
            ends = zip(chunk.offsets, chunk.sizes, part.offset, part.shape, strict=True)
            high = [min(a + n, b + m) for a, n, b, m in ends]
            if any(start >= stop for start, stop in zip(low, high, strict=True)):
                continue
            stored = self._load(part.key, chunk)
            if stored.shape != chunk.sizes or stored.dtype != dtype:
                raise UserError(f"{self.folder}: {part.key} at {list(chunk.offsets)} is not what .metadata says")
            source = stored[_box(low, high, chunk.offsets)]
            found += source.numel()
            if found == part.numel and target is None:  # all in one chunk: no copy
                return source.reshape(part.placement.shape)
            if target is None:
                target = torch.empty(part.shape, dtype=dtype)
            target[_box(low, high, part.offset)] = source
        if found != part.numel or target is None:
            raise UserError(f"{self.folder}: {part.key} is not all there at {list(part.offset)}")
        return target.view(part.placement.shape)

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        """A stored chunk."""
        try:
            info = self._storage[MetadataIndex(key, chunk.offsets)]
            file = self._files.get(info.relative_path)
            if file is None:
                file = self._files[info.relative_path] = (self.folder / info.relative_path).open("rb")
            file.seek(info.offset)
            return self._archives.load(file.read(info.length), chunk.sizes, self.dtype(key))
        except DAMAGE as error:
            raise UserError(
                f"{self.folder}: {key} at {list(chunk.offsets)} cannot be read, a file is damaged or missing:"
                f" {first_line(error)}"
            ) from error

    def _candidates(self, part: Part) -> Sequence[ChunkStorageMetadata]:
        """Stored chunks that the part may overlap: those of its layer and expert, found without a search."""
        if part.key not in self._chunks:
            chunks = self.tensors[part.key].chunks
            axes = 0  # leading ones that every chunk holds one index of
            while axes < len(part.shape) and all(chunk.sizes[axes] == 1 for chunk in chunks):
                axes += 1
            table: dict[tuple[int, ...], list[ChunkStorageMetadata]] = defaultdict(list)
            for chunk in chunks:
                table[tuple(chunk.offsets[:axes])].append(chunk)
            self._chunks[part.key] = axes, table
        axes, table = self._chunks[part.key]
        if all(size == 1 for size in part.shape[:axes]):
            return table.get(part.offset[:axes], ())
        return self.tensors[part.key].chunks


def write_torch_dist(
    folder: Path,
    parts: Sequence[tuple[Part, torch.dtype]],
    objects: Sequence[str],
    common_state: dict[str, Any],
    make: Callable[[Part], torch.Tensor],
    file_bytes: int,
) -> None:
    """Write a checkpoint into an existing folder; ``metadata.json``, by which Megatron knows one, comes last.

    FileSystemWriter could write the files as well, but holds on to the last tensor of every key.

    Args:
        folder: Where to.
        parts: What to store, with its dtype.
        objects: Unique keys of objects, stored as None: the extra states of modules without FP8.
        common_state: What is not sharded.
        make: Gives the tensor of a part, in its stored shape; called once for each, as it is written.
        file_bytes: A new file is begun at this size.

    Raises:
        OSError: Writing failed.
    """
    plans = [SavePlan([_tensor_item(part, dtype) for part, dtype in file]) for file in _in_files(parts, file_bytes)]
    blobs = dict.fromkeys(objects, _pickled([None])) | {_COMMON_STATE: _pickled([common_state])}
    plans.append(SavePlan([_object_item(key, blob) for key, blob in blobs.items()]))
    plans, metadata = create_default_global_save_plan(plans)
    queue, archives = iter(parts), Archives()

    def write(item: WriteItem, stream: Writable) -> None:
        if item.type == WriteItemType.BYTE_IO:
            stream.write(blobs[item.index.fqn])
        else:
            archives.save(make(next(queue)[0]), stream)

    results = [write_file(folder / f"__{number}_0.distcp", plan.items, write)[0] for number, plan in enumerate(plans)]
    writer = FileSystemWriter(folder)
    writer.set_up_storage_writer(is_coordinator=True)
    writer.finish(metadata, results)
    save_config(CheckpointingConfig("torch_dist"), str(folder))


def write_file(
    path: Path, items: Sequence[WriteItem], write: Callable[[WriteItem, Writable], None]
) -> tuple[list[WriteResult], FileRecord]:
    """Write items one behind the other, and make the file survive a power cut.

    Args:
        path: File to make.
        items: What to write, in this order.
        write: Writes an item.

    Returns:
        Where the items lie, for ``.metadata``, and the record of the file.

    Raises:
        OSError: Writing failed; it names the file.
    """
    results = []
    with naming(path), path.open("wb") as file:
        stream = ChecksummedWriter(file)
        for item in items:
            start = stream.size
            write(item, stream)
            stream.check()
            # The format's record of where an item lies: .metadata pickles this very class.
            info = _StorageInfo(path.name, start, stream.size - start)
            results.append(WriteResult(item.index, info.length, info))
        file.flush()
        os.fsync(file.fileno())
    return results, stream.record


def _in_files(
    parts: Sequence[tuple[Part, torch.dtype]], file_bytes: int
) -> Iterator[Sequence[tuple[Part, torch.dtype]]]:
    begun = filled = 0
    for number, (part, dtype) in enumerate(parts):
        nbytes = part.numel * dtype.itemsize
        if filled and filled + nbytes > file_bytes:
            yield parts[begun:number]
            begun, filled = number, 0
        filled += nbytes
    yield parts[begun:]


def _box(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start - zero, stop - zero) for start, stop, zero in zip(low, high, origin, strict=True))


def _tensor_item(part: Part, dtype: torch.dtype) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.shape))
    data = TensorWriteData(chunk, TensorProperties(dtype), torch.Size(part.global_shape))
    return WriteItem(MetadataIndex(part.key, part.offset), WriteItemType.SHARD, tensor_data=data)


def _object_item(key: str, blob: bytes) -> WriteItem:
    return WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(len(blob)))


def _pickled(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
