"""Every kind of schema that the config accepts works from the log to the answer, with every model that fits it."""

from __future__ import annotations

import math
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pytest
import torch
from fastapi.testclient import TestClient

from features.batch import collate
from features.builder.fold import rows_after
from features.builder.states import ITEM_AGGREGATES, SAMPLES, STATE, USER_AGGREGATES
from features.delta.table import Table
from features.samples.source import SampleSource
from features.schema import Aggregate, EventField, Feature, Schema, Sequence, Task, partition_bounds
from features.store.online import FeatureStoreSettings, apply, materialize
from models.artifact import save_artifact
from models.config import ModelConfig
from models.registry import MODELS, build_model
from pipeline.deployment.verification import asked_again, raw_contexts
from pipeline.evaluation.scoring import score_rows
from serving.api import build_api
from serving.ranker import Ranker
from serving.service import RankingService
from serving.settings import ServingSettings
from tests.features import worlds
from tests.features.worlds import COLORS, DAYS, SCHEMA, fold_all, write_world
from tests.serving.worlds import InProcess

USER_ID, AGE, DEVICE, ITEM_ID, ITEM_COLORS = SCHEMA.features
SEQUENCES, CLICK = SCHEMA.sequences, SCHEMA.tasks
USER_COUNT = Feature(name="watched", side="user", aggregate=Aggregate(of="events", function="sum", column="seconds"))
ITEM_COUNT = Feature(name="shown", side="item", aggregate=Aggregate())
CROSS_COUNT = Feature(
    name="color_clicks", side="cross", aggregate=Aggregate(function="rate", column="click", key="colors")
)
CROSS_ITEM = Feature(name="item_events", side="cross", aggregate=Aggregate(of="events", key="item_id"))


def sequence(field: EventField) -> tuple[Sequence, ...]:
    return (Sequence(name="own", events="events", length=2, fields=(field,)),)


SCHEMAS = {
    "nothing of the user but context": ((DEVICE, ITEM_ID), SEQUENCES, CLICK),
    "no context": ((USER_ID, AGE, ITEM_ID), SEQUENCES, CLICK),
    "no sequence": ((USER_ID, AGE, DEVICE, ITEM_ID), (), CLICK),
    "ids alone": ((USER_ID, ITEM_ID), (), CLICK),
    "two tasks of one label": ((USER_ID, ITEM_ID), SEQUENCES[1:], (*CLICK, Task(name="again", column="click"))),
    "counts alone": ((USER_COUNT, ITEM_COUNT), SEQUENCES[1:], CLICK),
    "a count of the user": ((USER_COUNT, ITEM_ID), (), CLICK),
    "a count of the item": ((USER_ID, ITEM_COUNT), (), CLICK),
    "crossed with what is no feature": ((DEVICE, CROSS_COUNT, CROSS_ITEM, ITEM_ID), SEQUENCES[1:], CLICK),
    "lists of items alone": ((DEVICE, ITEM_COLORS), (), CLICK),
    "numbers alone": ((AGE, ITEM_COUNT), sequence(EventField(name="seconds", kind="number")), CLICK),
    "events known by their items": (
        (AGE, ITEM_ID),
        sequence(EventField(name="shade", of="item", kind="category", vocabulary=COLORS)),
        CLICK,
    ),
}


@pytest.mark.parametrize("parts", SCHEMAS.values(), ids=SCHEMAS)
def test_the_endpoint_answers_what_is_scored_offline(
    tmp_path: Path, parts: tuple[tuple[Feature, ...], tuple[Sequence, ...], tuple[Task, ...]]
) -> None:
    features, sequences, tasks = parts
    schema = Schema(features=features, sequences=sequences, tasks=tasks)
    models = [name for name in MODELS if sequences or name != "hyformer"]
    assert_endpoint_scores_as_offline(tmp_path, schema, write_world(tmp_path, seed=3), models)


