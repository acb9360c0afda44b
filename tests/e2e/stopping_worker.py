"""A rank that steps as a run does, for tests of signals: ``stopping_worker.py FOLDER STEP_SECONDS [freeze]``."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

from megatron_vespo import guard, parallel, watchdog
from megatron_vespo.stopping import StopRequest, announce_stop

_STEPS = 200


def main() -> int:
    """Run steps until somebody says stop; then save."""
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    rank = os.environ["RANK"]
    guard.prctl(guard.PR_SET_PDEATHSIG, signal.SIGKILL)
    stop = StopRequest(announce_stop if rank == "0" else lambda: None)
    stop.install()
    parallel.initialize({}, seed=1)
    stop.defer()
    watchdog._ANSWER_SECONDS = 2.0
    watcher = watchdog.Watchdog(2.0 if "freeze" in sys.argv else 600.0, folder)
    watcher.start()
    (folder / f"pid_{rank}").write_text(str(os.getpid()))
    for _ in range(_STEPS):
        watcher.at("step")
        if "freeze" in sys.argv and rank == "0":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(seconds)
        watcher.at("ask")
        if parallel.any_rank(stop.requested):
            (folder / f"saved_{rank}").touch()
            break
    dist.barrier()
    parallel.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
