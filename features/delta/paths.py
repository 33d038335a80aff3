"""Paths and addresses as the user writes them, and in the form that libraries take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import quote

from deltalake.fs import DeltaStorageHandler
from pyarrow import fs

from features.errors import CorankError, UnavailableError, out_of_reach

PATIENCE = {"timeout": "30s", "retry_timeout": "30s"}
"""After how long a request to a storage that is silent is given up, and until when deltalake tries it again (Polars has
30 s of its own for that). Without them Polars waits for ever, and deltalake for three minutes, in which Python heeds no
signal."""

ESCAPE = re.compile("%[0-9a-fA-F]{2}")

UNREADABLE = re.compile(rf"\\|{ESCAPE.pattern}")
"""What the Delta library refuses in a local path, even behind links, or reads as something else."""


def address(path: str) -> str:
    """The form for libraries of a local path or an ``s3://`` address as the user writes it."""
    if "://" not in path:
        return path
    scheme, _, rest = path.partition("://")
    return f"{scheme}://{quote(rest, safe='/:@=+~')}"


def file_system(path: str) -> tuple[fs.FileSystem, str]:
    """The file system of a folder, local or on S3, and the folder's path in it."""
    return fs.FileSystem.from_uri(address(path)) if "://" in path else (fs.LocalFileSystem(), path)


def patient(options: Mapping[str, str]) -> dict[str, str]:
    """Options of deltalake and Polars: the user's own, and where these say nothing of it how long to wait."""
    return {**PATIENCE, **options}


def check_openable(path: str) -> None:
    """
    Args:
        path: absolute, or an ``s3://`` address.

    Raises:
        ValueError: it holds what the library takes for something else.
    """
    if wrong := (ESCAPE if "://" in path else UNREADABLE).search(path):
        raise ValueError(f"has {wrong[0]} in its name, below which no Delta table can lie; rename that folder")


def table_store(root: str, options: Mapping[str, str]) -> fs.FileSystem:
    """A file system whose root is a table, reached as deltalake reaches it.

    Args:
        options: of the storage, as deltalake takes them.
    """
    return fs.PyFileSystem(DeltaStorageHandler(address(root), options=patient(options)))


def cannot_read(table: str, uri: str, path: str, error: Exception) -> CorankError:
    """What to say of a file of a table that corank derived, when reading it failed."""
    if reason := out_of_reach(error):
        return UnavailableError(f"table {table} at {uri}: cannot read {path}: {reason}")
    if isinstance(error, FileNotFoundError):
        return CorankError(
            f"table {table} at {uri}: {path} is gone. If another command replaced it meanwhile (`corank features "
            "compact` or `forget`), run again; if it is lost, `corank repair`, then `corank run`, build it again."
        )
    return CorankError(
        f"table {table} at {uri}: cannot read {path}: {error}. `corank repair`, then `corank run`, build it again."
    )
