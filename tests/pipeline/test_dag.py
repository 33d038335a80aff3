"""The whole DAG on a small synthetic log: what comes out, running again, retraining, late data."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest
from deltalake import DeltaTable

from features.batch import collate
from features.builder.fold import rows_after
from features.delta.table import Table
from features.encoding import bucket_of
from features.errors import CorankError, DataGateError
from features.store.online import apply
from features.store.reader import OnlineReader
from models.artifact import load_artifact
from pipeline.config import Config, EvaluationConfig
from pipeline.dag import open_instance, run_dag
from pipeline.evaluation import score_rows
from pipeline.importers.synthetic import import_synthetic
from pipeline.progress import Progress
from pipeline.runtime import ensure_ray
from pipeline.skew import replay
from pipeline.stages import Pipeline, gate_reasons
from pipeline.verification import asked_again
from pipeline.workspace import FOREVER
from serving.client import RankingClient
from serving.deploy import stop
from serving.ports import endpoint_url
from serving.ranking import APPLICATION
from tests.pipeline.workspaces import START, load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
DAYS = ["2026-01-05", "2026-01-06", "2026-01-07"]


def quietly(_: str) -> None:
    """Importers report; tests do not listen."""


def run(config: Config, until: str | None = None, warm_start: bool = False) -> Pipeline:
    pipeline = Pipeline(config, Progress(), until, warm_start)
    ensure_ray(config.ray)
    pending = pipeline.pending()
    if pending:
        run_dag(pipeline, pending)
    return pipeline


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Iterator[Config]:
    """Three days imported, the DAG run over the first two; the endpoint is up."""
    folder = tmp_path_factory.mktemp("dag")
    import_synthetic(folder / "data", days=3, users=150, items=120, seed=1, start=START, buckets=2, say=quietly)
    config = load(folder, folder / "data")
    run(config, until=DAYS[1])
    yield config
    stop()


def test_every_impression_is_a_candidate_or_quarantined(config: Config) -> None:
    pipeline = Pipeline(config, Progress(), DAYS[1])
    for day in DAYS[:2]:
        shown = config.table("impressions").scan([day]).collect().height
        samples = pipeline.records.get("samples", day)
        validated = pipeline.records.get("validated", day)
        assert samples is not None
        assert validated is not None
        assert shown == validated["rows"]["impressions"] == samples["impressions"]
        assert shown == samples["candidates"] + samples["quarantined"]
        rows = [pipeline.source(0, FOREVER, (day,)).read(file) for file in pipeline.source(0, FOREVER, (day,)).files()]
        assert shown == sum(collate(part, config.schema_).candidates for part in rows)


def test_records_carry_lineage(config: Config) -> None:
    pipeline = Pipeline(config, Progress(), DAYS[1])
    champion = pipeline.registry.champion()
    assert champion is not None
    lineage = load_artifact(champion.artifact).metadata["lineage"]
    assert list(lineage["partitions"]) == DAYS[:2]
    assert lineage["fingerprints"][DAYS[0]]["impressions"].endswith("@1")
    assert lineage["code"].startswith("0.")
    deployed = pipeline.records.get("deployment", "current")
    assert deployed is not None
    assert deployed["number"] == champion.number


def test_dagster_knows_partitions_checks_and_models(config: Config) -> None:
    import dagster as dg

    with open_instance(config) as instance:
        for name in ("validated", "samples", "feature_store"):
            assert instance.get_materialized_partitions(dg.AssetKey(name)) == set(DAYS[:2])
        assert instance.get_latest_materialization_event(dg.AssetKey("deployment")) is not None


def test_running_again_does_nothing(config: Config) -> None:
    pipeline = Pipeline(config, Progress(), DAYS[1])
    tables = [DeltaTable(config.path("tables", name)) for name in ("samples", "state")]
    assert pipeline.pending() == []
    run(config, until=DAYS[1])
    assert [DeltaTable(table.table_uri).version() for table in tables] == [table.version() for table in tables]
    assert len(pipeline.registry.versions()) == 1


def test_compaction_of_the_log_is_no_new_data(config: Config, tmp_path: Path) -> None:
    copy = tmp_path / "impressions"
    shutil.copytree(config.table("impressions").uri, copy)
    table = Table("impressions", str(copy))
    more = pl.DataFrame(table.scan([DAYS[0]]).head(1).collect())
    more.write_delta(str(copy), mode="append")  # a second file in one slice: something to compact
    before, version = table.fingerprints(), DeltaTable(str(copy)).version()
    DeltaTable(str(copy)).optimize.compact()
    assert DeltaTable(str(copy)).version() > version
    assert table.fingerprints() == before
    DeltaTable(str(copy)).delete(f"dt = '{DAYS[1]}' and position > 3")
    changed = table.fingerprints()
    assert {day for day in before if before[day] != changed[day]} == {DAYS[1]}


def test_the_endpoint_scores_as_offline(config: Config) -> None:
    """Requests of the newest partition, asked again over HTTP at the moment up to which the store is filled."""
    pipeline = Pipeline(config, Progress(), DAYS[1])
    deployed, moment = pipeline.records.get("deployment", "current"), pipeline.store_close()
    assert deployed is not None
    assert moment is not None
    model = load_artifact(deployed["artifact"]).model
    impressions = asked_again(pipeline.build_settings(), DAYS[1], moment, limit=40)
    devices = dict(impressions.select("request_id", "device").iter_rows())
    rows = rows_after(pipeline.build_settings(), DAYS[:2], impressions)
    assert rows.num_rows >= 20
    with RankingClient(deployed["url"]) as client:
        for index in range(rows.num_rows):
            row = rows.slice(index, 1)
            request = row["requests"][0].as_py()[0]
            items = [candidate["item_id"] for candidate in request["candidates"]]
            context = {"device": devices[request["request_id"]]}
            answer = client.rank(row["user_id"][0].as_py(), items, context, request["ts"])
            online = np.array([answer["scores"][task.name] for task in config.schema_.tasks]).T
            offline = np.array(score_rows(model, row)["scores"].to_pylist())
            np.testing.assert_allclose(online, offline, atol=1e-5, rtol=0)
            by_score = sorted(range(len(items)), key=lambda index: -answer["scores"]["click"][index])
            assert answer["ranking"] == [items[index] for index in by_score]


def test_a_replayed_partition_reads_online_what_its_samples_hold(config: Config, tmp_path: Path) -> None:
    """Every value of every request: profiles, windowed aggregates, cross features, sequences."""
    pipeline = Pipeline(config, Progress(), DAYS[1])
    samples = pipeline.source(0, FOREVER, (DAYS[1],))
    build, store = pipeline.build_settings(), pipeline.store_settings()
    found = replay(build, store, samples, DAYS[1], 60, tmp_path, lambda *_: None)
    assert found.requests >= 60
    assert {name: (one.differ, one.example) for name, one in found.features.items() if one.differ} == {}
    assert {feature.name for feature in config.features} < set(found.features)
    # a store that lags is noticed, and where
    stale = replay(replace(build, log_delay=3_600_000_000), store, samples, DAYS[1], 60, tmp_path, lambda *_: None)
    assert {name for name, one in stale.features.items() if one.differ} >= {"watched.ts", "watched.item_id"}
    assert stale.rate > 0


def test_unknown_users_and_items_are_scored_and_named(config: Config) -> None:
    pipeline = Pipeline(config, Progress(), DAYS[1])
    url = f"http://127.0.0.1:{config.serving.port}"
    known = config.table("items").scan().select("item_id").head(1).collect().item()
    with RankingClient(url) as client:
        answer = client.rank("nobody", [known, "nothing"], {"device": "tv"}, pipeline.store_close())
        assert answer["cold_start"] == {"user": True, "items": ["nothing"]}
        assert len(answer["scores"]["click"]) == 2
        with pytest.raises(CorankError, match="candidates"):
            client.rank("nobody", [], {"device": "tv"})
        with pytest.raises(CorankError, match="device"):
            client.rank("nobody", [known], {})
        assert client.model()["tasks"] == ["click", "purchase"]


def test_an_event_sent_to_the_endpoint_changes_the_next_answer_once(config: Config) -> None:
    close = Pipeline(config, Progress(), DAYS[1]).store_close()
    assert close is not None
    known, category = config.table("items").scan().select("item_id", "category").head(1).collect().row(0)
    event = {"event_id": "new", "user_id": "somebody", "item_id": known, "ts": close}
    event |= {"category": category, "duration": 60.0}
    with RankingClient(f"http://127.0.0.1:{config.serving.port}") as client:

        def score() -> float:
            return float(client.rank("somebody", [known], {"device": "tv"}, close + 1)["scores"]["click"][0])

        before = score()
        assert client.push([event], "watches") == {"watched": 1}
        after = score()
        assert after != before
        assert client.push([event], "watches") == {"watched": 0}
        assert score() == after
        with pytest.raises(
            CorankError, match=r"table: .*tables of sequences are \['watches', 'searches', 'purchases'\]"
        ):
            client.push([event])


def test_killed_replicas_are_answered_503_and_answer_as_before_when_restarted_beside_a_changed_config(
    config: Config,
) -> None:
    pipeline = Pipeline(config, Progress(), DAYS[1])
    item, close = config.table("items").scan().select("item_id").head(1).collect().item(), pipeline.store_close()
    fewer = config.model_copy(update={"features": config.features[1:], "sequences": config.sequences[1:]})
    registered = Pipeline(fewer, Progress(), DAYS[1]).registered_settings()
    assert registered.live == (config.schema_,)
    apply(registered)
    url = endpoint_url(config.serving.host, config.serving.port)
    with RankingClient(url, timeout=120) as client, ThreadPoolExecutor(6) as pool:

        def scores() -> Any:
            return client.rank("somebody", [item] * 2_000, {"device": "tv"}, close)["scores"]

        def failure(until: float) -> str | None:
            while time.monotonic() < until:
                try:
                    scores()
                except CorankError as error:
                    return str(error)
            return None

        before = scores()
        for name, message in (("Ranker", "the model does not answer"), ("RankingService", "no process of the service")):
            replica = replica_process(name)
            asked = [pool.submit(failure, time.monotonic() + 2) for _ in range(6)]
            time.sleep(1.0)
            replica.suspend()  # with requests in it
            replica.kill()
            failures = {one.result() for one in asked} - {None}  # what was not in it, the next replica answers
            assert failures
            assert all(f"503: {message}" in str(one) and "try again" in str(one) for one in failures), failures
            until_it_answers(client)
            np.testing.assert_allclose(scores()["click"], before["click"], atol=1e-6)


def replica_process(name: str) -> psutil.Process:
    """The process of this test's replica of a deployment."""
    processes = psutil.Process().children(recursive=True)
    (found,) = [one for one in processes if f"ServeReplica:{APPLICATION}:{name}" in " ".join(one.cmdline())]
    return found


