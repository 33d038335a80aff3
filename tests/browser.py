"""Pages in a headless Chromium."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path


def opened(chromium: str, page: Path | str) -> tuple[str, list[str]]:
    """The page of a file or address as it is once its scripts ran, and what its console says."""
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom"]
        options += ["--enable-logging=stderr", "--virtual-time-budget=10000"]
        address = page if isinstance(page, str) else page.resolve().as_uri()
        done = subprocess.run([chromium, *options, address], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def drawn(page: str) -> set[str]:
    """Names of the figures that plotly.js has drawn."""
    parts = re.split(r'id="figure-(\w+)"', page)
    return {name for name, content in zip(parts[1::2], parts[2::2], strict=True) if 'class="main-svg"' in content}
