"""``python -m megatron_vespo.report RUN [RUN2 ...]``: one HTML page about runs, which works offline."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vespo.errors import UserError
from megatron_vespo.files import atomic_write
from megatron_vespo.page.content import content_of
from megatron_vespo.page.html import make_html
from megatron_vespo.page.serve import ADDRESS, make_server


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or serve it; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m megatron_vespo.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, such as runs/demo")
    parser.add_argument("--output", type=Path, help="file to write; default: report.html in the first run's folder")
    parser.add_argument("--watch", action="store_true", help=f"serve the page on {ADDRESS}, and refresh it")
    parser.add_argument("--port", type=int, default=8765, help="port to serve on; 0: any that is free")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between refreshes")
    options = parser.parse_args(arguments)
    try:
        if options.watch:
            _watch(options.runs, options.port, options.every)
        else:
            _write(options.runs, options.output or options.runs[0] / "report.html")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _write(runs: list[Path], output: Path) -> None:
    page = make_html(content_of(runs)).encode()
    try:
        atomic_write(output, page)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from error
    sys.stdout.write(f"{output} ({len(page) / 1e6:.2f} MB)\n")


def _watch(runs: list[Path], port: int, seconds: float) -> None:
    with make_server(runs, port, seconds) as server:
        sys.stdout.write(f"http://{ADDRESS}:{server.server_address[1]}/ (Ctrl-C ends it)\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
