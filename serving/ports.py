"""Is a port free? Asked before hours of work, too, so this module imports nothing heavy."""

from __future__ import annotations

import socket

from features.errors import CorankError


def require_free(host: str, port: int) -> None:
    """
    Raises:
        CorankError: something else listens there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CorankError(
                f"serving: cannot listen on {host}:{port}: {error.strerror}. "
                "Set `serving.port` to a free port, or stop what uses it."
            ) from None
