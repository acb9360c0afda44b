"""What a ``torch_dist`` checkpoint has pickled, read so that it can run no code of its own.

torch.distributed.checkpoint unpickles ``.metadata`` (filesystem.py:938) and every object but tensors, Megatron's common
state among them (default_planner.py:391), without a restriction; Transformer Engine unpickles the extra states of its
modules. So all of them are read here first, with the classes that belong there and no others. A checkpoint with any
other is refused before upstream sees it.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_vespo.errors import UserError

METADATA = ".metadata"

# What reading a damaged file raises in torch.load and torch.distributed.checkpoint.
DAMAGE = (RuntimeError, ValueError, KeyError, EOFError, OSError, AssertionError, AttributeError, TypeError, IndexError)

_DCP = "torch.distributed.checkpoint"
_METADATA_CLASSES = {
    f"{_DCP}.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    f"{_DCP}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    # Megatron keeps the plans of all ranks with the metadata (strategies/state_dict_saver.py:159).
    f"{_DCP}.planner": (
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
    "torch": ("Size", "device"),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath"),
}
_EXTRA_STATE_CLASSES = {
    "torch": ("Size", "device"),
    "torch._utils": ("_rebuild_tensor_v2",),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "_codecs": ("encode",),
    "transformer_engine.common.recipe": (
        "DelayedScaling",
        "Float8BlockScaling",
        "Float8CurrentScaling",
        "Format",
        "MMParams",
        "MXFP8BlockScaling",
        "NVFP4BlockScaling",
        "QParams",
        "_FormatHelper",
    ),
    "megatron.core.extensions.transformer_engine": ("TEDelayedScaling",),
}
# By which name torch pickles the storage of a tensor; Megatron puts its own function in the place of torch's.
_TENSOR_LOADERS = {
    ("torch.storage", "_load_from_bytes"),
    ("megatron.core.safe_globals", "safe_load_from_bytes"),
}


class _RefusedError(Exception):
    """A pickle asks for what has no place in it."""


class _Unpickler(pickle.Unpickler):
    """Finds the classes of a table, and torch's dtypes."""

    def __init__(self, stream: io.BytesIO, allowed: dict[str, tuple[str, ...]]) -> None:
        super().__init__(stream)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if name in self._allowed.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _TENSOR_LOADERS and "torch._utils" in self._allowed:
            return _load_tensor  # torch's own would unpickle anything
        raise _RefusedError(f"{module}.{name} has no place there")


def _load_tensor(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _read(path: Path, read: Callable[[], Any], what: str = "") -> Any:
    """Read something of a file; a UserError names the file."""
    try:
        return read()
    except _RefusedError as error:
        raise UserError(f"{path}: {what}is refused, it could run code: {error}") from error
    except pickle.UnpicklingError as error:
        # torch.load speaks at length; what it refuses stands in one sentence.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise UserError(f"{path}: {what}cannot be read: {first_line(error)}") from error
        raise UserError(f"{path}: {what}is refused, it could run code: {refused[1]} has no place there") from error
    except DAMAGE as error:
        raise UserError(f"{path}: {what}cannot be read: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The message, short."""
    return (str(error) or type(error).__name__).splitlines()[0]


def read_metadata(folder: Path) -> Metadata:
    """The ``.metadata`` of a checkpoint.

    Raises:
        UserError: It is damaged, or holds what has no place there; nothing of it has run.
    """
    path = folder / METADATA
    metadata = _read(path, lambda: _Unpickler(io.BytesIO(path.read_bytes()), _METADATA_CLASSES).load())
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path}: cannot be read: it holds no Metadata")
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != info.relative_path or getattr(info, "transform_descriptors", None):
            raise UserError(
                f"{path}: is refused: it names {info.relative_path!r}, which is no plain file of the folder"
            )
    return metadata


def check_objects(folder: Path) -> None:
    """Make sure that everything but tensors in a checkpoint can be unpickled without harm.

    Raises:
        UserError: An object is damaged, or holds what has no place there; nothing of it has run.
    """
    metadata = read_metadata(folder)
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, BytesStorageMetadata):
            continue
        info = metadata.storage_data.get(MetadataIndex(key))
        if info is None:
            raise UserError(f"{folder / METADATA}: does not say where {key} lies")
        path = folder / info.relative_path

        def read(path: Path = path, info: Any = info) -> Any:
            with path.open("rb") as stream:
                stream.seek(info.offset)
                return _load_tensor(stream.read(info.length))

        value = _read(path, read, f"{key} ")
        if "_extra_state" in key:
            _check_extra_state(path, key, value)


def _check_extra_state(path: Path, key: str, value: Any) -> None:
    """Transformer Engine unpickles the bytes in a tensor (pytorch/module/base.py, set_extra_state)."""
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, torch.Tensor) and part.numel():
            content = io.BytesIO(part.contiguous().view(torch.uint8).numpy().tobytes())
            _read(path, _Unpickler(content, _EXTRA_STATE_CLASSES).load, f"{key} ")


@contextmanager
def extra_states_checked() -> Iterator[None]:
    """Within it Transformer Engine unpickles extra states, those of delayed scaling (pytorch/_extra_state.py).

    It refuses to unless told that they are to be trusted, as they are when ``check_objects()`` has read them.
    """
    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
