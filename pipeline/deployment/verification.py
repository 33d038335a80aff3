"""Compares the endpoint's answers over HTTP with the model's offline scores, before a version is recorded.

The online store knows only the present. So requests of the newest partition are asked again, at the moment up to which
the store was filled. Their offline rows come from the builder's states, as those of the next partition would. Offline
and online must agree to 1e-5.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from features.builder.fold import rows_after
from features.builder.states import BuildSettings
from features.errors import CorankError
from features.schema import Schema
from features.validation import quarantine
from features.validation.rules import is_finite
from models.artifact import Artifact
from models.config import Precision
from models.selfcheck import TOLERANCES
from pipeline.evaluation.scoring import score_rows
from serving.client import RankingClient

REQUESTS = 16


def verify_endpoint(
    client: RankingClient,
    artifact: Artifact,
    build: BuildSettings,
    partitions: list[str],
    moment: int,
    limit: int = REQUESTS,
    precision: Precision = "float32",
) -> dict[str, Any]:
    """Compare the endpoint's scores with the offline scores of the same requests.

    Args:
        client: of the endpoint.
        artifact: what is served there.
        build: the builder's settings; the states of ``partitions`` must be there.
        precision: of the endpoint; offline scores are float32.
        moment: when the requests are asked, microseconds UTC: up to when the online store is filled.

    Returns:
        requests and candidates compared, the largest difference, and an example request.

    Raises:
        CorankError: another model is served, or a request's scores differ by more than the precision allows.
    """
    schema = build.schema
    impressions = asked_again(build, partitions[-1], moment, limit)
    contexts = raw_contexts(schema, impressions)
    rows = rows_after(build, partitions, impressions)
    candidates, largest = 0, 0.0
    example: dict[str, Any] = {}
    served = client.model()["model_version"]
    if served != artifact.version:
        raise CorankError(
            f"the endpoint {client.url} serves model {served}, not {artifact.version}; stop it and run again"
        )
    for index in range(rows.num_rows):
        row = rows.slice(index, 1)
        request, user_id = row["requests"][0].as_py()[0], row["user_id"][0].as_py()
        context = contexts[request["request_id"]]
        items = [candidate["item_id"] for candidate in request["candidates"]]
        offline = np.array(score_rows(artifact.model, row)["scores"].to_pylist())
        answer = client.rank(user_id, items, context, request["ts"], model_version=artifact.version)
        if answer["degraded"] is not None:
            raise CorankError(f"request {request['request_id']}: {answer['degraded']}; the deployment was not recorded")
        online = np.array([answer["scores"][task.name] for task in schema.tasks]).T
        difference = float(np.abs(online - offline).max())
        if not difference <= TOLERANCES[precision]:
            raise CorankError(
                f"request {request['request_id']}: the endpoint's scores differ from the offline scores by "
                f"{difference:.2e} (allowed {TOLERANCES[precision]:.0e}); the deployment was not recorded"
            )
        candidates, largest = candidates + len(items), max(largest, difference)
        if len(items) >= len(example.get("candidates", [])):
            example = {"user_id": user_id, "candidates": items, "context": context}
    return {"requests": rows.num_rows, "candidates": candidates, "largest_difference": largest, "example": example}


def asked_again(build: BuildSettings, partition: str, moment: int, limit: int) -> pl.DataFrame:
    """Impressions of the last request of some users of a partition, asked again at ``moment`` (microseconds UTC).

    Raises:
        CorankError: no impression of the partition is good.
    """
    table = build.tables["impressions"]
    keys = [pl.col(key).cast(pl.String) for key in ("request_id", "user_id")]
    asked = table.collect(table.scan([partition]).select(*keys, "ts").drop_nulls().unique(), [partition])
    last = asked.sort("ts", "request_id").unique("user_id", keep="last", maintain_order=True).tail(limit)
    rows = table.scan([partition]).filter(pl.col("request_id").cast(pl.String).is_in(last["request_id"].to_list()))
    good, _ = quarantine(table.collect(rows, [partition]), build.schema, [partition], build.grain, build.now)
    if good.is_empty():
        raise CorankError(
            f"table impressions, partition {partition}: all rows of its last requests are quarantined, so the "
            "deployment cannot be verified; correct them and run again"
        )
    text = [pl.col(key).cast(pl.String) for key in ("request_id", "user_id", "item_id")]
    return good.with_columns(*text, pl.lit(moment, pl.Int64).alias("ts"))


def raw_contexts(schema: Schema, impressions: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """Raw context by request id, as the first candidate has it: what a caller of the endpoint sends.

    A number that is not finite is missing, and JSON has no such number.
    """
    sources = list(dict.fromkeys(feature.source for feature in schema.side("context")))
    position = [name for name in ("position", "item_id") if name in impressions.columns]
    first = impressions.sort(position).unique("request_id", keep="first", maintain_order=True)
    numbers = dict.fromkeys(feature.source for feature in schema.side("context") if feature.kind == "number")
    first = first.with_columns(pl.when(is_finite(pl.col(name))).then(name).alias(name) for name in numbers)
    return {str(row["request_id"]): {name: row[name] for name in sources} for row in first.iter_rows(named=True)}
