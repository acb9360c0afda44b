"""Memory of a device that two processes read and write: a trainer rank's, and that of SGLang's worker beside it.

On a GPU it is CUDA's own way of sharing (IPC), on the CPU a file in memory that has no name: the kernel frees it with
the last process that has it open, however that ends. Neither Megatron nor SGLang is imported here, and no tensor is
pickled.
"""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Mapping
from typing import Any

import torch

Handle = list[Any]
"""What another process on the device opens the memory by; JSON. On a GPU each handle is good for one opening."""


def device_key(device: torch.device) -> str:
    """The name of a device that all processes on all nodes know it by.

    A GPU's number would not do: it depends on CUDA_VISIBLE_DEVICES.
    """
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).uuid)
    return f"cpu of {socket.gethostname()}"


class SharedBuffer:
    """A flat uint8 tensor on a device, whose memory others on the device can open."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._file: int | None = None
        if device.type == "cuda":
            self.flat = torch.empty(nbytes, dtype=torch.uint8, device=device)
        else:
            self._file = os.memfd_create("megatron_vespo")
            self.flat = torch.from_file(self._path(), shared=True, size=nbytes, dtype=torch.uint8)

    def handle(self) -> Handle:
        """For one opening. Everything written before is seen, once the device has been synchronised."""
        if self._file is not None:
            return [self._path(), self.flat.numel()]
        return [_text(part) for part in self.flat.untyped_storage()._share_cuda_()]

    def close(self) -> None:
        """Free the memory. Whoever has it open must have closed it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self.flat = torch.empty(0, dtype=torch.uint8)

    def _path(self) -> str:
        """How other processes of this user open the file."""
        return f"/proc/{os.getpid()}/fd/{self._file}"


def open_shared(handles: Mapping[str, Handle], device: torch.device) -> torch.Tensor:
    """The memory on this device, among handles by :func:`device_key`: flat, uint8; not to be written to.

    It is closed when the tensor and all its views are gone; synchronise the device before.

    Raises:
        ValueError: There is none on this device.
    """
    key = device_key(device)
    if key not in handles:
        raise ValueError(f"no trainer rank shares memory of the device {key}, only of {', '.join(handles)}")
    if device.type != "cuda":
        path, nbytes = handles[key]
        # Not shared: the file is opened for reading, and what is written to the tensor stays in this process.
        return torch.from_file(path, shared=False, size=nbytes, dtype=torch.uint8)
    # The first part is the number that the device has in the other process.
    parts = [_bytes(part) for part in handles[key][1:]]
    storage = torch.UntypedStorage._new_shared_cuda(device.index, *parts)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _text(part: Any) -> Any:
    return {"base64": base64.b64encode(part).decode()} if isinstance(part, bytes) else part


def _bytes(part: Any) -> Any:
    return base64.b64decode(part["base64"]) if isinstance(part, dict) else part
