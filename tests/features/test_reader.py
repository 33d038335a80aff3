"""The reader: the same batches with Ray and without, resumed anywhere, and every request once."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from hypothesis import given, settings
from hypothesis import strategies as st

import features.samples.source
from features.batch import collate
from features.errors import CorankError
from features.samples.source import SampleSource
from features.schema import SECOND
from tests.models.batches import make_rows, make_schema

SCHEMA = make_schema()
FILES, USERS = 7, 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SampleSource:
    """Two partitions with a file per bucket; every user id is of its file."""
    root = str(tmp_path_factory.mktemp("samples"))
    for file in range(FILES):
        rows = make_rows(SCHEMA, file, timelines=USERS)
        renamed = {
            "user_id": [f"{file}-{user}" for user in range(USERS)],
            "dt": [f"d{file % 2}"] * USERS,
            "bucket": [str(file)] * USERS,
        }
        for name, values in renamed.items():
            rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), pa.array(values))
        write_deltalake(root, rows, partition_by=["dt", "bucket"], mode="append")
    return SampleSource(root, SCHEMA, ("d0", "d1"), 0, 10**18)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that are neither a file nor all of them, so that their edges are tested."""
    monkeypatch.setattr(features.samples.source, "WINDOW_ROWS", 16)


def plain(
    source: SampleSource, candidates: int = 20, events: int = 200, seed: int | None = 5, skip: int = 0
) -> list[pa.Table]:
    return list(source.batches(candidates, events, seed, skip=skip, in_process=True))


def requests(batches: list[pa.Table]) -> list[tuple[str, str]]:
    found = []
    for rows in batches:
        batch = collate(rows, SCHEMA)
        found += list(zip(batch.user_id.tolist(), batch.request_id.tolist(), strict=True))
    return found


def equal(ours: list[pa.Table], theirs: list[pa.Table]) -> bool:
    return len(ours) == len(theirs) and all(a.equals(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [None, 5])
def test_ray_data_and_this_process_give_the_same_batches_in_the_same_order(
    local_ray: None, source: SampleSource, seed: int | None
) -> None:
    streamed = list(source.batches(20, 200, seed))
    assert equal(streamed, plain(source, seed=seed))
    assert equal(list(source.batches(20, 200, seed, skip=3)), streamed[3:])


def test_reading_can_go_on_after_any_number_of_batches(source: SampleSource) -> None:
    whole = plain(source)
    assert len(whole) > 8
    for skip in range(len(whole) + 2):
        assert equal(plain(source, skip=skip), whole[skip:])


@given(candidates=st.integers(1, 80), events=st.integers(1, 400), seed=st.none() | st.integers(0, 10**9))
@settings(max_examples=20, deadline=None)
def test_every_request_comes_exactly_once_under_every_budget(
    source: SampleSource, candidates: int, events: int, seed: int | None
) -> None:
    found = requests(plain(source, candidates, events, seed))
    expected = requests([source.read(file) for file in source.files()])
    assert sorted(found) == sorted(expected)
    assert len(set(found)) == len(found)


def test_a_seed_decides_the_order_and_another_one_gives_another(source: SampleSource) -> None:
    assert equal(plain(source, seed=1), plain(source, seed=1))
    assert requests(plain(source, seed=1)) != requests(plain(source, seed=2))
    assert requests(plain(source, seed=1)) != requests(plain(source, seed=None))


def test_rows_are_shuffled_within_files_too(source: SampleSource) -> None:
    users = [user for user, _ in requests(plain(source, seed=1))]
    files = [user.split("-")[0] for user in users]
    changes = sum(a != b for a, b in pairwise(files))
    assert changes >= FILES  # more often than files that lie one after the other would


def test_the_batches_do_not_hang_on_where_blocks_of_rows_end(source: SampleSource) -> None:
    rows = pa.concat_tables([source.read(file) for file in source.files()])
    whole = list(features.samples.source._windows([rows]))
    for size in (1, 5, 16, 41):
        pieces = [rows.slice(start, size) for start in range(0, rows.num_rows, size)]
        assert equal(list(features.samples.source._windows([rows.slice(0, 0), *pieces])), whole)


def test_only_the_partitions_and_times_asked_for_are_read(source: SampleSource) -> None:
    low, high = 1501 * SECOND, 2001 * SECOND
    part = SampleSource(source.root, SCHEMA, ("d1",), low, high)
    batches = [collate(rows, SCHEMA) for rows in plain(part)]
    assert {user.split("-")[0] for batch in batches for user in batch.user_id} <= {"1", "3", "5"}
    times = [int(ts) for batch in batches for ts in batch.users.ts]
    assert times
    assert all(low <= ts < high for ts in times)
    assert plain(SampleSource(source.root, SCHEMA, ("d9",), 0, 1)) == []


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_deltalake(tmp_path, make_rows(SCHEMA, 1), partition_by=["dt", "bucket"])
    broken = SampleSource(str(tmp_path), SCHEMA, ("d",), 0, 10**18)
    (file,) = broken.files()
    (tmp_path / file).write_bytes(b"not Parquet")
    with pytest.raises(CorankError, match=file.split("/")[-1]):
        plain(broken)
