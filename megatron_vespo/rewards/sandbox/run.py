"""Python programs that must not be trusted, run once each: no network, no other processes, no files but their own.

What holds them, from the kernel's side; each is applied by ``jail.py`` before the program's first instruction:

- Landlock: reads Python's own files and writes a fresh, empty folder; nothing else can be opened. Required.
- seccomp: no sockets, no new processes, no signals to anyone, and more (``syscalls.py``). Required.
- Limits: CPU and wall seconds, memory, output, size and number of files.
- No capabilities, no privileges to gain, no environment, no descriptors but the three standard ones.
- Namespaces of network and processes, and as root a user of its own: a second wall, where the machine permits them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_vespo.errors import UserError
from megatron_vespo.rewards.failures import RewardFailure
from megatron_vespo.rewards.sandbox import landlock, syscalls

Wall = Literal["files", "system calls"]

JAIL = Path(__file__).with_name("jail.py")
FOLDER_PREFIX = "vespo-sandbox-"
# Below this version truncating other people's files is not held back.
LANDLOCK_NEEDED = 3
# Folders of programs whose worker was killed with them are removed when they are as old.
STALE_SECONDS = 3600.0
# Of the jail beside the program: two starts of Python, on a machine that is busy.
JAIL_SECONDS = 30.0
SYSTEM_FILES = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/share/zoneinfo",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/dev/null",
    "/dev/zero",
    "/dev/urandom",
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use.

    Attributes:
        cpu_seconds: Of the processor, rounded up to whole seconds.
        wall_seconds: Of time.
        memory_bytes: Of address space.
        output_bytes: That it prints, to standard output and error each.
        folder_bytes: Of its folder, and of each file.
        folder_files: In its folder.
    """

    cpu_seconds: float = 10.0
    wall_seconds: float = 15.0
    memory_bytes: int = 1 << 30
    output_bytes: int = 1 << 20
    folder_bytes: int = 1 << 24
    folder_files: int = 100


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program.

    Attributes:
        broken: The limit for which it was killed: ``time``, ``output``, ``files``, or ``memory`` where that was the
            machine's; at its own limit of memory Python raises MemoryError. Empty: none.
        status: Exit status; negative: the signal that ended it.
        stdout: What it printed; up to the limit where it broke that one.
        stderr: The same of standard error.
        cpu_seconds: Of the processor that it used.
        second_walls: Namespaces and user that it had: ``network``, ``processes``, ``user``.
    """

    broken: str
    status: int
    stdout: str
    stderr: str
    cpu_seconds: float
    second_walls: tuple[str, ...]

    @property
    def succeeded(self) -> bool:
        """Whether it ended by itself and without an error."""
        return not self.broken and self.status == 0


@dataclass(frozen=True)
class Sandbox:
    """Where programs run.

    Attributes:
        limits: Of each program.
        without: Required walls that may be missing. For machines where nothing is at stake only.
        packages: Whether programs may import what is installed beside Python.
        python: Interpreter of the programs; None: the one that runs us.
    """

    limits: Limits = field(default_factory=Limits)
    without: Collection[Wall] = ()
    packages: bool = False
    python: str | None = None

    def check(self) -> str:
        """Try it out.

        Returns:
            One line on what protects this machine from the programs.

        Raises:
            UserError: A wall that is required is missing, or programs do not run at all.
        """
        missing = {"files": landlock.version() < LANDLOCK_NEEDED, "system calls": not syscalls.supported()}
        found = [wall for wall, is_missing in missing.items() if is_missing and wall not in self.without]
        if found:
            raise UserError(
                f"programs that a model wrote cannot be kept from harm here; missing: {', '.join(found)}. Files need "
                f"Landlock (Linux 6.2 or later; this kernel's version of it is {landlock.version()}, "
                f"{LANDLOCK_NEEDED} is needed), system calls need seccomp on x86-64 or 64-bit ARM. Where nothing is at "
                f"stake: params: {{without: [{', '.join(found)}]}}"
            )
        _remove_stale_folders()
        try:
            outcome = self.run("print(6 * 7)")
        except RewardFailure as failure:
            raise UserError(f"programs cannot be run in the sandbox: {failure}") from None
        if outcome.stdout != "42\n":
            raise UserError(f"programs cannot be run in the sandbox: {outcome.stderr or outcome.broken}")
        walls = {
            f"Landlock {landlock.version()}": not missing["files"],
            "seccomp": not missing["system calls"],
            "own network": "network" in outcome.second_walls,
            "own process numbers": "processes" in outcome.second_walls,
            "own user": "user" in outcome.second_walls,
        }
        there = ", ".join(wall for wall, stands in walls.items() if stands)
        absent = ", ".join(wall for wall, stands in walls.items() if not stands)
        return f"sandbox for programs: {there or 'NO PROTECTION'}; not available here: {absent or 'nothing'}"

    def run(self, program: str, stdin: str = "") -> Outcome:
        """Run a program to its end, or to a limit's.

        Args:
            program: Python.
            stdin: What it can read.

        Raises:
            RewardFailure: It could not be run, which is not its fault.
        """
        python = os.path.realpath(self.python or sys.executable)
        prefix = sys.base_prefix if self.python is None else str(Path(python).parents[1])
        folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")] if self.packages else []
        settings = {
            "program": program,
            "stdin": stdin,
            # -B: nothing but the program's own files in its folder.
            "command": [python, "-s", "-S", "-B", "-X", "utf8", "-c", _start(folders)],
            "readable": [*_of_python(prefix, python), *SYSTEM_FILES, *folders],
            "become_stranger": _is_for_everybody(python) and all(map(_is_for_everybody, folders)),
            "landlock": landlock.version() > 0,
            "seccomp": syscalls.supported(),
            **self._limits(),
        }
        with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX, ignore_cleanup_errors=True) as folder:
            return _outcome(settings, folder, self.limits.wall_seconds + JAIL_SECONDS)

    def _limits(self) -> dict[str, object]:
        limits = self.limits
        cpu = math.ceil(limits.cpu_seconds)
        return {
            "rlimits": {
                "RLIMIT_CPU": cpu,
                "RLIMIT_AS": limits.memory_bytes,
                "RLIMIT_FSIZE": limits.folder_bytes,
                "RLIMIT_NPROC": 64,  # threads; processes it has none. Not binding for root.
                "RLIMIT_NOFILE": 64,
                "RLIMIT_CORE": 0,
                "RLIMIT_MEMLOCK": 0,
            },
            "wall_seconds": limits.wall_seconds,
            "output_bytes": limits.output_bytes,
            "folder_bytes": limits.folder_bytes,
            "folder_files": limits.folder_files,
        }


def _remove_stale_folders() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, or removed by another worker meanwhile
            if time.time() - folder.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _start(folders: list[str]) -> str:
    """The first line of Python in the program's process."""
    return (
        f"import sys; sys.path += {folders!r}; sys.argv = ['program.py']; "
        "__file__ = 'program.py'; exec(compile(open(__file__, encoding='utf-8').read(), __file__, 'exec'))"
    )


def _of_python(prefix: str, python: str) -> list[str]:
    # A system's Python has the prefix /usr, where SYSTEM_FILES have what it needs.
    return [python] if prefix in ("/", "/usr") else [prefix]


def _is_for_everybody(path: str) -> bool:
    """Whether a user who is nobody may read it."""
    folders = all(folder.stat().st_mode & 0o001 for folder in Path(path).parents)
    return folders and bool(Path(path).stat().st_mode & 0o004)


def _outcome(settings: dict[str, object], folder: str, seconds: float) -> Outcome:
    command = [sys.executable, "-I", "-S", "-B", str(JAIL)]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(settings).encode(),
            capture_output=True,
            cwd=folder,
            env={},
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RewardFailure(f"the sandbox did not end a program within {seconds:g} s") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise RewardFailure(f"the sandbox failed: {lines[-1] if lines else f'exit status {done.returncode}'}")
    found = json.loads(done.stdout)
    if found["failure"]:
        raise RewardFailure(f"the sandbox could not hold the program, which did not run: {found['failure']}")
    return Outcome(
        found["broken"],
        found["status"],
        found["stdout"],
        found["stderr"],
        found["cpu_seconds"],
        tuple(found["namespaces"]),
    )
