"""Programs of this Python forked from this process, in which torch and Megatron are imported already.

Each is a process of its own with the arguments, environment, files, signals and session that it would have otherwise;
what it is spared is 5 seconds of imports. So are the ranks that torchrun's engine starts in one.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import runpy
import signal
import subprocess
import sys
import traceback
import types
from collections.abc import Mapping, Sequence
from typing import Any

import setproctitle
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

import megatron_vespo.launch
import megatron_vespo.training  # noqa: F401 - nor need the programs import these

# What Python starts with, unless the signal is ignored by whoever starts it. Popen has restored the last two.
_HANDLERS = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}
_IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)


def popen(args: Sequence[str], env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[Any]:
    """``subprocess.Popen`` of ``[sys.executable, "-m" | "-c" | FILE, ...]``, without a new interpreter."""
    assert args[0] == sys.executable
    environment = dict(os.environ if env is None else env)
    return subprocess.Popen(args, preexec_fn=lambda: _become(args, environment), **options)


def _become(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run the program in this forked process, which Popen has given its files, folder and session; never returns."""
    status = 1
    try:
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # as exec does, by which Popen knows that the program runs
        gc.freeze()  # what this process has besides is not the program's to sweep
        gc.enable()  # Popen had it off
        for number, handler in _HANDLERS.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        faulthandler.disable()
        logging.getLogger().handlers.clear()  # of pytest
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            setattr(sys, name, open(number, "w" if number else "r", buffering=1, closefd=False))  # noqa: SIM115
        setproctitle.setproctitle(" ".join(command))  # before: it finds the command line by the environment
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(1)  # the threads of the parent's pool are not here
        subprocess_handler.Popen = popen  # type: ignore[misc,assignment]
        status = _run([word for word in command[1:] if word != "-u"])
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)  # neither pytest nor its atexit handlers may run here


def _run(arguments: Sequence[str]) -> int:
    """What Python does with its arguments; the exit status."""
    kind, *rest = arguments
    try:
        if kind == "-c":
            code, sys.argv = rest[0], [kind, *rest[1:]]
            exec(compile(code, "<string>", "exec"), types.ModuleType("__main__").__dict__)
        elif kind == "-m":
            sys.argv = rest
            sys.modules.pop(rest[0], None)  # it runs as __main__
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [kind, *rest]
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, int) or end.code is None:
            return end.code or 0
        sys.stderr.write(f"{end.code}\n")
        return 1
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        return 1
    return 0
