"""The stages of the DAG, from a log partition to a verified deployment.

    log_partition → validated → samples → feature_store → candidate → evaluation → champion → deployment

Each stage is up to date when its record carries the digest of what it would be made from now; then it does
nothing. Each writes its record last, so a killed run continues where it stopped and ends the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.errors import ConfigError, CorankError, DataGateError
from features.records import Records, digest
from pipeline.config import Config, EvaluationConfig
from pipeline.log import Log, close_text
from pipeline.progress import Progress
from pipeline.runtime import ensure_ray, quiet
from pipeline.version import code_version

if TYPE_CHECKING:
    from features.reader import SampleSource
    from features.states import BuildSettings
    from features.store.online import FeatureStoreSettings
    from pipeline.registry import ModelRegistry, ModelVersion
    from serving.ranking import ServingSettings

DATA_SECTIONS = ("tables", "features", "sequences", "tasks", "grain")
"""Config sections that decide what a partition's rows mean."""

MODEL_SECTIONS = ("features", "sequences", "tasks", "model", "training", "split")
FOREVER = 2**62
SHOWN_FINDINGS = 20


@dataclass(frozen=True)
class Cuts:
    """Chronological split by request ts: train < validation ≤ … < test ≤ …, microseconds UTC."""

    train: int
    validation: int
    test: int


