"""The Ray Serve application and its client, which is loaded when first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.client import RankingClient

__all__ = ["RankingClient"]


def __getattr__(name: str) -> Any:
    if name == "RankingClient":
        from serving.client import RankingClient

        return RankingClient
    raise AttributeError(f"module 'serving' has no attribute {name!r}")
