"""The sample table flattened to impressions: one row per candidate, for libraries that know nothing else.

Every row repeats its request's features and its visible history, ``timeline[max(0, end − L):end]``: exactly what
the models read, stored once per candidate instead of once per user. Values are the sample table's own: codes of
:mod:`features.encoding` (0 is unknown), numbers, labels with null where they are not known.

Legend: U rows of the sample table, R requests, C candidates, E events.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.delta.paths import table_store
from features.errors import ConfigError, CorankError
from features.sample_table import code_type, end_column, feature_column, label_column, timeline_column
from features.samples.source import SampleSource
from features.schema import FieldSpec, Schema, Sequence
from features.tasks import each, ray_runs

CHUNK_BYTES = 64 * 2**20
"""Arrow bytes that are flattened at a time into one row group; with the file it reads they bound a task's memory."""

MANIFEST = "_export.json"
"""File that tells what an export holds, and that --overwrite may replace the folder. Parquet readers skip its name."""

OFFSET_BYTES = 4
"""Arrow's offset of one text or list."""


@dataclass(frozen=True)
class Unnested:
    """Rows of the sample table with their requests and candidates side by side.

    Attributes:
        rows: [U], each column in one chunk.
        requests, candidates: struct arrays, [R] and [C].
        row_of_request: [R].
        request_of_candidate: [C].
    """

    rows: pa.Table
    requests: Any
    candidates: Any
    row_of_request: np.ndarray
    request_of_candidate: np.ndarray

    @classmethod
    def of(cls, rows: pa.Table) -> Unnested:
        """Unnest rows in the layout of :func:`features.sample_table.sample_schema`, ``dt`` and ``bucket`` left out."""
        requests = rows["requests"].combine_chunks()
        candidates = requests.flatten().field("candidates")
        return cls(rows, requests.flatten(), candidates.flatten(), _owners(requests), _owners(candidates))

    def events(self, sequence: Sequence, field: FieldSpec | None) -> Any:
        """Values of one field (None: ts) of all timelines, timeline after timeline, [E]."""
        return self.rows[timeline_column(sequence, field)].combine_chunks().flatten()

    def window(self, sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
        """First event, as an index into :meth:`events`, and number of events that each request sees, [R] and [R]."""
        lengths = _lengths(self.rows[timeline_column(sequence, None)].combine_chunks())
        starts = (np.cumsum(lengths) - lengths)[self.row_of_request]
        end = self.requests.field(end_column(sequence)).to_numpy(zero_copy_only=False).astype(np.int64)
        first = np.maximum(0, end - sequence.length)
        return starts + first, end - first


def history_column(sequence: Sequence, field: FieldSpec | None) -> str:
    """Column of the visible events' values of one field (None: ts), oldest first."""
    return f"history__{timeline_column(sequence, field)}"


def export_schema(schema: Schema) -> pa.Schema:
    """Arrow schema of the export: one row per candidate."""
    return pa.schema(
        [
            *[pa.field(name, pa.string()) for name in ("request_id", "user_id", "item_id")],
            pa.field("ts", pa.int64()),
            *[
                pa.field(feature_column(feature), code_type(feature))
                for feature in (*schema.user_side, *schema.item_side)
            ],
            *[pa.field(label_column(task), pa.int8()) for task in schema.tasks],
            pa.field("weight", pa.float32()),
            *[
                pa.field(history_column(sequence, field), pa.list_(code_type(field) if field else pa.int64()))
                for sequence in schema.sequences
                for field in (None, *sequence.fields)
            ],
        ]
    )


def flatten(samples: Unnested, schema: Schema, start: int, stop: int, raw: bool = False) -> pa.Table:
    """Candidates ``start … stop − 1`` in the layout of :func:`export_schema`.

    Args:
        raw: numbers of ``scale: log`` as they are in the tables, not as log(1 + x).
    """
    request = samples.request_of_candidate[start:stop]
    candidates = samples.candidates.slice(start, stop - start)
    columns: dict[str, Any] = {"user_id": samples.rows["user_id"].take(pa.array(samples.row_of_request[request]))}
    for name in ("request_id", "ts", *map(feature_column, schema.user_side)):
        columns[name] = samples.requests.field(name).take(pa.array(request))
    for name in ("item_id", "weight", *map(feature_column, schema.item_side), *map(label_column, schema.tasks)):
        columns[name] = candidates.field(name)
    for sequence in schema.sequences:
        first, lengths = (values[request] for values in samples.window(sequence))
        ends = np.cumsum(lengths)
        events = pa.array(np.repeat(first - (ends - lengths), lengths) + np.arange(lengths.sum()))
        offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
        for field in (None, *sequence.fields):
            values = samples.events(sequence, field).take(events)
            if raw and field is not None and field.scale == "log":
                values = _unscaled(values)
            columns[history_column(sequence, field)] = pa.ListArray.from_arrays(offsets, values)
    for feature in schema.features if raw else ():
        if feature.scale == "log":
            columns[feature_column(feature)] = _unscaled(columns[feature_column(feature)])
    layout = export_schema(schema)
    return pa.table([columns[name] for name in layout.names], schema=layout)


def _unscaled(values: Any) -> Any:
    """x of log(1 + x)."""
    return pc.expm1(values.cast(pa.float64())).cast(values.type)


def flattened_bytes(samples: Unnested, schema: Schema) -> np.ndarray:
    """Arrow bytes of each candidate's flattened row, [C], by arithmetic; the bitmaps of nulls are left out."""
    user = _sizes(samples.rows["user_id"].combine_chunks())
    per_request = user[samples.row_of_request]
    for name in ("request_id", "ts", *map(feature_column, schema.user_side)):
        per_request = per_request + _sizes(samples.requests.field(name))
    for sequence in schema.sequences:
        fields = (None, *sequence.fields)
        _, lengths = samples.window(sequence)
        per_event = sum(_width(code_type(field) if field else pa.int64()) for field in fields)
        per_request = per_request + lengths * per_event + OFFSET_BYTES * len(fields)
    per_candidate: np.ndarray = per_request[samples.request_of_candidate]
    for name in ("item_id", "weight", *map(feature_column, schema.item_side), *map(label_column, schema.tasks)):
        per_candidate = per_candidate + _sizes(samples.candidates.field(name))
    return per_candidate


def chunk_bounds(sizes: np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges (start, stop) of rows [C] whose sizes add up to at most ``limit``, or of one larger row."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        used = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, used + limit, side="right")))
        yield start, stop
        start = stop


def _width(kind: pa.DataType) -> int:
    return int(kind.bit_width) // 8


def _sizes(values: Any) -> np.ndarray:
    """Arrow bytes of every value of an array of texts, numbers or lists of numbers."""
    if pa.types.is_string(values.type):
        text: np.ndarray = np.asarray(pc.binary_length(values).fill_null(0)).astype(np.int64)
        return OFFSET_BYTES + text
    if pa.types.is_list(values.type):
        return OFFSET_BYTES + _width(values.type.value_type) * _lengths(values)
    return np.full(len(values), _width(values.type), np.int64)


def _lengths(lists: Any) -> np.ndarray:
    lengths: np.ndarray = np.asarray(pc.list_value_length(lists).fill_null(0)).astype(np.int64)
    return lengths


def _owners(lists: Any) -> np.ndarray:
    """For every value of a list array the index of its list."""
    return np.repeat(np.arange(len(lists)), _lengths(lists))


# --- writing ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        candidates: rows, as many as the sample table has candidates.
        parquet_bytes, arrow_bytes: of the export on disk and, computed, in memory.
        sample_parquet_bytes, sample_arrow_bytes: of the rows of the sample table it was made from.
    """

    files: int
    candidates: int
    parquet_bytes: int
    arrow_bytes: int
    sample_parquet_bytes: int
    sample_arrow_bytes: int


def export_impressions(
    source: SampleSource,
    target: Path,
    candidates: Mapping[str, int],
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    raw: bool = False,
) -> Export:
    """Write the flattened samples below ``target``, on Ray where it runs: one Parquet file per file of samples.

    The folder appears whole or not at all: it is written beside and renamed. On a cluster it lies on storage that
    all nodes share.

    Args:
        candidates: per partition, how many the sample table is known to hold.
        overwrite: replace an earlier export at ``target``.
        progress: called with (files done, files in all).
        raw: see :func:`flatten`.

    Raises:
        ConfigError: ``target`` is a file, or holds anything and may not be replaced.
        CorankError: a file cannot be read, or rows in and rows out differ. Nothing appears then.
    """
    target = target.absolute()
    staging, replaced = (target.with_name(f".{target.name}.{what}") for what in ("partial", "replaced"))
    if replaced.exists() and not target.exists():  # an export was killed between the two renames below
        replaced.rename(target)
    _require_replaceable(target, overwrite)
    for leftover in (staging, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        result = _write(source, staging, candidates, progress, raw)
        if target.exists():
            target.rename(replaced)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    return result


def _require_replaceable(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigError(f"--target {target}: there is a file of this name; choose another folder")
    if not target.exists() or not any(target.iterdir()):
        return
    if not (target / MANIFEST).is_file():
        raise ConfigError(f"--target {target}: the folder holds something that is no export; choose another folder")
    if not overwrite:
        raise ConfigError(f"--target {target}: an export is there already; --overwrite replaces it")


def _write(
    source: SampleSource, root: Path, candidates: Mapping[str, int], progress: Callable[[int, int], None], raw: bool
) -> Export:
    written: list[dict[str, Any]] = []
    files = source.files()
    # closed as soon as the loop ends, as tasks that still run would go on writing
    with closing(each(_export_file, ((file, source, str(root), raw) for file in files), ray_runs())) as exported:
        for record in exported:
            written.append(record)
            progress(len(written), len(files))
    rows = dict.fromkeys(source.partitions, 0)
    for record in written:
        if not (root / record["file"]).is_file():
            raise CorankError(
                f"export: {record['file']} was written on another machine; "
                "--target must lie on storage that all nodes of the Ray cluster share"
            )
        rows[partition_of_file(record["file"])] += int(pq.read_metadata(root / record["file"]).num_rows)
    for partition in source.partitions:
        if rows[partition] != candidates[partition]:
            raise CorankError(
                f"export, partition {partition}: the sample table holds {candidates[partition]:,} candidates, but "
                f"{rows[partition]:,} rows were written; nothing was kept. If the samples were rebuilt meanwhile, run "
                f"it again; else `corank repair`, then `corank run`, build them again."
            )
    manifest = {"partitions": rows, "schema": source.schema.model_dump(mode="json")}
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    def total(name: str) -> int:
        return sum(int(record[name]) for record in written)

    return Export(
        files=len(written),
        candidates=sum(rows.values()),
        parquet_bytes=sum((root / record["file"]).stat().st_size for record in written),
        arrow_bytes=total("arrow_bytes"),
        sample_parquet_bytes=total("sample_parquet_bytes"),
        sample_arrow_bytes=total("sample_arrow_bytes"),
    )


def _export_file(file: str, source: SampleSource, root: str, raw: bool) -> dict[str, Any]:
    """Flatten one file of the sample table into one of the same name below ``root``, chunk by chunk."""
    rows = source.read(file)
    path = Path(root, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrow_bytes = 0
    with pq.ParquetWriter(path, export_schema(source.schema), compression="zstd") as writer:
        if rows.num_rows:
            samples = Unnested.of(rows)
            sizes = flattened_bytes(samples, source.schema)
            arrow_bytes = int(sizes.sum())
            for start, stop in chunk_bounds(sizes, CHUNK_BYTES):
                writer.write_table(flatten(samples, source.schema, start, stop, raw))
    return {
        "file": file,
        "arrow_bytes": arrow_bytes,
        "sample_parquet_bytes": parquet_bytes(source, file),
        "sample_arrow_bytes": rows.nbytes,
    }


# --- files of the sample table -----------------------------------------------------------------


def partition_of_file(file: str) -> str:
    """The partition ``dt`` of a file of the sample table, from its path ``dt=…/bucket=…/….parquet``."""
    return PurePosixPath(file).parts[0].removeprefix("dt=")


def parquet_bytes(source: SampleSource, file: str) -> int:
    """Size of a file of the sample table."""
    store = table_store(source.root, source.storage_options)
    return int(store.get_file_info(file).size)
