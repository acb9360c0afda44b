"""Writing files so that a reader never sees half of one, and a crash never leaves half of one behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def atomic_write(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write ``data`` to ``path``: the file holds either what it held before or all of ``data``.

    Args:
        path: File to write; its folder must exist. An existing file is replaced.
        data: The whole content; text is written as UTF-8.

    Raises:
        OSError: The folder is missing, read-only or full. ``path`` is untouched then.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    # The temporary file lies in the same folder, because a rename is atomic within one file system only.
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with naming(path), os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # noqa: PTH101  mkstemp makes files that only the owner can read
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a folder that appears under its name only when it is complete.

    Use as ``with atomic_folder("checkpoints/hf") as folder: ...`` and write into the folder it gives. When the body
    raises, nothing appears and an older folder of that name stays. An older folder is replaced by two renames, since
    POSIX cannot exchange two folders in one: a crash between them leaves the old content as ``.<name>.old-...``.

    Raises:
        OSError: The parent folder is missing, read-only or full.
    """
    path = Path(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            old = path.with_name(f".{path.name}.old-{os.getpid()}")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError name the file; that of a write to an open file does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _umask() -> int:
    """The process's file mode mask; the operating system lets it be read only by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Make a file, or the renames in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
