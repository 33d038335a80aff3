"""Local files that a library makes step by step, made whole or not at all.

A kill, a full disk or a second command in the middle would leave a half-made database that nothing can open any more.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time into the block; others wait. The operating system frees the lock of a killed one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def make_whole(path: Path, make: Callable[[Path], None]) -> None:
    """Have a file or folder made under another name, then move it to its place. The caller holds a lock."""
    prefix = f".{path.name}.new-"
    for left in path.parent.glob(f"{prefix}*"):  # left by a killed process
        remove(left)
    # a new name each time, as libraries keep connections by name
    scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
    try:
        make(scratch / path.name)
        os.replace(scratch / path.name, path)
    finally:
        remove(scratch)


def require_writable(path: Path) -> None:
    """
    Raises:
        PermissionError: this user may not write a file. SQLite says so, too, but names none.
    """
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def remove(path: Path) -> None:
    """Delete a file or a folder with all it holds."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def plain_path(path: Path) -> Path:
    """Another path to the same place, without characters that a library reads as more than a path: SQLAlchemy takes
    what follows a ``?`` for options, and Dagster looks for its settings by a pattern."""
    if not set("?*[]") & set(str(path)):
        return path
    alias = (
        Path(tempfile.gettempdir()) / f"corank-{os.getuid()}" / blake2b(str(path).encode(), digest_size=8).hexdigest()
    )
    alias.parent.mkdir(mode=0o700, exist_ok=True)
    if not alias.is_symlink():
        alias.symlink_to(path)
    return alias
