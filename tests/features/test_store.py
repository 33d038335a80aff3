"""The feature store on real Delta tables and a real SQLite online store."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from deltalake import DeltaTable

from features.delta.table import Table
from features.encoding import encode, hash_id
from features.errors import ConfigError, CorankError, UnreadableError
from features.sample_table import feature_column
from features.schema import Aggregate, EventField, Feature, Schema
from features.store.definitions import sequence_view
from features.store.erase import erase_absent
from features.store.online import FeatureStoreSettings, apply, materialize, open_store
from features.store.reader import OnlineReader
from tests.features import profiles
from tests.features.profiles import BIG, DAY, SCHEMA, STATE, write

settings = profiles.settings


def test_values_arrive_online_unchanged(settings: FeatureStoreSettings) -> None:
    apply(settings)
    apply(settings)  # twice changes nothing
    seen: list[tuple[str, int]] = []
    rows = materialize(settings, 0, 5 * DAY, lambda view, count: seen.append((view, count)))
    assert rows == {"user_features": 3, "item_features": 2, sequence_view(SCHEMA.sequences[0]): 2}
    assert dict(seen) == rows
    reader = OnlineReader(settings)
    profile = reader.user("a")
    assert profile is not None
    assert np.float32(profile.pop("score")) == np.float32(0.1)
    assert profile == {
        "user_id": "a",
        "city": "Köln",
        "segment_id": BIG,
        "age": 31.5,
        "tags": ["x", "y"],
        "groups": [BIG, 2],
        "updated_at": 0,
    }
    empty = reader.user("b")
    assert empty is not None
    assert empty.pop("updated_at") == 5 * DAY
    assert empty.pop("user_id") == "b"
    assert set(empty.values()) == {None}
    history = reader.sequences("a")["clicks"]
    assert history.ts.tolist() == [DAY + one for one in range(200)]
    assert history.fields["item"].tolist() == [hash_id(one) for one in range(200)]
    dwell = np.array([np.nan if one == 3 else one / 7 for one in range(200)], np.float32)
    np.testing.assert_array_equal(history.fields["dwell"], dwell)
    for nobody in ("b", "nobody"):
        history = reader.sequences(nobody)["clicks"]
        assert len(history.ts) == len(history.fields["item"]) == len(history.fields["dwell"]) == 0
    assert reader.user("nobody") is None
    assert reader.user("d") is None  # not yet materialised


def test_encoded_users_equal_the_offline_encoding(settings: FeatureStoreSettings) -> None:
    apply(settings)
    materialize(settings, 0, 5 * DAY)
    reader = OnlineReader(settings)
    table = settings.users.scan().filter(pl.col("updated_at") <= 5 * DAY).collect()
    user_features = SCHEMA.side("user")
    offline = table.select(
        encode(feature, pl.col(feature.source)).alias(feature_column(feature)) for feature in user_features
    )
    for user_id, row in zip(table["user_id"], offline.iter_rows(named=True), strict=True):
        assert reader.encoded_user(user_id, 5 * DAY) == (True, row)
    codes: dict[str, Any] = {"user_id": 0, "city": 0, "segment": 0, "age": None, "tags": [], "groups": [], "score": 0}
    unknown = {f"feature__{name}": code for name, code in codes.items()}
    assert reader.encoded_user("nobody", 5 * DAY) == (False, unknown)
    assert reader.encoded_user("b", 5 * DAY - 1) == (False, unknown)  # not yet true at that time


def test_items_are_read_through(settings: FeatureStoreSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    apply(settings)
    materialize(settings, 0, 5 * DAY)
    reader = OnlineReader(settings)
    rows = reader.items(["2", "9", "1", "2"], 4 * DAY)
    assert rows.columns == ["feature__item_id", "feature__genre", "feature__price", "item_known"]
    assert rows["item_known"].to_list() == [True, False, True, True]
    assert rows["feature__item_id"].to_list() == [hash_id(2), 0, hash_id(1), hash_id(2)]
    assert rows["feature__genre"].to_list() == [0, 0, 1, 0]
    assert rows["feature__price"].to_list() == [None, None, 2.5, None]
    earlier = reader.items(["2", "1"], 3 * DAY - 1)
    assert earlier["item_known"].to_list() == [False, True]
    assert earlier["feature__item_id"].to_list() == [0, hash_id(1)]
    # A changed profile shows after the maximum age, not before.
    write(
        Path(settings.items.uri),
        [{"item_id": 1, "genre": "action", "price": 1.0, "updated_at": 5 * DAY}],
        {"item_id": pl.Int64, "genre": pl.String, "price": pl.Float64, "updated_at": pl.Int64},
    )
    materialize(settings, 5 * DAY, 6 * DAY)
    assert reader.items(["1"], 6 * DAY)["feature__genre"].to_list() == [1]
    monkeypatch.setattr(reader._items, "_max_age", -1.0)
    for _ in range(5):  # replaced rows are dropped along the way
        assert reader.items(["1", "2"], 6 * DAY)["feature__genre"].to_list() == [2, 0]
    assert len(reader._items._read_at) <= 2 * len(reader._items._rows) + 1
    monkeypatch.setattr(reader._items, "_max_items", 1)
    assert reader.items(["9", "1"], 6 * DAY)["feature__genre"].to_list() == [0, 2]
    assert set(reader._items._rows) == {"9", "1"}


def test_deleted_rows_do_not_come_back(settings: FeatureStoreSettings) -> None:
    apply(settings)
    DeltaTable(settings.users.uri).delete("uid = 'a' AND city = 'Bonn'")
    DeltaTable(settings.users.uri).delete("uid = 'c'")
    materialize(settings, 0, 10 * DAY)
    reader = OnlineReader(settings)
    profile = reader.user("a")
    assert profile is not None
    assert profile["city"] == "Köln"
    assert reader.user("c") is None


def test_consecutive_windows_equal_one(settings: FeatureStoreSettings, tmp_path: Path) -> None:
    def content(path: str, windows: list[tuple[int, int]]) -> list[Any]:
        own = replace(settings, sqlite_path=str(tmp_path / path / "online.db"), registry=str(tmp_path / path / "r.db"))
        apply(own)
        for window in windows:
            materialize(own, *window)
        reader = OnlineReader(own)
        users = [reader.user(user_id) for user_id in "abcd"]
        events = [reader.sequences(user_id)["clicks"].ts.tolist() for user_id in "abcd"]
        return [users, events, reader.items(["1", "2"], 10 * DAY).rows()]

    borders = [0, 2 * DAY, 5 * DAY, 6 * DAY, 9 * DAY, 10 * DAY]
    windows = list(itertools.pairwise(borders))
    whole = content("one", [(0, 10 * DAY)])
    assert content("many", windows) == whole
    assert content("twice", [window for window in windows for _ in range(2)]) == whole
    assert whole[0][0]["city"] == "Bonn"
    assert None not in whole[0]


def test_a_damaged_profile_file_is_named_when_it_is_materialised(settings: FeatureStoreSettings) -> None:
    apply(settings)
    for path in Path(settings.users.uri).rglob("*.parquet"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnreadableError, match=r"table users: file .*parquet has .* bytes, but the Delta log says"):
        materialize(settings, 0, 2**50)


def test_errors_say_what_to_do(settings: FeatureStoreSettings) -> None:
    with pytest.raises(CorankError, match="Run the pipeline first"):
        OnlineReader(settings)
    with pytest.raises(CorankError, match="Run the pipeline first"):
        materialize(settings, 0, DAY)
    wrong = SCHEMA.model_copy(update={"features": (*SCHEMA.features, Feature(name="nope", side="user"))})
    with pytest.raises(ConfigError, match="no column 'nope'"):
        apply(replace(settings, schema=wrong))
    apply(settings)
    with pytest.raises(CorankError, match=r"lacks \['nope'\]"):
        OnlineReader(replace(settings, schema=wrong))


COUNTED = SCHEMA.model_copy(
    update={
        "features": (
            *SCHEMA.features,
            Feature(name="shown", side="user", aggregate=Aggregate(window=2)),
            Feature(name="seen", side="user", aggregate=Aggregate(of="events")),
        )
    }
)
"""The model that is served reads this."""


def without(*names: str, **changed: Feature) -> Schema:
    """``COUNTED`` without some features and with others in place of those of their names."""
    kept = [changed.get(one.name, one) for one in COUNTED.features if one.name not in names]
    return COUNTED.model_copy(update={"features": tuple(kept)})


def with_sequence(**changes: Any) -> Schema:
    return COUNTED.model_copy(update={"sequences": (SCHEMA.sequences[0].model_copy(update=changes),)})


ITEM, DWELL = SCHEMA.sequences[0].fields
CHANGED = {
    "a feature less": without("city"),
    "another column": without(age=Feature(name="age", column="segment_id", side="user", kind="number")),
    "another kind": without(age=Feature(name="age", side="user")),
    "a count less": without("shown"),
    "another window": without(shown=Feature(name="shown", side="user", aggregate=Aggregate(window=3))),
    "a sequence less": COUNTED.model_copy(update={"sequences": ()}),
    "a sequence's field less": with_sequence(fields=(ITEM,)),
    "a sequence's field more": with_sequence(fields=(ITEM, DWELL, EventField(name="more"))),
    "a sequence's field coded otherwise": with_sequence(
        fields=(EventField(name="item", column="item_id", kind="category", vocabulary=("1",)), DWELL)
    ),
    "a shorter sequence": with_sequence(length=3),
    "a sequence of another name": with_sequence(name="others"),
}


def write_tables(root: Path, schema: Schema, value: int) -> None:
    """State and counts as a builder of this schema writes them; what is coded differently has other values."""
    rows: dict[str, Any] = {"user_id": ["a", "b"], "ts": [2 * DAY, 2 * DAY]}
    state = dict(rows)
    for sequence in schema.sequences:
        times = list(range(min(sequence.length, 5)))
        state |= {f"{sequence.name}__ts": [times, []], f"{sequence.name}__event_id": [times, []]}
        for one in sequence.fields:
            code = 7 if one in (ITEM, DWELL) else value
            state[f"{sequence.name}__{one.name}"] = [[float(code) if one.kind == "number" else code] * len(times), []]
    counts = dict(rows)
    for one in schema.aggregates("user"):
        own = 4 if one in COUNTED.features else value
        if one.aggregate is not None and one.aggregate.window is not None:
            values = {"until": 20 * DAY, "counts": own, "sums": float(own)}
            counts |= {f"{what}__{one.name}": [[value], [value]] for what, value in values.items()}
        else:
            counts |= {f"count__{one.name}": [own, own], f"sum__{one.name}": [float(own), float(own)]}
    kinds = {name: STATE[name.replace("others__", "clicks__")] for name in state if name != "clicks__more"}
    for name, content, types in (("state", state, kinds), ("counts", counts, {})):
        frame = pl.DataFrame(content, schema_overrides=types)
        frame.write_delta(str(root / name), mode="overwrite", delta_write_options={"schema_mode": "overwrite"})


def everything(settings: FeatureStoreSettings) -> list[Any]:
    reader = OnlineReader(settings)
    histories = [asdict(one) for user in "abcd" for one in reader.sequences(user).values()]
    return [
        histories,
        [reader.encoded_user(user, 9 * DAY) for user in "abcd"],
        reader.items(["1", "2"], 9 * DAY).rows(),
    ]


@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED)
def test_a_changed_config_takes_nothing_from_a_model_that_is_served(
    settings: FeatureStoreSettings, tmp_path: Path, changed: Schema
) -> None:
    counts = Table("user_aggregates", str(tmp_path / "counts"))
    served = replace(settings, schema=COUNTED, user_aggregates=counts)
    write_tables(tmp_path, COUNTED, 7)
    apply(served)
    materialize(served, 0, 5 * DAY)
    before = everything(served)
    write_tables(tmp_path, changed, 8)
    newer = replace(served, schema=changed, live=(COUNTED,))
    for _ in range(2):
        apply(newer)
        materialize(newer, 0, 5 * DAY)
        erase_absent(newer, 5 * DAY)
        np.testing.assert_equal(everything(served), before)
    everything(newer)
    names = {view.name for view in open_store(newer).list_feature_views()}
    apply(replace(newer, live=()))
    left = {view.name for view in open_store(newer).list_feature_views()}
    assert left <= names
    if changed.sequences != COUNTED.sequences or changed.aggregates("user") != COUNTED.aggregates("user"):
        assert left < names
    everything(newer)


def test_a_column_that_a_table_lost_stays_as_it_was_stored_for_the_model_that_is_served(
    settings: FeatureStoreSettings,
) -> None:
    apply(settings)
    materialize(settings, 0, 5 * DAY)
    before = everything(settings)
    users = pl.read_delta(settings.users.uri).drop("city")
    users.write_delta(settings.users.uri, mode="overwrite", delta_write_options={"schema_mode": "overwrite"})
    features = tuple(one for one in SCHEMA.features if one.name != "city")
    newer = replace(settings, schema=SCHEMA.model_copy(update={"features": features}), live=(SCHEMA,))
    apply(newer)
    materialize(newer, 0, 5 * DAY)
    np.testing.assert_equal(everything(settings), before)
    apply(replace(newer, live=()))
    with pytest.raises(CorankError, match=r"lacks \['city'\]"):
        OnlineReader(settings)


def test_a_column_of_another_type_than_a_served_model_reads_is_refused(settings: FeatureStoreSettings) -> None:
    apply(settings)
    users = pl.read_delta(settings.users.uri).with_columns(age=pl.lit("old"))
    users.write_delta(settings.users.uri, mode="overwrite", delta_write_options={"schema_mode": "overwrite"})
    features = tuple(one.model_copy(update={"kind": "id"}) if one.name == "age" else one for one in SCHEMA.features)
    newer = replace(settings, schema=SCHEMA.model_copy(update={"features": features}), live=(SCHEMA,))
    with pytest.raises(ConfigError, match=r"table users: column 'age' is .*string.* now, .*column of their own"):
        apply(newer)


def test_a_damaged_registry_is_named_and_made_again_by_apply(settings: FeatureStoreSettings) -> None:
    apply(settings)
    materialize(settings, 0, 5 * DAY)
    before, path = everything(settings), Path(settings.registry)
    assert [one.name for one in path.parent.iterdir() if one.name.endswith(".tmp")] == []
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorankError, match=r"registry .* is damaged .*`corank features apply`"):
        OnlineReader(settings)
    apply(settings)
    np.testing.assert_equal(everything(settings), before)
