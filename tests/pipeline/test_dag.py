"""The whole DAG on a small synthetic log: what comes out, running again, retraining, late data."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import psutil
import pytest
from deltalake import DeltaTable
from ray import serve

from features.batch import collate
from features.builder.fold import rows_after
from features.delta.table import Table
from features.digest import digest
from features.encoding import bucket_of
from features.errors import CorankError, DataGateError
from features.store.online import apply
from features.store.reader import OnlineReader
from models.artifact import load_artifact
from pipeline.cluster import application
from pipeline.commands.run import _work
from pipeline.commands.skew import _served_skew
from pipeline.commands.summary import gate_text, print_models, print_status, print_summary
from pipeline.config import Config
from pipeline.cost import costs
from pipeline.dag import open_instance, run_dag
from pipeline.deployment.skew import replay
from pipeline.deployment.verification import asked_again
from pipeline.evaluation.scoring import score_rows
from pipeline.importers.synthetic import import_synthetic
from pipeline.progress import Progress
from pipeline.records import Record
from pipeline.report import report_of, write_report
from pipeline.runtime import ensure_ray
from pipeline.stages import STAGES, pending
from pipeline.stages.challenger import CHALLENGER
from pipeline.stages.champion import CHAMPION
from pipeline.stages.deployment import CURRENT, DEPLOYMENT, SERVED, SERVED_LOG, name_served
from pipeline.stages.evaluation import EVALUATION
from pipeline.stages.feature_store import FEATURE_STORE, online_record, registered_settings, store_settings
from pipeline.stages.progressive_validation import PROGRESSIVE_VALIDATION
from pipeline.stages.refit import REFIT
from pipeline.stages.samples import FOREVER, SAMPLES, build_settings, sample_source
from pipeline.stages.stage import Stage
from pipeline.stages.validated import VALIDATED
from pipeline.workspace import Workspace
from pipeline.workspace.registry import PROMOTED_BY_HAND
from serving.application import APPLICATION
from serving.client import RankingClient
from serving.deploy import stop
from serving.ports import endpoint_url, is_free
from serving.settings import ServingConfig
from tests.browser import drawn, opened
from tests.pipeline.workspaces import LENIENT, START, load, make
from tests.servers import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
DAYS = ["2026-01-05", "2026-01-06", "2026-01-07"]


def quietly(_: str) -> None:
    """Importers report; tests do not listen."""


def run(config: Config, until: str | None = None, warm_start: bool = False) -> Workspace:
    workspace = Workspace(config, Progress(), until, warm_start)
    ensure_ray(config.ray)
    if names := pending(workspace):
        run_dag(workspace, names)
    return workspace


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Iterator[Config]:
    """Three days imported, the DAG run over the first two; the endpoint is up."""
    folder = tmp_path_factory.mktemp("dag")
    import_synthetic(folder / "data", days=3, users=150, items=120, seed=1, start=START, buckets=2, say=quietly)
    tokens = folder / "tokens"
    tokens.touch(0o600)
    tokens.write_text("tests 5ca1ab1e-5ca1ab1e")
    training = {"epochs": 2, "batch_candidates": 1_000, "num_workers": 1}  # on Ray Train
    serving = {"port": free_port(), "tokens": str(tokens), "log_share": 1.0, "log_seconds": 0.5}
    config = load(folder, folder / "data", training=training, serving=serving)
    run(config, until=DAYS[1])
    yield config
    stop()


def test_every_impression_is_a_candidate_or_quarantined(config: Config) -> None:
    workspace = Workspace(config, Progress(), DAYS[1])
    for day in DAYS[:2]:
        shown = config.table("impressions").scan([day]).collect().height
        samples = workspace.records.read(SAMPLES, day)
        validated = workspace.records.read(VALIDATED, day)
        assert samples is not None
        assert validated is not None
        assert shown == validated.rows["impressions"] == samples.impressions
        assert shown == samples.candidates + samples.quarantined
        rows = [
            sample_source(workspace, 0, FOREVER, (day,)).read(file)
            for file in sample_source(workspace, 0, FOREVER, (day,)).files()
        ]
        assert shown == sum(collate(part, config.schema_).candidates for part in rows)


def test_records_carry_lineage(config: Config) -> None:
    workspace = Workspace(config, Progress(), DAYS[1])
    champion = workspace.registry.champion()
    assert champion is not None
    lineage = load_artifact(champion.artifact).metadata["lineage"]
    assert list(lineage["partitions"]) == DAYS[:2]
    assert lineage["fingerprints"][DAYS[0]]["impressions"].endswith("@1")
    assert lineage["code"].startswith("0.")
    deployed = workspace.records.read(DEPLOYMENT, CURRENT)
    assert deployed is not None
    assert deployed.number == champion.number


def test_dagster_knows_partitions_checks_and_models(config: Config) -> None:
    with open_instance(config) as instance:
        for name in ("validated", "samples", "feature_store"):
            assert instance.get_materialized_partitions(dg.AssetKey(name)) == set(DAYS[:2])
        assert instance.get_latest_materialization_event(dg.AssetKey("deployment")) is not None


def test_running_again_does_nothing(config: Config) -> None:
    workspace = Workspace(config, Progress(), DAYS[1])
    tables = [DeltaTable(config.path("tables", name)) for name in ("samples", "state")]
    assert pending(workspace) == []
    run(config, until=DAYS[1])
    assert [DeltaTable(table.table_uri).version() for table in tables] == [table.version() for table in tables]
    assert len(workspace.registry.versions()) == 1


def test_a_process_that_has_deployed_a_version_goes_on_to_serve_it(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `retrain --serve` does with the next partition; its own endpoint has the port."""
    assert not is_free(config.serving.host, config.serving.port)
    assert _work(Workspace(config, Progress(), DAYS[1]), serve=True, training=True) is False
    printed = capsys.readouterr().out
    assert "Nothing to do: every stage is up to date" in printed
    assert "warning     the training had " in printed  # so few steps


