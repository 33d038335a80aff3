"""New events pushed into the online store, against the sample builder reading the same log."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from features.delta.table import Table
from features.encoding import hash_id
from features.errors import CorankError
from features.sample_table import end_column, timeline_column
from features.schema import SECOND, partition_bounds
from features.store.online import apply, materialize
from features.store.push import EventsError, OnlineWriter
from features.store.reader import OnlineReader
from tests.features.stores import build_state, online_content, store_settings
from tests.features.worlds import DAY, DAYS, SCHEMA, write_world

CLOSES = [partition_bounds(day, "day")[1] for day in DAYS]
CLOSE_IN_MILLISECONDS = CLOSES[0] // 1_000
USERS = 4


def now_us() -> int:
    return time.time_ns() // 1_000


def events_of(tables: dict[str, Any], *days: str) -> pl.DataFrame:
    frame: pl.DataFrame = tables["events"].scan(days).collect()
    return frame.sort("ts", "event_id")


def event(ts: int, event_id: str, item: int = 1, **other: Any) -> dict[str, Any]:
    row = {"event_id": event_id, "user_id": 1, "item_id": item, "action": "buy", "seconds": None, "ts": ts}
    return row | other


def bought(reader: OnlineReader, user_id: str = "1") -> list[tuple[int, int]]:
    history = reader.sequences(user_id)["bought"]
    return list(zip(history.ts.tolist(), history.fields["item_id"].tolist(), strict=True))


@pytest.mark.parametrize("seed", [3, 5])
@pytest.mark.parametrize("log_delay", [0, 3 * SECOND])
def test_a_request_after_pushes_sees_what_the_sample_builder_shows_it(
    tmp_path: Path, seed: int, log_delay: int
) -> None:
    tables = write_world(tmp_path, seed, users=USERS)
    samples = build_state(tables, tmp_path, log_delay)
    settings = store_settings(tables, tmp_path, "replay")
    apply(settings)
    materialize(settings, 0, CLOSES[0])
    writer, reader = OnlineWriter(settings, log_delay), OnlineReader(settings)
    changes = sorted(set(tables["items"].scan().collect()["updated_at"]))
    compared = 0
    for day in DAYS[1:]:
        events = events_of(tables, day)
        requests = [
            (request["ts"], user, row, request) for user, row in samples[day].items() for request in row["requests"]
        ]
        pushed = partition_bounds(day, "day")[0]
        for ts, user, row, request in sorted(requests, key=lambda one: one[0]):
            # an event takes its item's profile along: those before a change are pushed before it
            for moment in [*[one for one in changes if pushed < one <= ts], ts]:
                fresh = events.filter(pl.col("ts").is_between(pushed, moment, closed="left"))
                if fresh.height:
                    writer.push(fresh)
                if moment in changes:
                    materialize(settings, moment, moment)
                pushed = moment
            for sequence in SCHEMA.sequences:
                history = reader.sequences(user)[sequence.name]
                seen = slice(None, int((history.ts < ts - log_delay).sum()))
                end = request[end_column(sequence)]
                start = max(0, end - sequence.length)
                assert history.ts[seen][-sequence.length :].tolist() == row[timeline_column(sequence, None)][start:end]
                for field in sequence.fields:
                    expected = np.array(row[timeline_column(sequence, field)][start:end], float)
                    np.testing.assert_array_equal(history.fields[field.name][seen][-sequence.length :], expected)
                compared += end > start
        for change in changes:  # the rest of the partition
            if pushed < change < partition_bounds(day, "day")[1]:
                writer.push(events.filter(pl.col("ts") < change))
                materialize(settings, change, change)
        writer.push(events)
    assert compared > 10


def test_pushing_again_adds_nothing(tmp_path: Path) -> None:
    tables = write_world(tmp_path, seed=5, users=USERS)
    build_state(tables, tmp_path, 0)
    settings = store_settings(tables, tmp_path, "again")
    apply(settings)
    materialize(settings, 0, CLOSES[1])
    writer = OnlineWriter(settings)
    materialised = online_content(settings, USERS, CLOSES[2])
    # events that the log has brought already: the state keeps L of them, older ones do not come back either
    assert events_of(tables, *DAYS[:2]).height > 10
    assert writer.push(events_of(tables, *DAYS[:2])) == {"watched": 0, "bought": 0}
    np.testing.assert_equal(online_content(settings, USERS, CLOSES[2]), materialised)
    events = events_of(tables, DAYS[2])
    added = writer.push(pl.concat([events, events]))
    assert added == {
        "watched": events.filter(pl.col("action") == "watch").height,
        "bought": events.filter(pl.col("action") == "buy").height,
    }
    pushed = online_content(settings, USERS, CLOSES[2])
    assert pushed != materialised
    assert writer.push(events) == {"watched": 0, "bought": 0}
    np.testing.assert_equal(online_content(settings, USERS, CLOSES[2]), pushed)


@pytest.mark.parametrize("layout", [["dt", "bucket"], []], ids=["bucketed", "cut from ts"])
def test_a_push_to_a_table_without_event_ids_makes_the_ids_that_its_log_has(tmp_path: Path, layout: list[str]) -> None:
    tables = write_world(tmp_path, seed=5, users=USERS)
    rows = tables["events"].scan().collect().drop("event_id").unique()
    rows = rows.with_columns(price=pl.lit(0.1, pl.Float32), seen=pl.lit(True))
    rows = rows.with_columns(pl.from_epoch("ts", "us").dt.replace_time_zone("UTC").alias("shown_at"))
    rows.drop([] if layout else ["dt", "bucket"]).write_delta(
        str(tmp_path / "plain"), delta_write_options={"partition_by": layout} if layout else {}
    )
    tables["events"] = Table("events", str(tmp_path / "plain"), makes=("event_id",), grain="day")
    build_state(tables, tmp_path, 0)
    settings = store_settings(tables, tmp_path, "plain_store", events={"events": tables["events"]})
    apply(settings)
    materialize(settings, 0, CLOSES[0])
    writer = OnlineWriter(settings)
    # as a client sends them: JSON's types, and ids as text
    sent = rows.filter(pl.col("dt") == DAYS[1]).drop("dt", "bucket")
    sent = sent.with_columns(pl.col("user_id").cast(pl.String), pl.col("price").cast(pl.String).cast(pl.Float64))
    sent = sent.with_columns(pl.col("shown_at").dt.strftime("%Y-%m-%dT%H:%M:%S%.6fZ"))
    assert writer.columns("events")[:2] == ["user_id", "ts"]
    assert {"price", "seen"} < set(writer.columns("events"))
    assert sum(writer.push(sent).values()) == sent.height
    assert sum(writer.push(sent).values()) == 0
    pushed = {user: bought(OnlineReader(settings), str(user)) for user in range(USERS)}
    materialize(settings, CLOSES[0], CLOSES[1])
    length = next(one.length for one in SCHEMA.sequences if one.name == "bought")
    for user, events in pushed.items():
        assert bought(OnlineReader(settings), str(user))[-length:] == events[-length:]
    assert sum(writer.push(sent).values()) == 0
    with pytest.raises(EventsError, match=r"the events lack the columns \['price'\]"):
        writer.push(sent.drop("price"))
    with pytest.raises(EventsError, match="price is Float32 in the table, which has no event_id"):
        writer.push(sent.with_columns(price=pl.lit("cheap")))


def test_materialising_a_partition_keeps_pushed_events_that_its_log_does_not_hold(tmp_path: Path) -> None:
    tables = write_world(tmp_path, seed=5, users=USERS)
    build_state(tables, tmp_path, 0)
    live, rested = (store_settings(tables, tmp_path, name) for name in ("live", "rested"))
    for settings in (live, rested):
        apply(settings)
    materialize(live, 0, CLOSES[0])
    OnlineWriter(live).push(events_of(tables, *DAYS[1:]))
    materialize(live, CLOSES[0], CLOSES[1])  # knows days 1 and 2; day 3 was only pushed
    materialize(rested, 0, CLOSES[1])
    before = online_content(rested, USERS, CLOSES[2])
    OnlineWriter(rested).push(events_of(tables, DAYS[2]))
    after = online_content(rested, USERS, CLOSES[2])
    assert after != before
    newest = {name: sequence.length for name, sequence in zip(("watched", "bought"), SCHEMA.sequences, strict=True)}
    kept = online_content(live, USERS, CLOSES[2])
    for user_id in map(str, range(USERS + 1)):
        for name, length in newest.items():
            for key, values in after[user_id][name].items():
                if key == "shade":  # the store did not know these items when their events were pushed
                    continue
                np.testing.assert_array_equal(kept[user_id][name][key][-length:], values[-length:])
    materialize(live, CLOSES[1], CLOSES[2])
    materialize(rested, CLOSES[1], CLOSES[2])
    np.testing.assert_equal(online_content(live, USERS, CLOSES[2]), online_content(rested, USERS, CLOSES[2]))


def test_events_pushed_before_counts_become_known_stay(tmp_path: Path) -> None:
    tables = write_world(tmp_path, seed=5, users=USERS)
    build_state(tables, tmp_path, 0)
    settings = store_settings(tables, tmp_path, "delayed")
    apply(settings)
    OnlineWriter(settings).push(pl.DataFrame([event(CLOSES[0] + 60 * SECOND, "new")]))
    materialize(settings, 0, CLOSES[0] + 3_600 * SECOND, close=CLOSES[0])
    assert (CLOSES[0] + 60 * SECOND, hash_id(1)) in bought(OnlineReader(settings))


@pytest.fixture
def writer(tmp_path: Path) -> OnlineWriter:
    tables = write_world(tmp_path, seed=0, users=USERS)
    build_state(tables, tmp_path, 0)
    settings = store_settings(tables, tmp_path, "small")
    apply(settings)  # nothing is materialised
    return OnlineWriter(settings, log_delay=10)


@pytest.fixture
def reader(writer: OnlineWriter) -> OnlineReader:
    return OnlineReader(writer.settings)


def test_the_newest_events_and_those_within_the_log_delay_stay(writer: OnlineWriter, reader: OnlineReader) -> None:
    assert bought(reader) == []
    writer.push(pl.DataFrame([event(DAY + one, f"e{one}", item=one) for one in (3, 1, 2)]))
    assert [ts - DAY for ts, _ in bought(reader)] == [1, 2, 3]  # 2 of them are L, all are within the delay
    writer.push(pl.DataFrame([event(DAY + 12, "e12"), event(DAY + 20, "e20")]))
    assert [ts - DAY for ts, _ in bought(reader)] == [2, 3, 12, 20]  # a request sees ts < 20 − 10 at least: 2 and 3
    writer.push(pl.DataFrame([event(DAY + 11, "late", item=7), event(DAY + 1, "e1", item=1)]))
    assert bought(reader)[2] == (DAY + 11, hash_id(7))
    assert [ts - DAY for ts, _ in bought(reader)] == [2, 3, 11, 12, 20]  # e1 had been dropped and stays so


@pytest.mark.parametrize("newest", [DAY, DAY + SECOND // 4], ids=["whole second", "between seconds"])
def test_a_burst_pushed_again_changes_nothing(writer: OnlineWriter, reader: OnlineReader, newest: int) -> None:
    burst = pl.DataFrame([event(newest - 20, f"e{item}", item=item) for item in range(5)] + [event(newest, "last")])
    assert writer.push(burst)["bought"] == 6
    stored = bought(reader)
    for _ in range(3):
        assert writer.push(burst)["bought"] == 0
        assert bought(reader) == stored


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e39, "inf"])
def test_what_no_number_of_a_table_can_be_is_no_number_of_a_push(
    writer: OnlineWriter, reader: OnlineReader, value: object
) -> None:
    with pytest.raises(EventsError, match="seconds"):
        writer.push(pl.DataFrame([event(DAY, "a", action="watch", seconds=value)]))
    rows = [event(DAY + at, f"e{at}", action="watch", seconds=seconds) for at, seconds in enumerate((math.nan, 1.5))]
    assert writer.push(pl.DataFrame(rows))["watched"] == 2
    np.testing.assert_array_equal(reader.sequences("1")["watched"].fields["seconds"], np.float32([math.nan, 1.5]))


def test_a_push_takes_timestamps_and_text_ids_like_the_log(writer: OnlineWriter, reader: OnlineReader) -> None:
    rows = pl.DataFrame([event(DAY, "b", item=2), event(DAY, "a", item=1)])
    typed = rows.with_columns(pl.col("ts").cast(pl.Datetime("us", "UTC")), pl.col("user_id", "item_id").cast(pl.String))
    assert writer.push(typed) == {"watched": 0, "bought": 2}
    assert bought(reader) == [(DAY, hash_id(1)), (DAY, hash_id(2))]
    assert writer.push(rows) == {"watched": 0, "bought": 0}


def test_a_push_that_cannot_be_read_writes_nothing_and_says_why(writer: OnlineWriter, reader: OnlineReader) -> None:
    good = pl.DataFrame([event(DAY, "a"), event(DAY, "b")])
    with pytest.raises(CorankError, match=r"no sequence reads the table 'clicks'.*'events'"):
        writer.push(good, table="clicks")
    with pytest.raises(CorankError, match=r"events: the events lack the columns \['seconds'\]"):
        writer.push(good.drop("seconds"))
    with pytest.raises(CorankError, match=r"events: the events lack the columns \['action'\]"):
        writer.push(good.drop("action"))
    with pytest.raises(CorankError, match="push to events: seconds is a number, but has type String"):
        writer.push(good.with_columns(action=pl.lit("watch"), seconds=pl.lit("long")))
    with pytest.raises(CorankError, match="1 of 2 events have a ts that looks like milliseconds"):
        writer.push(good.with_columns(pl.Series("ts", [DAY, CLOSE_IN_MILLISECONDS])))
    with pytest.raises(CorankError, match="1 of 2 events have a ts in the future"):
        writer.push(good.with_columns(pl.Series("ts", [DAY, now_us() + 3_600 * SECOND])))
    with pytest.raises(CorankError, match="1 of 2 events have a negative user_id"):
        writer.push(good.with_columns(pl.Series("user_id", [1, -1])))
    with pytest.raises(CorankError, match="2 of 2 events have a negative item_id"):
        writer.push(good.with_columns(item_id=pl.lit(-1)))
    with pytest.raises(CorankError, match="item_id is an id, but has type Float64"):
        writer.push(good.with_columns(item_id=pl.lit(5.0)))
    with pytest.raises(CorankError, match="ts has type String"):
        writer.push(good.with_columns(ts=pl.lit("now")))
    with pytest.raises(CorankError, match="1 of 2 events have no event_id"):
        writer.push(good.with_columns(pl.Series("event_id", ["a", None])))
    assert bought(reader) == []
