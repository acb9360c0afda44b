"""Transport by disk: rank 0 writes a Hugging Face folder, the servers read it. The reference for the others."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

from megatron_vespo.errors import UserError
from megatron_vespo.files import atomic_folder
from megatron_vespo.models.hf_files import HfWriter, copy_companions
from megatron_vespo.weight_sync.servers import Servers
from megatron_vespo.weight_sync.transport import NamedTensors, Sent


class DiskTransport:
    """Keeps the folder of the version that the servers hold, and no older one.

    Args:
        servers: Who reads it.
        folder: Where version folders are made; the servers must see it under the same path.
        source: HF folder whose config and tokenizer files go with the weights.
    """

    def __init__(self, servers: Servers, folder: Path, source: Path) -> None:
        self._servers, self._folder, self._source = servers, folder.absolute(), source
        self._stack = ExitStack()
        self._writer: HfWriter | None = None
        self._target: Path | None = None
        self.sent = Sent()

    def begin(self, version: int) -> None:
        """Open a new version folder."""
        self._version, self._target, self.sent = version, self._folder / f"version_{version:06d}", Sent()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary = self._stack.enter_context(atomic_folder(self._target))
            copy_companions(self._source, temporary)
            self._writer = HfWriter(temporary)
        except OSError as error:
            raise self._failed(error) from error

    def send(self, tensors: NamedTensors) -> None:
        """Write one bucket."""
        assert self._writer is not None
        try:
            self._writer.add(tensors)
        except OSError as error:
            raise self._failed(error) from error
        self.sent.bytes += sum(tensor.nbytes for _, tensor in tensors)

    def finish(self) -> None:
        """Publish the folder, have the servers load it, delete older ones."""
        assert self._writer is not None and self._target is not None
        target, version = self._target, self._version
        try:
            self._writer.finish()
            self._stack.close()
        except OSError as error:
            raise self._failed(error) from error
        self._servers.each(lambda control: control.update_weights_from_disk(target, version))
        for old in self._folder.glob("version_*"):
            if old != target:
                shutil.rmtree(old)

    def repair(self) -> bool:
        """All weights were sent: sending them again would mend nothing."""
        return False

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self._target}: weights for the servers cannot be written: {error}")
