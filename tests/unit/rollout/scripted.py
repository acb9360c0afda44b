"""A server on this machine whose answers to /generate a Python function makes."""

import asyncio
import json
import os
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from megatron_vespo.rollout.client import SGLangClient

Answer = Callable[[dict[str, Any]], Any]
Requests = list[dict[str, Any]]

KNOWN = {
    "/model_info": {"weight_version": "3", "model_path": "m"},
    "/v1/models": {"data": [{"max_model_len": 64}]},
    "/server_info": {"max_req_input_len": 58, "max_total_num_tokens": 1000, "version": "0.5.23", "tp_size": 1},
    "/ready": {},
    "/health": {},
}


@dataclass(frozen=True)
class Status:
    """An answer that is not a success."""

    code: int
    content: str


@dataclass(frozen=True)
class Break:
    """No answer: the connection is closed after these bytes, or reset."""

    sent: bytes = b""
    reset: bool = False


def answer(
    ids: list[int],
    *,
    version: str = "3",
    reason: str = "stop",
    log_probs: list[float | None] | None = None,
    spans: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """What SGLang answers to a /generate."""
    log_probs = [-0.5] * len(ids) if log_probs is None else log_probs
    return {
        "output_ids": ids,
        "meta_info": {
            "finish_reason": {"type": reason},
            "output_token_logprobs": [[value, token, None] for value, token in zip(log_probs, ids, strict=True)],
            "weight_versions": [{"version": version, "start": 0, "end": len(ids)}] if spans is None else spans,
        },
    }


@contextmanager
def serve(
    generate: Answer,
    requests: Requests | None = None,
    *,
    port: int = 0,
    known: Callable[[str], Any] = KNOWN.__getitem__,
) -> Iterator[str]:
    """The address of a server. ``generate`` gets the body of each /generate and returns what to answer, or a
    :class:`Status` or a :class:`Break`; it runs in a thread, the bodies of concurrent requests in several. ``known``
    answers the routes without a body in the same way."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer is sent at once, not in pieces

        def do_GET(self) -> None:
            result = known(self.path)
            self.reply(result if isinstance(result, Status) else Status(200, json.dumps(result)))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if requests is not None:
                requests.append(body)
            result = generate(body)
            if isinstance(result, Break):
                self.break_off(result)
            else:
                self.reply(result if isinstance(result, Status) else Status(200, json.dumps(result)))

        def reply(self, status: Status) -> None:
            content = status.content.encode()
            self.send_response(status.code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def break_off(self, how: Break) -> None:
            self.close_connection = True
            self.wfile.write(how.sent)
            if how.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())

        def log_message(self, *arguments: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *arguments: Any) -> None:
            pass  # a client that is gone

    with Server(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def with_client[T](
    generate: Answer, use: Callable[[SGLangClient], Awaitable[T]], requests: Requests | None = None, **more: Any
) -> T:
    """What ``use`` returns for a client of such a server; ``more`` goes to the client."""
    with serve(generate, requests) as url:
        return use_client(url, use, **more)


def use_client[T](url: str, use: Callable[[SGLangClient], Awaitable[T]], **more: Any) -> T:
    async def run() -> T:
        client = SGLangClient(url, vocab_size=32, **more)
        try:
            return await use(client)
        finally:
            await client.close()

    return asyncio.run(run())