def until_it_answers(client: RankingClient) -> None:
    until = time.monotonic() + 120
    while True:
        try:
            client.healthz()
            return
        except CorankError:
            assert time.monotonic() < until
            time.sleep(0.2)


def test_training_refuses_a_partition_without_a_passing_record(config: Config) -> None:
    pipeline = Pipeline(config, Progress(), DAYS[2])
    with pytest.raises(DataGateError, match=DAYS[2]):
        pipeline.train_candidate()
    with pytest.raises(DataGateError, match=DAYS[2]):
        pipeline.build_samples([DAYS[2]])


def test_retraining_takes_the_next_partition_from_the_champions_weights(config: Config) -> None:
    """Last of this module: it moves the champion."""
    old = Pipeline(config, Progress(), DAYS[1])
    before = old.registry.champion()
    assert before is not None
    state = {day: old.records.get("samples", day) for day in DAYS[:2]}
    stop()
    pipeline = run(config, until=DAYS[2], warm_start=True)
    champion = pipeline.registry.champion()
    assert champion is not None
    assert champion.number == before.number + 1
    assert champion.tags["partition"] == DAYS[2]
    lineage = load_artifact(champion.artifact).metadata["lineage"]
    assert lineage["warm_start"] == before.number
    assert lineage["trained_from"] == load_artifact(before.artifact).metadata["lineage"]["cuts"]["validation"]
    evaluation = pipeline.records.get("evaluation", pipeline.evaluation_key)
    assert evaluation is not None
    assert evaluation["champion"] == before.number
    assert {day: pipeline.records.get("samples", day) for day in DAYS[:2]} == state
    assert Pipeline(config, Progress()).pending() == []
    assert pipeline.registry.rollback().number == before.number


