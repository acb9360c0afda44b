"""Where the servers are: named in the configuration, in a file that may change, or by an sglang-router."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import httpx

from megatron_vespo.config import ServerSection
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.keys import headers

ROUTER_TIMEOUT = 30.0

Addresses = Callable[[], list[str]]


def server_addresses(section: ServerSection, own: Sequence[str], api_key: str | None) -> Addresses:
    """What gives the servers' addresses of the moment.

    Args:
        section: Where they are said to be.
        own: Addresses of the servers that the run started itself, if it did.
        api_key: The servers', if they have one.
    """
    if own:
        return lambda: list(own)
    if section.url_file is not None:
        return lambda: read_addresses(Path(section.url_file or ""))
    if section.router is not None:
        return lambda: ask_router(section.router or "", api_key)
    return lambda: section.urls


def read_addresses(path: Path) -> list[str]:
    """Addresses from a file, one a line, or from all files of a folder; blank lines and what follows a # are left out.

    Raises:
        UserError: A file cannot be read, or a line is no address.
    """
    try:
        lines = (_read_folder(path) if path.is_dir() else path.read_text(encoding="utf-8")).splitlines()
    except OSError as error:
        raise UserError(f"rollout.server.url_file: {path} cannot be read: {error.strerror or error}") from error
    urls = [url for line in lines if (url := line.partition("#")[0].strip())]
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"rollout.server.url_file: {path}: {url!r} is no address; http://host:port would be right")
    return list(dict.fromkeys(urls))


def _read_folder(path: Path) -> str:
    texts = []
    for file in sorted(path.glob("[!.]*")):  # one that is being written has a dot in front
        with suppress(FileNotFoundError):  # its servers have just ended
            texts.append(file.read_text(encoding="utf-8"))
    return "\n".join(texts)


def address_towards(host: str, port: int = 80) -> str:
    """The address under which the machine ``host`` reaches this one. Nothing is sent.

    Raises:
        UserError: There is no such machine, or no way to it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, port))  # a datagram socket sends nothing when it connects
        except OSError as error:
            raise UserError(f"{host}: no way there from this machine: {error.strerror or error}") from error
        return str(probe.getsockname()[0])


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
