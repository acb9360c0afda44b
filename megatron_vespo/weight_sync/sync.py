"""Pushing new weights to SGLang: one sequence of steps, with the transport plugged in."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from megatron_vespo import parallel
from megatron_vespo.errors import UserError
from megatron_vespo.metrics.measure import Values
from megatron_vespo.models.export import HfExporter
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.weight_sync.servers import Servers
from megatron_vespo.weight_sync.transport import Transport
from megatron_vespo.weight_sync.verify import Verifier

_NAMES_SHOWN = 3


class WeightSync:
    """Pushes the policy's weights, as a version, to all servers.

    Args:
        exporter: Streams the weights to rank 0.
        servers: On rank 0; None elsewhere. Closed with this object.
        transport: On rank 0; None elsewhere. Closed with this object.
        verify: Take fingerprints on both sides after every push.
    """

    def __init__(
        self, exporter: HfExporter, servers: Servers | None, transport: Transport | None, *, verify: bool = True
    ) -> None:
        self._exporter, self._servers, self._transport = exporter, servers, transport
        self._verifier = Verifier(servers, exporter.shapes) if verify and servers is not None else None
        self._repairs = 0

    def push(self, version: int) -> Values:
        """Make the servers generate with the current weights. A collective.

        Generation pauses, running requests are retracted, and the update flushes the KV and prefix caches: no token
        after the push is sampled from keys and values that older weights computed.

        Returns:
            On rank 0 the metrics of the push.

        Raises:
            UserError: A server refused, died, does not hold the weights afterwards or does not say the new version;
                on every rank.
        """
        parallel.on_main(lambda: self._begin(version))
        failure: UserError | None = None
        try:
            self._stream()
        except UserError as error:
            failure = error

        def finish() -> None:
            if failure is not None:
                raise failure
            self._finish(version)

        parallel.on_main(finish)
        return self._metrics()

    def close(self) -> None:
        """Leave the process group and delete what the transport keeps."""
        if self._transport is not None:
            self._transport.close()
        if self._servers is not None:
            self._servers.close()

    def _begin(self, version: int) -> None:
        assert self._servers is not None and self._transport is not None  # rank 0
        self._servers.each(lambda control: control.pause_generation("retract"))
        self._servers.each(SGLangControl.begin_weight_update)
        if self._verifier is not None:
            self._verifier.begin()
        self._transport.begin(version)

    def _stream(self) -> None:
        """Send bucket after bucket, each while the next one is gathered.

        Raises:
            UserError: Sending failed. The stream is drained then, since the other ranks are sending.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="weight-sync") as sender:
            sending: Future[None] | None = None
            failure: UserError | None = None
            for tensors in self._exporter.stream():
                if self._transport is None or failure is not None:
                    continue
                failure = _failure_of(sending)
                if failure is None:
                    sending = sender.submit(self._transport.send, tensors)
                    if self._verifier is not None:
                        self._verifier.add(tensors)
            failure = failure or _failure_of(sending)
        if failure is not None:
            raise failure

    def _finish(self, version: int) -> None:
        assert self._servers is not None and self._transport is not None  # rank 0
        self._transport.finish()
        self._verify()
        self._servers.each(SGLangControl.end_weight_update)
        self._servers.each(SGLangControl.continue_generation)
        served = self._servers.each(SGLangControl.weight_version)
        for control, its in zip(self._servers.controls, served, strict=True):
            if its != version:
                raise UserError(
                    f"{control.base_url} serves weight version {its} after a push of {version}; is another trainer"
                    " using this server?"
                )

    def _verify(self) -> None:
        assert self._transport is not None
        self._repairs = 0
        wrong = [] if self._verifier is None else self._verifier.mismatches()
        if wrong and self._transport.repair():
            assert self._verifier is not None
            self._repairs = 1
            wrong = self._verifier.mismatches()
        if wrong:
            assert self._servers is not None
            shown = ", ".join(wrong[:_NAMES_SHOWN]) + (", ..." if len(wrong) > _NAMES_SHOWN else "")
            raise UserError(
                f"{self._servers.urls}: {len(wrong)} tensors differ on the server from what was pushed: {shown}; where"
                " the server changes weights on purpose (quantisation), set weight_sync.verify: none"
            )

    def _metrics(self) -> Values:
        if self._transport is None:
            return {}
        sent = self._transport.sent
        return {
            "perf/sync_bytes": float(sent.bytes),
            "perf/sync_changed_share": sent.changed_share,
            "perf/sync_repairs": float(self._repairs),
        }


def _failure_of(sending: Future[None] | None) -> UserError | None:
    """The error that a bucket's sending ended with, once it has ended."""
    if sending is None:
        return None
    try:
        sending.result()
    except UserError as error:
        return error
    return None
