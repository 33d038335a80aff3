"""The command ``corank``. What takes long to import comes after the handlers of signals."""

from __future__ import annotations

from pipeline import interrupts


def main() -> None:
    """Entry point of the command ``corank``."""
    interrupts.end_at_once()
    from pipeline.commands.app import main as parse_and_run

    parse_and_run()


if __name__ == "__main__":
    main()
