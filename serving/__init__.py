"""The Ray Serve application and its clients, which are loaded when first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.client import AsyncRankingClient, RankingClient

__all__ = ["AsyncRankingClient", "RankingClient"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from serving import client

        return getattr(client, name)
    raise AttributeError(f"module 'serving' has no attribute {name!r}")