class Pipeline:
    """The stages of one config.

    Args:
        until: use the log up to this partition; default: the newest closed one.
        warm_start: begin training with the champion, on what came after its own training.
    """

    def __init__(self, config: Config, progress: Progress, until: str | None = None, warm_start: bool = False) -> None:
        self.config, self.progress = config, progress
        self.until, self.warm_start = until, warm_start
        self.records = Records(config.path("records"))

    # --- what there is ------------------------------------------------------------------------------

    @cached_property
    def log(self) -> Log:
        return Log(self.config, self.records, self.until)

    @property
    def partitions(self) -> list[str]:
        return self.log.partitions

    @property
    def trainable(self) -> list[str]:
        """The kept partitions whose labels are all known."""
        return [partition for partition in self.kept if self.log.is_attributed(partition)]

    @property
    def kept(self) -> list[str]:
        """The partitions but for those whose samples retention dropped (pipeline/maintenance.py).

        A retired partition keeps its record, so that it counts as built and nothing rebuilds it.
        """
        records = {partition: self.records.get("samples", partition) or {} for partition in self.partitions}
        return [partition for partition, record in records.items() if not record.get("retired")]

    @cached_property
    def registry(self) -> ModelRegistry:
        from pipeline.registry import ModelRegistry

        return ModelRegistry(self.config)

    @cached_property
    def state_inputs(self) -> dict[str, str]:
        """Per partition the digest of all that its states are made from, the partition before included."""
        settings = self.config.digest_of(
            *DATA_SECTIONS, "buckets", "log_delay_seconds", "aggregates_delay_seconds", "start"
        )
        chain: dict[str, str] = {}
        previous = ""
        for partition in self.partitions:
            previous = digest([settings, self.log.fingerprint(partition), previous])
            chain[partition] = previous
        return chain

    @cached_property
    def sample_inputs(self) -> dict[str, str]:
        """Per partition the digest of all that its samples are made from: its states, and labels that came later."""
        return {one: digest([inputs, self.log.labels(one)]) for one, inputs in self.state_inputs.items()}

    def validation_inputs(self, partition: str) -> str:
        settings = self.config.digest_of(*DATA_SECTIONS, "validation")
        return digest([settings, self.log.fingerprint(partition)])

    @property
    def candidate_key(self) -> str:
        """Names the candidate: the newest samples and everything that shapes training. The same for a run
        and a retraining, so that one finds the other's work done."""
        settings = [self.config.digest_of(*MODEL_SECTIONS), self.config.gate_task]
        # retired partitions too: dropping old samples makes no other candidate
        known = [self.sample_inputs[partition] for partition in self.partitions if self.log.is_attributed(partition)]
        return digest([known, settings])

    @property
    def evaluation_key(self) -> str:
        """Names the verdict on the candidate: other limits of the gate judge again without training again."""
        return digest([self.candidate_key, self.config.digest_of("evaluation")])

    def store_inputs(self) -> dict[str, str]:
        """Per partition what the online store should hold."""
        settings = self.config.digest_of("feast", "features", "sequences")
        return {partition: digest([inputs, settings]) for partition, inputs in self.state_inputs.items()}

    # --- what is left to do -------------------------------------------------------------------------

    def stale_validation(self) -> list[str]:
        stale = []
        for partition in self.partitions:
            record = self.records.get("validated", partition)
            if not record or record["inputs"] != self.validation_inputs(partition) or not record["passed"]:
                stale.append(partition)
        return stale

    def stale_samples(self) -> list[str]:
        """The partitions whose inputs changed: all after the first whose rows did, or those whose labels arrived."""
        records = {partition: self.records.get("samples", partition) or {} for partition in self.partitions}
        return [one for one, record in records.items() if record.get("inputs") != self.sample_inputs[one]]

    def stale_store(self) -> list[str]:
        stored = (self.records.get("feature_store", "online") or {}).get("partitions", {})
        wanted = self.store_inputs()
        for index, partition in enumerate(self.partitions):
            if stored.get(partition) != wanted[partition]:
                return self.partitions[index:]
        return []

    def pending(self) -> list[str]:
        """Names of the stages that have work, in order; empty when everything is up to date."""
        checks = {
            "validated": bool(self.stale_validation()),
            "samples": bool(self.stale_samples()),
            "feature_store": bool(self.stale_store()),
            "candidate": not self.has_candidate(self.candidate_key),
            "evaluation": self.records.get("evaluation", self.evaluation_key) is None,
            "champion": self.records.get("champion", self.evaluation_key) is None,
        }
        stages = [stage for stage, stale in checks.items() if stale]
        changed = "champion" in stages or "feature_store" in stages or not self.is_deployed()
        return [*stages, "deployment"] if changed else stages

    def has_candidate(self, key: str) -> bool:
        record = self.records.get("candidate", key)
        return record is not None and Path(record["artifact"], "SHA256SUMS").is_file()

    def is_deployed(self) -> bool:
        champion = self.registry.champion()
        record = self.records.get("deployment", "current")
        return champion is not None and record is not None and record["inputs"] == self.deployment_inputs(champion)

    def deployment_inputs(self, champion: ModelVersion) -> str:
        return digest(
            [champion.number, champion.artifact, self.config.digest_of("serving", "feast", "log_delay_seconds")]
        )

    # --- stages -------------------------------------------------------------------------------------

    def validate(self, partitions: Sequence[str]) -> list[dict[str, Any]]:
        """Great Expectations gate. Every verdict is recorded.

        Raises:
            DataGateError: a partition did not pass; every finding is named.
        """
        from features.validation import validate_partitions

        config = self.config
        tables = {role: config.table(role) for role in config.tables}
        self._require_no_gaps()
        with self.progress.stage("validated") as stage:
            done = 0

            def said(result: Any) -> None:
                nonlocal done
                done += 1
                stage.say(f"{done}/{len(partitions)} partitions, now {result.partition}")

            results, docs = validate_partitions(
                tables,
                config.schema_,
                list(partitions),
                config.grain,
                config.validation,
                config.local_path("great_expectations"),
                config.path("quarantine"),
                self.log.now,
                said,
            )
            stored = []
            for result in results:
                record = {
                    "inputs": self.validation_inputs(result.partition),
                    "passed": result.passed,
                    "rows": result.rows,
                    "quarantined": result.quarantined,
                    "checks": result.checks,
                    "findings": [asdict(finding) for finding in result.findings],
                    "data_docs": str(docs),
                    "fingerprint": self.log.fingerprint(result.partition),
                    "code": code_version(),
                }
                self.records.put("validated", result.partition, record)
                stored.append(record)
            failed = [result for result in results if not result.passed]
            rows = sum(result.rows.get("impressions", 0) for result in results)
            quarantined = sum(result.quarantined for result in results)
            stage.say(
                f"{len(results) - len(failed)} of {len(results)} partitions pass "
                f"{sum(result.checks for result in results):,} checks; "
                f"{rows:,} impressions, {quarantined:,} quarantined"
            )
        if failed:
            messages = list(dict.fromkeys(finding.message for result in failed for finding in result.failures))
            raise DataGateError(
                _listed(f"{len(failed)} of {len(results)} partitions failed validation", messages)
                + f"\nData Docs: {docs}"
            )
        self.log.keep_types(self.records)
        return stored

    def build_samples(self, partitions: Sequence[str]) -> dict[str, Any]:
        """Fold partitions into timelines and write their rows.

        Raises:
            CorankError: a partition has no passing validation record.
        """
        from features.samples import build_partitions

        self._require_validated()
        config = self.config
        with self.progress.stage("samples") as stage:
            stage.say("starting Ray")
            ensure_ray(config.ray)
            settings = self.build_settings()
            stage.say(f"{len(partitions)} partitions, {config.buckets} buckets")
            shown = {partition: self._record("validated", partition)["rows"]["impressions"] for partition in partitions}
            counts = {}
            for consecutive in self._runs(partitions):
                earlier = self.partitions[: self.partitions.index(consecutive[0])]
                counts |= build_partitions(
                    settings, consecutive, earlier, shown, lambda what, done, total: stage.say(f"{done}/{total} {what}")
                )
            for partition in partitions:
                self.records.put(
                    "samples",
                    partition,
                    {
                        "inputs": self.sample_inputs[partition],
                        "fingerprint": self.log.fingerprint(partition),
                        "code": code_version(),
                        **asdict(counts[partition]),
                    },
                )
            total = {
                name: sum(getattr(count, name) for count in counts.values())
                for name in ("impressions", "quarantined", "candidates", "requests", "users", "timeline_events")
            }
            stage.say(
                f"{len(partitions)} partitions: {total['impressions']:,} impressions in = "
                f"{total['candidates']:,} candidates + {total['quarantined']:,} quarantined; "
                f"{total['requests']:,} requests, {total['users']:,} timelines"
            )
        return total

    def _runs(self, partitions: Sequence[str]) -> list[list[str]]:
        """The partitions in runs of consecutive ones."""
        runs: list[list[str]] = []
        for partition in partitions:
            index = self.partitions.index(partition)
            if runs and index and self.partitions[index - 1] == runs[-1][-1]:
                runs[-1].append(partition)
            else:
                runs.append([partition])
        return runs

    def fill_store(self, partitions: Sequence[str]) -> dict[str, int]:
        """Feast apply and materialise these partitions into the online store.

        Raises:
            ConfigError: the store holds later partitions: going back would leave old and new values side by side.
        """
        from features.store.online import apply, materialize

        stored = (self.records.get("feature_store", "online") or {}).get("partitions", {})
        if stored and max(stored) > partitions[-1]:
            raise ConfigError(
                f"--until {partitions[-1]}: the online store already holds partitions up to {max(stored)} and cannot "
                "go back; fill it without --until"
            )
        with self.progress.stage("feature_store") as stage:
            stage.say("registering features")
            settings = self.store_settings()
            apply(settings)
            first = self.partitions.index(partitions[0]) == 0
            start = 0 if first else self.log.bounds(partitions[0])[0]
            # counts become known some time after the close, by then or by now
            end = max(
                close := self.log.bounds(partitions[-1])[1], min(close + self.config.aggregates_delay, self.log.now)
            )
            rows = materialize(settings, start, end, lambda view, done: stage.say(f"{view}: {done:,} rows"))
            self.records.put(
                "feature_store",
                "online",
                {
                    "partitions": {p: inputs for p, inputs in self.store_inputs().items() if p <= partitions[-1]},
                    "close": end,
                    "rows": rows,
                    **self.lineage(),
                },
            )
            written = ", ".join(f"{count:,} {view}" for view, count in rows.items())
            stage.say(f"{written} up to {close_text(end)}")
        return rows

    def train_candidate(self) -> dict[str, Any]:
        """Train on all partitions, or from the champion on what came after its training."""
        from models.artifact import save_artifact
        from pipeline.selfcheck import selfcheck_document
        from pipeline.training import TrainingJob, number_statistics, train

        self._require_validated()
        config, key = self.config, self.candidate_key
        with self.progress.stage("candidate") as stage:
            stage.say("preparing")
            ensure_ray(config.ray)
            cuts = self.cuts()
            champion = self.registry.champion() if self.warm_start else None
            weights, low, statistics = None, cuts.train, None
            if champion is not None:
                from models.artifact import load_artifact
                from models.profile import on_meta

                artifact = load_artifact(champion.artifact)
                if artifact.schema != config.schema_:
                    raise CorankError(
                        f"retraining starts from model version {champion.number}, whose features differ from the "
                        "config's; train from scratch with `corank run`"
                    )
                own = on_meta(config.schema_, config.model.name, config.model.preset, **config.model.overrides)
                same = [model.describe() | {"dropout": None} for model in (artifact.model, own)]
                if same[0] != same[1]:
                    raise CorankError(
                        f"retraining starts from model version {champion.number}, whose model or sizes differ from "
                        "the config's `model:`; train from scratch with `corank run`"
                    )
                weights, statistics = artifact.model.state_dict(), {}
                low = int(artifact.metadata["lineage"]["cuts"]["validation"])
            train_source = self.source(low, cuts.validation)
            job = TrainingJob(
                name=f"{config.name}-{key[:12]}" + (f"-from-{champion.number}" if champion else ""),
                schema=config.schema_,
                model=config.model,
                training=config.training,
                train=train_source,
                validation=self.source(cuts.validation, cuts.test),
                statistics=number_statistics(train_source) if statistics is None else statistics,
                gate_task=config.gate_task,
                warm_start=weights,
            )

            def said(report: Any) -> None:
                score = report.get(f"{config.gate_task}_auc")
                metric = f", validation AUC {score:.4f}" if score is not None else ""
                stage.say(
                    f"epoch {report['epoch']}/{config.training.epochs}, {report['candidates']:,} candidates{metric}"
                )

            result = train(job, config.path("checkpoints"), said, elastic=config.ray.address is not None)
            lineage = {
                "pipeline": config.name,
                # those whose samples it was made from: retention keeps them while the model is live
                "partitions": {
                    partition: self.sample_inputs[partition]
                    for partition in self.trainable
                    if self.log.bounds(partition)[1] > low
                },
                **self.lineage(),
                "cuts": asdict(cuts),
                "trained_from": low,
                "warm_start": champion.number if champion else None,
                "seed": config.training.seed,
                "checkpoint": f"{config.path('checkpoints')}/{job.name}",
            }
            directory = config.local_path("models", job.name)
            version = save_artifact(
                directory,
                result.model,
                {
                    "lineage": lineage,
                    "metrics": {"validation": result.history},
                    "selfcheck": selfcheck_document(result.model, self.source(cuts.test, FOREVER)),
                },
            )
            record = {"artifact": str(directory), "version": version, "history": result.history, **lineage}
            self.records.put("candidate", key, record)
            best = max(result.history, key=lambda entry: entry.get(f"{config.gate_task}_auc", 0.0))
            stage.say(
                f"model {version}, {len(result.history)} epochs of {best['candidates']:,} candidates, "
                f"best validation AUC {best.get(f'{config.gate_task}_auc', float('nan')):.4f} in epoch {best['epoch']}"
            )
        return record

    def evaluate(self) -> dict[str, Any]:
        """Judge the candidate on the held-out newest requests, beside the baseline and the champion."""
        from models.artifact import load_artifact
        from pipeline.evaluation import baseline, report, score_source
        from pipeline.report import write_report

        config, key = self.config, self.candidate_key
        candidate = self._record("candidate", key)
        cuts = Cuts(**candidate["cuts"])
        with self.progress.stage("evaluation") as stage:
            stage.say("scoring held-out requests")
            ensure_ray(config.ray)
            test, options = self.source(cuts.test, FOREVER), config.training
            budget = (4 * options.batch_candidates, 4 * options.batch_events)
            scored = score_source(candidate["artifact"], test, *budget)
            champion = self.registry.champion()
            rival = None
            if champion is not None and champion.artifact != candidate["artifact"]:
                if load_artifact(champion.artifact).schema == config.schema_:
                    stage.say(f"scoring champion version {champion.number}")
                    rival = score_source(champion.artifact, test, *budget)
                else:
                    self.progress.note(f"champion version {champion.number} reads other features: not compared")
            stage.say("fitting the baseline")
            everything = self.source(0, FOREVER)
            baselines = {
                task.name: baseline(everything, task, cuts.test, config.log_delay) for task in config.schema_.tasks
            }
            reports = report(config.schema_, scored, baselines, rival, config.evaluation.resamples)
            gate = reports[config.gate_task]
            against = (champion.number, gate.champion_gain[0]) if champion and gate.champion_gain else None
            reasons = gate_reasons(config.evaluation, gate.gain[0], against)
            record = {
                "model": candidate["version"],
                "tasks": {name: entry.as_dict() for name, entry in reports.items()},
                "impressions": len(scored.scores),
                "passed": not reasons,
                "reasons": reasons,
                "champion": champion.number if rival is not None and champion else None,
                **self.lineage(),
            }
            record["report"] = write_report(config.local_path("reports"), config, candidate, record)
            self.records.put("evaluation", self.evaluation_key, record)
            low, high = gate.gain[1:]
            stage.say(
                f"{len(scored.scores):,} impressions: {config.gate_task} AUC {gate.metrics.auc:.4f} against "
                f"{gate.baseline.auc:.4f} of the baseline "
                f"(difference {gate.gain[0]:+.4f}, 95 % {low:+.4f} … {high:+.4f})"
            )
        return record

    def promote(self) -> dict[str, Any]:
        """Register the candidate in MLflow; it becomes champion when it passed the gate.

        Raises:
            CorankError: it did not pass and there is no champion to keep.
        """
        key = self.candidate_key
        candidate, evaluation = self._record("candidate", key), self._record("evaluation", self.evaluation_key)
        with self.progress.stage("champion") as stage:
            stage.say("registering in MLflow")
            registry = self.registry
            metrics = {
                f"test/{task}_{name}": value
                for task, entry in evaluation["tasks"].items()
                for name, value in entry.items()
                if isinstance(value, float)
            }
            known = [v for v in registry.versions() if v.tags.get("content") == candidate["version"]]
            if known:
                version = known[0]
            else:
                flat = {
                    f"{section}.{name}": value
                    for section in ("model", "training", "split")
                    for name, value in self.config.model_dump(mode="json")[section].items()
                }
                run = registry.log_run(
                    f"{self.config.name}-{candidate['version']}",
                    candidate["version"],
                    {**flat, "partitions": f"{self.partitions[0]} … {self.partitions[-1]}", "code": candidate["code"]},
                    metrics,
                    candidate["history"],
                    candidate["artifact"],
                )
                tags = {
                    "content": candidate["version"],
                    "evaluation": self.evaluation_key,
                    "partition": self.partitions[-1],
                }
                version = registry.register(candidate["artifact"], run, tags)
            if evaluation["passed"]:
                registry.promote(version.number)
                outcome = f"version {version.number} is champion"
            else:
                outcome = f"version {version.number} not promoted: " + "; ".join(evaluation["reasons"])
            record = {
                "number": version.number,
                "model": candidate["version"],
                "promoted": evaluation["passed"],
                "outcome": outcome,
                **self.lineage(),
            }
            self.records.put("champion", self.evaluation_key, record)
            stage.say(outcome)
        if registry.champion() is None:
            raise CorankError(
                f"model {outcome}, and there is no champion to serve. See the report {evaluation['report']}; "
                "change the config or the gate (`evaluation`), then run again."
            )
        return record

    def deploy(self) -> dict[str, Any]:
        """Start the endpoint with the champion, verify its answers over HTTP, and record the version.

        Raises:
            CorankError: it does not start, or its scores differ from the offline scores.
        """
        from models.artifact import load_artifact
        from pipeline.verification import verify_endpoint
        from serving.deploy import start

        quiet()
        champion = self.registry.champion()
        if champion is None:
            raise CorankError("there is no champion to deploy; `corank run` trains one")
        config = self.config
        if load_artifact(champion.artifact).schema != config.schema_:
            raise CorankError(
                f"champion version {champion.number} reads other features than the config declares, so it cannot be "
                "served with them; promote a version of these features (`corank models list`) or restore the config"
            )
        with self.progress.stage("deployment") as stage:
            stage.say(f"starting Ray Serve with model version {champion.number}")
            ensure_ray(config.ray)
            url = start(self.serving_settings(champion), config.serving.host, config.serving.port)
            stage.say("comparing its answers with offline scores")
            stored = self._record("feature_store", "online")
            built = [partition for partition in self.partitions if partition in stored["partitions"]]
            verified = verify_endpoint(url, champion.artifact, self.build_settings(), built, int(stored["close"]))
            record = {
                "inputs": self.deployment_inputs(champion),
                "number": champion.number,
                "model": champion.tags.get("content", ""),
                "artifact": champion.artifact,
                "url": url,
                "verified": verified,
                **self.lineage(),
            }
            self.records.put("deployment", "current", record)
            stage.say(
                f"version {champion.number} at {url}, {verified['requests']} requests over HTTP equal offline scores "
                f"within {verified['largest_difference']:.1e}"
            )
        return record

    def lineage(self) -> dict[str, Any]:
        """What every record of a whole log carries: fingerprints, config and code."""
        return {
            "fingerprints": {partition: self.log.fingerprint(partition) for partition in self.partitions},
            "config": self.config.digest_of(*type(self.config).model_fields),
            "code": code_version(),
        }

    # --- parts that stages share --------------------------------------------------------------------

    def cuts(self) -> Cuts:
        """Cuts in request ts from the counts in the records; reads only the partitions that hold a cut."""
        counts = {partition: self._record("samples", partition)["requests"] for partition in self.trainable}
        if not counts:
            known = self.log.bounds(self.partitions[0])[1] + self.config.schema_.attribution_window
            raise CorankError(
                f"no partition can be trained on yet: the attribution window of {self.partitions[0]} ends at "
                f"{close_text(known)}"
            )
        total = sum(counts.values())
        split = self.config.split
        test_rank = total - round(total * split.test)
        validation_rank = test_rank - round(total * split.validation)
        if validation_rank < 1 or test_rank >= total or test_rank == validation_rank:
            raise CorankError(
                f"{total:,} requests are too few for split.test {split.test} and split.validation {split.validation}; "
                "import more partitions or widen the split"
            )
        return Cuts(
            train=self.log.bounds(next(iter(counts)))[0],
            validation=self._request_ts(counts, validation_rank),
            test=self._request_ts(counts, test_rank),
        )

    def _request_ts(self, counts: dict[str, int], rank: int) -> int:
        """ts of the request of this rank (from 0) in time order."""
        from features.batch import request_times

        for partition, count in counts.items():
            if rank < count:
                source = self.source(0, FOREVER, (partition,))
                times = sorted(ts for file in source.files() for ts in request_times(source.read(file)))
                return int(times[rank])
            rank -= count
        raise AssertionError("rank beyond the counted requests")

    def source(self, low: int, high: int, partitions: tuple[str, ...] | None = None) -> SampleSource:
        """Samples of requests with low ≤ ts < high, out of the partitions that can hold them."""
        from features.reader import SampleSource

        chosen = partitions or tuple(
            partition
            for partition in self.trainable
            if self.log.bounds(partition)[1] > low and self.log.bounds(partition)[0] < high
        )
        return SampleSource(self.config.path("tables", "samples"), self.config.schema_, chosen, low, high)

    def store_close(self) -> int | None:
        """Up to when the online store knows the log, microseconds UTC; None while it is empty."""
        record = self.records.get("feature_store", "online")
        return int(record["close"]) if record else None

    def build_settings(self) -> BuildSettings:
        from features.states import BuildSettings

        config = self.config
        return BuildSettings(
            tables={role: config.table(role) for role in config.tables},
            schema=config.schema_,
            grain=config.grain,
            buckets=config.buckets,
            log_delay=config.log_delay,
            root=config.path("tables"),
            now=self.log.now,
            aggregates_delay=config.aggregates_delay,
        )

    def store_settings(self) -> FeatureStoreSettings:
        from features.lake import Table
        from features.store.online import FeatureStoreSettings

        config = self.config
        return FeatureStoreSettings(
            project=config.name,
            registry=str(config.local_path("feast", "registry.db")),
            schema=config.schema_,
            users=config.table("users"),
            items=config.table("items"),
            state_uri=config.path("tables", "state"),
            user_aggregates=Table("user_aggregates", config.path("tables", "user_aggregates")),
            item_aggregates=Table("item_aggregates", config.path("tables", "item_aggregates")),
            online=config.feast.online,
            sqlite_path=str(config.local_path("feast", "online.db")),
            redis=config.feast.redis,
        )

    def serving_settings(self, champion: ModelVersion) -> ServingSettings:
        from serving.ranking import ServingSettings

        options = self.config.serving
        return ServingSettings(
            artifact=champion.artifact,
            store=self.store_settings(),
            log_delay=self.config.log_delay,
            max_candidates=options.max_candidates,
            ranker_replicas=options.ranker_replicas,
            service_replicas=options.service_replicas,
            max_batch_requests=options.max_batch_requests,
            batch_wait_ms=options.batch_wait_ms,
            max_ongoing_requests=options.max_ongoing_requests,
            max_queued_requests=options.max_queued_requests,
        )

    def _require_no_gaps(self) -> None:
        gaps = [] if self.config.validation.allow_gaps else self.log.gaps()
        if gaps:
            empty = [f"table impressions, partition {partition}: 0 rows" for partition in gaps]
            raise DataGateError(_listed("the log has empty partitions (validation.allow_gaps accepts them)", empty))

    def _require_validated(self) -> None:
        self._require_no_gaps()
        refused = self.stale_validation()
        if refused:
            raise DataGateError(
                f"partitions without a passing validation record: {', '.join(refused[:SHOWN_FINDINGS])}. "
                "Run `corank validate` to see why."
            )

    def _record(self, stage: str, key: str) -> dict[str, Any]:
        record = self.records.get(stage, key)
        if record is None:
            raise CorankError(f"{stage} has no record for {key}; run `corank run` first")
        return record


