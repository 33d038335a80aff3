"""A thread that reads the online store for requests, one after the other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class StoreThread:
    """Tells a store that is slow from a queue that is long: both make a request wait, but only one is the store's."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._asked: float | None = None  # when the store was asked what it has not answered yet

    def timed(self, read: Callable[[], T]) -> T:
        """What the store answers; to be called in the thread."""
        self._asked = time.monotonic()
        try:
            return read()
        finally:
            self._asked = None

    async def run(self, work: Callable[[], T]) -> T:
        """The result of some work in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def result(self, work: Callable[[], T], seconds: float | None) -> T:
        """The result of some work in the thread.

        Raises:
            TimeoutError: the store has not answered one question for so many seconds, this one's or one before it.
        """
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        while seconds is not None:
            done, _ = await asyncio.wait([future], timeout=seconds / 4)
            asked = self._asked
            if done:
                break
            if asked is not None and time.monotonic() - asked >= seconds:
                future.cancel()
                raise TimeoutError
        return await future
