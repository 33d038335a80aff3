"""The flattened export against plain Python over the sample table's rows, and how it appears."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from features.builder.fold import fold_bucket
from features.builder.states import SAMPLES
from features.delta.write import replace_partition, write_file
from features.errors import ConfigError, CorankError
from features.sample_table import feature_column, label_column, sample_schema, timeline_column
from features.samples.export import MANIFEST, Unnested, chunk_bounds, export_impressions, flatten, flattened_bytes
from features.samples.source import SampleSource
from tests.features.worlds import DAYS, SCHEMA, settings, write_world

ALWAYS = (0, 2**62)


def build_samples(path: Path, seed: int, users: int = 6) -> SampleSource:
    """The sample table of a small world, built in this process."""
    build = settings(write_world(path / "log", seed, users), path / "tables")
    files: dict[str, list[Any]] = {day: [] for day in DAYS}
    for bucket in range(2):
        for table, day, rows, _ in fold_bucket(build, bucket, DAYS, []):
            if table == SAMPLES and rows.num_rows:
                files[day].append(write_file(build.table_root(SAMPLES), rows, {"dt": day, "bucket": str(bucket)}, {}))
    for day in DAYS:
        replace_partition(build.table_root(SAMPLES), day, files[day], sample_schema(SCHEMA), {})
    return SampleSource(build.table_root(SAMPLES), SCHEMA, tuple(DAYS), *ALWAYS)


def read_all(source: SampleSource) -> pa.Table:
    return pa.concat_tables([source.read(file) for file in source.files()])


def flattened_in_plain_python(rows: pa.Table) -> list[dict[str, Any]]:
    """One dict per candidate, read off the definition."""
    result = []
    for row in rows.to_pylist():
        for request in row["requests"]:
            for candidate in request["candidates"]:
                one = {name: request[name] for name in ("request_id", "ts")}
                one |= {"user_id": row["user_id"], "item_id": candidate["item_id"], "weight": candidate["weight"]}
                one |= {feature_column(f): request[feature_column(f)] for f in SCHEMA.user_side}
                one |= {feature_column(f): candidate[feature_column(f)] for f in SCHEMA.item_side}
                one |= {label_column(task): candidate[label_column(task)] for task in SCHEMA.tasks}
                for sequence in SCHEMA.sequences:
                    end = request[f"end__{sequence.name}"]
                    for field in (None, *sequence.fields):
                        column = timeline_column(sequence, field)
                        one[f"history__{column}"] = row[column][max(0, end - sequence.length) : end]
                result.append(one)
    return result


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (row["request_id"], row["item_id"]))


@pytest.mark.parametrize("seed", range(4))
def test_a_flattened_row_holds_what_the_model_sees_of_its_candidate(tmp_path: Path, seed: int) -> None:
    rows = read_all(build_samples(tmp_path, seed))
    expected = flattened_in_plain_python(rows)
    cut = [row["requests"][0]["end__watched"] < len(row["watched__ts"]) for row in rows.to_pylist()]
    assert any(cut)  # some request sees less than its timeline
    assert any(row["label__click"] is None for row in expected)
    samples = Unnested.of(rows)
    for limit, several in ((1, True), (600, True), (2**30, False)):
        bounds = list(chunk_bounds(flattened_bytes(samples, SCHEMA), limit))
        chunks = [flatten(samples, SCHEMA, start, stop) for start, stop in bounds]
        assert pa.concat_tables(chunks).to_pylist() == expected
        assert (len(bounds) > 1) == several


def test_raw_numbers_are_those_of_the_tables_where_the_model_reads_logarithms(tmp_path: Path) -> None:
    rows = read_all(build_samples(tmp_path, seed=1))
    (feature,) = [feature for feature in SCHEMA.features if feature.kind == "number"]
    logged = SCHEMA.model_copy(
        update={
            "features": tuple(
                one.model_copy(update={"scale": "log"}) if one is feature else one for one in SCHEMA.features
            )
        }
    )
    samples, name = Unnested.of(rows), feature_column(feature)
    stored, raw = (flatten(samples, logged, 0, len(samples.candidates), raw) for raw in (False, True))
    assert any(value is not None for value in stored[name].to_pylist())
    expected = [None if value is None else pytest.approx(math.expm1(value)) for value in stored[name].to_pylist()]
    assert raw[name].to_pylist() == expected
    assert raw.drop_columns([name]).equals(stored.drop_columns([name]))


def test_rows_are_flattened_alike_from_a_slice_of_a_larger_table(tmp_path: Path) -> None:
    rows = read_all(build_samples(tmp_path, seed=1))
    part = rows.slice(2, 3)
    samples = Unnested.of(part)
    flattened = flatten(samples, SCHEMA, 1, len(samples.candidates)).to_pylist()
    assert flattened == flattened_in_plain_python(part)[1:]


def test_computed_bytes_are_those_of_the_arrow_table_but_for_the_bitmaps_of_nulls(tmp_path: Path) -> None:
    samples = Unnested.of(read_all(build_samples(tmp_path, seed=2, users=40)))
    count = len(samples.candidates)
    table = flatten(samples, SCHEMA, 0, count)
    computed = int(flattened_bytes(samples, SCHEMA).sum())
    buffers = [array for column in table.columns for array in column.chunks]
    events = sum(len(array.values) for array in buffers if pa.types.is_list(array.type))
    bitmaps = (count * table.num_columns + events) / 8
    assert 0 <= table.nbytes - computed <= bitmaps + 16 * table.num_columns
    assert bitmaps < 0.1 * computed


@pytest.mark.parametrize("seed", range(5))
def test_chunks_follow_each_other_within_the_limit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 50, 200)
    sizes[rng.integers(0, 200, 5)] = 500  # larger than the limit: a chunk of its own
    bounds = list(chunk_bounds(sizes, 100))
    assert [start for start, _ in bounds] == [0, *[stop for _, stop in bounds[:-1]]]
    assert bounds[-1][1] == len(sizes)
    for start, stop in bounds:
        assert sizes[start:stop].sum() <= 100 or stop == start + 1
    for (start, stop), (_, following) in itertools.pairwise(bounds):
        assert following > stop
        assert sizes[start : stop + 1].sum() > 100  # no chunk is smaller than it needs to be


def test_a_folder_that_is_no_export_is_never_touched(tmp_path: Path) -> None:
    source = build_samples(tmp_path, seed=1)
    target = tmp_path / "home"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="no export"):
            export_impressions(source, target, dict.fromkeys(DAYS, 0), overwrite)
    with pytest.raises(ConfigError, match="file of this name"):
        export_impressions(source, target / "thesis.txt", dict.fromkeys(DAYS, 0), overwrite=True)
    assert [path.name for path in tmp_path.rglob("*.txt")] == ["thesis.txt"]
    assert {path.name for path in tmp_path.iterdir()} == {"log", "tables", "home"}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_export_is_complete_or_absent(tmp_path: Path, local_ray: None) -> None:
    source = build_samples(tmp_path, seed=3)
    expected = flattened_in_plain_python(read_all(source))
    rows = candidates_by_partition(source)
    target = tmp_path / "out" / "flat"
    seen: list[tuple[int, int]] = []

    wrong = rows | {DAYS[1]: rows[DAYS[1]] + 1}
    with pytest.raises(CorankError, match=f"partition {DAYS[1]}: the sample table holds {rows[DAYS[1]] + 1} cand"):
        export_impressions(source, target, wrong)
    assert list((tmp_path / "out").iterdir()) == []

    result = export_impressions(source, target, rows, progress=lambda *at: seen.append(at))
    files = source.files()
    assert seen == [(done, len(files)) for done in range(1, len(files) + 1)]
    assert [path.name for path in target.parent.iterdir()] == ["flat"]
    assert {str(path.relative_to(target)) for path in target.rglob("*.parquet")} == set(files)
    dataset = ds.dataset(target, format="parquet", partitioning="hive")
    content = dataset.to_table()
    assert set(content["dt"].to_pylist()) == set(DAYS)
    assert in_order(content.drop(["dt", "bucket"]).to_pylist()) == in_order(expected)
    assert result.candidates == len(expected) == sum(rows.values())
    assert json.loads((target / MANIFEST).read_text())["partitions"] == rows
    assert result.parquet_bytes == sum(path.stat().st_size for path in target.rglob("*.parquet"))
    assert result.sample_parquet_bytes == sum(Path(source.root, file).stat().st_size for file in files)

    with pytest.raises(ConfigError, match="--overwrite"):
        export_impressions(source, target, rows)
    one_day = SampleSource(source.root, SCHEMA, (DAYS[2],), *ALWAYS)
    Path(source.root, files[0]).write_bytes(b"damaged")
    with pytest.raises(Exception, match=files[0].rsplit("/", 1)[1]):
        export_impressions(source, target, rows, overwrite=True)
    assert ds.dataset(target, format="parquet", partitioning="hive").count_rows() == len(expected)
    export_impressions(one_day, target, rows, overwrite=True)
    assert ds.dataset(target, format="parquet", partitioning="hive").count_rows() == rows[DAYS[2]]
    assert [path.name for path in target.parent.iterdir()] == ["flat"]


def candidates_by_partition(source: SampleSource) -> dict[str, int]:
    """Candidates per partition, by Polars instead of the code under test."""
    rows = pl.read_delta(source.root)
    counts = rows.group_by("dt").agg(pl.col("requests").list.eval(pl.element().struct.field("candidates").list.len()))
    return {dt: sum(map(sum, lists)) for dt, lists in counts.iter_rows()}
