"""The folder of a run's checkpoints: names, the manifest that makes a checkpoint complete, and what is removed when.

::

    checkpoints/latest_checkpointed_iteration.txt     the newest, as Megatron-LM writes it
    checkpoints/iter_0000005/manifest.json            size and CRC32 of every file, written last
    checkpoints/iter_0000005/metadata.json .metadata __0_0.distcp ...    Megatron's
    checkpoints/iter_0000005/run/...                  what else the run needs to go on
    checkpoints/.iter_0000010.tmp/                    being written, or left behind by a crash
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_vespo.errors import UserError
from megatron_vespo.files import atomic_write, sync

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
MANIFEST = "manifest.json"
RUN_FILES = "run"

_ITERATION = re.compile(r"iter_(\d{7,})")
_CHUNK = 2**22


def iteration_name(iteration: int | None) -> str:
    """Name of the folder of an iteration; None is a release: weights without an optimizer to go on with."""
    return RELEASE if iteration is None else f"iter_{iteration:07d}"


def temporary_name(iteration: int) -> str:
    """Name of the folder while it is being written."""
    return f".{iteration_name(iteration)}.tmp"


def write_tracker(folder: Path, iteration: int | None) -> None:
    """Say which checkpoint in ``folder`` is the newest."""
    atomic_write(folder / TRACKER, RELEASE if iteration is None else str(iteration))


def tracked(folder: Path) -> Path:
    """The checkpoint in ``folder`` that the tracker names.

    Raises:
        UserError: There is no tracker, or it names none.
    """
    tracker = folder / TRACKER
    if not tracker.is_file():
        raise UserError(f"{folder}: not a Megatron checkpoint: neither {TRACKER} nor metadata.json is there")
    text = tracker.read_text(encoding="utf-8").strip()
    if text != RELEASE and not text.isdigit():
        raise UserError(f"{tracker}: says {text!r}; a number of an iteration or {RELEASE!r} would be right")
    return folder / iteration_name(None if text == RELEASE else int(text))


def list_checkpoints(folder: Path) -> list[int]:
    """Iterations of the complete checkpoints in a folder, ascending; none where there is no such folder."""
    names = [_ITERATION.fullmatch(manifest.parent.name) for manifest in folder.glob(f"iter_*/{MANIFEST}")]
    return sorted(int(name[1]) for name in names if name)


def choose(folder: Path, iteration: int | None) -> int:
    """The checkpoint to go on from.

    Args:
        folder: Of all checkpoints.
        iteration: Which; None is the one that the tracker names, else the last complete one. After a run has gone back
            to an earlier checkpoint, later ones than the tracker's may lie there.

    Raises:
        UserError: It is not there.
    """
    there = list_checkpoints(folder)
    if iteration is None:
        tracker = folder / TRACKER
        text = tracker.read_text(encoding="utf-8").strip() if tracker.is_file() else ""
        iteration = int(text) if text.isdigit() else max(there, default=-1)
    if iteration in there or (folder / iteration_name(iteration)).is_dir():  # or incomplete: its manifest is missing
        return iteration
    if not there:
        raise UserError(f"{folder}: there is no checkpoint to go on from")
    raise UserError(f"{folder}: there is no checkpoint {iteration}; there are {', '.join(map(str, there))}")


def way_out(folder: Path, iteration: int) -> str:
    """What a user can do whose checkpoint cannot be used."""
    before = [number for number in list_checkpoints(folder) if number < iteration]
    return f"go on from the one before with --resume {before[-1]}" if before else "there is none before it"


# --- files and their checksums ---


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What the manifest says of a file.

    Attributes:
        size: In bytes.
        crc32: Of its content.
    """

    size: int
    crc32: int


class Writable(Protocol):
    """Takes bytes."""

    def write(self, data: Any, /) -> int:
        """Write all of it."""
        ...


