"""One live line per stage: what it is doing, how far it is, how long it took."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
PLAIN_INTERVAL = 5.0
"""Seconds between lines of a stage when the output is no terminal."""


def plain_console(**options: Any) -> Console:
    """A terminal for texts with users' own names and paths in them: ``[v2]`` is no markup there, ``:tv:`` no emoji.

    Args:
        options: of rich's console.
    """
    return Console(markup=False, emoji=False, highlight=False, **options)


@dataclass
class Line:
    """The live line of a running stage; ``say`` replaces its text."""

    name: str
    console: Console
    live: Live | None
    started: float = field(default_factory=time.monotonic)
    text: str = ""
    printed: float = 0.0

    def say(self, text: str) -> None:
        self.text = text
        if self.live is not None:
            self.live.update(self)
        elif time.monotonic() - self.printed >= PLAIN_INTERVAL:
            self.printed = time.monotonic()
            self.console.print(f"… {self.name:<14} {text}")

    def __rich__(self) -> Text:
        """The line, drawn at every refresh, so that its seconds go on."""
        return Text(
            f"{SPINNER[int(self.seconds * 8) % len(SPINNER)]} {self.name:<14} {self.text}  ({self.seconds:.0f} s)"
        )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class Eta:
    """The speed of some work, smoothed over about five calls of ``tell``, and the time that the rest of it takes."""

    def __init__(self) -> None:
        self.done, self.at, self.rate = 0, 0.0, 0.0

    def tell(self, done: int, total: int, unit: str) -> str:
        """``", 9,100 candidates/s, 2:05 left"``; nothing the first time, and no time when all is done."""
        now = time.monotonic()
        if self.at:
            rate = max(done - self.done, 0) / max(now - self.at, 1e-6)
            self.rate = 0.8 * self.rate + 0.2 * rate if self.rate else rate
        self.done, self.at = done, now
        if not self.rate:
            return ""
        minutes, seconds = divmod(round((total - done) / self.rate), 60)
        return f", {self.rate:,.0f} {unit}/s" + (f", {minutes}:{seconds:02} left" if done < total else "")


class Progress:
    """Prints stages as they run; one line of each stays."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or plain_console(file=sys.stderr, soft_wrap=True)

    def note(self, text: str) -> None:
        """A line that stays on screen."""
        self.console.print(f"  {text}")

    @contextmanager
    def stage(self, name: str) -> Iterator[Line]:
        """Run a stage; its last text is what stays on screen. An error carries the stage's name as a note."""
        stage, mark = Line(name, self.console, None), "✗"
        try:
            if not self.console.is_terminal:
                yield stage
            else:
                with Live(console=self.console, transient=True, refresh_per_second=8) as stage.live:
                    stage.say("")
                    yield stage
            mark = "✓"
        except Exception as error:
            error.add_note(f"stage {name}")
            raise
        finally:
            line = f"{mark} {name:<14} {stage.text}  ({stage.seconds:.1f} s)"
            self.console.print(line)
