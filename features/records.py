"""Records: what a stage made, from what. A record is the commit point of a stage; readers follow it.

One small JSON document per stage and key below ``<workspace>/records``, written atomically. A stage is
up to date when its record carries the digest of what it would be made from now.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pyarrow import fs

from features.delta.paths import address
from features.errors import CorankError


def digest(value: object) -> str:
    """128-bit digest of a JSON-like value; equal values in any key order have equal digests."""
    text = json.dumps(value, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Records:
    """The records of one workspace (a local folder or an ``s3://`` prefix)."""

    def __init__(self, root: str) -> None:
        self.fs: fs.FileSystem
        self.root: str
        self.fs, self.root = fs.FileSystem.from_uri(address(root)) if "://" in root else (fs.LocalFileSystem(), root)

    def get(self, stage: str, key: str) -> dict[str, Any] | None:
        """The record, or None when the stage never finished for this key.

        Raises:
            CorankError: it is damaged; the file is named.
        """
        path = self._path(stage, key)
        if self.fs.get_file_info(path).type == fs.FileType.NotFound:
            return None
        with self.fs.open_input_stream(path) as stream:
            text = stream.read()
        try:
            return dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise CorankError(
                f"record {path} is damaged ({error}). Remove it and run again: what it stands for is made again."
            ) from error

    def put(self, stage: str, key: str, record: Mapping[str, Any]) -> None:
        """Write a record; it is seen whole or not at all, and stays, whatever happens to the machine then."""
        path = self._path(stage, key)
        document = {**record, "recorded_at": datetime.now(UTC).isoformat(timespec="seconds")}
        content = json.dumps(document, indent=1, sort_keys=True, default=str).encode()
        self.fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
        if isinstance(self.fs, fs.LocalFileSystem):
            _write_durably(Path(path), content)
        else:
            with self.fs.open_output_stream(path) as stream:
                stream.write(content)

    def _path(self, stage: str, key: str) -> str:
        return f"{self.root}/{stage}/{key}.json"


def _write_durably(path: Path, content: bytes) -> None:
    """Write a file beside, then give it its name; both are on the disk when this returns."""
    scratch = path.with_name(f"{path.name}.tmp")
    with scratch.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(scratch, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
