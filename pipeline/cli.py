"""The command ``corank``. Slow imports come after the handlers of signals are set."""

from __future__ import annotations

import locale
import os
import sys

from pipeline import interrupts


def main() -> None:
    """Entry point of the command ``corank``."""
    interrupts.end_at_once()
    _in_utf8()
    from pipeline.commands.app import main as parse_and_run

    parse_and_run()


def _in_utf8() -> None:
    """Under another locale start again in Python's UTF-8 mode, as libraries write files in the locale's encoding."""
    if sys.flags.utf8_mode or locale.getencoding().lower() in ("utf-8", "utf8"):
        return
    streams = {"PYTHONIOENCODING": f"{sys.stdout.encoding}:replace"}  # the terminal keeps its encoding
    os.execve(sys.executable, sys.orig_argv, streams | dict(os.environ) | {"PYTHONUTF8": "1"})


if __name__ == "__main__":
    main()
