"""The ranks beside this one, as Linux's /proc shows them. Standard library only."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path


def children(pid: int) -> list[int]:
    """Process ids of the living children of a process; none where it is gone itself."""
    return [child for task in _tasks(pid) for child in _children_of_thread(task) if command_line(child)]


def command_line(pid: int) -> bytes:
    """Arguments of a process, each ended by a zero byte; empty once it is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def a_local_rank_is_gone() -> bool:
    """Whether torchrun's agent, the parent of this node's ranks, or one of the ranks has ended.

    The ranks of a node run one command line, which tells them from other children of the agent. False outside torchrun
    and ``launch``.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    own = command_line(os.getpid())
    ranks = [pid for pid in children(os.getppid()) if command_line(pid) == own]
    return len(ranks) < int(os.environ["LOCAL_WORLD_SIZE"])


def how_it_ended(status: int) -> str:
    """An exit status in words: ``failed with exit status 3``, or ``was killed by SIGKILL`` for -9."""
    if status >= 0:
        return f"failed with exit status {status}"
    return f"was killed by {signal.Signals(-status).name if -status in signal.Signals else f'signal {-status}'}"


def _tasks(pid: int) -> Iterator[Path]:
    return Path(f"/proc/{pid}/task").glob("*/children")


def _children_of_thread(file: Path) -> list[int]:
    try:
        return [int(child) for child in file.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
        return []
