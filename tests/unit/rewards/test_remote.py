"""The HTTP reward with a real server on a port of this machine."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megatron_vespo.errors import UserError
from megatron_vespo.rewards.failures import RewardFailure
from megatron_vespo.rewards.loader import load_reward
from megatron_vespo.rewards.pool import RewardPool
from megatron_vespo.rewards.protocol import Term
from megatron_vespo.rewards.remote import HttpReward
from tests.unit.rewards.scored import make

Reply = Callable[[dict[str, Any], int], tuple[int, str]]


class Server:
    """Answers each request as ``reply(content, number of the request)`` says."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.reply: Reply = lambda content, number: (200, "1.0")
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.seen.append({**content, "key": self.headers.get("X-Key")})
                status, body = server.reply(content, len(server.seen))
                if status == 0:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/score"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def score(url: str, **params: Any) -> float:
    async def once() -> float:
        return await HttpReward(url, **params)(make("four", "4", tokens=3, finish="length", data_source="gsm8k"))

    return asyncio.run(once())


def test_what_is_sent(server: Server) -> None:
    assert score(server.url, headers={"X-Key": "k"}) == 1.0
    assert server.seen == [
        {
            "response": "four",
            "label": "4",
            "metadata": {"data_source": "gsm8k"},
            "prompt_ids": [1, 2],
            "response_length": 3,
            "finish_reason": "length",
            "key": "k",
        }
    ]


@pytest.mark.parametrize(
    "body, reward", [("0.5", 0.5), ("-2", -2), ("true", 1), ('{"reward": 0.25}', 0.25), ('{"score": 3, "why": "x"}', 3)]
)
def test_answers(server: Server, body: str, reward: float) -> None:
    server.reply = lambda content, number: (200, body)
    assert score(server.url) == reward


@pytest.mark.parametrize("body", ["", "good", "null", '"1.0"', "NaN", "[1]", "{}", '{"reward": null}', "1e999"])
def test_answers_that_are_no_number(server: Server, body: str) -> None:
    server.reply = lambda content, number: (200, body)
    with pytest.raises(RewardFailure, match="no number, nor an object with reward or score"):
        score(server.url)
    assert len(server.seen) == 1


@pytest.mark.parametrize("status", [0, 408, 429, 500, 502, 503, 504])
def test_it_tries_again(server: Server, status: int) -> None:
    server.reply = lambda content, number: (status, "busy") if number < 3 else (200, "0.5")
    begin = time.monotonic()
    assert score(server.url) == 0.5
    assert len(server.seen) == 3
    assert 0.6 <= time.monotonic() - begin < 5  # pauses of 0.2 and 0.4 s


def test_it_gives_up(server: Server) -> None:
    server.reply = lambda content, number: (503, "busy")
    with pytest.raises(RewardFailure, match="2 tries failed, the last with status 503 busy"):
        score(server.url, tries=2)
    assert len(server.seen) == 2


def test_a_refusal_is_final(server: Server) -> None:
    server.reply = lambda content, number: (422, "no such task")
    with pytest.raises(RewardFailure, match="status 422 no such task"):
        score(server.url)
    assert len(server.seen) == 1


def test_a_request_that_takes_too_long_is_tried_again(server: Server) -> None:
    def slow(content: dict[str, Any], number: int) -> tuple[int, str]:
        time.sleep(1.0 if number == 1 else 0)
        return 200, "1"

    server.reply = slow
    assert score(server.url, seconds=0.3) == 1.0
    assert len(server.seen) == 2


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(RewardFailure, match="2 tries failed, the last with ConnectError"):
        score("http://127.0.0.1:9/", tries=2)


@pytest.mark.parametrize(
    "params, message",
    [
        ({}, "missing a required argument: 'url'"),
        ({"url": "localhost:1"}, "does not begin with http"),
        ({"url": "http://x", "tries": 0}, "tries and connections"),
    ],
)
def test_params(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward("http", params)


def test_many_at_once_in_a_worker(server: Server) -> None:
    def slow(content: dict[str, Any], number: int) -> tuple[int, str]:
        time.sleep(0.3)
        return (500, "") if number % 10 == 0 else (200, content["response"])

    server.reply = slow
    pool = RewardPool([Term("", "http", 1.0, {"url": server.url})], workers=1, timeout=20.0)
    pool.start()

    async def all_of_them() -> list[float]:
        return await asyncio.gather(*(pool.score(make(str(number))) for number in range(60)))

    begin = time.monotonic()
    try:
        assert asyncio.run(all_of_them()) == list(range(60))
    finally:
        pool.close()
    assert time.monotonic() - begin < 10  # one after the other they would take 18 s
