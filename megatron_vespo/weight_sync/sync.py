"""Pushing new weights to SGLang: one sequence of steps, with the transport plugged in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from megatron_vespo import parallel
from megatron_vespo.errors import UserError
from megatron_vespo.models.conversion import HfExporter
from megatron_vespo.rollout.control import SGLangControl

NamedTensors = Sequence[tuple[str, torch.Tensor]]


class Transport(Protocol):
    """How tensors get from rank 0 to the server. Every method raises UserError where it fails."""

    def begin(self, version: int) -> None:
        """Get ready for the tensors of a version."""

    def send(self, tensors: NamedTensors) -> None:
        """Send one bucket, HF names."""

    def finish(self) -> None:
        """All tensors are sent: make the server use them."""

    def close(self) -> None:
        """Give up what is held."""


class WeightSync:
    """Pushes the policy's weights, as a version, to the server.

    Args:
        exporter: Streams the weights to rank 0.
        control: The server's control routes, on rank 0; None elsewhere.
        transport: On rank 0; None elsewhere.
    """

    def __init__(self, exporter: HfExporter, control: SGLangControl | None, transport: Transport | None) -> None:
        self._exporter, self._control, self._transport = exporter, control, transport

    def push(self, version: int) -> None:
        """Make the server generate with the current weights. A collective.

        Generation pauses, running requests are retracted, and the update flushes the KV and prefix caches: no token
        after the push is sampled from keys and values that older weights computed.

        Raises:
            UserError: The server refused, died, or does not say the new version afterwards; on every rank.
        """
        parallel.on_main(lambda: self._begin(version))
        failure: UserError | None = None
        for tensors in self._exporter.stream():
            if self._transport is not None and failure is None:
                try:
                    self._transport.send(tensors)
                except UserError as error:  # the other ranks are still sending: drain the stream, then fail together
                    failure = error

        def finish() -> None:
            if failure is not None:
                raise failure
            self._finish(version)

        parallel.on_main(finish)

    def close(self) -> None:
        """Leave the process group and delete what the transport keeps."""
        if self._transport is not None:
            self._transport.close()
        if self._control is not None:
            self._control.close()

    def _begin(self, version: int) -> None:
        assert self._control is not None and self._transport is not None  # rank 0
        self._control.pause_generation("retract")
        self._transport.begin(version)

    def _finish(self, version: int) -> None:
        assert self._control is not None and self._transport is not None  # rank 0
        self._transport.finish()
        self._control.continue_generation()
        served = self._control.weight_version()
        if served != version:
            raise UserError(
                f"{self._control.base_url} serves weight version {served} after a push of {version}; is another trainer"
                " using this server?"
            )
