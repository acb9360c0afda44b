"""Where the servers are: named in the configuration, in a file that may change, or by an sglang-router."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx

from megatron_vespo.config import ServerSection
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.keys import headers
from megatron_vespo.rollout.server import SGLangServer

ROUTER_TIMEOUT = 30.0

Addresses = Callable[[], list[str]]


def server_addresses(section: ServerSection, server: SGLangServer | None, api_key: str | None) -> Addresses:
    """What gives the servers' addresses of the moment.

    Args:
        section: Where they are said to be.
        server: The run's own server, if it started one.
        api_key: The servers', if they have one.
    """
    if server is not None:
        return lambda: [server.url]
    if section.url_file is not None:
        return lambda: read_addresses(Path(section.url_file or ""))
    if section.router is not None:
        return lambda: ask_router(section.router or "", api_key)
    return lambda: section.urls


def read_addresses(path: Path) -> list[str]:
    """Addresses from a file, one a line; blank lines and what follows a # are left out.

    Raises:
        UserError: The file cannot be read, or a line is no address.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"rollout.server.url_file: {path} cannot be read: {error.strerror or error}") from error
    urls = [url for line in lines if (url := line.partition("#")[0].strip())]
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"rollout.server.url_file: {path}: {url!r} is no address; http://host:port would be right")
    return list(dict.fromkeys(urls))


def ask_router(router: str, api_key: str | None = None) -> list[str]:
    """Addresses of the workers that an sglang-router knows.

    Raises:
        UserError: It does not answer, or not as a router does.
    """
    url = f"{router.rstrip('/')}/workers"
    try:
        answer = httpx.get(url, timeout=ROUTER_TIMEOUT, trust_env=False, headers=headers(api_key))
        answer.raise_for_status()
        return [str(worker["url"]) for worker in answer.json()["workers"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"rollout.server.router: {url} does not name workers ({type(error).__name__}:"
            f" {str(error).splitlines()[0]}); give the address of an sglang-router"
        ) from error