def profiles_with(tmp_path: Path, tables: dict[str, Table], columns: list[pl.Expr]) -> dict[str, Table]:
    """The tables, of whose profiles both kinds have these columns, too."""
    for role in ("users", "items"):
        rows = tables[role].scan().collect().with_row_index("row").with_columns(columns).drop("row")
        rows.write_delta(str(tmp_path / f"other {role}"))
        tables[role] = Table(role, str(tmp_path / f"other {role}"))
    return tables


def of_profile(side: Literal["user", "item"], column: str, **declared: Any) -> Feature:
    name = "_".join([side, column, *map(str, declared), declared.get("kind", "id")])
    return Feature(name=name, column=column, side=side, **declared)


OWN_NAMES = ("ts", "count__watched", "count__shown", "own__ts", "key__color_clicks")
"""Columns that tables of ours have, as well."""


@pytest.mark.parametrize("side", ["user", "item"])
def test_a_profiles_column_may_be_called_as_one_of_ours(tmp_path: Path, side: Literal["user", "item"]) -> None:
    own = [of_profile(side, name, kind="number") for name in OWN_NAMES]
    features = (USER_ID, ITEM_ID, *own, USER_COUNT, ITEM_COUNT, CROSS_COUNT)
    schema = Schema(features=features, sequences=sequence(EventField(name="seconds", kind="number")), tasks=CLICK)
    columns = [(pl.col("row").cast(pl.Int64) + place).alias(name) for place, name in enumerate(OWN_NAMES)]
    tables = profiles_with(tmp_path, write_world(tmp_path, seed=3), columns)
    assert_endpoint_scores_as_offline(tmp_path, schema, tables, ["ui-mixformer"])


def repeated(values: list[Any], kind: Any) -> pl.Expr:
    return pl.lit(pl.Series(values, dtype=kind)).gather(pl.col("row") % len(values))


LISTS = {
    "texts": repeated([["de", None], None, [], ["fr", "de", "de"]], pl.List(pl.String)),
    "integers": repeated([[1, None], None, [], [-3, 2, 2]], pl.List(pl.Int32)),
    "booleans": repeated([[True, None], None, [], [False]], pl.List(pl.Boolean)),
    "dates": repeated([[date(2026, 1, 5), None], None, []], pl.List(pl.Date)),
    "decimals": repeated([[7, None], None, []], pl.List(pl.Int64)).cast(pl.List(pl.Decimal(20, 0))),
}
IDS = {
    "flag": repeated([True, None, False], pl.Boolean),
    "day": repeated([date(2026, 1, 5), None], pl.Date),
    "text": repeated(["", None, "ö", "a"], pl.String),
    "whole": repeated([2**63 - 1, None, 5], pl.Int64),
}
NUMBERS = {
    "real": repeated([math.nan, None, math.inf, 1e300, -1.0, -2.5, 3.3], pl.Float64),
    "wide": repeated([2**62 + 2**38 + 1, None, 2**53 + 2**24 + 1, -5], pl.Int64),
    "small": repeated([math.nan, None, math.inf, 0.1], pl.Float32),
}


def of_every_kind(side: Literal["user", "item"]) -> list[Feature]:
    return [
        *[of_profile(side, column, multi=True) for column in LISTS],
        *[of_profile(side, column) for column in IDS],
        *[of_profile(side, column, kind="number") for column in (*NUMBERS, "flag")],
        of_profile(side, "real", kind="number", scale="log"),
        of_profile(side, "flag", kind="category", vocabulary=("true", "false")),
        of_profile(side, "whole", kind="category", vocabulary=("5",)),
        of_profile(side, "texts", kind="category", vocabulary=("de",), multi=True),
    ]


CROSSED = [
    Feature(name=f"by_{key}_{window or 0}", side="cross", aggregate=Aggregate(key=key, window=window))
    for key in (*LISTS, *IDS)
    for window in (None, 1)
]


