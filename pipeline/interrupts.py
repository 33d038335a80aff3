"""SIGINT (Ctrl-C) and SIGTERM: whatever a command is doing, it ends within seconds, with one message and 130 or 143.

Both have the same handler, even where a shell started the command with SIGINT ignored: Dagster gives SIGTERM whatever
handler SIGINT has. It is imported before all else, so it imports nothing slow itself.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 10.0
"""Seconds in which a command may put away its work; then it is killed with all that it started."""
REPEAT = 3.0
"""Seconds after which an interrupt that was lost is raised again."""
SAME = 0.5
"""A second signal within so many seconds is the first one again: some senders reach a process also by its group."""

_Handler = Callable[[int, FrameType | None], Any]


def end_at_once() -> None:
    """Let both signals end this process at once: before the work begins there is nothing to put away."""
    _handle(lambda number, _: _end(number))


class Interrupts:
    """The signals that this process gets while a command works.

    Attributes:
        came: number of the first one, None before it.
    """

    def __init__(self) -> None:
        self.came: int | None = None
        self._raising = True
        self._leaving = threading.Lock()
        self._stderr = os.dup(2)  # a library may put a file in its place

    def hold(self) -> None:
        """From here on the work is put away and a signal does not interrupt it; a second one still ends the process."""
        self._raising = False
        _handle(self._heed)  # a library may have left its own

    def leave(self) -> NoReturn:
        """End this process and all that it started, now, without what Python and libraries do at exit."""
        import psutil

        self._leaving.acquire()  # never released: only the first thread that comes here ends the process
        for _ in range(2):  # twice, as some may only just be starting
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    child.kill()
        _end(self.came or signal.SIGTERM, self._stderr)

    def _heed(self, number: int, _: FrameType | None) -> None:
        self.came = self.came or number
        if self._raising:
            raise KeyboardInterrupt

    def _watch(self, signals: socket.socket) -> None:
        """Make sure that a signal ends the process.

        A handler raises its exception wherever the main thread happens to be. Inside a destructor or the callback of a
        weak reference Python prints the exception and drops it; in code that is not Python's it waits; and what
        catches the exception may wait for a process that the same signal has ended.
        """
        main = threading.main_thread().ident
        repeated, since = 0, 0.0
        while True:
            if since:
                signals.settimeout(max(min(REPEAT, since + GRACE - time.monotonic()), 0.01))
            try:
                (number,) = signals.recv(1) or (0,)
            except TimeoutError:
                if time.monotonic() - since >= GRACE:
                    self.leave()
                if self._raising and main is not None:
                    repeated += 1
                    signal.pthread_kill(main, self.came or signal.SIGTERM)
                continue
            if number == 0:
                return
            if number not in SIGNALS:
                continue
            if not since:
                self.came, since = self.came or number, time.monotonic()
            elif repeated:
                repeated -= 1
            elif time.monotonic() - since > SAME:
                self.leave()


@contextmanager
def interruptible() -> Iterator[Interrupts]:
    """While the block lasts both signals raise KeyboardInterrupt in the main thread, and again after a while if the
    block goes on. ``GRACE`` seconds after the first signal, or at a second one, the process is killed.
    """
    import psutil  # noqa: F401  # imported now, as an interrupt leaves no time for it

    interrupts = Interrupts()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    handlers = _handle(interrupts._heed)
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)  # every signal writes its number
    watcher = threading.Thread(target=interrupts._watch, args=(reader,), name="watches signals", daemon=True)
    watcher.start()
    try:
        yield interrupts
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        writer.close()
        watcher.join()
        reader.close()
        os.close(interrupts._stderr)


@contextmanager
def deferred() -> Iterator[None]:
    """Let signals wait for the end of the block; then the handlers from before it get them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals come to the main thread
        return
    came: list[int] = []
    handlers = _handle(lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            handler = handlers[came[0]]
            if callable(handler):
                handler(came[0], None)
            elif handler == signal.SIG_DFL:
                signal.raise_signal(came[0])


def reinstate() -> None:
    """Set the handlers of both signals again: connecting, Ray installs native ones that Python does not know of."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.getsignal(number))


def _handle(handler: _Handler) -> dict[int, Any]:
    """Give both signals this handler; returns those that they had."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    # None: the handler was not set by Python
    return {number: signal.SIG_DFL if former is None else former for number, former in before.items()}


def _end(number: int, stderr: int = 2) -> NoReturn:
    """Say what stopped, and end this process."""
    words = []
    for word in sys.argv[1:3]:
        if not word.isidentifier():
            break
        words.append(word)
    command = " ".join(["corank", *words])
    cursor = "\x1b[?25h" if os.isatty(stderr) else ""  # the live line hides it
    message = f"{cursor}\n{signal.Signals(number).name}: {command} stopped; run the same command again to continue\n"
    with suppress(OSError):
        os.write(stderr, message.encode())
    os._exit(128 + number)