def test_the_summary_says_what_tables_lack_and_what_is_taken_instead(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(Path(config.table("users").uri).parent, tmp_path / "data")
    users = tmp_path / "data" / "users"
    rows = pl.read_delta(str(users)).drop("updated_at").unique("user_id")
    rows.write_delta(str(users), mode="overwrite", delta_write_options={"schema_mode": "overwrite"})
    print_summary(Workspace(load(tmp_path, tmp_path / "data"), Progress(), DAYS[1]), None)
    assert "note        table users has no updated_at: " in capsys.readouterr().out


@dataclass(frozen=True)
class CountedRecord(Record):
    requests: int = 0


def counted(is_partitioned: bool) -> Stage[CountedRecord]:
    """All that a new stage needs, but for its entry in the list."""

    class Counted(Stage[CountedRecord]):
        """How many requests the samples have."""

        name = "counted"
        depends = ("samples",)
        record = CountedRecord
        partitioned = is_partitioned

        def inputs(self, workspace: Workspace) -> dict[str, str]:
            made_from = SAMPLES.inputs(workspace)
            return made_from if self.partitioned else {"all": digest(made_from)}

        def run(self, workspace: Workspace, parts: Sequence[str]) -> dict[str, CountedRecord]:
            requests = {one: workspace.records.require(SAMPLES, one).requests for one in workspace.partitions}
            records = {}
            for part in parts:
                count = requests[part] if self.partitioned else sum(requests.values())
                records[part] = CountedRecord(inputs=self.inputs(workspace)[part], requests=count)
                workspace.records.write(self, part, records[part])
            return records

        def counts(self, workspace: Workspace) -> tuple[str, str]:
            records = [workspace.records.require(self, part) for part in self.inputs(workspace)]
            return f"{len(records)} parts", f"{sum(record.requests for record in records)} counted requests"

    return Counted()


@pytest.mark.parametrize("is_partitioned", [False, True], ids=["whole", "by partition"])
def test_a_new_stage_is_one_object_and_one_entry_in_the_list(
    config: Config, capsys: pytest.CaptureFixture[str], is_partitioned: bool
) -> None:
    stage = counted(is_partitioned)
    STAGES.insert(2, stage)
    try:
        workspace = Workspace(config, Progress(), DAYS[1])
        assert pending(workspace) == ["counted"]
        print_status(workspace)
        assert "work left   counted (`corank run`)" in capsys.readouterr().out
        run_dag(workspace, pending(workspace))
        assert pending(workspace) == []
        parts = DAYS[:2] if is_partitioned else ["all"]
        requests = sum(workspace.records.require(stage, part).requests for part in parts)
        assert requests == sum(workspace.records.require(SAMPLES, day).requests for day in DAYS[:2]) > 0
        print_summary(workspace, None)
        (row,) = [line for line in capsys.readouterr().out.splitlines() if " counted " in line]
        assert f"{len(parts)} parts" in row
        assert f"{requests} counted requests" in row
        with open_instance(config) as instance:
            assert instance.get_latest_materialization_event(dg.AssetKey("counted")) is not None
    finally:
        STAGES.remove(stage)
        shutil.rmtree(config.path("records", "counted"), ignore_errors=True)


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
    workspace = Workspace(config, Progress(), DAYS[1])
    deployed, moment = workspace.records.read(DEPLOYMENT, CURRENT), online_record(workspace).close
    assert deployed is not None
    assert moment is not None
    model = load_artifact(deployed.artifact).model
    impressions = asked_again(build_settings(workspace), DAYS[1], moment, limit=40)
    devices = dict(impressions.select("request_id", "device").iter_rows())
    rows = rows_after(build_settings(workspace), DAYS[:2], impressions)
    assert rows.num_rows >= 20
    with RankingClient(deployed.url, token=config.serving.own_token) as client:
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
    workspace = Workspace(config, Progress(), DAYS[1])
    samples = sample_source(workspace, 0, FOREVER, (DAYS[1],))
    build, store = build_settings(workspace), store_settings(workspace)
    found = replay(build, store, samples, DAYS[1], 60, tmp_path, lambda *_: None)
    assert found.requests >= 60
    assert {name: (one.differ, one.example) for name, one in found.features.items() if one.differ} == {}
    assert {feature.name for feature in config.features} < set(found.features)
    # a store that lags is noticed, and where
    stale = replay(replace(build, log_delay=3_600_000_000), store, samples, DAYS[1], 60, tmp_path, lambda *_: None)
    assert {name for name, one in stale.features.items() if one.differ} >= {"watched.ts", "watched.item_id"}
    assert stale.rate > 0


def test_unknown_users_and_items_are_scored_and_named(config: Config) -> None:
    workspace = Workspace(config, Progress(), DAYS[1])
    url = f"http://127.0.0.1:{config.serving.port}"
    known = config.table("items").scan().select("item_id").head(1).collect().item()
    with RankingClient(url, token=config.serving.own_token) as client:
        answer = client.rank("nobody", [known, "nothing"], {"device": "tv"}, online_record(workspace).close)
        assert answer["cold_start"] == {"user": True, "items": ["nothing"]}
        assert len(answer["scores"]["click"]) == 2
        with pytest.raises(CorankError, match="candidates"):
            client.rank("nobody", [], {"device": "tv"})
        with pytest.raises(CorankError, match="device"):
            client.rank("nobody", [known], {})
        assert client.model()["tasks"] == ["click", "purchase"]


def test_what_was_served_is_logged_and_the_log_gives_the_same_features_later(config: Config) -> None:
    """The requests asked above, at the opening of the third day, which lies in the log already."""
    workspace, table = Workspace(config, Progress()), Table("served", f"{config.path(SERVED_LOG)}/requests")
    until = time.monotonic() + 20
    while not table.exists() or table.scan([DAYS[2]]).collect().height < 20:
        assert time.monotonic() < until
        time.sleep(0.1)
    with workspace.progress.stage("skew") as stage:
        found = _served_skew(workspace, None, 0, stage, lambda *_: None)
    assert (found.partition, found.left_out) == (DAYS[2], 0)
    assert found.requests >= 20
    assert {name: (one.differ, one.example) for name, one in found.features.items() if one.differ} == {}
    assert {feature.name for feature in config.features} < set(found.features)


def test_an_event_sent_to_the_endpoint_changes_the_next_answer_once(config: Config) -> None:
    close = online_record(Workspace(config, Progress(), DAYS[1])).close
    assert close is not None
    known, category = config.table("items").scan().select("item_id", "category").head(1).collect().row(0)
    event = {"event_id": "new", "user_id": "somebody", "item_id": known, "ts": close}
    event |= {"category": category, "duration": 60.0}
    with RankingClient(f"http://127.0.0.1:{config.serving.port}", token=config.serving.own_token) as client:

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
    workspace = Workspace(config, Progress(), DAYS[1])
    item, close = (
        config.table("items").scan().select("item_id").head(1).collect().item(),
        online_record(workspace).close,
    )
    fewer = config.model_copy(update={"features": config.features[1:], "sequences": config.sequences[1:]})
    registered = registered_settings(Workspace(fewer, Progress(), DAYS[1]))
    assert registered.live == (config.schema_,)
    apply(registered)
    url = endpoint_url(config.serving.host, config.serving.port)
    with RankingClient(url, timeout=120, token=config.serving.own_token) as client, ThreadPoolExecutor(6) as pool:

        def scores() -> Any:
            return client.rank("somebody", [item] * 2_000, {"device": "tv"}, close)["scores"]

        def failure(ended: threading.Event) -> str | None:
            """What the first request that is not answered is told; requests are asked until then, or until the end."""
            while not ended.is_set():
                try:
                    scores()
                    answered.append(time.monotonic())
                except CorankError as error:
                    return str(error)
            return None

        answered: list[float] = []
        begun = time.monotonic()
        before = scores()
        long = min(2.0 + 6 * (time.monotonic() - begun), 20.0)  # six that wait for each other have come through by then
        for name, message in (("Ranker", "the model does not answer"), ("RankingService", "no process of the service")):
            replica, ended = replica_process(name), threading.Event()
            asked = [pool.submit(failure, ended) for _ in range(6)]
            time.sleep(0.5)
            replica.suspend()
            answered.append(time.monotonic())
            while time.monotonic() - answered[-1] < long:  # until all requests wait for it
                time.sleep(0.1)
            replica.kill()
            wait(asked, timeout=40, return_when=FIRST_COMPLETED)
            time.sleep(1.0)
            ended.set()
            failures = {one.result() for one in asked} - {None}  # what was not in it, the next replica answers
            assert failures, name
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
    workspace = Workspace(config, Progress(), DAYS[2])
    with pytest.raises(DataGateError, match=DAYS[2]):
        make(CHALLENGER, workspace)
    with pytest.raises(DataGateError, match=DAYS[2]):
        SAMPLES.run(workspace, [DAYS[2]])


def test_retraining_takes_the_next_partition_from_the_champions_weights(config: Config) -> None:
    """Last of this module: it moves the champion."""
    old = Workspace(config, Progress(), DAYS[1])
    before = old.registry.champion()
    assert before is not None
    state = {day: old.records.read(SAMPLES, day) for day in DAYS[:2]}
    stop()
    workspace = run(config, until=DAYS[2], warm_start=True)
    champion = workspace.registry.champion()
    assert champion is not None
    assert champion.number == before.number + 1
    assert champion.tags["partition"] == DAYS[2]
    lineage = load_artifact(champion.artifact).metadata["lineage"]
    assert lineage["warm_start"] == before.number
    # the first one was refitted on what it was judged by, so the next begins behind it, and leaves its newest tenth
    first = load_artifact(before.artifact).metadata["lineage"]
    assert first["trained_until"] == old.log.bounds(DAYS[1])[1] == lineage["trained_from"]
    assert first["judged"]["version"] == before.tags["judged"] != before.tags["content"]
    opening, close = workspace.log.bounds(DAYS[2])
    assert opening < lineage["trained_until"] == lineage["cuts"]["test"] < close
    progressive = workspace.records.require(PROGRESSIVE_VALIDATION, DAYS[2])
    assert progressive.champion == progressive.frozen == before.number
    assert progressive.versions_scored[str(before.number)]["click"]["auc"] is not None
    evaluation = workspace.records.read(EVALUATION, EVALUATION.key(workspace))
    assert evaluation is not None
    assert evaluation.champion == before.number
    measured = {one.measured: one for one in evaluation.criteria}
    over = f"gain over champion version {before.number}"
    for what in (
        "click AUC",
        "click GAUC",
        "purchase AUC",
        "click AUC, users with few events",
        "click AUC, device mobile",
    ):
        assert measured[f"{what}, {over}"].interval is not None
    slowdown = measured[f"time of scoring the self-check requests ÷ that of champion version {before.number}"]
    assert slowdown.passed is True
    assert evaluation.tasks["click"]["references"]["boosting on 9 numbers"]["auc"] is not None
    assert {day: workspace.records.read(SAMPLES, day) for day in DAYS[:2]} == state
    assert pending(Workspace(config, Progress())) == []
    assert workspace.registry.rollback().number == before.number


def test_a_split_and_a_shadow_of_the_config_are_named_to_a_running_service(config: Config) -> None:
    def beside(**changes: Any) -> dict[str, Any]:
        serving = ServingConfig.model_validate(config.serving.model_dump() | changes)
        workspace = Workspace(config.model_copy(update={"serving": serving}), Progress())
        champion, before = workspace.registry.champion(), (workspace.records.get(*SERVED) or {})
        assert champion is not None
        try:
            name_served(workspace, champion)
            return workspace.records.get(*SERVED) or {}
        finally:
            workspace.records.put(*SERVED, before)

    first, second = (
        version.artifact
        for version in sorted(Workspace(config, Progress()).registry.versions(), key=lambda version: version.number)
    )
    named = beside(split={"version": 2, "share": 0.2}, shadow=2)
    assert (named["artifact"], named["shadow"]) == (first, second)
    assert named["split"] == {"artifact": second, "share": 0.2}
    assert not {"split", "shadow"} & set(beside(split={"version": 1, "share": 0.2}, shadow=1))  # what answers anyway
    with pytest.raises(CorankError, match=r"serving.shadow: there is no version 7; there are \[1, 2\]"):
        beside(shadow=7)


def test_the_application_of_a_rayservice_is_that_of_the_champion(config: Config, tmp_path: Path) -> None:
    """As ``serve deploy`` and KubeRay build it, from the config's path alone."""
    with pytest.raises(CorankError, match="name the config"):
        application({})
    folder = Path(config.workspace).parent
    built = application({"config": str(folder / "config.yaml")})
    assert isinstance(built, serve.Application)
    assert (Workspace(config, Progress()).records.get(*SERVED) or {})["number"] == 1


def test_the_report_of_a_version_is_one_file_without_a_script_error(config: Config, chromium: str) -> None:
    """Of both versions; every stage of a run has a cost."""
    workspace = Workspace(config, Progress(), DAYS[2])
    for number, partition in ((1, DAYS[1]), (2, DAYS[2])):
        page, errors = opened(chromium, report_of(workspace, number))
        assert errors == []
        figures = {"partitions", "learning", "calibration"} | ({"life"} if number == 2 else set())
        assert drawn(page) == figures
        spent = costs(workspace.records, partition)
        assert {stage.name for stage in STAGES} - set(spent) <= ({"progressive_validation"} if number == 1 else set())
        assert all(one["seconds"] > 0 for one in spent.values())
        assert spent["challenger"]["cpu_seconds"] > 0.5
        assert spent["samples"]["rows"] == sum(
            one.impressions + one.events
            for one in (workspace.records.require(SAMPLES, day) for day in (DAYS[:2] if number == 1 else DAYS[2:]))
        )


def test_late_rows_rebuild_their_partition_and_all_after_it(config: Config, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(Path(config.table("impressions").uri).parent, data)
    shutil.copytree(config.local_path(), tmp_path / "work")
    moved = load(tmp_path, data)
    assert pending(Workspace(moved, Progress(), DAYS[1])) != []  # other tables, other work
    workspace = Workspace(config, Progress(), DAYS[2])
    fingerprints = {day: dict(workspace.log.fingerprint(day)) for day in DAYS}
    late = pl.DataFrame(config.table("watches").scan([DAYS[1]]).head(1).collect())
    bucket = bucket_of("visitor", config.buckets)
    late = late.with_columns(
        event_id=pl.lit("late"), user_id=pl.lit("visitor"), bucket=pl.lit(bucket, late["bucket"].dtype)
    )
    late.write_delta(config.table("watches").uri, mode="append")
    after = Workspace(config, Progress(), DAYS[2])
    changed = {day for day in DAYS if after.log.fingerprint(day) != fingerprints[day]}
    assert changed == {DAYS[1]}
    assert SAMPLES.stale(after) == DAYS[1:]
    events = {day: after.records.require(SAMPLES, day).events for day in DAYS}
    after = rebuilt(config)
    assert {day: after.records.require(SAMPLES, day).events for day in DAYS} == {
        **events,
        DAYS[1]: events[DAYS[1]] + 1,
    }
    online = OnlineReader(store_settings(after))
    assert online.sequences("visitor")["watched"].ts.tolist() == late["ts"].to_list()
    assert online.encoded_user("visitor", online_record(after).close or 0)[0]
    DeltaTable(config.table("watches").uri).delete("event_id = 'late'")
    after = rebuilt(config)
    assert {day: after.records.require(SAMPLES, day).events for day in DAYS} == events
    assert online.sequences("visitor")["watched"].ts.tolist() == []
    assert not online.encoded_user("visitor", online_record(after).close or 0)[0]


def test_retraining_after_late_rows_rebuilds_but_trains_nothing_and_the_running_service_takes_the_champion_over(
    config: Config,
) -> None:
    """After the tests before: what was changed and changed back is another log; version 2 is served, 1 is champion."""
    assert "challenger" in pending(Workspace(config, Progress(), DAYS[2]))
    before = Workspace(config, Progress()).registry.versions()
    late = pl.DataFrame(config.table("watches").scan([DAYS[0]]).head(1).collect())
    late.with_columns(event_id=pl.lit("later")).write_delta(config.table("watches").uri, mode="append")
    command = [sys.executable, "-c", "from pipeline.cli import main; main()"]
    path = config.local_path().parent / "config.yaml"
    done = subprocess.run([*command, "retrain", "--config", path], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"Nothing to train: what is known up to {DAYS[2]}, the newest closed partition, is trained on" in done.stdout
    assert done.stderr.index("✓ feature_store") < done.stderr.index("✓ deployment")
    assert "the running service takes version 1 over" in done.stderr
    assert "✓ deployment     version 1 at http" in done.stderr
    with RankingClient(
        endpoint_url(config.serving.host, config.serving.port), token=config.serving.own_token
    ) as client:
        assert client.model()["model_version"] == before[-1].tags["content"]
        # what gives other scores than it was published with never goes live: the champion is the one before, again
        lying = config.local_path("models", "lying")
        shutil.copytree(before[0].artifact, lying)
        document = json.loads((lying / "selfcheck.json").read_text())
        document["scores"][0][0] += 0.5
        text = json.dumps(document)
        sums = (lying / "SHA256SUMS").read_text().splitlines()
        digest = hashlib.sha256(text.encode()).hexdigest()
        (lying / "selfcheck.json").write_text(text)
        (lying / "SHA256SUMS").write_text(
            "".join(f"{digest}  selfcheck.json\n" if "selfcheck" in line else f"{line}\n" for line in sums)
        )
        registry = Workspace(config, Progress()).registry
        run_id = registry.client.get_model_version(config.name, str(before[0].number)).run_id
        tags = {
            "partition": DAYS[2],
            "trained": DAYS[2],
            "content": "lying",
            "evaluation": before[0].tags["evaluation"],
        }
        number = registry.register(str(lying), run_id, tags).number
        done = subprocess.run(
            [*command, "models", "promote", str(number), "--config", path], capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 1
        assert "self-check requests differ by 5.00e-01" in done.stderr
        assert "Version 1 is champion again" in done.stderr
        champion = registry.champion()
        assert champion is not None
        assert champion.number == 1
        assert "self-check" in registry.version(number).tags["failed live"]
        assert client.model()["model_version"] == before[-1].tags["content"]
        registry.client.delete_model_version(config.name, str(number))
    after = Workspace(config, Progress(), DAYS[2])
    assert pending(after, training=False) == []
    assert [one.number for one in after.registry.versions()] == [one.number for one in before]
    assert not DEPLOYMENT.stale(after)
    # the store is ahead of a model whose labels came late: its answers are compared with what the store was filled from
    assert make(DEPLOYMENT, Workspace(config, Progress(), DAYS[0])).verified["requests"] > 0
    stop()


def rebuilt(config: Config) -> Workspace:
    """What changed is validated, built and online again."""
    workspace = Workspace(config, Progress(), DAYS[2])
    VALIDATED.run(workspace, VALIDATED.stale(workspace))
    SAMPLES.run(workspace, SAMPLES.stale(workspace))
    FEATURE_STORE.run(workspace, FEATURE_STORE.stale(workspace))
    assert not {"validated", "samples", "feature_store"} & set(pending(workspace))
    return workspace


def test_a_corrected_profile_rebuilds_and_a_later_snapshot_does_not(config: Config, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(Path(config.table("users").uri).parent, data)
    moved = load(tmp_path, data)
    before = SAMPLES.inputs(Workspace(moved, Progress()))
    users = moved.table("users")
    close = Workspace(moved, Progress()).log.bounds(DAYS[2])[1]
    later = users.scan().head(1).collect().with_columns(updated_at=pl.lit(close))
    later.write_delta(users.uri, mode="append")
    assert SAMPLES.inputs(Workspace(moved, Progress())) == before
    corrected = users.scan().collect().with_columns(pl.col("age") + 1)
    corrected.write_delta(users.uri, mode="overwrite")
    assert all(now != before[day] for day, now in SAMPLES.inputs(Workspace(moved, Progress())).items())


def test_a_rejected_first_challenger_is_registered_but_not_served(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(Path(config.table("users").uri).parent, tmp_path / "data")
    shutil.copytree(config.local_path(), tmp_path / "work")
    strict = load(tmp_path, tmp_path / "data", evaluation=LENIENT | {"min_gain_over_baseline": 0.9})
    shutil.rmtree(strict.local_path("mlflow"))
    for stage in (CHAMPION, DEPLOYMENT):  # of which the versions would be registered again
        shutil.rmtree(strict.local_path("records", stage.name))
    workspace = Workspace(strict, Progress(), DAYS[0])
    VALIDATED.run(workspace, [DAYS[0]])
    SAMPLES.run(workspace, [DAYS[0]])
    make(CHALLENGER, workspace)
    assert not make(EVALUATION, workspace).passed
    assert make(REFIT, workspace).why == "not refitted: it did not pass its gate"
    with pytest.raises(CorankError, match=r"not promoted.*no champion to serve"):
        make(CHAMPION, workspace)
    (refused,) = workspace.registry.versions()
    assert refused.aliases == ()
    verdict = workspace.records.require(EVALUATION, refused.tags["evaluation"])
    assert verdict.reasons == [one.reason for one in verdict.criteria if one.passed is False]
    assert gate_text(refused, verdict) == f"failed: {verdict.reasons[0]}"
    page = write_report(workspace, refused.tags["evaluation"]).read_text()
    assert "<td>click AUC, gain over the baseline</td>" in page
    registry = workspace.registry
    other = registry.register(refused.artifact, registry.log_run("run", "other", {}, {}, [], refused.artifact), {})
    registry.promote(other.number)
    forced = registry.promote_by_hand(refused.number)
    assert forced.aliases == ("champion",)
    assert f" in place of version {other.number}, failed: click AUC" in forced.tags[PROMOTED_BY_HAND]
    assert gate_text(forced, verdict).endswith(forced.tags[PROMOTED_BY_HAND])
    passed = registry.judged(refused.number, "another", [])
    assert gate_text(passed, replace(verdict, passed=True)).startswith("passed; promoted by hand ")
    # each version is listed with its own verdict, whatever was judged later
    workspace.records.write(EVALUATION, "another", replace(verdict, passed=True))
    later = registry.register(refused.artifact, registry.log_run("run", "later", {}, {}, [], refused.artifact), {})
    registry.judged(later.number, "another", [])
    registry.judged(refused.number, refused.tags["evaluation"], verdict.reasons)
    capsys.readouterr()
    print_models(workspace)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ ")]
    assert "passed" in next(line for line in lines if line.startswith(f"│ {later.number} "))
    assert "failed" in next(line for line in lines if line.startswith(f"│ {refused.number} "))


def test_a_hyformer_goes_through_the_same_dag(config: Config, tmp_path: Path) -> None:
    """Trained, judged and read back from its artifact; an encoding per request, several sequences."""
    shutil.copytree(Path(config.table("users").uri).parent, tmp_path / "data")
    shutil.copytree(config.local_path(), tmp_path / "work")
    model = {"name": "hyformer", "layers": 1, "encoding": "longer", "short_length": 10, "queries": 2, "tokens": 16}
    # no refit moves its predictions so little: the judged model goes live
    moved = load(tmp_path, tmp_path / "data", model=model, evaluation={**LENIENT, "refit_bound": 1e-9})
    workspace = Workspace(moved, Progress(), DAYS[1])
    VALIDATED.run(workspace, VALIDATED.stale(workspace))
    SAMPLES.run(workspace, SAMPLES.stale(workspace))
    make(CHALLENGER, workspace)
    evaluation = make(EVALUATION, workspace)
    assert evaluation.passed, evaluation
    kept = make(REFIT, workspace)
    assert (kept.refitted, kept.version) == (False, evaluation.model)
    assert "more than evaluation.refit_bound 1e-09" in kept.why
    assert kept.predictions["click"][0] != kept.predictions["click"][1]
    promoted = make(CHAMPION, workspace)
    champion = workspace.registry.champion()
    assert champion is not None, promoted
    artifact = load_artifact(champion.artifact)
    assert artifact.model.describe()["name"] == "hyformer"
    assert artifact.model.describe()["queries"] == 2
    assert artifact.metadata["selfcheck"]["scores"]
    other = load(tmp_path, tmp_path / "data")
    with pytest.raises(CorankError, match=r"whose model or sizes differ from the config's `model:`"):
        make(CHALLENGER, Workspace(other, Progress(), DAYS[1], warm_start=True))
