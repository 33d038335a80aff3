"""Checks that files are whole: SQLite's as far as SQLite can tell, and files that end with a digest."""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path

SEAL = b"\xfa\xff\x7f\x10"
"""Precedes the digest at the end of a file. Protobuf reads both as an unknown field of 16 bytes and ignores it."""

MAGIC = b"SQLite format 3\0"


HINDERED = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM", "SQLITE_FULL")
"""What keeps SQLite from reading a file that may be whole: another process writes it, this user may not, no room."""


def problem_of_database(path: Path, pages: bool = True) -> str | None:
    """What is wrong with a file that should be a database; None when nothing is.

    Args:
        pages: read the whole file (a gigabyte takes seconds) and check its pages and their references. Changed values
            in a page that is whole are not noticed, as SQLite has no checksums.
    """
    if not path.is_file():
        return "is missing"
    with path.open("rb") as stream:
        start = stream.read(len(MAGIC))
    if not start:
        return "is empty"
    if start != MAGIC:
        return "is no SQLite database"
    if not pages:
        return None
    try:
        with closing(sqlite3.connect(path)) as database:
            (verdict,) = database.execute("pragma quick_check(1)").fetchone()
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # of damaged names
        if getattr(error, "sqlite_errorname", "").startswith(HINDERED):
            return None
        verdict = str(error)
    return None if verdict == "ok" else f"has damaged pages ({' '.join(verdict.split())})"


def remove_database(path: Path) -> None:
    """Delete a database with what SQLite keeps beside it."""
    for end in ("", "-journal", "-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)


def seal(content: bytes) -> bytes:
    """What to append to a file's content, so that :func:`problem_of_sealed` finds every change of it."""
    return SEAL + hashlib.blake2b(content, digest_size=16).digest()


def problem_of_sealed(path: Path) -> str | None:
    """What is wrong with a file that ends with its seal; None when nothing is."""
    if not path.is_file():
        return "is missing"
    whole = path.read_bytes()
    if not whole:
        return "is empty"
    content, _, _ = whole.rpartition(SEAL)
    return None if whole == content + seal(content) else "is not what was written"
