"""Asynchronous client of one SGLang server: token ids in; token ids, log-probs and weight versions out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp

from megatron_vespo.errors import UserError
from megatron_vespo.rollout import protocol
from megatron_vespo.rollout.keys import headers
from megatron_vespo.rollout.protocol import Generation, Request, ServerInfo
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.types import FloatArray, IntArray

TokenIds = Sequence[int] | IntArray

# However early idle connections are given up, on a loaded machine a request may still race with the server's closing
# one. Only an established connection that broke is tried again: a server that is gone refuses the next one, and
# sampling twice what nobody received does no harm.
BROKEN_CONNECTION = (
    aiohttp.ClientOSError,
    aiohttp.ClientConnectionResetError,
    aiohttp.ServerDisconnectedError,
    aiohttp.ClientPayloadError,
    aiohttp.ClientResponseError,  # not an error status, which is an answer, but something that is not HTTP
)
NEVER_CONNECTED = aiohttp.ClientConnectorError  # is a ClientOSError too
CONNECTION_ATTEMPTS = 4
CONNECTION_RETRY_SECONDS = 0.25


class SGLangClient:
    """Generates on one server. Belongs to one event loop; nothing is ever tokenised again.

    Args:
        base_url: Address, ``http://host:port``.
        vocab_size: Ids below this one are valid; checked before sending, since the server dies of bad ids.
        max_concurrent: Requests in flight at once; more wait here.
        timeout: Seconds that one generation may take.
        unpushed_version: What the weights that the server started with count as; None: generating before a push is an
            error.
        api_key: The server's, if it has one.
        routing: Layers of the model and experts a token: ask which were chosen. None: do not.

    All methods raise :class:`ServerError` naming the address, the route and what the server said, and
    :class:`ServerGoneError` if the connection fails.
    """

    def __init__(
        self,
        base_url: str,
        *,
        vocab_size: int,
        max_concurrent: int = 256,
        timeout: float = 3600.0,
        unpushed_version: int | None = None,
        api_key: str | None = None,
        routing: tuple[int, int] | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.vocab_size = vocab_size
        self._unpushed_version = unpushed_version
        self._headers = headers(api_key)
        self._routing = routing
        self._slots = asyncio.Semaphore(max_concurrent)
        self._info: ServerInfo | None = None
        self._asking = asyncio.Lock()
        self._timeout = aiohttp.ClientTimeout(total=timeout, connect=protocol.CONNECT_TIMEOUT_SECONDS)
        self._session: aiohttp.ClientSession | None = None

    async def generate(
        self,
        input_ids: TokenIds,
        sampling: SamplingParams,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        cache_key: str | None = None,
    ) -> Generation:
        """Sample one response to ``input_ids``.

        Args:
            input_ids: Token ids, at least one.
            sampling: How to sample.
            max_new_tokens: Instead of ``sampling``'s, where a response is being continued.
            seed: Determines the response, together with the weights, where the server runs deterministic inference. A
                continuation takes the same one.
            cache_key: Share cached prefixes only with requests of the same key.

        Raises:
            UserError: bad ids or a request beyond the context; nothing is sent then.
        """
        ids = [int(token) for token in input_ids]
        limit = sampling.max_new_tokens if max_new_tokens is None else max_new_tokens
        protocol.check_ids(ids, self.vocab_size, self.base_url)
        protocol.check_length(len(ids), limit, await self.limits(), self.base_url)
        request = protocol.generate_request(ids, sampling, limit, seed, cache_key, self._routing is not None)
        return protocol.parse_generation(
            self.base_url, await self._send(request), self._unpushed_version, self._routing
        )

    async def score(self, input_ids: TokenIds, start: int) -> FloatArray:
        """Log-probs (nats, temperature 1) of ``input_ids[start:]``, shape [len(input_ids) - start]; ``start`` >= 1."""
        ids = [int(token) for token in input_ids]
        if not 1 <= start <= len(ids):
            raise UserError(f"score: start {start} is outside 1 to {len(ids)}; the first token has no log-probability")
        protocol.check_ids(ids, self.vocab_size, self.base_url)
        protocol.check_length(len(ids), 0, await self.limits(), self.base_url)
        answer = await self._send(protocol.score_request(ids, start))
        return protocol.parse_scores(self.base_url, answer, len(ids) - start)

    async def info(self) -> ServerInfo:
        """What the server says of itself, asked anew."""
        self._info = protocol.parse_info([await self._send(request) for request in protocol.INFO_REQUESTS])
        return self._info

    async def limits(self) -> ServerInfo:
        """The same, asked once: lengths do not change while a server lives."""
        async with self._asking:  # hundreds of first requests must not all ask
            return self._info or await self.info()

    def assume(self, info: ServerInfo) -> None:
        """Take these limits instead of asking: a router has none of its own."""
        self._info = info

    async def close(self) -> None:
        """Close all connections; requests in flight fail."""
        if self._session is not None:
            await self._session.close()

    async def _send(self, request: Request) -> Any:
        async with self._slots:
            status, content = await self._attempt(request)
        return protocol.parse_response(self.base_url, request, status, content)

    async def _attempt(self, request: Request) -> tuple[int, bytes]:
        attempts = CONNECTION_ATTEMPTS
        while True:
            attempts -= 1
            try:
                async with self._connections().request(
                    request.method, self.base_url + request.route, json=request.body, allow_redirects=False
                ) as response:
                    return response.status, await response.read()
            except (aiohttp.ClientError, TimeoutError) as error:
                broke = isinstance(error, BROKEN_CONNECTION) and not isinstance(error, NEVER_CONNECTED)
                if not attempts or not broke:
                    timed_out = isinstance(error, TimeoutError)
                    raise protocol.connection_error(self.base_url, request, error, timed_out=timed_out) from error
            await asyncio.sleep(CONNECTION_RETRY_SECONDS)

    def _connections(self) -> aiohttp.ClientSession:
        """Made at the first request: they belong to the event loop that runs then.

        aiohttp rather than httpx, whose pool looks through all connections whenever a request begins or ends: with
        hundreds in flight that takes longer than the server does.
        """
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=protocol.KEEPALIVE_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=self._timeout,
                headers=self._headers,
                trust_env=False,
            )
        return self._session
