"""Servers are started only while the gate is open, and whoever shuts it knows that none is starting."""

from __future__ import annotations

import threading

from megatron_vespo.rollout.gate import StartGate


def test_a_start_waits_before_a_shut_gate_and_is_waited_for() -> None:
    gate, begun, may_end, shut = StartGate(), threading.Event(), threading.Event(), threading.Event()

    def start() -> None:
        with gate.starting():
            begun.set()
            may_end.wait(10)

    def shut_it() -> None:
        gate.shut()
        shut.set()

    first = threading.Thread(target=start)
    first.start()
    assert begun.wait(10)
    threading.Thread(target=shut_it).start()
    assert not shut.wait(0.2), "a start under way is waited for"
    begun.clear()
    second = threading.Thread(target=start)
    second.start()
    may_end.set()
    assert shut.wait(10)
    first.join(10)
    assert not begun.wait(0.2), "the gate is shut"
    gate.open()
    assert begun.wait(10)
    second.join(10)


def test_one_that_fails_to_start_holds_nobody_up() -> None:
    gate = StartGate()
    try:
        with gate.starting():
            raise OSError
    except OSError:
        pass
    gate.shut()
