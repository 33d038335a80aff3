"""Commands of a user whom permission bits bind, as they do not bind root."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def bound(command: list[str]) -> list[str]:
    """The command without root's right to pass over permission bits; a normal user's needs nothing."""
    if os.geteuid():
        return command
    if not shutil.which("setpriv"):
        pytest.skip("root without setpriv (util-linux): permission bits do not bind it")
    without = "-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set={without}", f"--inh-caps={without}", *command]


@contextmanager
def closed(*paths: Path, mode: int = 0) -> Iterator[None]:
    """Files and folders with other permission bits, for as long as the block lasts."""
    before = {path: path.stat().st_mode for path in paths}
    for path in paths:
        path.chmod(mode)
    try:
        yield
    finally:
        for path, bits in before.items():
            path.chmod(bits)