@pytest.mark.parametrize(
    "features",
    [[*of_every_kind("user"), ITEM_ID], [USER_ID, *of_every_kind("item")], [USER_ID, ITEM_ID, *CROSSED]],
    ids=["of users", "of items", "crossed"],
)
def test_values_of_every_type_mean_online_what_they_mean_offline(tmp_path: Path, features: list[Feature]) -> None:
    columns = [values.alias(name) for name, values in (LISTS | IDS | NUMBERS).items()]
    tables = profiles_with(tmp_path, write_world(tmp_path, seed=3), columns)
    schema = Schema(features=tuple(features), sequences=(), tasks=CLICK)
    assert_endpoint_scores_as_offline(tmp_path, schema, tables, ["mixformer"])


def assert_endpoint_scores_as_offline(
    tmp_path: Path, schema: Schema, tables: dict[str, Table], models: list[str]
) -> None:
    """From these tables to samples, a store, a model of each name, and its answers over HTTP."""
    build, close = worlds.settings(tables, tmp_path, schema=schema), partition_bounds(DAYS[-1], "day")[1]
    fold_all(build, DAYS, [])
    store = FeatureStoreSettings(
        project="schemas",
        registry=str(tmp_path / "registry.db"),
        schema=schema,
        users=tables["users"],
        items=tables["items"],
        state_uri=str(tmp_path / STATE),
        user_aggregates=Table(USER_AGGREGATES, str(tmp_path / USER_AGGREGATES)),
        item_aggregates=Table(ITEM_AGGREGATES, str(tmp_path / ITEM_AGGREGATES)),
        sqlite_path=str(tmp_path / "online.db"),
    )
    apply(store)
    materialize(store, 0, close)
    impressions = asked_again(build, DAYS[-1], close, limit=4)
    contexts, rows = raw_contexts(schema, impressions), rows_after(build, DAYS, impressions)
    samples = SampleSource(str(tmp_path / SAMPLES), schema, tuple(DAYS), 0, 2**62)
    for name in models:
        torch.manual_seed(0)
        model = build_model(schema, name, "tiny")
        for file in samples.files():
            model(collate(samples.read(file), schema)).square().sum().backward()
        assert all(one.grad is None or one.grad.to_dense().isfinite().all() for one in model.parameters())
        save_artifact(tmp_path / name, model.eval(), {})
        settings = ServingSettings(str(tmp_path / name), store, ranker_threads=1)
        service = RankingService(settings, InProcess(Ranker(settings)))  # type: ignore[arg-type]
        with TestClient(build_api(service)) as client:
            for index in range(rows.num_rows):
                row = rows.slice(index, 1)
                (request,) = row["requests"][0].as_py()
                body = {"user_id": row["user_id"][0].as_py(), "context": contexts[request["request_id"]], "ts": close}
                body["candidates"] = [one["item_id"] for one in request["candidates"]]
                answer = client.post("/v1/rank", json=body)
                assert answer.status_code == 200, answer.text
                online = np.array([answer.json()["scores"][task.name] for task in schema.tasks]).T
                offline = np.array(score_rows(model, row)["scores"].to_pylist())
                np.testing.assert_allclose(online, offline, atol=1e-5)
            unknown = {"user_id": "nobody", "candidates": ["nothing"], "ts": close}
            context = {feature.source: None for feature in schema.side("context")}
            assert client.post("/v1/rank", json=unknown | {"context": context}).status_code == 200


@pytest.mark.parametrize(
    ("features", "message"),
    [((ITEM_ID, ITEM_COUNT), "side: user or context"), ((USER_ID, CROSS_ITEM), "side: item"), ((), "side: item")],
)
def test_what_no_model_can_rank_by_is_refused(features: tuple[Feature, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schema(features=features, sequences=SEQUENCES, tasks=CLICK)


def test_a_hyformer_without_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="hyformer decodes behaviour sequences"):
        ModelConfig(name="hyformer").check_fit(SCHEMA.model_copy(update={"sequences": ()}))
