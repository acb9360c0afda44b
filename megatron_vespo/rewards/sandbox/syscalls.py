"""A seccomp filter: system calls that a program which must not be trusted has no use for. Standard library alone.

A forbidden call fails with EPERM and is nothing worse, so that a program that tries one may go on. Files are not this
filter's business but Landlock's, what Landlock does not know of (mode, owner, times, attributes) aside.

Source: https://docs.kernel.org/userspace-api/seccomp_filter.html, ``asm/unistd.h``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform

# Number on x86-64 and on 64-bit ARM; None: it has no such call.
FORBIDDEN: dict[str, tuple[int | None, int | None]] = {
    # other processes: to start, to signal, to look into, to slow down
    "fork": (57, None),
    "vfork": (58, None),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    # the network, and every other way to talk to somebody
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semctl": (66, 191),
    "msgget": (68, 186),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    # memory that no limit counts
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # what Landlock leaves open
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "removexattrat": (466, 466),
    "truncate": (76, 45),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "inotify_add_watch": (254, 27),
    "fanotify_init": (300, 262),
    # the kernel's larger surfaces
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "personality": (135, 92),
    "syslog": (103, 116),
}
# Calls that depend on an argument: clone makes threads, but no processes; prlimit64 is for oneself (0).
CLONE, CLONE3, PRLIMIT = (56, 220), (435, 435), (302, 261)
CLONE_THREAD = 0x00010000

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH
X32 = 0x40000000  # a second set of numbers on x86-64

PR_SET_SECCOMP, MODE_FILTER = 22, 2
KILL, ALLOW = 0x80000000, 0x7FFF0000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER_AT, ARCH_AT, ARGUMENT_AT = 0, 4, 16  # in struct seccomp_data; both architectures are little-endian


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_ushort),
        ("if_true", ctypes.c_ubyte),
        ("if_false", ctypes.c_ubyte),
        ("k", ctypes.c_uint32),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction))]


def supported() -> bool:
    """Whether the filter is known for this processor. Whether the kernel takes it shows when it is used."""
    return platform.machine() in ARCHITECTURES


def forbid() -> None:
    """Put the filter on this process, for good. Needs ``no_new_privs``.

    Raises:
        OSError: The kernel refused, or the processor is unknown.
    """
    if not supported():
        raise OSError(errno.ENOSYS, f"seccomp: no table of system calls for {platform.machine()}")
    instructions = _filter(*ARCHITECTURES[platform.machine()])
    array = (_Instruction * len(instructions))(*instructions)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, MODE_FILTER, ctypes.byref(_Program(len(array), array)), 0, 0):
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")


def _filter(column: int, arch: int) -> list[_Instruction]:
    def no(error: int) -> _Instruction:
        return _Instruction(RETURN, 0, 0, 0x00050000 | error)

    def rule(test: int, value: int, result: _Instruction) -> list[_Instruction]:
        return [_Instruction(test, 0, 1, value), result]

    load_number = _Instruction(LOAD, 0, 0, NUMBER_AT)
    argument = _Instruction(LOAD, 0, 0, ARGUMENT_AT)
    allow = _Instruction(RETURN, 0, 0, ALLOW)
    program = [
        _Instruction(LOAD, 0, 0, ARCH_AT),
        _Instruction(EQUAL, 1, 0, arch),
        _Instruction(RETURN, 0, 0, KILL),
        load_number,
        *rule(AT_LEAST, X32, no(errno.ENOSYS)),
    ]
    for numbers in FORBIDDEN.values():
        if (number := numbers[column]) is not None:
            program += rule(EQUAL, number, no(errno.EPERM))
    # Its flags are behind a pointer; the C library then takes clone.
    program += rule(EQUAL, CLONE3[column], no(errno.ENOSYS))
    for numbers, test, value in ((CLONE, ANY_BIT, CLONE_THREAD), (PRLIMIT, EQUAL, 0)):
        program += [_Instruction(EQUAL, 0, 4, numbers[column]), argument, *rule(test, value, allow), no(errno.EPERM)]
    return [*program, allow]
