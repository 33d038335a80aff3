"""Fingerprints, which identify the content of partitions so that no change can be missed.

A Delta version is one of the whole table. A partition's fingerprint names the last commit that changed data in it;
compaction changes none. Commits cannot tell when they were cleaned up behind a checkpoint, or when a `remove` does not
say where it removed. Then the fingerprint names the partition's set of live files, if that has changed since the last
look.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from deltalake import DeltaTable
from pyarrow import fs

WHOLE_TABLE = "None"
"""Name of the only partition of a table without partitions."""


def fingerprints(
    delta: DeltaTable,
    store: fs.FileSystem,
    files: Mapping[str, Sequence[str]],
    touched: Callable[[Mapping[str, Any]], Iterable[str] | None],
    cache: dict[str, Any] | None = None,
) -> dict[str, str]:
    """The fingerprint of every partition.

    Args:
        store: rooted at the table.
        files: per partition the live files that may hold its rows.
        touched: the partitions that an ``add`` or ``remove`` of the log changes; None when it does not say.
        cache: what an earlier call left there; only later commits are read then, so that log clean-up changes nothing.
    """
    identity, newest = str(delta.metadata().id)[:8], delta.version()
    cache = cache if cache is not None else {}
    known = cache.get("version", -1)
    if cache.get("table") != identity or known > newest or _was_replaced(store, cache):
        cache.clear()
        known = -1
    named: dict[str, int | str] = cache.get("partitions", {})
    before: dict[str, str] = cache.get("files", {})
    now = {partition: _digest(sorted(paths)) for partition, paths in files.items()}
    seen: dict[str, int] = {}
    doubt = -1  # the newest version that may have touched partitions without saying so
    for version in range(known + 1, newest + 1):
        actions = _actions(store, version)
        if actions is None:
            doubt = version
            continue
        for action in actions:
            partitions = touched(action)
            if partitions is None:
                doubt = version
            else:
                seen |= dict.fromkeys(partitions, version)
    # a deletion vector changes the rows of a file, not its name
    hidden = "deletionVectors" in (delta.protocol().reader_features or ())
    for partition in files:
        if partition in seen:
            named[partition] = seen[partition]
        if 0 <= doubt >= seen.get(partition, -1) and (now[partition] != before.get(partition) or hidden):
            named[partition] = f"files {now[partition]}" + (f" of version {newest}" if hidden else "")
        named.setdefault(partition, 0)
    cache |= {"table": identity, "version": newest, "partitions": named, "files": now}
    cache["commit"] = digest_of_commit(store, newest)
    return {partition: f"{identity}@{named[partition]}" for partition in files}


def _was_replaced(store: fs.FileSystem, cache: Mapping[str, Any]) -> bool:
    """Whether the last commit seen is now another one, since the log was restored and then written differently."""
    if cache.get("commit") is None:
        return False
    now = digest_of_commit(store, cache["version"])
    return now is not None and now != cache["commit"]


def digest_of_commit(store: fs.FileSystem, version: int) -> str | None:
    """Tells a version from another one of this number, of a log that was restored; None when it was cleaned up."""
    commit = _commit(store, version)
    return None if commit is None else _digest(commit.decode())


def _actions(store: fs.FileSystem, version: int) -> list[dict[str, Any]] | None:
    """What a commit with data change added and removed; None when it was cleaned up."""
    commit = _commit(store, version)
    if commit is None:
        return None
    entries = [json.loads(line) for line in commit.splitlines() if line.strip()]
    actions = [entry.get("add") or entry.get("remove") for entry in entries]
    return [action for action in actions if action and action.get("dataChange", True)]


def _commit(store: fs.FileSystem, version: int) -> bytes | None:
    name = f"_delta_log/{version:020d}.json"
    if store.get_file_info(name).type == fs.FileType.NotFound:
        return None
    return bytes(store.open_input_file(name).read())


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()
