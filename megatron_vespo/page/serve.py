"""The page of a run that goes on, at an address of this machine alone."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from megatron_vespo.errors import UserError
from megatron_vespo.page.content import content_of
from megatron_vespo.page.html import make_html, script_data

ADDRESS = "127.0.0.1"


def make_server(folders: list[Path], port: int, refresh_seconds: float) -> ThreadingHTTPServer:
    """A server of the page (``/``) and its data (``/content.json``), read anew for each request; nothing else.

    Raises:
        UserError: The port is taken, or a folder is not a run's.
    """
    content_of(folders)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of another name that points to this address (DNS rebinding) may not read the run.
            if self.headers.get("Host", "").rpartition(":")[0] not in (ADDRESS, "localhost"):
                return self.send_error(403)
            if self.path not in ("/", "/content.json"):
                return self.send_error(404)
            try:
                content = content_of(folders)
            except UserError as error:
                return self.send_error(503, explain=str(error))
            page = self.path == "/"
            text = make_html(content, refresh_seconds) if page else script_data(content)
            body = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", f"{'text/html' if page else 'application/json'}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a line a request would hide what the run says."""

    try:
        return ThreadingHTTPServer((ADDRESS, port), Handler)
    except OSError as error:
        raise UserError(f"port {port} of {ADDRESS}: {error.strerror}; choose another with --port") from error
