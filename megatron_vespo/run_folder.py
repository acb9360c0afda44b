"""The run's folder: whether it may be used, what of an earlier attempt stays, and its lock."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import yaml

from megatron_vespo.checkpoint_folder import choose, list_checkpoints
from megatron_vespo.config import Config
from megatron_vespo.errors import UserError
from megatron_vespo.files import atomic_write

CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"

# What a file system says that knows no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def resume_step(config: Config) -> int | None:
    """The step whose checkpoint the run goes on from; None for one that starts at the beginning.

    Raises:
        UserError: ``run.resume`` names a step without a checkpoint.
    """
    resume, checkpoints = config.run.resume, config.run_folder / "checkpoints"
    if resume == "never" or (resume == "auto" and not list_checkpoints(checkpoints)):
        return None
    return choose(checkpoints, None if resume == "auto" else resume)


def check_run_folder(config: Config) -> None:
    """Refuse to write into an earlier run that shall not be touched.

    Raises:
        UserError: What is there, and what to do.
    """
    folder = config.run_folder
    if resume_step(config) is not None or config.run.overwrite or config.preflight.only or not _content(folder):
        return
    if config.run.resume == "never":
        raise UserError(
            f"{folder} exists; choose another run.name, go on with it by --resume auto, or set run.overwrite=true to"
            " replace it"
        )
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder} has no {CONFIG_FILE}: it is not a run's folder; choose another run.name")
    if _content(folder / "hf"):
        raise UserError(
            f"{folder} has saved models in hf/ but no checkpoint to go on from; choose another run.name, or set"
            " run.overwrite=true to replace them"
        )


def prepare_run_folder(config: Config, resolved: str) -> None:
    """Make the run folder with the resolved configuration in it, which must be locked.

    A run that is resumed keeps everything; where the configuration has changed, the earlier one stays as
    ``config.until_step_000005.yaml``. A run that starts at the beginning replaces an earlier one, if that may be.

    Raises:
        UserError: As ``check_run_folder``.
    """
    check_run_folder(config)
    folder, step = config.run_folder, resume_step(config)
    if step is None:
        for path in _content(folder):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    else:
        _keep_earlier_config(folder, step, resolved)
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "error.txt").unlink(missing_ok=True)  # an earlier attempt's; this one's is still to come
    atomic_write(folder / CONFIG_FILE, resolved)


def _content(folder: Path) -> list[Path]:
    """What is in a folder beside the lock; nothing where there is no folder."""
    return [path for path in folder.iterdir() if path.name != LOCK_FILE] if folder.is_dir() else []


def _keep_earlier_config(folder: Path, step: int, resolved: str) -> None:
    kept, current = folder / f"config.until_step_{step:06d}.yaml", folder / CONFIG_FILE
    # An attempt from the same step before left the one that trained until there.
    if current.is_file() and not kept.exists():
        earlier = current.read_text(encoding="utf-8")
        if _settings(earlier) != _settings(resolved):
            atomic_write(kept, earlier)


def _settings(text: str) -> dict[str, Any]:
    """A configuration without ``run.resume``, which says how it was started, not what it is."""
    tree = yaml.safe_load(text)
    tree["run"].pop("resume", None)
    return tree


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, made if need be, for the body; the kernel releases it when this process dies.

    Children, forked or executed, do not hold it.

    Raises:
        UserError: Another run holds it; names its host and process id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Unbuffered, so that closing it in a forked child writes nothing. A program that is executed never has it.
    with (folder / LOCK_FILE).open("ab", buffering=0) as file:
        os.register_at_fork(after_in_child=file.close)
        if _lock(file, folder):
            file.truncate(0)
            file.write(f"host {socket.gethostname()}, process {os.getpid()}\n".encode())
        yield


def refuse_if_locked(folder: Path) -> None:
    """Fail if another run, or this one, holds the folder's lock.

    Raises:
        UserError: It names host and process id of the holder.
    """
    if (folder / LOCK_FILE).is_file():
        with (folder / LOCK_FILE).open("ab", buffering=0) as file:
            _lock(file, folder)


def _lock(file: FileIO, folder: Path) -> bool:
    """Take the lock; False, with a line in the log, where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = (folder / LOCK_FILE).read_text(encoding="utf-8").strip() or "which is just starting"
        raise UserError(
            f"{folder} is in use by another run ({holder}); choose another run.name, or stop that one"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logging.getLogger(__name__).warning("%s: not locked against a second run: %s", folder, error.strerror)
        return False
    return True
