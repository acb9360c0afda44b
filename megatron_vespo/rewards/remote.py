"""A reward from an HTTP server: a judge, a reward model, a checker on other machines."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import httpx

from megatron_vespo.rewards.failures import RewardFailure, shorten
from megatron_vespo.types import Sample

# A server that is busy or starting says one of these; other refusals would only be repeated.
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0


class HttpReward:
    """Asks a server for the reward of each sample, many at a time.

    It posts JSON: ``response`` (text), ``label``, ``metadata``, ``prompt_ids``, ``response_length`` (tokens) and
    ``finish_reason``. The server answers with a JSON number, or an object that has it as ``reward`` or ``score``.

    Args:
        url: Where to post.
        tries: Requests for one sample; those after the first follow a failed connection, a time-out or one of the
            statuses 408, 425, 429, 500, 502, 503, 504, after pauses that double from 0.2 s to 10 s.
        seconds: That one request may take. All of them together may take ``reward.timeout``.
        connections: At once, for each worker process.
        headers: Of every request.
    """

    def __init__(
        self,
        url: str,
        tries: int = 5,
        seconds: float = 20.0,
        connections: int = 64,
        headers: dict[str, str] | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url: {url!r} does not begin with http:// or https://")
        if tries < 1 or connections < 1 or not seconds > 0:
            raise ValueError("tries and connections must be 1 or more, seconds above 0")
        self._url, self._tries = url, tries
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        # Waiting for one of our own connections is no failure of the server's.
        timeout = httpx.Timeout(seconds, pool=None)
        self._client = httpx.AsyncClient(limits=limits, timeout=timeout, headers=headers)

    async def __call__(self, sample: Sample) -> float:
        """The sample's reward.

        Raises:
            RewardFailure: The server gave none, ``tries`` times or with a refusal that is final.
        """
        content = {
            "response": sample.text,
            "label": sample.prompt.label,
            "metadata": sample.prompt.metadata,
            "prompt_ids": sample.prompt.input_ids.tolist(),
            "response_length": len(sample.response_ids),
            "finish_reason": sample.finish_reason,
        }
        reason = ""
        for attempt in range(self._tries):
            if attempt:
                await asyncio.sleep(min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE))
            try:
                answer = await self._client.post(self._url, json=content)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__} {error}".strip()
                continue
            if answer.status_code == httpx.codes.OK:
                return _read(answer)
            reason = f"status {answer.status_code} {shorten(answer.text)}".strip()
            if answer.status_code not in _TRY_AGAIN:
                raise RewardFailure(f"{self._url}: {reason}")
        raise RewardFailure(f"{self._url}: {self._tries} tries failed, the last with {reason}")


def _read(answer: httpx.Response) -> float:
    try:
        found: Any = answer.json()
    except ValueError:
        found = None
    if isinstance(found, dict):
        found = found.get("reward", found.get("score"))
    if isinstance(found, bool | int | float) and math.isfinite(found):
        return float(found)
    raise RewardFailure(f"{answer.url}: no number, nor an object with reward or score: {shorten(answer.text)}")
