"""Is what the endpoint answers what the model scores offline? Asked over HTTP before a version is recorded.

The online store knows only the present. So the requests compared are those of the newest partition whose
visible history and profiles are still all online; offline and online then must agree to 1e-5.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from features.batch import end_column, sample_schema, timeline_column
from features.errors import CorankError
from features.lake import Table
from features.reader import SampleSource
from features.schema import Sequence
from features.store.online import FeatureStoreSettings, OnlineReader
from models.artifact import load_artifact
from pipeline.evaluation import score_rows
from pipeline.selfcheck import selfcheck_difference
from serving.client import RankingClient

TOLERANCE = 1e-5
REQUESTS = 16


def verify_endpoint(
    url: str,
    artifact_path: str,
    newest: SampleSource,
    impressions: Table,
    store: FeatureStoreSettings,
    log_delay: int,
    limit: int = REQUESTS,
) -> dict[str, Any]:
    """Compare the endpoint's scores with the offline scores of the same requests.

    Args:
        newest: samples of the newest partition; ``impressions`` holds their raw context.

    Returns:
        requests and candidates compared, the largest difference, and an example request.

    Raises:
        CorankError: the model's self-check or a request's scores differ by more than 1e-5.
    """
    artifact = load_artifact(artifact_path)
    drift = selfcheck_difference(artifact.model, artifact.metadata["selfcheck"], _layout(newest))
    if drift > TOLERANCE:
        raise CorankError(
            f"model {artifact_path}: its self-check requests differ by {drift:.2e} from the stored scores"
        )
    compared, candidates, largest = 0, 0, 0.0
    example: dict[str, Any] = {}
    with RankingClient(url) as client:
        served = client.model()["model_version"]
        if served != artifact.version:
            raise CorankError(
                f"the endpoint {url} serves model {served}, not {artifact.version}; stop it and run again"
            )
        for row, request in replayable(newest, store, log_delay):
            context = _raw_context(impressions, newest, request["request_id"])
            items = [candidate["item_id"] for candidate in request["candidates"]]
            offline = np.array(score_rows(artifact.model, row)["scores"].to_pylist())
            answer = client.rank(row["user_id"][0].as_py(), items, context, request["ts"])
            online = np.array([answer["scores"][task.name] for task in newest.schema.tasks]).T
            difference = float(np.abs(online - offline).max())
            if difference > TOLERANCE:
                raise CorankError(
                    f"request {request['request_id']}: the endpoint's scores differ from the offline scores by "
                    f"{difference:.2e} (allowed {TOLERANCE:.0e}); the deployment was not recorded"
                )
            compared, candidates, largest = compared + 1, candidates + len(items), max(largest, difference)
            if len(items) >= len(example.get("candidates", [])):
                example = {"user_id": row["user_id"][0].as_py(), "candidates": items, "context": context}
            if compared >= limit:
                break
    if not compared:
        raise CorankError(
            "no request of the newest partition could be replayed against the online store, so the deployment cannot "
            "be verified. Materialise again: delete records/feature_store and run `corank run`"
        )
    return {"requests": compared, "candidates": candidates, "largest_difference": largest, "example": example}


def replayable(
    newest: SampleSource, store: FeatureStoreSettings, log_delay: int
) -> Iterator[tuple[pa.Table, dict[str, Any]]]:
    """Requests of the newest partition that the online store can still answer as of their own time.

    Yields:
        the request as a row of the sample table, and the request itself.
    """
    reader = OnlineReader(store)
    for file in newest.files():
        for row in newest.read(file).to_pylist():
            histories = reader.sequences(row["user_id"])
            for request in reversed(row["requests"]):
                if all(
                    _same_window(row, request, sequence, histories[sequence.name].ts, log_delay)
                    for sequence in newest.schema.sequences
                ) and _profiles_unchanged(reader, row, request):
                    schema = _layout(newest)
                    columns = pa.schema([field for field in schema if field.name not in ("dt", "bucket")])
                    yield pa.Table.from_pylist([{**row, "requests": [request]}], schema=columns), request
                    break  # one request of every user


def _same_window(
    row: dict[str, Any], request: dict[str, Any], sequence: Sequence, online: np.ndarray, log_delay: int
) -> bool:
    end = request[end_column(sequence)]
    offline = row[timeline_column(sequence, None)][max(0, end - sequence.length) : end]
    seen = online[online < request["ts"] - log_delay][-sequence.length :]
    return list(seen) == offline


def _profiles_unchanged(reader: OnlineReader, row: dict[str, Any], request: dict[str, Any]) -> bool:
    known, _ = reader.encoded_user(row["user_id"], request["ts"])
    items = reader.items([candidate["item_id"] for candidate in request["candidates"]], request["ts"])
    return known == request["user_known"] and items["item_known"].to_list() == [
        candidate["item_known"] for candidate in request["candidates"]
    ]


def _raw_context(impressions: Table, newest: SampleSource, request_id: str) -> dict[str, Any]:
    sources = [feature.source for feature in newest.schema.side("context")]
    if not sources:
        return {}
    rows = impressions.scan(newest.partitions).filter(pl.col("request_id").cast(pl.String) == request_id)
    return rows.select(sources).head(1).collect().row(0, named=True)


def _layout(source: SampleSource) -> pa.Schema:
    return sample_schema(source.schema)
