"""Transport of changes: what differs bit for bit from the last push, as positions and values, by broadcast.

After an optimizer step at a learning rate of 1e-6 most bfloat16 weights are the bits they were. Rank 0 keeps a copy of
the weights last pushed in host memory, as large as the model, and compares each bucket with it; SGLang's workers need
no copy (see ``sglang_weights.loader``). A change costs 2 bytes beside its value, so a tensor of bfloat16 of which more
than half changed, or of float32 of which two thirds did, is sent whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatron_vespo import platform
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.sglang_weights.wire import Change, Request, find_change
from megatron_vespo.weight_sync.servers import Servers
from megatron_vespo.weight_sync.transport import NamedTensors, Sent

_Found = tuple[Change, torch.Tensor, torch.Tensor | None]


class DeltaTransport:
    """Sends changes to servers that hold what was pushed last, all weights to others.

    Args:
        servers: Who gets it; started with our loader as ``custom_weight_loader``.
        bucket_bytes: Most weights in flight at once when all are sent again.
    """

    def __init__(self, servers: Servers, bucket_bytes: int) -> None:
        self._servers, self._bucket_bytes = servers, bucket_bytes
        self._pushed: dict[str, torch.Tensor] = {}
        self._pushed_version: int | None = None
        self.sent = Sent()

    def begin(self, version: int) -> None:
        """Find out whether the servers hold the weights that this object pushed last."""
        self._version, self.sent = version, Sent()
        self._elements = self._changed = 0
        if self._pushed_version is not None and set(self._servers.each(_version)) != {self._pushed_version}:
            self._pushed_version = None  # a server was restarted, or somebody else pushed to it
        self._whole = self._pushed_version is None

    def send(self, tensors: NamedTensors) -> None:
        """Send what changed in one bucket; nothing if nothing did."""
        found: list[_Found] = []
        for name, tensor in tensors:
            tensor = tensor.cpu()
            old = None if self._whole else self._pushed.get(name)
            found.append(_whole(name, tensor) if old is None else find_change(name, tensor, old))
            self._elements += tensor.numel()
            self._changed += found[-1][1].numel()
            self._pushed[name] = tensor
        if any(change.count for change, _, _ in found):
            self._send(found)

    def finish(self) -> None:
        """Have the servers call what they hold by the new version."""
        if not self.sent.bytes:
            smallest = min(self._pushed, key=lambda name: self._pushed[name].numel())
            self._send([_whole(smallest, self._pushed[smallest])])
        self._pushed_version = self._version
        self.sent.changed_share = self._changed / self._elements

    def repair(self) -> bool:
        """Send all weights from the copy."""
        for names in self._buckets():
            self._send([_whole(name, self._pushed[name]) for name in names])
        return True

    def close(self) -> None:
        """Forget the copy."""
        self._pushed.clear()

    def _buckets(self) -> Iterator[list[str]]:
        names: list[str] = []
        filled = 0
        for name, tensor in self._pushed.items():
            if names and filled + tensor.nbytes > self._bucket_bytes:
                yield names
                names, filled = [], 0
            names.append(name)
            filled += tensor.nbytes
        yield names

    def _send(self, found: Sequence[_Found]) -> None:
        parts = [values for _, values, _ in found] + [gaps for _, _, gaps in found if gaps is not None]
        flat = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts]).to(platform.device())
        request = Request("patch", tuple(change for change, _, _ in found), self._servers.group_name)
        version = self._version
        self._servers.broadcast(flat, lambda control: self._servers.load(control, request, version))
        self.sent.bytes += flat.numel()


def _whole(name: str, tensor: torch.Tensor) -> _Found:
    return Change.whole(name, tensor), tensor, None


def _version(control: SGLangControl) -> int | None:
    try:
        return control.weight_version()
    except UserError:  # not ours, or gone, which the next request to it will say
        return None
