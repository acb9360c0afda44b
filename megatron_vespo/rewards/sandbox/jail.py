"""Runs one Python program that must not be trusted: ``python -I -S jail.py``, settings on standard input.

Standard input is a JSON object, which ``run.py`` writes; standard output gets one of what became of the program. A
script of the standard library alone, started anew for every program, so that the program finds neither our memory nor
our files, descriptors or environment. This process stays outside, feeds the program, reads what it prints, holds the
limits and kills it. The program is a single process: it cannot start others (``syscalls.py``).
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[3]))
from megatron_vespo.rewards.sandbox import landlock, syscalls

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
NEW_USER, NEW_PID, NEW_NET, NEW_IPC, NEW_UTS = 0x10000000, 0x20000000, 0x40000000, 0x08000000, 0x04000000
CAPABILITY_VERSION_3 = 0x20080522
# Of no account on this machine, and so no files are theirs. The first is for a program's own, so that limits on what
# one user may have are its own too; the second where a container knows no such numbers.
STRANGERS = (1_900_000_000 + os.getpid() % 1_000_000, 65534)
CHUNK = 1 << 16
LOOK_SECONDS = 0.05

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    """Run the program that the settings describe."""
    settings = json.load(sys.stdin)
    _libc.prctl(PR_SET_DUMPABLE, 0)
    # The current folder is the program's.
    Path("program.py").write_text(settings["program"], encoding="utf-8", errors="replace")
    named = separate(settings["become_stranger"])
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # now: another user would not keep it
    if not _is_read(1):
        return 1  # whoever waits died before that
    pipes = [os.pipe() for _ in range(4)]
    child = os.fork()
    if child == 0:
        _become_the_program(settings, pipes)
    for number, (read, write) in enumerate(pipes):
        os.close(read if number == 0 else write)
    ours = [pipes[0][1], *(read for read, _ in pipes[1:])]
    outcome = _watch(child, ours, settings)
    outcome["namespaces"] = named
    json.dump(outcome, sys.stdout)
    return 0


def separate(become_stranger: bool) -> list[str]:
    """Leave the network, the process numbers and, as root, the user behind, as far as this machine permits.

    Returns:
        What was possible: ``network``, ``processes``, ``user``.
    """
    flags = NEW_PID | NEW_NET | NEW_IPC | NEW_UTS
    done = _libc.unshare(flags) == 0
    stranger = become_stranger and os.geteuid() == 0 and any(_become(number) for number in STRANGERS)
    done = done or _libc.unshare(flags | NEW_USER) == 0
    return ["network", "processes"] * done + ["user"] * stranger


def _become(number: int) -> bool:
    try:
        os.chown(".", number, number)
        os.chown("program.py", number, number)
        os.setgroups([])
        os.setresgid(number, number, number)
        os.setresuid(number, number, number)
    except OSError:
        return False
    return True


def _become_the_program(settings: dict[str, Any], pipes: list[tuple[int, int]]) -> None:
    """In the child: give up what the program must not have and turn into it. What fails goes through the last pipe."""
    confessional = pipes[3][1]
    try:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        for place, descriptor in ((0, pipes[0][0]), (1, pipes[1][1]), (2, pipes[2][1])):
            os.dup2(descriptor, place)
        os.dup2(confessional, 3)
        os.set_inheritable(3, False)
        os.closerange(4, 4096)
        if not _is_read(3):
            os._exit(70)  # the jail died before the signal of its death was asked for
        for name, limit in settings["rlimits"].items():
            number = getattr(resource, name)
            hard = resource.getrlimit(number)[1]
            value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(number, (value, value))
        _drop_capabilities()
        _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
        if settings["landlock"]:
            landlock.confine(readable=settings["readable"], writable=["."])
        if settings["seccomp"]:
            syscalls.forbid()
        os.execve(settings["command"][0], settings["command"], {"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"})
    except BaseException as error:  # noqa: BLE001 - whatever it is, the program must not run
        os.write(3, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(70)


def _is_read(pipe: int) -> bool:
    """Whether anybody has the end of this pipe from which it is read."""
    poll = select.poll()
    poll.register(pipe, 0)
    return not any(events & select.POLLERR for _, events in poll.poll(0))


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def _check(result: int, name: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def _watch(child: int, pipes: list[int], settings: dict[str, Any]) -> dict[str, Any]:
    """Feed the program and read it until it ends, or breaks a limit and is killed."""
    feed, output, errors, confession = pipes
    kept: dict[int, bytearray] = {output: bytearray(), errors: bytearray(), confession: bytearray()}
    to_write = memoryview(settings["stdin"].encode("utf-8", "replace"))
    deadline = time.monotonic() + settings["wall_seconds"]
    os.set_blocking(feed, False)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    broken, reading, status = "", set(kept), None
    while status is None and not broken:
        ended = os.wait4(child, os.WNOHANG)
        done = ended[0] == child
        if done:
            status = ended
        readable, writable, _ = select.select(reading, [feed] if feed >= 0 else [], [], 0 if done else LOOK_SECONDS)
        if writable:
            to_write = _feed(feed, to_write)
            if not to_write:
                os.close(feed)
                feed = -1
        for descriptor in readable:
            data = os.read(descriptor, CHUNK)
            kept[descriptor] += data
            if not data:
                reading.discard(descriptor)
            if len(kept[descriptor]) > settings["output_bytes"]:
                broken = "output"
        if status is None and time.monotonic() > deadline:
            broken = "time"
        if status is None and not broken and _is_too_big(Path(), settings["folder_bytes"], settings["folder_files"]):
            broken = "files"
        if not reading and status is None:
            time.sleep(0.001)
    if status is None:
        os.kill(child, signal.SIGKILL)
        status = os.wait4(child, 0)
    else:
        broken = broken or _drain(reading, kept, settings["output_bytes"])
    code = os.waitstatus_to_exitcode(status[1])
    seconds = status[2].ru_utime + status[2].ru_stime
    if not broken and code in (-signal.SIGXCPU, -signal.SIGKILL):
        # Nobody else kills it: the kernel did, for this limit or because the machine's memory ran out.
        broken = "time" if seconds > settings["rlimits"]["RLIMIT_CPU"] - 0.5 else "memory"
    texts = {"failure": confession, "stdout": output, "stderr": errors}
    return {
        "broken": broken,
        "status": code,
        "cpu_seconds": seconds,
        **{name: kept[descriptor].decode(errors="replace") for name, descriptor in texts.items()},
    }


def _feed(descriptor: int, left: memoryview) -> memoryview:
    try:
        return left[os.write(descriptor, left[:CHUNK]) :]
    except BlockingIOError:
        return left
    except BrokenPipeError:
        return left[:0]


def _drain(reading: set[int], kept: dict[int, bytearray], limit: int) -> str:
    """Read what the program left in the pipes, which nobody writes to any more."""
    for descriptor in reading:
        while data := os.read(descriptor, CHUNK):
            kept[descriptor] += data
            if len(kept[descriptor]) > limit:
                return "output"
    return ""


def _is_too_big(folder: Path, max_bytes: int, max_files: int) -> bool:
    size = files = 0
    pending = [str(folder)]
    while pending:
        try:
            entries = list(os.scandir(pending.pop()))
        except OSError:
            continue
        for entry in entries:
            files += 1
            try:
                size += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
            except OSError:
                continue
            if size > max_bytes or files > max_files:
                return True
    return False


if __name__ == "__main__":
    sys.exit(main())
