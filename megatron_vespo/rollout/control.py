"""Synchronous client of a server's control routes: readiness, weights, pausing. For code outside the event loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import httpx

from megatron_vespo.rollout import protocol
from megatron_vespo.rollout.keys import headers
from megatron_vespo.rollout.protocol import Request, ServerError, ServerInfo, TensorList

PauseMode = Literal["retract", "in_place", "abort"]

READY_TIMEOUT = 5.0
QUICK_TIMEOUT = 60.0  # for what needs no work but an answer, unless all requests must be quicker
HEALTH_TIMEOUT = 30.0  # SGLang itself waits 20 s for its scheduler


class SGLangControl:
    """Controls one server.

    A push to a server that may be generating, exact to the token (each later token matches the new weights, and each
    weight version its tokens)::

        control.pause_generation()           # "retract": requests go back to the queue, their KV cache is recomputed
        control.begin_weight_update()
        control.update_weights_from_...(version=7)
        control.end_weight_update()
        control.continue_generation()

    Args:
        base_url: Address, ``http://host:port``.
        timeout: Seconds a request may take; loading a large model from disk is the slowest.
        transport: Instead of the network, for tests.
        flush_cache: Whether an update flushes the KV and prefix caches, which needs all requests retracted or aborted.
        api_key: The server's, if it has one.

    All methods raise :class:`ServerError` naming the address, the route and what the server said, and
    :class:`ServerGoneError` if the connection fails.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout: float = 600.0,
        transport: httpx.BaseTransport | None = None,
        flush_cache: bool = True,
        api_key: str | None = None,
    ) -> None:
        self._flush_cache, self._quick = flush_cache, min(QUICK_TIMEOUT, timeout)
        self.base_url = base_url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.base_url,
            timeout=httpx.Timeout(timeout, connect=protocol.CONNECT_TIMEOUT_SECONDS),
            limits=httpx.Limits(keepalive_expiry=protocol.KEEPALIVE_SECONDS),
            headers=headers(api_key),
            trust_env=False,
            transport=transport,
        )

    def ready(self) -> bool:
        """Whether the server takes requests; False while it is paused, and where nothing listens. Instant."""
        return self._succeeds(protocol.READY, READY_TIMEOUT)

    def alive(self) -> bool:
        """Whether anything answers, also while the server is paused. Instant."""
        return self._succeeds(protocol.MODEL_INFO, READY_TIMEOUT)

    def health(self, timeout: float = HEALTH_TIMEOUT) -> bool:
        """Whether the server really generates: it samples a token, which takes 1 s, or 20 s if the scheduler hangs."""
        return self._succeeds(protocol.HEALTH, min(timeout, HEALTH_TIMEOUT))

    def info(self, timeout: float = QUICK_TIMEOUT) -> ServerInfo:
        """What the server says of itself. One whose scheduler hangs says nothing."""
        quick = min(timeout, self._quick)
        return protocol.parse_info([self._send(request, quick) for request in protocol.INFO_REQUESTS])

    def weight_version(self) -> int:
        """Policy version of the weights it has now. A ServerError if none was ever pushed."""
        return protocol.parse_version(self.base_url, self._send(protocol.MODEL_INFO, self._quick)["weight_version"])

    def pause_generation(self, mode: PauseMode = "retract") -> None:
        """Stop sampling until :meth:`continue_generation`.

        ``retract`` (with the cache flushed by the update) and ``abort``, which returns partial responses and takes a
        second, are exact: ``in_place`` goes on with the old weights' KV cache and attributes a token to the wrong
        version. Its updates must not flush the cache, since requests are running.
        """
        self._send(Request("/pause_generation", {"mode": mode}), self._quick)

    def continue_generation(self) -> None:
        """Sample again."""
        self._send(protocol.CONTINUE_GENERATION, self._quick)

    def release_memory(self, tags: Sequence[str]) -> None:
        """Give device memory back to the machine: ``kv_cache``, ``weights``, or both. What was in it is lost.

        Generation must be paused by ``retract``: SGLang ends itself where a request is running. It needs its argument
        ``enable_memory_saver``, without which it says yes and keeps the memory.
        """
        self._send(Request("/release_memory_occupation", {"tags": list(tags)}))

    def resume_memory(self, tags: Sequence[str]) -> None:
        """Take the memory again, at the same addresses. Only what was released: SGLang ends itself otherwise."""
        self._send(Request("/resume_memory_occupation", {"tags": list(tags)}))

    def begin_weight_update(self) -> None:
        """Open a weight update: weights packed at load time become loadable again."""
        self._send(protocol.BEGIN_WEIGHT_UPDATE)

    def end_weight_update(self) -> None:
        """Close it: quantised weights are packed again."""
        self._send(protocol.END_WEIGHT_UPDATE)

    def update_weights_from_disk(self, folder: Path | str, version: int) -> None:
        """Load all weights from a Hugging Face folder, flush the cache, and call them ``version``.

        The path is the server's. It is checked here only when missing: SGLang would take it for a repository's name.
        """
        if not Path(folder).is_dir():
            raise ServerError(
                f"{self.base_url}/update_weights_from_disk: no folder {folder}; the server must see it too"
            )
        self._send(
            Request(
                "/update_weights_from_disk",
                {"model_path": str(folder), "weight_version": str(version), "flush_cache": self._flush_cache},
            )
        )

    def init_weights_update_group(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        """Join a process group with the trainer, which is rank 0 of it. Returns once all have joined.

        Args:
            master_address: Address of the rendezvous.
            master_port: Its port.
            rank_offset: Rank of the server's first worker.
            world_size: Ranks in all, the trainer's one included.
            group_name: Name for the later calls.
            backend: ``gloo`` or ``nccl``.
        """
        self._send(
            Request(
                "/init_weights_update_group",
                {
                    "master_address": master_address,
                    "master_port": master_port,
                    "rank_offset": rank_offset,
                    "world_size": world_size,
                    "group_name": group_name,
                    "backend": backend,
                },
            )
        )

    def destroy_weights_update_group(self, group_name: str) -> None:
        """Leave the process group."""
        self._send(Request("/destroy_weights_update_group", {"group_name": group_name}))

    def update_weights_from_distributed(
        self, tensors: TensorList, group_name: str, version: int, load_format: str | None = None
    ) -> None:
        """Receive tensors that rank 0 of the group broadcasts in this order, meanwhile: call it from another thread.

        SGLang skips unknown names without a word, so they must be right. The cache is flushed.

        Args:
            tensors: What will be broadcast.
            group_name: The group joined.
            version: Policy version these weights belong to.
            load_format: ``flattened_bucket`` if all tensors come as one flat uint8 tensor.
        """
        self._send(
            Request(
                "/update_weights_from_distributed",
                {
                    "names": tensors.names,
                    "dtypes": tensors.dtypes,
                    "shapes": tensors.shapes,
                    "group_name": group_name,
                    "weight_version": str(version),
                    "load_format": load_format,
                    "flush_cache": self._flush_cache,
                },
            )
        )

    def update_weights_with_loader(self, loader: str, payloads: Sequence[str], version: int | None) -> None:
        """Have each worker call a function of ours with what is in its payload. The cache is flushed.

        SGLang refuses a function that it was not started with; one that raises ends the server.

        Args:
            loader: Import path; the server was started with it as ``--custom-weight-loader``.
            payloads: Named tensors, pickled, in base64, for each tensor-parallel rank of the server.
            version: Policy version that the weights belong to afterwards; None leaves it as it is.
        """
        self._send(
            Request(
                "/update_weights_from_tensor",
                {
                    "serialized_named_tensors": list(payloads),
                    "load_format": loader,
                    "weight_version": None if version is None else str(version),
                    "flush_cache": self._flush_cache,
                },
            )
        )

    def flush_cache(self) -> None:
        """Forget all cached prefixes. A ServerError while requests run."""
        self._send(protocol.FLUSH_CACHE, self._quick)

    def abort_all(self) -> None:
        """End all running requests; they return what they have, with finish reason ``abort``."""
        self._send(protocol.ABORT_ALL)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _succeeds(self, request: Request, timeout: float) -> bool:
        try:
            self._send(request, timeout)
        except ServerError:
            return False
        return True

    def _send(self, request: Request, timeout: float | None = None) -> Any:
        try:
            response = self._http.request(
                request.method, request.route, json=request.body, timeout=timeout or self._http.timeout
            )
        except httpx.TransportError as error:
            timed_out = isinstance(error, httpx.TimeoutException)
            raise protocol.connection_error(self.base_url, request, error, timed_out=timed_out) from error
        return protocol.parse_response(self.base_url, request, response.status_code, response.content)
