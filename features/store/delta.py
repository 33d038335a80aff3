"""Feast over Delta: a data source that names a Delta table and an offline store that reads it.

Feast's own offline stores read the Parquet files below a Delta table, deleted rows included. Here every
read goes through :class:`features.delta.table.Table`, which follows the Delta log and the canonical names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal, cast

import pandas as pd
import polars as pl
import pyarrow as pa
from feast import FeatureView, RepoConfig, ValueType
from feast.data_source import DataSource
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.protos.feast.core.DataSource_pb2 import DataSource as DataSourceProto
from feast.repo_config import FeastConfigBaseModel
from feast.type_map import pa_to_feast_value_type
from pydantic import Field

from features.delta.table import STAMP, Table
from features.errors import CorankError
from features.store.query import SLICE_BYTES, TIME, Partitions, Query, dated, deal, latest, together

EVENT_TIMESTAMP = "event_timestamp"
"""The column that Feast joins on, made from a table's int64 ``ts`` or ``updated_at``, which is kept, too."""

ORDER = "__order"
"""Column with the position of an entity row among those asked for."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def moment(microseconds: int) -> datetime:
    """Microseconds UTC as a datetime, without the rounding of ``datetime.fromtimestamp``."""
    return EPOCH + timedelta(microseconds=microseconds)


class DeltaSource(DataSource):
    """A Delta table as a Feast data source, kept in the registry as a custom source.

    Credentials are not kept in the registry: the offline store's configuration has them (``storage_options``).
    """

    def __init__(
        self,
        *,
        name: str,
        uri: str,
        clock: str,
        columns: Mapping[str, str] | None = None,
        makes: Iterable[str] = (),
    ) -> None:
        """
        Args:
            uri: local path or ``s3://`` address.
            clock: canonical name of the int64 column (microseconds UTC) that says when a row became true.
            columns: canonical name → the table's own column name.
            makes: columns that are made where the table has none (:class:`features.delta.table.Table`).
        """
        super().__init__(name=name, timestamp_field=EVENT_TIMESTAMP)
        self.uri = uri
        self.clock = clock
        self.columns = dict(columns or {})
        self.makes = tuple(makes)

    def table(self, config: RepoConfig) -> Table:
        """The table behind this source, at the version and with the credentials that the offline store's config has."""
        options, versions = (getattr(config.offline_store, name, {}) for name in ("storage_options", "versions"))
        return Table(
            self.name,
            self.uri,
            self.columns,
            options.get(self.uri, {}),
            version=versions.get(self.uri),
            makes=self.makes,
        )

    def scan(self, config: RepoConfig) -> pl.LazyFrame:
        """The table's rows with join keys as text and the column ``event_timestamp``.

        Raises:
            CorankError: there is no such table, or it lacks the column that dates its rows.
        """
        return (
            dated(self.table(config), self.clock)
            .with_columns(pl.col(TIME).cast(STAMP).alias(EVENT_TIMESTAMP))
            .drop(TIME)
        )

    def source_type(self) -> DataSourceProto.SourceType.ValueType:
        return DataSourceProto.CUSTOM_SOURCE

    @staticmethod
    def from_proto(data_source: DataSourceProto) -> DeltaSource:
        return DeltaSource(name=data_source.name, **json.loads(data_source.custom_options.configuration))

    def _to_proto_impl(self) -> DataSourceProto:
        configuration = json.dumps(
            {"uri": self.uri, "clock": self.clock, "columns": self.columns, "makes": list(self.makes)}
        )
        return DataSourceProto(
            name=self.name,
            type=DataSourceProto.CUSTOM_SOURCE,
            data_source_class_type=f"{DeltaSource.__module__}.{DeltaSource.__qualname__}",
            timestamp_field=self.timestamp_field,
            custom_options=DataSourceProto.CustomSourceOptions(configuration=configuration.encode()),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DeltaSource) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[str, str, str, str, tuple[str, ...]]:
        return self.name, self.uri, self.clock, json.dumps(self.columns, sort_keys=True), self.makes

    def validate(self, config: RepoConfig) -> None:
        self.scan(config)

    @staticmethod
    def source_datatype_to_feast_value_type() -> Callable[[str], ValueType]:
        return pa_to_feast_value_type

    def get_table_column_names_and_types(self, config: RepoConfig) -> Iterable[tuple[str, str]]:
        return [(column.name, str(column.type)) for column in self.table(config).schema()]


