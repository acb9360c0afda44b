"""API keys of SGLang servers: whoever has one may sample from a server and replace its weights."""

from __future__ import annotations

import ipaddress
import os
import secrets

from megatron_vespo.config import ServerSection
from megatron_vespo.errors import UserError


def server_key(section: ServerSection) -> str | None:
    """The key of the run's servers, for rank 0; None where they have none.

    A server of the run's own that others than this machine can reach gets a new one, unless the environment holds one.

    Raises:
        UserError: The variable that ``rollout.server.api_key_env`` names is not set.
    """
    if section.api_key_env is not None:
        key = os.environ.get(section.api_key_env)
        if not key:
            raise UserError(f"rollout.server.api_key_env: the environment variable {section.api_key_env} is not set")
        return key
    return secrets.token_urlsafe(32) if section.is_own and not is_loopback(section.host) else None


def headers(key: str | None) -> dict[str, str]:
    """HTTP headers that carry the key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone; a name other than localhost is taken to be no such one."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
