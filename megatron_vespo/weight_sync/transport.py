"""What all transports have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_vespo.weight_sync.servers import Servers

NamedTensors = Sequence[tuple[str, torch.Tensor]]


@dataclass
class Sent:
    """What one push sent to each server.

    Attributes:
        bytes: Bytes.
        changed_share: Share of the weights' elements that differ from the last push; None if nobody looked.
    """

    bytes: int = 0
    changed_share: float | None = None


class Transport(Protocol):
    """How tensors get from rank 0 to the servers. Every method raises UserError where it fails.

    Attributes:
        sent: Of the push that began last.
    """

    sent: Sent

    def begin(self, version: int) -> None:
        """Get ready for the tensors of a version. The servers are paused, and an update is open on them."""

    def send(self, tensors: NamedTensors) -> None:
        """Send one bucket, HF names. The tensors are the transport's to keep."""

    def finish(self) -> None:
        """All tensors are sent: make the servers hold them."""

    def repair(self) -> bool:
        """The servers hold other weights than were sent: send all of them. Whether that was possible."""
        ...

    def close(self) -> None:
        """Give up what is held."""


class StreamTransport:
    """What transports share that hand all weights over bucket by bucket, each used by the servers when it comes.

    Args:
        servers: Who gets them.
    """

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._version = 0
        self.sent = Sent()

    def begin(self, version: int) -> None:
        """Start counting."""
        self._version, self.sent = version, Sent()

    def finish(self) -> None:
        """Nothing is left to do."""

    def repair(self) -> bool:
        """All weights were sent: sending them again would mend nothing."""
        return False

    def close(self) -> None:
        """Nothing is held."""
