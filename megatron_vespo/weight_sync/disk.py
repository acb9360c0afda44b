"""Transport by disk: rank 0 writes a Hugging Face folder, the server reads it. The reference for the others."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

from megatron_vespo.files import atomic_folder
from megatron_vespo.models.hf_files import HfWriter, copy_companions
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.weight_sync.sync import NamedTensors


class DiskTransport:
    """Keeps the folder of the version that the server serves, and no older one.

    Args:
        control: The server.
        folder: Where version folders are made; the server must see it under the same path.
        source: HF folder whose config and tokenizer files go with the weights.
    """

    def __init__(self, control: SGLangControl, folder: Path, source: Path) -> None:
        self._control, self._folder, self._source = control, folder.absolute(), source
        self._stack = ExitStack()
        self._writer: HfWriter | None = None
        self._target: Path | None = None

    def begin(self, version: int) -> None:
        """Open a new version folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._version, self._target = version, self._folder / f"version_{version:06d}"
        temporary = self._stack.enter_context(atomic_folder(self._target))
        copy_companions(self._source, temporary)
        self._writer = HfWriter(temporary)

    def send(self, tensors: NamedTensors) -> None:
        """Write one bucket."""
        assert self._writer is not None
        self._writer.add(tensors)

    def finish(self) -> None:
        """Publish the folder, have the server load it, delete older ones."""
        assert self._writer is not None and self._target is not None
        self._writer.finish()
        self._stack.close()
        self._control.update_weights_from_disk(self._target, self._version)
        for old in self._folder.glob("version_*"):
            if old != self._target:
                shutil.rmtree(old)

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)