class ChecksummedWriter:
    """Passes bytes on and keeps their number and CRC32.

    After a failed write it takes bytes without passing them on: torch's writers cannot handle an exception in the
    middle of an archive. ``check()`` raises it.
    """

    def __init__(self, stream: Writable) -> None:
        self._stream = stream
        self._failure: OSError | None = None
        self.size = 0
        self.crc32 = 0

    def write(self, data: Any) -> int:
        """Write bytes."""
        if self._failure is None:
            try:
                self._stream.write(data)
            except OSError as error:
                # A new one: the frames that this one knows hold torch's writer, and a cycle with it ends in a crash.
                self._failure = OSError(error.errno, error.strerror)
        self.size += len(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        return len(data)

    def check(self) -> None:
        """Raise what a write ran into."""
        if self._failure is not None:
            raise self._failure

    @property
    def record(self) -> FileRecord:
        """Of what was written so far."""
        return FileRecord(self.size, self.crc32)


def file_record(path: Path) -> FileRecord:
    """Size and CRC32 of a file."""
    size = checksum = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return FileRecord(size, checksum)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        layout: Parallel layout that saved it.
        files: Record of every file by its path in the folder.
    """

    layout: dict[str, int]
    files: dict[str, FileRecord]

    def write(self, folder: Path) -> None:
        """Make the checkpoint complete."""
        files = {name: asdict(record) for name, record in sorted(self.files.items())}
        atomic_write(folder / MANIFEST, json.dumps({"layout": self.layout, "files": files}, indent=1) + "\n")

    @property
    def run_files(self) -> list[str]:
        """Names of the files of the run's state."""
        prefix = f"{RUN_FILES}/"
        return [name.removeprefix(prefix) for name in self.files if name.startswith(prefix)]

    def damage(self, folder: Path, names: Iterable[str]) -> str:
        """What is wrong with the first of these files that is not as it was written, or an empty string."""
        for name in names:
            wanted = self.files[name]
            try:
                found = file_record(folder / name)
            except FileNotFoundError:
                return f"{folder / name} is missing"
            except OSError as error:
                return f"{folder / name} cannot be read: {error.strerror}"
            if found.size != wanted.size:
                return f"{folder / name} has {found.size:,} bytes instead of {wanted.size:,}"
            if found != wanted:
                return f"{folder / name} is damaged: its checksum is not that of what was written"
        return ""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        UserError: It is missing or damaged, or names files that lie elsewhere; it names the file.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(content["layout"], {name: FileRecord(**entry) for name, entry in content["files"].items()})
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not complete: {MANIFEST} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged") from error
    for name in manifest.files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{path} names {name!r}, which is no file of the checkpoint")
    return manifest


# --- appearing and disappearing ---


def begin(folder: Path, iteration: int) -> Path:
    """Make the folder to write a checkpoint into, and remove what crashed saves left behind.

    Raises:
        OSError: The file system is full or read-only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".iter_*.tmp"):
        shutil.rmtree(left)
    for left in folder.glob(f".{TRACKER}.*.tmp"):
        left.unlink()
    temporary = folder / temporary_name(iteration)
    temporary.mkdir()
    return temporary


def complete(
    folder: Path, iteration: int, layout: dict[str, int], written: Mapping[str, FileRecord], run: Mapping[str, bytes]
) -> None:
    """Make what was written a checkpoint: manifest, the name that counts, and the tracker, in this order.

    A checkpoint of that iteration is replaced: a run that went back to an earlier one reaches the later ones again.

    Args:
        folder: Of all checkpoints.
        iteration: Which.
        layout: Parallel layout of the ranks.
        written: Records of files that need not be read again.
        run: Files of the run's state, by name.

    Raises:
        OSError: Writing failed.
    """
    final, temporary = folder / iteration_name(iteration), folder / temporary_name(iteration)
    replaced = final.with_name(f".{final.name}.old.tmp")
    if run:
        (temporary / RUN_FILES).mkdir()
    for name, content in run.items():
        atomic_write(temporary / RUN_FILES / name, content)
    paths = {path.relative_to(temporary).as_posix(): path for path in temporary.rglob("*") if path.is_file()}
    files = {name: written.get(name) or file_record(path) for name, path in paths.items()}
    Manifest(layout, files).write(temporary)
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    sync(folder)
    write_tracker(folder, iteration)
    shutil.rmtree(replaced, ignore_errors=True)


def prune(folder: Path, iteration: int, keep: int) -> None:
    """Remove all but the last ``keep`` complete checkpoints up to this iteration.

    Raises:
        OSError: Removing failed.
    """
    for number in [number for number in list_checkpoints(folder) if number <= iteration][:-keep]:
        _remove(folder / iteration_name(number))


def _remove(checkpoint: Path) -> None:
    """Under a name that does not count, so that a crash leaves no half of one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)
