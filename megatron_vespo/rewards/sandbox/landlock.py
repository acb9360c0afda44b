"""Landlock: a process gives up all files but some, for itself and what it starts. Standard library alone.

Source: https://docs.kernel.org/userspace-api/landlock.html and ``linux/landlock.h``.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
CREATE_RULESET_VERSION = 1
RULE_PATH_BENEATH = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, MAKE_SYM = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 12
REFER, TRUNCATE = 1 << 13, 1 << 14

READ = EXECUTE | READ_FILE | READ_DIR
# Neither devices, sockets and pipes, nor programs.
WRITE = READ_FILE | READ_DIR | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM | REFER | TRUNCATE
OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE

# ABI version -> all rights on files that it knows; a version between two has those of the older one.
FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
TCP_FROM, TCP = 4, 0b11  # bind, connect
SCOPE_FROM, SCOPE = 6, 0b11  # abstract sockets, signals

_libc = ctypes.CDLL(None, use_errno=True)


def version() -> int:
    """The kernel's ABI version; 0: there is no Landlock."""
    return max(0, _libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), CREATE_RULESET_VERSION))


def confine(*, readable: Sequence[str], writable: Sequence[str]) -> None:
    """Give up all files and TCP ports for good. Needs ``no_new_privs``.

    Args:
        readable: Files and folders that may still be read and executed; those that do not exist are left out.
        writable: Folders in which files may be read, written, made and removed.

    Raises:
        OSError: The kernel refused.
    """
    abi = version()
    handled = max((rights for since, rights in FILE_RIGHTS.items() if since <= abi), default=0)
    attributes = struct.pack("=Q", handled)
    if abi >= TCP_FROM:
        attributes += struct.pack("=Q", TCP)
    if abi >= SCOPE_FROM:
        attributes += struct.pack("=Q", SCOPE)
    ruleset = _call(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    for paths, rights in ((readable, READ), (writable, WRITE)):
        for path in filter(os.path.exists, paths):
            _allow(ruleset, path, handled & (rights if Path(path).is_dir() else rights & OF_A_FILE))
    _call(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    _call(ADD_RULE, ruleset, RULE_PATH_BENEATH, struct.pack("=Qi", rights, descriptor), 0)
    os.close(descriptor)


def _call(number: int, *arguments: object) -> int:
    result = _libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"landlock: {os.strerror(ctypes.get_errno())}")
    return result