class DeltaOfflineStoreConfig(FeastConfigBaseModel):
    """Configuration of :class:`DeltaOfflineStore`; Feast finds it by its name."""

    type: Literal["features.store.delta.DeltaOfflineStore"] = "features.store.delta.DeltaOfflineStore"
    storage_options: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Table address → what deltalake needs to read it."""
    versions: dict[str, int] = Field(default_factory=dict)
    """Table address → the version that is read; default: the newest."""
    slice_bytes: int = Field(SLICE_BYTES, ge=1)
    """Bytes of Delta files that one Ray task reads; smaller tables are read in this process."""


class DeltaRetrievalJob(RetrievalJob):
    """A query that runs when its result is asked for."""

    def __init__(
        self,
        portions: Callable[[], Iterable[pl.DataFrame]],
        full_feature_names: bool = False,
        metadata: RetrievalMetadata | None = None,
    ) -> None:
        """
        Args:
            portions: gives the result in one or more data frames.
        """
        self.portions = portions
        self._full_feature_names = full_feature_names
        self._metadata = metadata

    @property
    def full_feature_names(self) -> bool:
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        return []

    @property
    def metadata(self) -> RetrievalMetadata | None:
        return self._metadata

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        # One chunk: Feast writes only the first batch of a table to the online store.
        return pl.concat(list(self.portions())).to_arrow(compat_level=pl.CompatLevel.oldest()).combine_chunks()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return cast(pd.DataFrame, self._to_arrow_internal(timeout).to_pandas())


class DeltaOfflineStore(OfflineStore):
    """Feast's offline store over Delta tables: Polars on slices of a table, in Ray tasks when it is large.

    Where Ray does not run, or the table is small (``slice_bytes``), the same runs in this process.
    """

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> DeltaRetrievalJob:
        """The newest row of every entity with start ≤ event timestamp ≤ end.

        Both bounds belong to the window, so consecutive windows share their border and lose nothing.
        Of rows with one time the last in the table's order counts. Entities come in no fixed order.
        """
        query = _query(config, data_source, join_key_columns, feature_name_columns, start_date, end_date, latest=True)

        def portions() -> Iterator[pl.DataFrame]:
            for rows in Partitions(query, _slice_bytes(config)).map(partial(latest, query)):
                yield _stamped(together([rows]), timestamp_field)

        return DeltaRetrievalJob(portions)

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> DeltaRetrievalJob:
        """Every row with start ≤ event timestamp ≤ end, in the table's order; not those without a key or a time."""
        query = _query(config, data_source, join_key_columns, feature_name_columns, start_date, end_date)

        def portions() -> Iterator[pl.DataFrame]:
            for rows in Partitions(query, _slice_bytes(config)).rows():
                yield _stamped(rows, timestamp_field)

        return DeltaRetrievalJob(portions)

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        **kwargs: Any,
    ) -> DeltaRetrievalJob:
        """As-of join: every entity row exactly once, in its order, with the newest values known by its time.

        Raises:
            CorankError: ``entity_df`` is no data frame, or lacks ``event_timestamp`` or a join key.
        """
        if not isinstance(entity_df, pd.DataFrame) or EVENT_TIMESTAMP not in entity_df.columns:
            raise CorankError(f"entity_df: pass a pandas data frame with the join keys and {EVENT_TIMESTAMP!r}")
        stamps = pd.to_datetime(entity_df[EVENT_TIMESTAMP], utc=True).dt.as_unit("us").astype("int64")
        entities = pl.from_pandas(entity_df.reset_index(drop=True))
        times = pl.Series(TIME, stamps.to_numpy())

        def portions() -> Iterator[pl.DataFrame]:
            joined = entities
            for view in feature_views:
                name = view.projection.name_alias or view.projection.name
                wanted = [ref.split(":", 1)[1] for ref in feature_refs if ref.split(":", 1)[0] == name]
                mapped = view.projection.join_key_map
                query = Query(
                    delta_source(view).table(config),
                    delta_source(view).clock,
                    keys={mapped.get(column.name, column.name): column.name for column in view.entity_columns},
                    values={f"{name}__{feature}" if full_feature_names else feature: feature for feature in wanted},
                    end=cast(int | None, times.max()),
                )
                if missing := [key for key in query.keys if key not in entities.columns]:
                    raise CorankError(f"entity_df lacks the join keys {missing} of the view {name}")
                if wrong := [key for key in query.keys if entities.schema[key].is_float()]:
                    raise CorankError(
                        f"entity_df: the join keys {wrong} are fractional numbers, as pandas makes of integers beside "
                        "a missing one; cast them to text or integers"
                    )
                keys = entities.select(pl.col(key).cast(pl.String) for key in query.keys).with_columns(times)
                joined = joined.hstack(_as_of(keys, query, view.ttl, _slice_bytes(config)))
            yield joined

        metadata = RetrievalMetadata(
            features=feature_refs, keys=[column for column in entity_df.columns if column != EVENT_TIMESTAMP]
        )
        return DeltaRetrievalJob(portions, full_feature_names, metadata)


