"""Whose turn it is on devices that trainer and servers share (``placement.mode: colocate``).

Each turn says what lies on the devices; everything else is in host memory (the trainer's) or given up (the servers').

    turn     servers              trainer                           what happens
    train    -                    parameters, gradients, optimizer  building, restoring, training
    push     weights              parameters                        weights are handed over; scoring
    save     weights              parameters, optimizer             checkpoints
    sample   weights, KV cache    -                                 generating, evaluating; a server is started again

Invariants, asserted here, in ``policy.offload`` and by the exporter: whoever computes has on the device what it needs;
nothing is taken before the other side has given it up; a server is only started while the trainer has nothing there;
and after a turn ``train``, which costs the servers their weights, they generate only once they have been pushed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from megatron_vespo import parallel
from megatron_vespo.errors import UserError
from megatron_vespo.policy.offload import ALL_PARTS, DeviceMemory, Part
from megatron_vespo.rollout.fleet import Fleet, Member
from megatron_vespo.rollout.gate import StartGate

WEIGHTS, KV_CACHE = "weights", "kv_cache"
"""SGLang's names for parts of its memory."""


@dataclass(frozen=True)
class Turn:
    """What lies on the devices.

    Attributes:
        name: For messages.
        servers: Of the servers.
        trainer: Of the trainer.
        after: Turns that may come before.
    """

    name: str
    servers: frozenset[str]
    trainer: frozenset[Part]
    after: frozenset[str]


_START = Turn("start", frozenset({WEIGHTS, KV_CACHE}), frozenset(), frozenset())
TRAIN = Turn("train", frozenset(), ALL_PARTS, frozenset({"start", "sample"}))
PUSH = Turn("push", frozenset({WEIGHTS}), frozenset({Part.PARAMETERS}), frozenset({"train", "push", "sample"}))
SAVE = Turn("save", frozenset({WEIGHTS}), frozenset({Part.PARAMETERS, Part.OPTIMIZER}), frozenset({"sample"}))
SAMPLE = Turn("sample", frozenset({WEIGHTS, KV_CACHE}), frozenset(), frozenset({"push", "save"}))


class Turns:
    """Where trainer and servers have devices of their own: nobody waits for a turn. All methods are collectives.

    Attributes:
        memory: Of the trainer; None before it is built, in its first turn.
    """

    memory: DeviceMemory | None = None

    def train(self) -> None:
        """The trainer's: to build, restore or train."""

    def push(self) -> None:
        """Both sides': weights are handed over. Servers may be started again before."""

    def sample(self) -> None:
        """The servers', who have been pushed."""

    def scoring(self) -> AbstractContextManager[None]:
        """Within it the trainer computes log-probabilities; before and afterwards it is the servers' turn."""
        return nullcontext()

    def saving(self) -> AbstractContextManager[None]:
        """Within it the trainer saves; before and afterwards it is the servers' turn."""
        return nullcontext()


class SharedDevices(Turns):
    """Moves memory as the table above says; on every rank.

    Args:
        fleet: The servers, on rank 0, all of them just started; None elsewhere.
        gate: When servers of this rank's node may be started again.
        timed: Counts the time that a phase takes.
    """

    def __init__(
        self, fleet: Fleet | None, gate: StartGate, timed: Callable[[str], AbstractContextManager[None]]
    ) -> None:
        self._fleet, self._gate, self._timed = fleet, gate, timed
        self._now = _START
        self._held: dict[tuple[str, int], frozenset[str]] = {}  # of each life of a server, if not all

    def train(self) -> None:
        """As of :class:`Turns`."""
        self._take(TRAIN)

    def push(self) -> None:
        """As of :class:`Turns`. Where no server is left, the trainer makes room until one has been started."""
        self._take(PUSH)

    def sample(self) -> None:
        """As of :class:`Turns`."""
        self._take(SAMPLE)

    def scoring(self) -> AbstractContextManager[None]:
        """As of :class:`Turns`."""
        return self._meanwhile(PUSH)

    def saving(self) -> AbstractContextManager[None]:
        """As of :class:`Turns`."""
        return self._meanwhile(SAVE)

    @contextmanager
    def _meanwhile(self, turn: Turn) -> Iterator[None]:
        assert self._now is SAMPLE, f"{turn.name} in the turn {self._now.name}"
        self._take(turn)
        yield
        self._take(SAMPLE)

    def _take(self, turn: Turn) -> None:
        """Give up first, then take: trainer, servers, trainer."""
        assert self._now.name in turn.after, f"{turn.name} after {self._now.name}"
        with self._timed("turns"):
            restarts = turn is PUSH and parallel.ask_main(self._all_gone)
            if self.memory is not None:
                self.memory.keep(frozenset() if restarts else turn.trainer)
            parallel.barrier()
            if restarts:
                self._gate.open()
                parallel.on_main(self._wait_for_one)
            self._gate.shut()  # whatever is starting is ready before the trainer comes, and asked to make room
            parallel.barrier()
            parallel.on_main(partial(self._move_servers, turn))
            if self.memory is not None:
                self.memory.bring(turn.trainer)
                assert self.memory.held == turn.trainer, f"{turn.name}: the trainer has {sorted(self.memory.held)}"
            if not turn.trainer:
                self._gate.open()
        self._now = turn

    def _all_gone(self) -> bool:
        assert self._fleet is not None
        self._fleet.look()
        return not self._fleet.present()

    def _wait_for_one(self) -> None:
        assert self._fleet is not None
        self._fleet.wait_present()

    def _move_servers(self, turn: Turn) -> None:
        assert self._fleet is not None
        members = self._fleet.rest()
        with ThreadPoolExecutor(max(len(members), 1), thread_name_prefix="turns") as threads:
            list(threads.map(partial(self._move, turn.servers), members))
        if not turn.trainer:
            self._fleet.wake()

    def _move(self, wanted: frozenset[str], member: Member) -> None:
        """Have a server hold this. One that is lost on the way holds nothing."""
        assert self._fleet is not None
        control, life, everything = member.control, (member.url, member.lives), SAMPLE.servers
        held = self._held.get(life, everything)
        try:
            if held == everything != wanted:
                control.pause_generation("retract")
            if held - wanted:
                control.release_memory(sorted(held - wanted))
            if wanted - held:
                control.resume_memory(sorted(wanted - held))
            if held != everything == wanted:
                control.continue_generation()
        except UserError as error:
            if not self._fleet.find_lost([member], error):
                raise
            return
        self._held[life] = wanted
