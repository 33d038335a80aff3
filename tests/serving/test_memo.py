"""What is remembered of user sides: the scores are those of what is computed, within its bytes, until forgotten."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

import serving.live
from features.sample_table import concatenate
from features.store.reader import OnlineReader
from models.registry import MODELS, build_model
from models.selfcheck import TOLERANCES
from serving.api import build_api
from serving.memo import MemoisedModel
from serving.ranker import Ranker
from serving.rows import build_row
from serving.service import RankingService
from serving.settings import ServingConfig, ServingSettings
from tests.serving.worlds import CONTEXT, NOW, SCHEMA, InProcess, Remote, body, name, rows_of


def test_after_a_user_is_forgotten_nothing_that_was_read_before_is_remembered(
    settings: ServingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.live, "FOLLOW_SECONDS", 0.05)
    document = tmp_path / "current.json"
    name(document, settings.artifact)
    ranker = Ranker(settings)
    (_, memoised) = ranker._model(settings.artifact)
    service = RankingService(replace(settings, follow=str(document)), InProcess(ranker))  # type: ignore[arg-type]
    with TestClient(build_api(service)) as client:
        assert [client.post("/v1/rank", json=body()).json()["memo"] for _ in range(2)] == ["none", "user"]
        name(document, settings.artifact, erased=1)
        until = time.monotonic() + 20
        while len(memoised.users) + len(memoised.timelines):  # without a further request
            assert time.monotonic() < until
            time.sleep(0.02)
        assert memoised.users.nbytes == memoised.timelines.nbytes == 0
        assert [client.post("/v1/rank", json=body()).json()["memo"] for _ in range(2)] == ["none", "user"]
    # a request that was read before, and comes late, leaves nothing behind
    row = build_row(OnlineReader(settings.store), 0, "7", ["1"], CONTEXT, NOW).rows
    ranker.score([(settings.artifact, row, 1)])
    assert len(memoised.users) == 1
    ranker.score([(settings.artifact, row, 0)])
    assert len(memoised.users) == 0
    ranker.score([(settings.artifact, row, 2)])
    assert len(memoised.users) == 1


@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_is_remembered_gives_the_scores_of_what_is_computed(settings: ServingSettings, name: str) -> None:
    torch.manual_seed(0)
    model = build_model(SCHEMA, name, "tiny", id_dropout=0.0).eval()
    never, memo = MemoisedModel(model, 0), MemoisedModel(model, 10**9)

    def levels(rows: list[Any], exact: bool = False) -> list[str]:
        ranked = list(memo.rank(concatenate(rows), 100))
        plain = list(never.rank(concatenate(rows), 100))
        for one, other in zip(ranked, plain, strict=True):
            np.testing.assert_allclose(one.scores, other.scores, atol=0 if exact else 1e-6)
            assert other.remembered == "none"
        return [one.remembered for one in ranked]

    first, page, later, cold = rows_of(
        settings, ("7", ["1", "2"], NOW), ("7", ["3"], NOW), ("7", ["1"], NOW + 1), ("8", ["2", "1"], NOW)
    )
    assert levels([first]) == ["none"]
    assert levels([first], exact=True) == ["user"]  # a retry
    assert levels([page]) == ["user"]  # other candidates of the same request
    assert levels([later]) == ["timeline"]  # the same events at another time
    # what is remembered, in part remembered and new in one batch, and one of them twice
    latest, other = rows_of(settings, ("7", ["2", "3"], NOW + 2), ("8", ["3"], NOW + 2))
    assert levels([cold, latest, first, latest, other]) == ["none", "timeline", "user", "timeline", "none"]
    assert levels([other, cold, latest]) == ["user", "user", "user"]


def test_a_long_request_is_scored_in_parts_that_take_turns_and_its_user_side_once(settings: ServingSettings) -> None:
    whole = replace(settings, options=ServingConfig(max_candidates=10, memo_megabytes=16))
    parts = replace(settings, options=whole.options.model_copy(update={"chunk_candidates": 3}))
    unremembered = replace(settings, options=parts.options.model_copy(update={"memo_megabytes": 0}))
    request = body(candidates=[3, 1, 2, 9, "1", 2, 3, 1])
    answers, asked = [], []
    for each in (whole, parts, unremembered):
        ranker = Ranker(each)
        handle = InProcess(ranker)
        sizes: list[int] = []

        def counted(bound: Any, ranker: Ranker = ranker, sizes: list[int] = sizes) -> Any:
            sizes.append(len(bound[1]["requests"][0].as_py()[0]["candidates"]))
            return ranker.score([bound])[0]

        handle.rank = Remote(counted)
        service = RankingService(each, handle)  # type: ignore[arg-type]
        with TestClient(build_api(service)) as client:
            answers.append(client.post("/v1/rank", json=request).json())
        asked.append(sizes)
        _, memoised = ranker._model(each.artifact)
        assert len(memoised.users) == (1 if each is not unremembered else 0)
        assert service.memo_bytes == memoised.users.nbytes + memoised.timelines.nbytes
    assert asked == [[8], [3, 3, 2], [8]]
    for answer in answers:
        assert answer["ranking"] == answers[0]["ranking"]
        assert answer["memo"] == "none"
        for task, scores in answers[0]["scores"].items():
            np.testing.assert_allclose(answer["scores"][task], scores, atol=1e-6)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_of_a_timeline_that_has_moved_on_the_new_events_alone_are_encoded(
    settings: ServingSettings, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = build_model(SCHEMA, name, "tiny", id_dropout=0.0).eval()
    never, memo = MemoisedModel(model, 0), MemoisedModel(model, 10**9)
    encode, encoded = model.encode_timelines, list[int]()

    def counted(timelines: Any) -> Any:
        encoded.append(len(timelines["clicks"].ts))
        return encode(timelines)

    def levels(*requests: tuple[str, int]) -> tuple[list[str], int]:
        rows = concatenate(rows_of(settings, *((user, ["1", "2"], ts) for user, ts in requests)))
        plain = list(never.rank(rows, 100))
        encoded.clear()
        monkeypatch.setattr(model, "encode_timelines", counted)
        ranked = list(memo.rank(rows, 100))
        monkeypatch.setattr(model, "encode_timelines", encode)
        for one, other in zip(ranked, plain, strict=True):
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)
        return [one.remembered for one in ranked], sum(encoded)

    # the user's events have the times 100 … 109, of which a request sees the last five
    assert levels(("7", 103)) == (["none"], 3)
    assert levels(("7", 105)) == (["events"], 2)
    assert levels(("7", 107)) == (["events"], 2)  # two new ones, and the two oldest are gone
    assert levels(("7", 107), ("8", 107), ("7", 110)) == (["user", "none", "events"], 3)
    assert levels(("7", 200)) == (["timeline"], 0)
    assert levels(("7", 102)) == (["none"], 2)  # none of the last timeline's first events
    assert levels(("7", 111), ("7", 105)) == (["timeline", "user"], 0)
    memo.forget()
    assert levels(("7", 106)) == (["none"], 5)


def test_what_is_remembered_stays_within_its_bytes_and_the_longest_unused_goes(settings: ServingSettings) -> None:
    torch.manual_seed(0)
    model = build_model(SCHEMA, "ui-mixformer", "tiny", id_dropout=0.0).eval()
    rows = rows_of(settings, *(("7", ["1"], NOW + step) for step in range(6)))
    roomy = MemoisedModel(model, 10**9)
    for row in rows:
        list(roomy.rank(row, 100))
    assert (len(roomy.users), len(roomy.timelines)) == (6, 1)
    size = roomy.users.nbytes // 6
    small = MemoisedModel(model, 2 * round(3.5 * size))
    for row in rows[:3]:
        list(small.rank(row, 100))
    assert next(small.rank(rows[0], 100)).remembered == "user"  # used last now
    list(small.rank(rows[3], 100))
    assert small.users.nbytes <= small.users.most_bytes
    found = [next(small.rank(row, 100)).remembered for row in (rows[0], rows[2], rows[3], rows[1])]
    assert found == ["user", "user", "user", "timeline"]


def test_in_bfloat16_the_scores_are_near_those_in_float32_and_what_is_remembered_gives_the_same(
    settings: ServingSettings,
) -> None:
    rows = concatenate(rows_of(settings, ("7", ["1", "2", "3"], NOW), ("8", ["2"], NOW)))
    torch.manual_seed(0)
    model = build_model(SCHEMA, "ui-mixformer", "tiny", id_dropout=0.0).eval()
    exact = [ranked.scores for ranked in MemoisedModel(model, 10**9).rank(rows, 100)]
    low = MemoisedModel(model, 10**9, "bfloat16")
    first, again = ([ranked.scores for ranked in low.rank(rows, 100)] for _ in range(2))
    for one, other, remembered in zip(exact, first, again, strict=True):
        assert one.dtype == other.dtype == np.float32
        assert not np.array_equal(one, other)
        np.testing.assert_allclose(one, other, atol=TOLERANCES["bfloat16"])
        np.testing.assert_array_equal(other, remembered)
