"""Pushing new weights to SGLang: one sequence of steps, with the transport plugged in."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from megatron_vespo import parallel
from megatron_vespo.errors import UserError
from megatron_vespo.metrics.measure import Values
from megatron_vespo.models.export import Exporter, shapes_of
from megatron_vespo.rollout.control import PauseMode, SGLangControl
from megatron_vespo.rollout.fleet import Fleet, Member
from megatron_vespo.weight_sync.servers import Servers
from megatron_vespo.weight_sync.transport import Transport
from megatron_vespo.weight_sync.turns import Turns
from megatron_vespo.weight_sync.verify import GroupReports, Reports, Verifier

_NAMES_SHOWN = 3


class WeightSync:
    """Pushes the policy's weights, as a version, to all servers.

    Args:
        exporter: Streams the weights to rank 0.
        fleet: Who the servers are, on rank 0; None elsewhere.
        servers: On rank 0; None elsewhere. Closed with this object.
        transport: On rank 0; None elsewhere. Closed with this object.
        pause: What happens to requests in flight during a push: ``retract``, ``in_place`` or ``abort``. None: none are,
            ``turns`` pauses generation.
        verify: How fingerprints that the servers take after every push come back; None: none are taken.
        turns: Whose turn it is on devices that trainer and servers share.
    """

    def __init__(
        self,
        exporter: Exporter,
        fleet: Fleet | None,
        servers: Servers | None,
        transport: Transport | None,
        *,
        pause: PauseMode | None = "retract",
        verify: Reports | None = GroupReports(),  # noqa: B008 - it has no state
        turns: Turns | None = None,
    ) -> None:
        self._exporter, self._fleet, self._servers, self._transport = exporter, fleet, servers, transport
        self._pause, self._turns = pause, turns or Turns()
        self._verifier: Verifier | None = None
        if verify is not None and servers is not None:
            self._verifier = Verifier(servers, shapes_of(exporter), verify)
        self._repairs = self._version = 0
        self._members: list[Member] = []

    def push(self, version: int) -> Values:
        """Make the servers generate with the current weights. A collective.

        Generation pauses and, unless ``pause`` is ``in_place``, the update flushes the KV and prefix caches: no token
        after the push is sampled from keys and values that older weights computed. A server that is lost on the way is
        left out, and the push begins anew with the others; one that joined or came back is in.

        Returns:
            On rank 0 the metrics of the push.

        Raises:
            UserError: A server refused, does not hold the weights afterwards or does not say the new version, or no
                server is left; on every rank.
        """
        self._version = version
        while not self._attempt(version):
            pass
        self._turns.sample()
        return self._metrics()

    def push_again(self) -> None:
        """Push the version pushed last, whose weights the trainer must still have. A collective."""
        self.push(self._version)

    def close(self) -> None:
        """Leave the process group and delete what the transport keeps."""
        if self._transport is not None:
            self._transport.close()
        if self._servers is not None:
            self._servers.leave()

    def _attempt(self, version: int) -> bool:
        """Push; False if a server was lost meanwhile and the push must begin anew."""
        self._turns.push()
        if not parallel.ask_main(lambda: self._survives(lambda: self._begin(version))):
            return False
        failure: UserError | None = None
        try:
            self._stream()
        except UserError as error:
            failure = error

        def finish() -> bool:
            if failure is not None:
                raise failure
            self._finish(version)
            return True

        try:
            return parallel.ask_main(lambda: self._survives(finish))
        finally:
            self._exporter.done()  # only now: other ranks are through while servers still read the last bucket

    def _survives(self, work: Callable[[], bool]) -> bool:
        """What the work says; False if a server was lost, for which another error of it is no error."""
        assert self._fleet is not None and self._servers is not None  # rank 0
        try:
            return work()
        except UserError as error:
            if not self._fleet.find_lost(self._members, error):
                raise
            self._servers.leave()
            self._servers.abandon_update()
            return False

    def _begin(self, version: int) -> bool:
        """Open the update on all servers; False if there is none, and the turn is not one for waiting."""
        assert self._fleet is not None and self._servers is not None and self._transport is not None  # rank 0
        self._members = []  # of an error before there are any, no loss of an earlier one is the cause
        self._members = self._fleet.begin_push()
        if not self._members:
            return False
        self._servers.choose(self._members)
        if self._pause is not None:
            pause = self._pause
            self._servers.each(lambda control: control.pause_generation(pause))
        self._servers.each(SGLangControl.begin_weight_update)
        if self._verifier is not None:
            self._verifier.begin()
        self._transport.begin(version)
        return True

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
        if self._pause is not None:
            self._servers.each(SGLangControl.continue_generation)
        served = self._servers.each(SGLangControl.weight_version)
        for control, its in zip(self._servers.controls, served, strict=True):
            if its != version:
                raise UserError(
                    f"{control.base_url} serves weight version {its} after a push of {version}; is another trainer"
                    " using this server?"
                )
        assert self._fleet is not None
        self._fleet.end_push(self._members, version)

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
