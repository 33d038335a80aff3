"""Sample statistics against plain Python, merged against whole, and the count of distinct ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from features.sample_table import feature_column, timeline_column
from features.samples.export import Unnested, flatten
from features.samples.statistics import SKETCH, SampleStatistics, ValueCounts, sample_statistics
from features.schema import FieldSpec
from tests.features.test_export import build_samples, read_all
from tests.features.worlds import SCHEMA


def counted_in_plain_python(spec: FieldSpec, values: list[Any]) -> dict[str, Any]:
    lists = [value if isinstance(value, list) else [value] for value in values]
    known = [[one for one in some if one is not None and (spec.kind == "number" or one != 0)] for some in lists]
    figures = {"kind": spec.kind, "values": len(values), "coverage": sum(map(bool, known)) / len(values)}
    if spec.kind != "number":
        ids = [one for some in known for one in some]
        figures |= {"ids": len(ids), "distinct": len(set(ids)), "unique_ratio": len(set(ids)) / len(ids)}
    return figures


@pytest.mark.parametrize("seed", range(3))
def test_statistics_equal_a_plain_python_reading_of_their_names(tmp_path: Path, seed: int) -> None:
    rows = read_all(build_samples(tmp_path, seed, users=12))
    figures = SampleStatistics.of(rows, SCHEMA).describe(SCHEMA)
    plain = rows.to_pylist()
    requests = [request for row in plain for request in row["requests"]]
    candidates = [candidate for request in requests for candidate in request["candidates"]]
    assert [figures[name] for name in ("timelines", "requests", "candidates")] == [
        len(plain),
        len(requests),
        len(candidates),
    ]
    assert figures["candidates_per_request"] == len(candidates) / len(requests)
    assert figures["requests_per_timeline"] == len(requests) / len(plain)
    for features, holders in ((SCHEMA.user_side, requests), (SCHEMA.item_side, candidates)):
        for feature in features:
            expected = counted_in_plain_python(feature, [one[feature_column(feature)] for one in holders])
            assert figures["features"][feature.name] == {"side": feature.side, **expected}
    for sequence in SCHEMA.sequences:
        visible = [min(request[f"end__{sequence.name}"], sequence.length) for request in requests]
        found = figures["sequences"][sequence.name]
        assert found["coverage"] == sum(map(bool, visible)) / len(visible)
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)):
            assert found["visible_events"][name] == np.quantile(visible, share, method="inverted_cdf")
        for field in sequence.fields:
            values = [value for row in plain for value in row[timeline_column(sequence, field)]]
            assert found["fields"][field.name] == counted_in_plain_python(field, values)


def test_statistics_of_parts_merge_to_those_of_the_whole(tmp_path: Path) -> None:
    rows = read_all(build_samples(tmp_path, seed=5, users=12))
    whole = SampleStatistics.of(rows, SCHEMA).describe(SCHEMA)
    merged = SampleStatistics.empty(SCHEMA)
    for start in range(0, rows.num_rows, 5):
        merged = merged.merge(SCHEMA, SampleStatistics.of(rows.slice(start, 5), SCHEMA))
    merged = merged.merge(SCHEMA, SampleStatistics.of(rows.slice(0, 0), SCHEMA))
    parts = merged.describe(SCHEMA)
    assert parts.pop("bytes")["flattened_arrow_computed"] == whole.pop("bytes")["flattened_arrow_computed"]
    assert parts == whole


def test_nothing_has_no_shares_instead_of_an_error() -> None:
    figures = SampleStatistics.empty(SCHEMA).describe(SCHEMA)
    assert figures["candidates_per_request"] is None
    assert figures["features"]["user_id"]["coverage"] is None
    assert figures["sequences"]["watched"]["visible_events"]["max"] is None
    assert figures["bytes"]["flattened_parquet_estimated"] is None


@pytest.mark.parametrize("distinct", [SKETCH - 1, 4 * SKETCH])
def test_distinct_ids_are_exact_when_few_and_within_two_percent_when_many(distinct: int) -> None:
    spec = FieldSpec(name="item_id")
    rng = np.random.default_rng(distinct)
    pool = rng.integers(-(2**63), 2**63, distinct)  # as uniform as xxh64
    codes = np.concatenate([pool, rng.choice(pool, distinct // 2), np.zeros(100, np.int64)])
    rng.shuffle(codes)
    whole = ValueCounts.of(spec, pa.array(codes))
    halves = [ValueCounts.of(spec, pa.array(half)) for half in np.array_split(codes, 2)]
    merged = halves[0].merge(spec, halves[1])
    assert merged.distinct(spec) == whole.distinct(spec)
    assert (merged.rows, merged.covered, merged.ids) == (len(codes), len(codes) - 100, len(codes) - 100)
    assert len(merged.smallest) <= SKETCH
    assert whole.distinct(spec) == pytest.approx(distinct, rel=0 if distinct < SKETCH else 0.02)


def test_a_category_is_counted_exactly() -> None:
    spec = FieldSpec(name="color", kind="category", vocabulary=("red", "blue", "green"))
    counts = ValueCounts.of(spec, pa.array([0, 1, 1, 3]))
    assert (counts.distinct(spec), counts.ids, counts.covered, counts.rows) == (2, 3, 3, 4)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_files_are_counted_on_ray_and_bytes_are_measured(tmp_path: Path, local_ray: None) -> None:
    source = build_samples(tmp_path, seed=3)
    rows = read_all(source)
    seen: list[tuple[int, int]] = []
    figures = sample_statistics(source, lambda *at: seen.append(at)).describe(SCHEMA)
    expected = SampleStatistics.of(rows, SCHEMA).describe(SCHEMA)
    files = source.files()
    assert seen[-1] == (len(files), len(files))
    found = figures.pop("bytes")
    assert found["flattened_arrow_computed"] == expected.pop("bytes")["flattened_arrow_computed"]
    assert found["sample_parquet"] == sum(Path(source.root, file).stat().st_size for file in files)
    assert found["estimated_from_candidates"] == figures["candidates"]  # small files are sampled whole
    samples = Unnested.of(rows)
    least = flatten(samples, SCHEMA, 0, len(samples.candidates)).nbytes // 10
    assert found["flattened_parquet_estimated"] > least
    assert figures == expected