def test_late_rows_rebuild_their_partition_and_all_after_it(config: Config, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(Path(config.table("impressions").uri).parent, data)
    shutil.copytree(config.local_path(), tmp_path / "work")
    moved = load(tmp_path, data)
    assert Pipeline(moved, Progress(), DAYS[1]).pending() != []  # other tables, other work
    pipeline = Pipeline(config, Progress(), DAYS[2])
    fingerprints = {day: dict(pipeline.log.fingerprint(day)) for day in DAYS}
    late = pl.DataFrame(config.table("watches").scan([DAYS[1]]).head(1).collect())
    bucket = bucket_of("visitor", config.buckets)
    late = late.with_columns(
        event_id=pl.lit("late"), user_id=pl.lit("visitor"), bucket=pl.lit(bucket, late["bucket"].dtype)
    )
    late.write_delta(config.table("watches").uri, mode="append")
    after = Pipeline(config, Progress(), DAYS[2])
    changed = {day for day in DAYS if after.log.fingerprint(day) != fingerprints[day]}
    assert changed == {DAYS[1]}
    assert after.stale_samples() == DAYS[1:]
    events = {day: (after.records.get("samples", day) or {})["events"] for day in DAYS}
    after = rebuilt(config)
    assert {day: (after.records.get("samples", day) or {})["events"] for day in DAYS} == {
        **events,
        DAYS[1]: events[DAYS[1]] + 1,
    }
    online = OnlineReader(after.store_settings())
    assert online.sequences("visitor")["watched"].ts.tolist() == late["ts"].to_list()
    assert online.encoded_user("visitor", after.store_close() or 0)[0]
    DeltaTable(config.table("watches").uri).delete("event_id = 'late'")
    after = rebuilt(config)
    assert {day: (after.records.get("samples", day) or {})["events"] for day in DAYS} == events
    assert online.sequences("visitor")["watched"].ts.tolist() == []
    assert not online.encoded_user("visitor", after.store_close() or 0)[0]


def test_retraining_after_late_rows_rebuilds_but_trains_nothing_and_leaves_the_service_as_it_is(
    config: Config,
) -> None:
    """After the tests before: what was changed and changed back is another log; version 2 is served, 1 is champion."""
    assert "candidate" in Pipeline(config, Progress(), DAYS[2]).pending()
    before = Pipeline(config, Progress()).registry.versions()
    late = pl.DataFrame(config.table("watches").scan([DAYS[0]]).head(1).collect())
    late.with_columns(event_id=pl.lit("later")).write_delta(config.table("watches").uri, mode="append")
    command = [sys.executable, "-c", "from pipeline.cli import main; main()"]
    path = config.local_path().parent / "config.yaml"
    done = subprocess.run([*command, "retrain", "--config", path], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"Nothing to train: what is known up to {DAYS[2]}, the newest closed partition, is trained on" in done.stdout
    assert done.stderr.index("✓ feature_store") < done.stderr.index("✓ deployment")
    assert "version 1 verified at an endpoint of its own, as another process serves" in done.stderr
    assert "is up with version 2" in done.stdout
    assert "champion is version 1: restart `corank serve` to serve it" in done.stdout
    with RankingClient(endpoint_url(config.serving.host, config.serving.port)) as client:
        assert client.model()["model_version"] == before[0].tags["content"]
    after = Pipeline(config, Progress(), DAYS[2])
    assert after.pending(training=False) == []
    assert after.registry.versions() == before
    assert after.is_deployed()
    # the store is ahead of a model whose labels came late: its answers are compared with what the store was filled from
    assert Pipeline(config, Progress(), DAYS[0]).deploy()["verified"]["requests"] > 0
    stop()


def rebuilt(config: Config) -> Pipeline:
    """What changed is validated, built and online again."""
    pipeline = Pipeline(config, Progress(), DAYS[2])
    pipeline.validate(pipeline.stale_validation())
    pipeline.build_samples(pipeline.stale_samples())
    pipeline.fill_store(pipeline.stale_store())
    assert not {"validated", "samples", "feature_store"} & set(pipeline.pending())
    return pipeline


def test_a_corrected_profile_rebuilds_and_a_later_snapshot_does_not(config: Config, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(Path(config.table("users").uri).parent, data)
    moved = load(tmp_path, data)
    before = Pipeline(moved, Progress()).sample_inputs
    users = moved.table("users")
    close = Pipeline(moved, Progress()).log.bounds(DAYS[2])[1]
    later = users.scan().head(1).collect().with_columns(updated_at=pl.lit(close))
    later.write_delta(users.uri, mode="append")
    assert Pipeline(moved, Progress()).sample_inputs == before
    corrected = users.scan().collect().with_columns(pl.col("age") + 1)
    corrected.write_delta(users.uri, mode="overwrite")
    assert all(now != before[day] for day, now in Pipeline(moved, Progress()).sample_inputs.items())


@pytest.mark.parametrize(
    ("gain", "against", "passes"),
    [
        (0.01, None, True),
        (-0.01, None, False),
        (float("nan"), None, False),
        (0.01, (3, -0.005), True),
        (0.01, (3, -0.02), False),
        (0.01, (3, float("nan")), False),
    ],
)
def test_the_gate_promotes_only_what_beats_the_baseline_and_holds_the_champion(
    gain: float, against: tuple[int, float] | None, passes: bool
) -> None:
    reasons = gate_reasons(EvaluationConfig(), gain, against)
    assert (not reasons) == passes


def test_a_rejected_first_candidate_is_registered_but_not_served(config: Config, tmp_path: Path) -> None:
    shutil.copytree(Path(config.table("users").uri).parent, tmp_path / "data")
    shutil.copytree(config.local_path(), tmp_path / "work")
    strict = load(tmp_path, tmp_path / "data", evaluation={"min_gain_over_baseline": 0.9, "resamples": 50})
    shutil.rmtree(strict.local_path("mlflow"))
    pipeline = Pipeline(strict, Progress(), DAYS[0])
    pipeline.validate([DAYS[0]])
    pipeline.build_samples([DAYS[0]])
    pipeline.train_candidate()
    assert not pipeline.evaluate()["passed"]
    with pytest.raises(CorankError, match=r"not promoted.*no champion to serve"):
        pipeline.promote()
    assert [version.aliases for version in pipeline.registry.versions()] == [()]


def test_a_hyformer_goes_through_the_same_dag(config: Config, tmp_path: Path) -> None:
    """Trained, judged and read back from its artifact; an encoding per request, several sequences."""
    shutil.copytree(Path(config.table("users").uri).parent, tmp_path / "data")
    shutil.copytree(config.local_path(), tmp_path / "work")
    model = {"name": "hyformer", "layers": 1, "encoding": "longer", "short_length": 10, "queries": 2, "tokens": 16}
    moved = load(tmp_path, tmp_path / "data", model=model)
    pipeline = Pipeline(moved, Progress(), DAYS[1])
    pipeline.validate(pipeline.stale_validation())
    pipeline.build_samples(pipeline.stale_samples())
    pipeline.train_candidate()
    evaluation = pipeline.evaluate()
    assert evaluation["passed"], evaluation
    promoted = pipeline.promote()
    champion = pipeline.registry.champion()
    assert champion is not None, promoted
    artifact = load_artifact(champion.artifact)
    assert artifact.model.describe()["name"] == "hyformer"
    assert artifact.model.describe()["queries"] == 2
    assert artifact.metadata["selfcheck"]["scores"]
    other = load(tmp_path, tmp_path / "data")
    with pytest.raises(CorankError, match=r"whose model or sizes differ from the config's `model:`"):
        Pipeline(other, Progress(), DAYS[1], warm_start=True).train_candidate()