def gate_reasons(limits: EvaluationConfig, gain: float, against: tuple[int, float] | None) -> list[str]:
    """Why a candidate is not promoted; empty when it passes. A difference that is no number does not pass.

    Args:
        gain: AUC minus the baseline's.
        against: version of the champion and AUC minus its AUC, or None without one.
    """
    reasons = []
    if not gain >= limits.min_gain_over_baseline:
        reasons.append(f"AUC gain over the baseline {gain:+.4f} is below {limits.min_gain_over_baseline:+.4f}")
    if against is not None and not against[1] >= -limits.max_loss_against_champion:
        reasons.append(
            f"AUC {against[1]:+.4f} against champion version {against[0]} loses more than "
            f"{limits.max_loss_against_champion:.4f}"
        )
    return reasons


def _listed(title: str, messages: Sequence[str]) -> str:
    shown = [f"  {message}" for message in messages[:SHOWN_FINDINGS]]
    if len(messages) > SHOWN_FINDINGS:
        shown.append(f"  … and {len(messages) - SHOWN_FINDINGS} more")
    return title + ":\n" + "\n".join(shown)


@contextmanager
def exclusive(config: Config) -> Iterator[None]:
    """One run per workspace at a time; a lock of a killed run is released by the operating system.

    Raises:
        CorankError: another run is working in this workspace.
    """
    import fcntl

    path = config.local_path("run.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorankError(f"another corank run is working in {path.parent}; wait for it or stop it") from None
        handle.write(str(os.getpid()))
        handle.flush()
        yield
