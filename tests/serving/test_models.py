"""Models that take over from one another while requests come."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

import serving.live
import serving.ranker
from features.errors import CorankError
from features.sample_table import sample_schema
from features.store.reader import OnlineReader
from models.artifact import load_artifact, save_artifact
from serving.api import build_api
from serving.ranker import Ranker
from serving.rows import build_row
from serving.service import RankingService
from serving.settings import ServingSettings
from tests.serving.worlds import CONTEXT, NOW, SCHEMA, InProcess, body, name, published, rows_of


def test_a_model_that_is_named_while_requests_come_takes_over_without_a_lost_or_mixed_answer(
    settings: ServingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.live, "FOLLOW_SECONDS", 0.05)
    (first, one), (second, two) = published(tmp_path, 1), published(tmp_path, 2)
    document = tmp_path / "current.json"
    name(document, first)
    handle = InProcess(Ranker(replace(settings, artifact=first)))
    service = RankingService(replace(settings, artifact=first, follow=str(document)), handle)  # type: ignore[arg-type]
    answers = []
    with TestClient(build_api(service)) as client:
        expected = {}
        for artifact, version in ((first, one), (second, two), (first, one)):
            name(document, artifact)
            until = time.monotonic() + 20
            while not answers or answers[-1]["model_version"] != version:
                assert time.monotonic() < until
                response = client.post("/v1/rank", json=body())
                assert response.status_code == 200
                answers.append(response.json())
            expected[version] = answers[-1]["scores"]
        assert expected[one] != expected[two]
        for each in answers:
            assert each["scores"] == expected[each["model_version"]]
        # what is no model, or gives other scores than it was published with, stays out, and says so
        damaged = tmp_path / "damaged"
        shutil.copytree(second, damaged)
        (damaged / "model.safetensors").write_bytes(b"")
        for artifact, why in ((str(damaged), "is damaged"), (str(tmp_path / "none"), "not a model artifact")):
            name(document, artifact)
            until = time.monotonic() + 20
            while (client.get("/v1/model").json()["refused"] or {}).get("artifact") != artifact:
                assert time.monotonic() < until
                time.sleep(0.02)
            served = client.get("/v1/model").json()
            assert served["model_version"] == one
            assert why in served["refused"]["why"]
            assert client.post("/v1/rank", json=body()).json()["scores"] == expected[one]
        document.write_text("{half")
        name(document, second)
        until = time.monotonic() + 20
        while client.get("/v1/model").json()["model_version"] != two:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert client.get("/v1/model").json()["refused"] is None


def test_a_model_that_scores_its_self_check_otherwise_is_refused(settings: ServingSettings, tmp_path: Path) -> None:
    ranker, reader = Ranker(settings), OnlineReader(settings.store)
    row = build_row(reader, 0, "7", ["1", "2"], CONTEXT, NOW).rows
    model = load_artifact(settings.artifact).model
    document = {"rows": row.to_pylist(), "scores": ranker.score([(settings.artifact, row)])[0].scores.tolist()}
    columns = set(sample_schema(SCHEMA).names)
    document["rows"] = [{name: value for name, value in one.items() if name in columns} for one in document["rows"]]
    right = tmp_path / "right"
    save_artifact(right, model, {"selfcheck": document})
    assert len(ranker.score([(str(right), row)])[0].scores) == 2
    wrong = tmp_path / "wrong"
    document["scores"][0][0] += 1e-3
    save_artifact(wrong, model, {"selfcheck": document})
    with pytest.raises(CorankError, match=r"wrong: its self-check requests differ by 1\.00e-03"):
        ranker.score([(str(wrong), row)])


def test_requests_of_two_models_that_meet_in_one_batch_are_scored_each_by_its_own(
    settings: ServingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.ranker, "MOST_MODELS", 2)
    (first, _), (second, _) = published(tmp_path, 1), published(tmp_path, 2)
    ranker, reader = Ranker(replace(settings, artifact=first)), OnlineReader(settings.store)
    sizes = (("7", 3), ("8", 1), ("7", 2))
    rows = [build_row(reader, 0, user, ["1", "2", "3"][:size], CONTEXT, NOW).rows for user, size in sizes]
    mixed = [one.scores for one in ranker.score(list(zip((first, second, first), rows, strict=True)))]
    alone = [
        ranker.score([(artifact, row)])[0].scores for artifact, row in zip((first, second, first), rows, strict=True)
    ]
    for one, other in zip(mixed, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    third, _ = published(tmp_path, 3)
    ranker.score([(third, rows[0])])
    assert list(ranker._models) == [first, third]  # the one longest not asked for went


def test_requests_to_a_loaded_model_do_not_wait_for_another_to_load(settings: ServingSettings, tmp_path: Path) -> None:
    (first, _), (second, _) = published(tmp_path, 1), published(tmp_path, 2)
    ranker = Ranker(replace(settings, artifact=first))
    (row,) = rows_of(settings, ("7", ["1"], NOW))
    with ThreadPoolExecutor(2) as pool, ranker._loading:  # as while another is loaded
        waiting = pool.submit(ranker.score, [(second, row)])
        assert pool.submit(ranker.score, [(first, row)]).result(20)[0].scores.shape == (1, 2)
        assert not waiting.done()
    assert waiting.result(20)[0].scores.shape == (1, 2)


def test_where_the_named_model_is_unfit_a_service_begins_with_the_one_it_was_started_with(
    settings: ServingSettings, tmp_path: Path
) -> None:
    first, one = published(tmp_path, 1)
    document = tmp_path / "current.json"
    name(document, str(tmp_path / "nothing"))
    service = RankingService(
        replace(settings, artifact=first, follow=str(document)),
        InProcess(Ranker(replace(settings, artifact=first))),  # type: ignore[arg-type]
    )
    with TestClient(build_api(service)) as client:
        assert client.post("/v1/rank", json=body()).json()["model_version"] == one
        assert "not a model artifact" in client.get("/v1/model").json()["refused"]["why"]
