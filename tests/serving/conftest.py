"""A filled store with a published model, and a client of a service in this process."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl
import pytest
import torch
from deltalake import write_deltalake
from fastapi.testclient import TestClient

from features.delta.table import Table
from features.encoding import hash_id
from features.store.online import FeatureStoreSettings, apply, materialize
from models.artifact import save_artifact
from models.registry import build_model
from serving.api import build_api
from serving.ranker import Ranker
from serving.service import RankingService
from serving.settings import ServingConfig, ServingSettings
from tests.serving.worlds import NOW, SCHEMA, InProcess


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ServingSettings:
    root = tmp_path_factory.mktemp("serving")
    users = {"user_id": ["7", "8"], "tags": [["a", "b"], ["c"]], "updated_at": [0, 2 * NOW]}
    items = {"item_id": [1, 2, 3], "price": [1.0, None, 3.0], "updated_at": [0, 0, 2 * NOW]}
    events = list(range(100, 110))
    state = {"user_id": ["7"], "ts": [500], "clicks__ts": [events], "clicks__item": [[hash_id(one) for one in events]]}
    state["clicks__event_id"] = state["clicks__item"]
    for name, content in (("users", users), ("items", items), ("state", state)):
        write_deltalake(str(root / name), pl.DataFrame(content).to_arrow())
    store = FeatureStoreSettings(
        project="test",
        registry=str(root / "registry.db"),
        schema=SCHEMA,
        users=Table("users", str(root / "users")),
        items=Table("items", str(root / "items")),
        state_uri=str(root / "state"),
        sqlite_path=str(root / "online.db"),
    )
    apply(store)
    materialize(store, 0, 3 * NOW)
    torch.manual_seed(0)
    model = build_model(SCHEMA, "ui-mixformer", "tiny", id_dropout=0.0)
    save_artifact(root / "model", model, {"metrics": {"auc": float("nan")}, "lineage": {}, "selfcheck": {}})
    return ServingSettings(str(root / "model"), store, ServingConfig(max_candidates=4), log_delay=2, ranker_threads=1)


@pytest.fixture(scope="module")
def client(settings: ServingSettings) -> Iterator[TestClient]:
    service = RankingService(settings, InProcess(Ranker(settings)))  # type: ignore[arg-type]
    with TestClient(build_api(service), raise_server_exceptions=False) as client:
        yield client
