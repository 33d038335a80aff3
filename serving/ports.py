"""Addresses of endpoints. They are checked before long work starts, so this module imports nothing heavy."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from features.errors import CorankError

EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""Hosts that mean all addresses, and the loopback address at which to ask their endpoint."""


def endpoint_url(host: str, port: int) -> str:
    """Where to ask an endpoint that listens on this host and port, e.g. ``http://127.0.0.1:8000``."""
    asked = EVERYWHERE.get(host, host)
    return f"http://{f'[{asked}]' if ':' in asked else asked}:{port}"


def is_own(url: str) -> bool:
    """Whether an address is this machine's own, on loopback or not, which is asked without a proxy."""
    host = urlsplit(url).hostname or ""
    return is_loopback(host) or host == socket.gethostname().lower() or (_is_address(host) and is_free(host, 0))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on this host."""
    if _is_address(host):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def require_free(host: str, port: int) -> None:
    """
    Raises:
        CorankError: something else listens there, or this machine has no such address.
    """
    if refusal := _refusal(host, port):
        raise CorankError(
            f"serving: cannot listen on {host}:{port}: {refusal}. "
            "Set `serving.port` to a free port, or stop what uses it."
        )


def is_free(host: str, port: int) -> bool:
    return _refusal(host, port) is None


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _refusal(host: str, port: int) -> str | None:
    """Why this process cannot listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        return error.strerror or str(error)
    return None
