"""How often the holder of a token may ask."""

from __future__ import annotations

from limits import RateLimitItem, RateLimitItemPerSecond
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

WINDOW_SECONDS = 10
"""Over which requests are counted, so that a few may come at once."""


class Rate:
    """At most so many requests per second of each holder, counted in this process."""

    def __init__(self, requests_per_second: float) -> None:
        self._limit = _limit(requests_per_second)
        self._counts = MovingWindowRateLimiter(MemoryStorage())

    def allows(self, holder: str) -> bool:
        """Whether one more request is within the limit; it counts then."""
        return self._counts.hit(self._limit, holder)


def _limit(requests_per_second: float) -> RateLimitItem:
    """So many requests within the window, or one within as many seconds as it takes."""
    if requests_per_second * WINDOW_SECONDS < 1:
        return RateLimitItemPerSecond(1, round(1 / requests_per_second))
    return RateLimitItemPerSecond(round(requests_per_second * WINDOW_SECONDS), WINDOW_SECONDS)