def _as_of(entities: pl.DataFrame, query: Query, ttl: timedelta | None, slice_bytes: int) -> pl.DataFrame:
    """The query's values for every row of ``entities`` (keys, ``TIME``) [N], in their order.

    Raises:
        CorankError: the join did not give back every row once.
    """
    partitions = Partitions(query, slice_bytes, beside=int(entities.estimated_size()))
    entities = entities.with_row_index(ORDER)
    sides = deal(entities, query.keys, partitions.count) if partitions.count > 1 else [entities]
    join = partial(_join, query, ttl // timedelta(microseconds=1) if ttl else None)
    found = together(partitions.map(join, [(side,) for side in sides])).sort(ORDER)
    if not found[ORDER].equals(entities[ORDER]):
        raise CorankError(
            f"point-in-time join with table {query.table.name}: {entities.height:,} entity rows gave {found.height:,} "
            "rows. Please report this as a defect of corank."
        )
    return found.drop(ORDER)


def _join(query: Query, tolerance: int | None, entities: pl.DataFrame, *pieces: pl.DataFrame) -> pl.DataFrame:
    """One partition of the as-of join: ``ORDER`` of the entity rows and the values."""
    joined = entities.sort(TIME).join_asof(
        together(pieces).sort(TIME, maintain_order=True),
        on=TIME,
        by=list(query.keys),
        strategy="backward",
        tolerance=tolerance,
        check_sortedness=False,  # both sides have just been sorted
    )
    return joined.select(ORDER, *query.values)


def delta_source(view: FeatureView) -> DeltaSource:
    """The Delta table behind a view.

    Raises:
        CorankError: the view reads something else.
    """
    return _delta(view.batch_source)


def _delta(source: DataSource | None) -> DeltaSource:
    if not isinstance(source, DeltaSource):
        raise CorankError(f"the Delta offline store reads DeltaSource only, not {type(source).__name__}")
    return source


def _query(
    config: RepoConfig,
    data_source: DataSource,
    keys: list[str],
    features: list[str],
    start: datetime | None,
    end: datetime | None,
    latest: bool = False,
) -> Query:
    source = _delta(data_source)
    return Query(
        source.table(config),
        source.clock,
        keys={key: key for key in keys},
        values={feature: feature for feature in features},
        start=None if start is None else microseconds(start),
        end=None if end is None else microseconds(end),
        latest=latest,
    )


def _stamped(rows: pl.DataFrame, timestamp_field: str) -> pl.DataFrame:
    return rows.with_columns(pl.col(TIME).cast(STAMP).alias(timestamp_field)).drop(TIME)


def _slice_bytes(config: RepoConfig) -> int:
    return int(config.offline_store.slice_bytes)


def microseconds(time: datetime) -> int:
    """The inverse of :func:`moment`; a time without a zone is UTC."""
    aware = time if time.tzinfo is not None else time.replace(tzinfo=UTC)
    return (aware - EPOCH) // timedelta(microseconds=1)
