"""Records: what a stage made, and from what. Writing the record completes a stage; readers go by records.

One small JSON document per stage and key below ``<workspace>/records``, written atomically. A stage is
up to date when its record carries the digest of what it would be made from now. Of each stage the documents are read
as its own frozen dataclass; other documents (the log's fingerprints and types, who was forgotten) are plain.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pyarrow import fs
from pydantic import TypeAdapter, ValidationError

from features.delta.paths import file_system
from features.digest import digest
from features.errors import CorankError, writing

FORMER_NAMES = {"challenger": "candidate"}
"""What stages were called by earlier versions; the records of that time are still read."""


class DamagedRecordError(CorankError):
    """A record that is not as it was written.

    Attributes:
        why: what is wrong with it.
    """

    def __init__(self, path: str, why: object) -> None:
        super().__init__(
            f"record {path} is damaged ({why}). `corank repair` removes it; what it stands for is made again then."
        )
        self.why = str(why)


@dataclass(frozen=True)
class Record:
    """The fields of every record.

    Attributes:
        inputs: digest of what it was made from; the record's key where that is this digest.
        code: version of the code that made it.
    """

    inputs: str = ""
    code: str = ""


@dataclass(frozen=True)
class LogRecord(Record):
    """A record of something made from the whole log, with the log and the config as they were.

    Attributes:
        fingerprints: per partition and table.
        versions: of the tables.
        now: when the log was read, microseconds UTC.
        config: digest of all of the config.
    """

    fingerprints: dict[str, dict[str, str]] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    now: int = 0
    config: str = ""


CHECKSUM = "checksum"
"""Key of the checksum of everything else in a document; documents of earlier versions have none."""

R = TypeVar("R", bound=Record)
R_co = TypeVar("R_co", bound=Record, covariant=True)


class Recorded(Protocol[R_co]):
    """A stage, as far as its typed records go; they lie in a folder of its name."""

    @property
    def name(self) -> str: ...

    @property
    def record(self) -> type[R_co]: ...


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


class Records:
    """The records of one workspace (a local folder or an ``s3://`` prefix)."""

    def __init__(self, root: str) -> None:
        self.fs, self.root = file_system(root)

    def read(self, stage: Recorded[R], key: str) -> R | None:
        """The record, or None when the stage never finished for this key.

        Keys that the record's dataclass does not know are ignored, and those that it lacks have their defaults, so that
        records of other versions are read.

        Raises:
            DamagedRecordError
        """
        document = self.get(stage.name, key)
        if document is None and stage.name in FORMER_NAMES:
            document = self.get(FORMER_NAMES[stage.name], key)
        if document is None:
            return None
        try:
            kind: Any = stage.record
            record: R = _adapter(kind).validate_python({"inputs": key, **document})
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
            raise DamagedRecordError(self.path(stage.name, key), "; ".join(wrong)) from None
        return record

    def all(self, stage: Recorded[R]) -> dict[str, R]:
        """Every record of a stage, by key.

        Raises:
            DamagedRecordError
        """
        folders = {stage.name, FORMER_NAMES.get(stage.name)}
        found = {key: self.read(stage, key) for folder, key in self.documents() if folder in folders}
        return {key: record for key, record in found.items() if record is not None}

    def discard(self, stage: Recorded[R], key: str) -> None:
        """Remove a record, if there is one: the stage never finished for this key."""
        for folder, other in list(self.documents()):
            if other == key and folder in (stage.name, FORMER_NAMES.get(stage.name)):
                self.remove(folder, key)

    def require(self, stage: Recorded[R], key: str) -> R:
        """
        Raises:
            CorankError: there is no such record, or it is damaged.
        """
        record = self.read(stage, key)
        if record is None:
            raise CorankError(f"{stage.name} has no record for {key}; run `corank run` first")
        return record

    def write(self, stage: Recorded[R], key: str, record: R) -> None:
        """Write a record, whole or not at all; from then on it survives a crash of the machine."""
        self.put(stage.name, key, asdict(record))

    def get(self, folder: str, key: str) -> dict[str, Any] | None:
        """A plain document, or None.

        Raises:
            DamagedRecordError
        """
        path = self.path(folder, key)
        if self.fs.get_file_info(path).type == fs.FileType.NotFound:
            return None
        with self.fs.open_input_stream(path) as stream:
            text = stream.read()
        try:
            document = dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise DamagedRecordError(path, error) from error
        if document.pop(CHECKSUM, None) not in (None, digest(document)):
            raise DamagedRecordError(path, "its checksum differs")
        return document

    def documents(self) -> Iterator[tuple[str, str]]:
        """Folder and key of every document, in order."""
        found = self.fs.get_file_info(fs.FileSelector(self.root, allow_not_found=True, recursive=True))
        for path in sorted(entry.path for entry in found if entry.path.endswith(".json")):
            folder, _, name = path.removeprefix(f"{self.root}/").rpartition("/")
            yield folder, name.removesuffix(".json")

    def path(self, folder: str, key: str) -> str:
        return f"{self.root}/{folder}/{key}.json"

    def remove(self, folder: str, key: str) -> None:
        """Remove a document, so that what it records counts as never made."""
        self.fs.delete_file(self.path(folder, key))

    def put(self, folder: str, key: str, content: Mapping[str, Any]) -> None:
        """Write a plain document as :meth:`write` does a record."""
        path = self.path(folder, key)
        document = {**content, "recorded_at": datetime.now(UTC).isoformat(timespec="seconds")}
        document = json.loads(json.dumps(document, default=str))  # as readers will get it
        text = json.dumps({**document, CHECKSUM: digest(document)}, indent=1, sort_keys=True).encode()
        with writing(path, len(text)):
            self.fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
            if isinstance(self.fs, fs.LocalFileSystem):
                _write_durably(Path(path), text)
            else:
                with self.fs.open_output_stream(path) as stream:
                    stream.write(text)


def _write_durably(path: Path, content: bytes) -> None:
    """Write a file under another name, then rename it; content and name are on the disk when this returns."""
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
