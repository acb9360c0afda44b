"""Runs one command that cannot outlive its owner: ``python guard.py OWNER_PID GRACE_SECONDS COMMAND...``.

Run as a script of its own, standard library only, so that it is up in milliseconds. The guard stays between the
owner and the command because SGLang's children ask to die with their parent only after seconds of imports, and what a
reward function starts never does: whoever merely executes the command leaves orphans when the owner is killed.

- The kernel tells the guard when its owner dies, SIGKILL included. That signal is tied to the thread that started
  the guard, so it is believed only where the owner is really gone.
- The guard adopts every orphan below it (PR_SET_CHILD_SUBREAPER) and, before it ends, kills and reaps them all.
- The command dies with the guard, should somebody kill that one.

Its exit status is the command's.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

OWNER_DIED = signal.SIGHUP
STOP = (signal.SIGTERM, signal.SIGINT)
WATCHED = (OWNER_DIED, *STOP, signal.SIGCHLD)


def guarded(command: Sequence[str], grace: float) -> list[str]:
    """The command line that runs ``command`` under a guard of this process.

    Args:
        command: What to run.
        grace: Seconds between SIGTERM, which the guard passes on, and SIGKILL.
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(grace), *command]


def main(argv: list[str]) -> int:
    """Guard the command until it ends, the owner dies or somebody says stop."""
    owner, grace, command = int(argv[0]), float(argv[1]), argv[2:]
    # Blocked signals wait for sigwait below: no handlers, nothing asynchronous, nothing lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    for number in WATCHED:
        signal.signal(number, signal.SIG_DFL)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, OWNER_DIED)
    if os.getppid() != owner:  # it died before we asked to be told
        return 1
    child = _spawn(command)
    status = _watch(child, owner)
    if status is None:
        status = _terminate(child, grace)
    _kill_descendants()
    return status


def prctl(option: int, value: int) -> None:
    """Change a property of this process; Linux's system call of that name."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def _spawn(command: list[str]) -> int:
    guard = os.getpid()
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)  # a blocked signal would stay blocked across exec
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"cannot execute {command[0]}: {error}\n".encode())
        os._exit(127)


def _watch(child: int, owner: int) -> int | None:
    """Exit status of the command, or None as soon as it shall be stopped."""
    while True:
        received = signal.sigwait(WATCHED)
        if received == signal.SIGCHLD:
            status = _reap(child)
            if status is not None:
                return status
        elif received != OWNER_DIED or os.getppid() != owner:
            return None


def _terminate(child: int, grace: float) -> int:
    os.kill(child, signal.SIGTERM)
    deadline = time.monotonic() + grace
    status = None
    while status is None and (left := deadline - time.monotonic()) > 0:
        signal.sigtimedwait([signal.SIGCHLD], left)
        status = _reap(child)
    return 128 + signal.SIGTERM if status is None else status


def _reap(child: int) -> int | None:
    """Collect everything that ended; the command's exit status if it is among it."""
    status = None
    while True:
        try:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == child:
            code = os.waitstatus_to_exitcode(wait_status)
            status = code if code >= 0 else 128 - code


def _kill_descendants() -> None:
    """Kill and reap until no child is left; the children of a killed child become ours and fall in the next round."""
    own_children = Path(f"/proc/self/task/{os.getpid()}/children")
    while True:
        for pid in own_children.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
